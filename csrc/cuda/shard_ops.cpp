// The operators of rows whose columns are spread over processes, for CUDA tensors. What is exchanged is float32:
// states [N, kStateFloats, and kSoftmaxFloats for each of a tail and a softmax at temperature 1], sums [N, statistics
// that take them, kSumsFloats].
#include <tuple>

#include "op_job.h"

namespace {

using kldiv::ScalarType;
using kldiv::Tensor;
using kldiv::gpu::Job;
using kldiv::gpu::OnDevice;

// What all processes have said, [shards, N, ...] with `width` numbers a row.
const float* of_shards(const Tensor& tensor, const Tensor& logits, int64_t shards, int64_t width, const char* name) {
    STD_TORCH_CHECK(kldiv::same_device(tensor, logits) && tensor.is_contiguous() &&
                        tensor.scalar_type() == ScalarType::Float && tensor.dim() >= 1 && tensor.size(0) == shards &&
                        tensor.numel() == shards * width,
                    name, " must be a contiguous float32 tensor of ", width, " numbers for each of ", shards,
                    " processes, on the device of logits");
    return static_cast<const float*>(kldiv::address(tensor));
}

int64_t shards_of(const Tensor& states) {
    STD_TORCH_CHECK(states.dim() >= 1 && states.size(0) >= 1, "states must be [processes, N, ...]");
    return states.size(0);
}

// What the launches of the job leave for each other. Given back as the operator returns, while the stream still works
// there: who gets it next comes later on the same stream.
Tensor use_workspace(Job& job, const OnDevice& device, const Tensor& logits) {
    const Tensor workspace = kldiv::new_floats(logits, 1, kldiv::gpu::workspace_floats(job));
    job.workspace = static_cast<float*>(workspace.data_ptr());
    job.stream = device.stream();
    return workspace;
}

Tensor shard_state(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                   std::optional<Tensor> mask, std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                   std::vector<double> parameters, std::vector<std::string> stats, int64_t vocab_size,
                   int64_t first_column) {
    const OnDevice device(logits);
    Job job =
        kldiv::gpu::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    const Tensor states = kldiv::new_floats(logits, job.rows, kldiv::gpu::shard_state_floats(job));
    const Tensor workspace = use_workspace(job, device, logits);
    kldiv::gpu::run_shard_state(job, first_column, static_cast<float*>(states.data_ptr()));
    return states;
}

Tensor shard_sums(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                  std::optional<Tensor> mask, std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                  std::vector<double> parameters, std::vector<std::string> stats, int64_t vocab_size,
                  const Tensor& states) {
    const OnDevice device(logits);
    Job job =
        kldiv::gpu::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    const int64_t shards = shards_of(states), width = job.rows * kldiv::gpu::shard_state_floats(job);
    const Tensor sums = kldiv::new_floats(logits, job.rows, kldiv::gpu::shard_sums_floats(job));
    const Tensor workspace = use_workspace(job, device, logits);
    kldiv::gpu::run_shard_sums(job, of_shards(states, logits, shards, width, "states"), shards,
                               static_cast<float*>(sums.data_ptr()));
    return sums;
}

std::tuple<Tensor, Tensor> shard_finish(const Tensor& logits, std::optional<Tensor> reference,
                                        std::optional<Tensor> labels, std::optional<Tensor> mask,
                                        std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                                        std::vector<double> parameters, std::vector<std::string> stats,
                                        int64_t vocab_size, const Tensor& states, const Tensor& sums,
                                        std::optional<Tensor> picked) {
    const OnDevice device(logits);
    Job job =
        kldiv::gpu::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    const int64_t shards = shards_of(states), width = job.rows * kldiv::gpu::shard_state_floats(job),
                  summed = job.rows * kldiv::gpu::shard_sums_floats(job);
    job.picked =
        kldiv::per_token<float>(picked, logits, 2 * job.rows * job.labels_per_row, ScalarType::Float, "picked");
    STD_TORCH_CHECK(!job.labels || job.picked, "picked must be given with labels");
    const Tensor values = kldiv::new_floats(logits, kldiv::gpu::value_rows(job, job.stat_count), job.rows);
    const Tensor state = kldiv::new_floats(logits, kldiv::gpu::state_rows(job), job.rows);
    job.values = static_cast<float*>(values.data_ptr());
    job.state = static_cast<float*>(state.data_ptr());
    const Tensor workspace = use_workspace(job, device, logits);
    kldiv::gpu::run_shard_finish(job, of_shards(states, logits, shards, width, "states"),
                                 of_shards(sums, logits, shards, summed, "sums"), shards);
    return {values, state};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(KLDIV_LIBRARY, KLDIV_DEVICE_KEY, m) {
    m.impl("shard_state", TORCH_BOX(&shard_state));
    m.impl("shard_sums", TORCH_BOX(&shard_sums));
    m.impl("shard_finish", TORCH_BOX(&shard_finish));
}
