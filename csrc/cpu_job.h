// From the arguments of an operator to a job of the CPU backend.
#pragma once

#include "cpu/rows.h"
#include "op_arguments.h"

namespace kldiv {

static_assert(static_cast<int>(Dtype::float32) == kFloat32 && static_cast<int>(Dtype::bfloat16) == kBfloat16 &&
              static_cast<int>(Dtype::float16) == kFloat16);
inline Dtype dtype_of(const Tensor& tensor, const char* name) { return static_cast<Dtype>(element_of(tensor, name)); }

inline Rows rows_of(const Tensor& tensor, const Tensor& logits, int64_t columns, const char* name) {
    check_rows(tensor, logits, columns, name);
    Rows rows;
    rows.data = static_cast<const char*>(address(tensor));
    rows.dtype = dtype_of(tensor, name);
    for (int64_t i = 0; i < tensor.dim() - 1; ++i) {
        rows.sizes.push_back(tensor.size(i));
        rows.strides.push_back(tensor.stride(i));
    }
    return rows;
}

// The arguments that describe the rows, the same for every operator.
inline Job make_job(const Tensor& logits, const std::optional<Tensor>& reference, const std::optional<Tensor>& labels,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& exclude,
                    const std::optional<Tensor>& token_parameters, const std::vector<double>& parameters,
                    const std::vector<std::string>& stats, int64_t vocab_size) {
    Job job;
    job.kernels = &best_kernels();
    job.columns = vocab_size;
    job.student = rows_of(logits, logits, vocab_size, "logits");
    if (reference) job.teacher = rows_of(*reference, logits, vocab_size, "reference");
    take_tokens(job, logits, labels, mask, exclude, token_parameters);
    take_parameters(parameters, job.parameters);
    for (int64_t i = 0; job.labels && i < job.rows * job.labels_per_row; ++i)
        STD_TORCH_CHECK(job.labels[i] < vocab_size, "labels must be below vocab_size");
    for (const std::string& name : stats) {
        job.stats.push_back(find_statistic(name));
        const Request& request = job.stats.back();
        const bool labelled = request.kind == Kind::logprob || request.kind == Kind::reference_logprob ||
                              request.kind == Kind::tail_logprob;
        STD_TORCH_CHECK(job.labels || !labelled, name, " needs labels");
        const bool two_rows =
            request.kind == Kind::reference_logprob || (request.divergence && request.divergence->needs_p);
        STD_TORCH_CHECK(job.teacher || !two_rows, name, " needs reference");
    }
    job.threads = torch::stable::get_num_threads();
    return job;
}

inline void use_plan(Job& job, const std::vector<std::string>& stats, bool gradient, bool one_read) {
    const CpuPlan plan =
        plan_cpu({job.rows, job.columns, job.student.element_bytes(), job.teacher ? job.teacher.element_bytes() : 0,
                  needs_normalised_sums(stats), gradient, one_read},
                 job.threads);
    job.threads = plan.threads;
    job.split_rows = plan.split_rows;
}

}  // namespace kldiv
