#include "plan.h"

#include <algorithm>
#include <array>

namespace kldiv {

bool needs_normalised_sums(const std::vector<std::string>& stats) {
    static const std::array<const char*, 10> first_sweep = {
        "logprob", "reference_logprob", "logsumexp",  "max_logprob", "argmax",
        "entropy", "reference_entropy", "forward_kl", "reverse_kl",  "hellinger"};
    return std::any_of(stats.begin(), stats.end(), [](const std::string& name) {
        return std::find(first_sweep.begin(), first_sweep.end(), name) == first_sweep.end();
    });
}

CpuPlan plan_cpu(const CpuShape& shape, int64_t threads) {
    CpuPlan plan;
    const int64_t blocks = (shape.columns + kBlock - 1) / kBlock;
    // Whole rows keep a row in one core's cache between its sweeps; below four rows a thread the last ones would leave
    // cores idle.
    plan.split_rows = blocks > 1 && threads > 1 && shape.rows < 4 * threads;
    plan.threads = std::max<int64_t>(1, std::min(threads, plan.split_rows ? shape.rows * blocks : shape.rows));
    plan.sweeps = 1 + shape.normalised_sums + shape.gradient;
    const int64_t read = shape.student_bytes + shape.teacher_bytes;
    const int64_t written = shape.gradient ? shape.student_bytes : 0;
    const bool second_read = shape.gradient && !shape.one_read;
    plan.bytes = shape.rows * shape.columns * (read * (1 + second_read) + written);
    plan.kernel = shape.one_read ? "one-read" : (shape.gradient ? "forward, then backward" : "forward");
    plan.kernel += plan.split_rows ? ", rows split into blocks" : ", a row per thread";
    plan.reason = plan.split_rows
                      ? std::to_string(shape.rows) + " rows are fewer than 4 x " + std::to_string(threads) +
                            " threads, so threads share each row's " + std::to_string(blocks) + " blocks"
                      : (blocks == 1 ? "a row is one block of " + std::to_string(kBlock) + " columns or less"
                                     : std::to_string(shape.rows) + " rows keep " + std::to_string(threads) +
                                           " threads busy; a row stays in its core's cache between sweeps");
    return plan;
}

}  // namespace kldiv
