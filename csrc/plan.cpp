#include "plan.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <stdexcept>

#include "first_sweep.h"

namespace kldiv {
namespace {

using Names = std::vector<std::string>;

bool contains(const Names& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

// 151936 as 151,936.
std::string grouped(int64_t number) {
    std::string digits = std::to_string(number);
    for (int64_t i = static_cast<int64_t>(digits.size()) - 3; i > 0; i -= 3) digits.insert(i, ",");
    return digits;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool needs_normalised_sums(const Names& stats) {
    return std::any_of(stats.begin(), stats.end(), [](const std::string& name) { return !finishes_first(name); });
}

CpuPlan plan_cpu(const CpuShape& shape, int64_t threads) {
    CpuPlan plan;
    const int64_t blocks = divide_up(shape.columns, kBlock);
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

int64_t slice_columns(int64_t columns) {
    int64_t slice = kSliceColumns;
    while (divide_up(columns, slice) > kMostSlices) slice *= 2;
    return slice;
}

int64_t label_bytes(int64_t columns) { return kLabelHeadBytes + slice_columns(columns) / 8; }

int64_t cluster_slice(int64_t columns, int cluster) { return divide_up(divide_up(columns, cluster), 64) * 64; }

int64_t one_read_head_bytes(int cluster) { return kOneReadHead + kOneReadExchange * cluster; }

CudaTarget cuda_target(int capability) {
    // CUDA C++ Programming Guide, technical specifications by compute capability. A capability that is not named there
    // gets the least that its generation has.
    constexpr int64_t large = 232448, middle = 166912, small = 101376;
    switch (capability) {
        case 80:
        case 87:
            return {capability, middle, 1};
        case 90:
        case 100:
        case 103:
            return {capability, large, 16};
        default:
            break;
    }
    if (capability < 80 || capability >= 130)
        throw std::invalid_argument("the cuda backend serves sm_80 to sm_129, not sm_" + std::to_string(capability));
    if (capability < 90) return {capability, small, 1};
    if (capability < 110) return {capability, large, 16};
    return {capability, small, 8};
}

namespace {

// A shorter row is swept by one block faster than a cluster exchanges what its CTAs found. Unmeasured: where the two
// meet is a guess.
constexpr int64_t kShortestOneRead = 8192;
// One row is computed, one loads, one is stored; more stages only even out the delays.
constexpr int kEnoughStages = 3;
// What is done once a row takes a CTA longer there, and no less in a larger cluster: smaller ones leave it more time.
// Unmeasured.
constexpr int kEnoughStagesOfTopK = 2;
constexpr int kClusters[] = {1, 2, 4, 8, 16};

// What KLDIV_CUDA_PLAN asks for; 0: not said.
struct Request {
    std::string text;
    bool two_sweep = false;
    int cluster = 0, stages = 0;

    [[noreturn]] void refuse(const std::string& why) const {
        throw std::invalid_argument("KLDIV_CUDA_PLAN is '" + text + "': " + why);
    }
};

int positive(const std::string& digits, const Request& request) {
    const bool number = !digits.empty() && digits.size() < 6 &&
                        std::all_of(digits.begin(), digits.end(), [](unsigned char c) { return std::isdigit(c); });
    const int value = number ? std::stoi(digits) : 0;
    if (value == 0) request.refuse("'" + digits + "' is no number of at least 1");
    return value;
}

Request requested() {
    Request request;
    const char* text = std::getenv("KLDIV_CUDA_PLAN");
    if (!text || !*text) return request;
    request.text = text;
    if (request.text == "two-sweep") {
        request.two_sweep = true;
        return request;
    }
    for (size_t start = 0; start <= request.text.size();) {
        const size_t end = std::min(request.text.find(',', start), request.text.size());
        const std::string part = request.text.substr(start, end - start);
        const size_t equals = part.find('=');
        const std::string name = part.substr(0, equals);
        int* to = name == "cluster" ? &request.cluster : (name == "stages" ? &request.stages : nullptr);
        if (equals == std::string::npos || !to || *to)
            request.refuse("expected two-sweep, or cluster=C,stages=S with either part left out");
        *to = positive(part.substr(equals + 1), request);
        start = end + 1;
    }
    if (request.cluster &&
        std::find(std::begin(kClusters), std::end(kClusters), request.cluster) == std::end(kClusters))
        request.refuse("expected a cluster of 1, 2, 4, 8 or 16");
    if (request.stages > kMostStages) request.refuse("expected at most " + std::to_string(kMostStages) + " stages");
    return request;
}

std::string name_of(const CudaTarget& target) { return "sm_" + std::to_string(target.capability); }

// Why a call cannot be one-read on any cluster, or nothing.
std::string must_be_two_sweep(const CudaShape& shape, const CudaTarget& target) {
    static const Names labelled_or_sum = {"logprob", "logsumexp"};
    static const Names without_student_gradient = {"reference_logprob", "reference_entropy", "max_logprob", "argmax"};
    // At the ends of their parameter's range they are another divergence, with kernels of its own.
    static const Names with_limits = {"js", "alpha", "skew_kl", "skew_reverse_kl"};
    if (!shape.student_gradient && !shape.teacher_gradient) return "no gradient is asked for";
    if (!shape.known_coefficients) return "the gradient's coefficients are known after the statistics only";
    if (target.capability < 90) return name_of(target) + " has no thread-block clusters (sm_90 and later have)";
    if (shape.teacher_gradient) return "a gradient of reference_logits is asked for";
    if (!shape.same_dtype) return "logits and reference_logits differ in dtype";
    if (shape.columns % kOneReadColumns != 0)
        return grouped(shape.columns) + " columns are not a multiple of " + std::to_string(kOneReadColumns);
    if (!shape.aligned) return "rows of logits do not all start at multiples of 16 bytes";
    if (shape.topk_outcomes > 0) {
        if (shape.float16) return "top-k losses have no one-read kernel for float16";
        if (shape.labels_per_row > kMostLabels)
            return grouped(shape.labels_per_row) + " labels a row; one-read takes " + grouped(kMostLabels);
        return "";
    }
    for (const char* name : {"tail_logprob", "untempered_logprob"})
        if (contains(shape.stats, name)) return std::string(name) + " has no one-read kernel";
    if (shape.labels_per_row != 1) return std::to_string(shape.labels_per_row) + " labels a row";
    int others = 0;
    for (const std::string& name : shape.stats) {
        if (contains(without_student_gradient, name)) return name + " has no gradient of logits";
        if (shape.token_parameters && contains(with_limits, name))
            return name + " with a parameter per token can have a different formula in each row";
        others += !contains(labelled_or_sum, name);
    }
    if (others > 1) return std::to_string(others) + " statistics beside logprob and logsumexp; one-read takes one";
    return "";
}

int64_t slot_bytes(const CudaShape& shape, int cluster) {
    return cluster_slice(shape.columns, cluster) * (shape.student_bytes + shape.teacher_bytes);
}

// Of a CTA beside its slots.
int64_t other_bytes(const CudaShape& shape, int cluster) {
    const int64_t topk = 2 * topk_outcome_bytes(shape.topk_outcomes) +
                         2 * topk_gradient_bytes(shape.labels_per_row, shape.student_bytes);
    return one_read_head_bytes(cluster) + (shape.topk_outcomes > 0 ? topk : 0);
}

// Rows (pairs of rows) that a cluster holds at a time.
int stages_of(const CudaShape& shape, const CudaTarget& target, int cluster) {
    const int64_t room = std::max<int64_t>(0, target.shared_bytes - other_bytes(shape, cluster));
    return static_cast<int>(std::min<int64_t>(kMostStages, room / slot_bytes(shape, cluster)));
}

bool fills_cluster(const CudaShape& shape, int cluster) {
    return (cluster - 1) * cluster_slice(shape.columns, cluster) < shape.columns;
}

std::string rows_of(const CudaShape& shape, int64_t count) {
    const std::string kind = shape.teacher_bytes ? "row pair" : "row";
    return grouped(count) + " " + kind + (count == 1 ? "" : "s") + " of " + grouped(shape.columns) + " columns";
}

// Cluster and stages, both 0 where nothing fits.
struct Choice {
    int cluster = 0, stages = 0;
};

Choice choose(const CudaShape& shape, const CudaTarget& target, const Request& request) {
    if (request.cluster > target.largest_cluster)
        request.refuse(name_of(target) + " has clusters of at most " + std::to_string(target.largest_cluster));
    if (request.cluster && !fills_cluster(shape, request.cluster))
        request.refuse(grouped(shape.columns) + " columns leave a CTA of the cluster without any");
    Choice best;
    const int own = shape.topk_outcomes > 0 ? kEnoughStagesOfTopK : kEnoughStages;
    const int enough = request.stages ? request.stages : own;
    for (const int cluster : kClusters) {
        if (request.cluster ? cluster != request.cluster : cluster > target.largest_cluster) continue;
        if (!fills_cluster(shape, cluster)) continue;
        const int stages = stages_of(shape, target, cluster);
        if (stages > best.stages) best = {cluster, stages};
        if (stages >= enough) break;
    }
    if (best.stages < std::max(1, request.stages) && (request.cluster || request.stages))
        request.refuse(name_of(target) + " has no shared memory for " + rows_of(shape, std::max(1, request.stages)) +
                       " in a cluster of " + (request.cluster ? "" : "at most ") +
                       std::to_string(request.cluster ? request.cluster : target.largest_cluster));
    if (request.stages) best.stages = request.stages;
    return best;
}

CudaPlan two_sweep(const CudaShape& shape, const std::string& why) {
    CudaPlan plan;
    const bool gradient = shape.student_gradient || shape.teacher_gradient;
    plan.kernel = "two-sweep";
    plan.threads = kSweepThreads;
    const bool labels = shape.labels_per_row > 1 || contains(shape.stats, "tail_logprob");
    plan.shared_bytes = kSweepSharedBytes + (labels ? label_bytes(shape.columns) : 0);
    plan.sweeps = 1 + needs_normalised_sums(shape.stats) + gradient;
    const int64_t read = shape.student_bytes + shape.teacher_bytes;
    const int64_t written = shape.student_gradient * shape.student_bytes + shape.teacher_gradient * shape.teacher_bytes;
    plan.bytes = shape.rows * shape.columns * (read * plan.sweeps + written);
    plan.reason = "two-sweep: " + why;
    return plan;
}

}  // namespace

CudaPlan plan_cuda(const CudaShape& shape, const CudaTarget& target) {
    // What the device has refused is not asked for again.
    const Request request = target.refused_clusters ? Request{} : requested();
    const std::string obstacle = must_be_two_sweep(shape, target);
    if (!obstacle.empty()) return two_sweep(shape, obstacle);
    if (request.two_sweep) return two_sweep(shape, "KLDIV_CUDA_PLAN says so");
    const bool chosen = request.cluster || request.stages;
    if (!chosen && shape.columns < kShortestOneRead)
        return two_sweep(
            shape, "a row of " + grouped(shape.columns) + " columns is shorter than " + grouped(kShortestOneRead));
    const Choice choice = choose(shape, target, request);
    if (!choice.cluster)
        return two_sweep(shape, name_of(target) + " has no shared memory for " + rows_of(shape, 1) +
                                    " in a cluster of " + std::to_string(target.largest_cluster));
    CudaPlan plan;
    plan.kernel = "one-read";
    plan.cluster = choice.cluster;
    plan.stages = choice.stages;
    plan.threads = kOneReadThreads;
    plan.shared_bytes = other_bytes(shape, choice.cluster) + choice.stages * slot_bytes(shape, choice.cluster);
    plan.sweeps = 2 + needs_normalised_sums(shape.stats);
    plan.bytes = shape.rows * shape.columns * (2 * shape.student_bytes + shape.teacher_bytes);
    plan.reason = (choice.cluster == 1 ? "1 CTA holds " : std::to_string(choice.cluster) + " CTAs hold ") +
                  rows_of(shape, choice.stages) + ": " + std::to_string(divide_up(plan.shared_bytes, 1024)) +
                  " KiB each" + (chosen ? ", as KLDIV_CUDA_PLAN says" : "");
    return plan;
}

}  // namespace kldiv
