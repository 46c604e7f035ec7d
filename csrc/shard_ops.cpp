// The operators of rows whose columns are spread over processes, on CPUs.
#include "cpu/shards.h"
#include "cpu_job.h"
#include "namespace.h"

namespace {

using kldiv::ScalarType;
using kldiv::Tensor;
using torch::stable::new_empty;

// What all processes have said, [shards, ...] with `width` numbers of a process.
const double* of_shards(const Tensor& tensor, int64_t shards, int64_t width, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Double &&
                        tensor.dim() >= 1 && tensor.size(0) == shards && tensor.numel() == shards * width,
                    name, " must be a contiguous float64 tensor of ", width, " numbers for each of ", shards,
                    " processes");
    return static_cast<const double*>(kldiv::address(tensor));
}

int64_t shards_of(const Tensor& states) {
    STD_TORCH_CHECK(states.dim() >= 1 && states.size(0) >= 1, "states must be [processes, N, ...]");
    return states.size(0);
}

Tensor shard_state(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                   std::optional<Tensor> mask, std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                   std::vector<double> parameters, std::vector<std::string> stats, int64_t vocab_size,
                   int64_t first_column) {
    const kldiv::Job job =
        kldiv::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    const Tensor states = new_empty(logits, {job.rows, kldiv::shard_state(job)}, ScalarType::Double);
    kldiv::run_shard_state(job, first_column, static_cast<double*>(states.data_ptr()));
    return states;
}

Tensor shard_sums(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                  std::optional<Tensor> mask, std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                  std::vector<double> parameters, std::vector<std::string> stats, int64_t vocab_size,
                  const Tensor& states) {
    const kldiv::Job job =
        kldiv::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    const int64_t shards = shards_of(states), count = static_cast<int64_t>(stats.size());
    const Tensor sums = new_empty(logits, {job.rows, count, kldiv::kShardSums}, ScalarType::Double);
    kldiv::run_shard_sums(job, of_shards(states, shards, job.rows * kldiv::shard_state(job), "states"), shards,
                          static_cast<double*>(sums.data_ptr()));
    return sums;
}

std::tuple<Tensor, Tensor> shard_finish(const Tensor& logits, std::optional<Tensor> reference,
                                        std::optional<Tensor> labels, std::optional<Tensor> mask,
                                        std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                                        std::vector<double> parameters, std::vector<std::string> stats,
                                        int64_t vocab_size, const Tensor& states, const Tensor& sums,
                                        std::optional<Tensor> picked) {
    kldiv::Job job =
        kldiv::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    const int64_t shards = shards_of(states), count = static_cast<int64_t>(stats.size());
    const int64_t summed = kldiv::needs_normalised_sums(stats) ? job.rows * count * kldiv::kShardSums : 0;
    job.picked =
        kldiv::per_token<float>(picked, logits, 2 * job.rows * job.labels_per_row, ScalarType::Float, "picked");
    STD_TORCH_CHECK(!job.labels || job.picked, "picked must be given with labels");
    const Tensor values = kldiv::new_floats(logits, job.value_rows(), job.rows);
    const Tensor state = kldiv::new_floats(logits, kldiv::kStateOfRow + kldiv::kStateOfStatistic * count, job.rows);
    job.values = static_cast<float*>(values.data_ptr());
    job.state = static_cast<float*>(state.data_ptr());
    kldiv::run_shard_finish(job, of_shards(states, shards, job.rows * kldiv::shard_state(job), "states"),
                            of_shards(sums, shards, summed, "sums"), shards);
    return {values, state};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(KLDIV_NAMESPACE, CPU, m) {
    m.impl("shard_state", TORCH_BOX(&shard_state));
    m.impl("shard_sums", TORCH_BOX(&shard_sums));
    m.impl("shard_finish", TORCH_BOX(&shard_finish));
}
