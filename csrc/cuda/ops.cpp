// The operators of ops.cpp for CUDA tensors. A C++ compiler without CUDA builds this file.
//
// Under KLDIV_CUDA_HOST it is the library kldiv_cuda_host of tests/cuda_host: the same operators on CPU tensors, above
// a model of the machine.
#include <tuple>
#include <vector>

#include "op_job.h"

#ifdef KLDIV_CUDA_HOST
#define KLDIV_CUDA_ARCHS "host"
#endif

namespace {

using kldiv::ScalarType;
using kldiv::Tensor;
using kldiv::gpu::Job;
using kldiv::gpu::make_job;
using kldiv::gpu::OnDevice;
using torch::stable::new_empty;

Tensor new_gradient(const Tensor& like, kldiv::gpu::Gradient* gradient) {
    const Tensor out = new_empty(like, like.sizes());
    *gradient = {out.data_ptr(), like.size(like.dim() - 1)};
    return out;
}

// The gradient of `logits`, or an empty tensor where it is not wanted or takes their place.
Tensor student_gradient(Job& job, const Tensor& logits, bool wanted, bool in_place) {
    job.in_place = wanted && in_place;
    if (wanted && !in_place) return new_gradient(logits, &job.d_student);
    STD_TORCH_CHECK(!wanted || logits.is_contiguous(), "logits must be contiguous for a gradient in place");
    if (wanted) job.d_student = {logits.data_ptr(), logits.size(logits.dim() - 1)};
    return new_empty(logits, {0});
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // values, state, dlogits, dreference

Outputs run(Job& job, const OnDevice& device, const Tensor& logits, const std::optional<Tensor>& reference,
            const std::optional<Tensor>& coefficients, bool with_state, bool student, bool teacher, bool in_place) {
    teacher = teacher && reference;
    const Tensor values = kldiv::new_floats(logits, kldiv::gpu::value_rows(job, job.stat_count), job.rows);
    Tensor state = kldiv::new_floats(logits, with_state ? kldiv::gpu::state_rows(job) : 0, job.rows);
    const Tensor dlogits = student_gradient(job, logits, student, in_place);
    const Tensor dreference = teacher ? new_gradient(*reference, &job.d_teacher) : new_empty(logits, {0});
    const float* given =
        kldiv::per_token<float>(coefficients, logits, kldiv::gpu::value_rows(job, job.stat_count) * job.rows,
                                ScalarType::Float, "coefficients");
    if (student || teacher) job.coefficients = given;
    if (job.rows == 0) return {values, state, dlogits, dreference};

    job.values = static_cast<float*>(values.data_ptr());
    job.stream = device.stream();
    const kldiv::CudaPlan plan = kldiv::gpu::plan(job);
    // Two sweeps hand their state on through memory, asked for or not.
    const bool keep_state = with_state || ((job.coefficients || job.topk.teacher) && !plan.one_read());
    const Tensor saved =
        keep_state && !with_state ? kldiv::new_floats(logits, kldiv::gpu::state_rows(job), job.rows) : state;
    if (keep_state) job.state = static_cast<float*>(saved.data_ptr());
    // Given back as this function returns, while the stream still works there: who gets it next comes later on the same
    // stream.
    const Tensor workspace = kldiv::new_floats(logits, 1, plan.one_read() ? 0 : kldiv::gpu::workspace_floats(job));
    if (!plan.one_read()) job.workspace = static_cast<float*>(workspace.data_ptr());
    // Two sweeps hand the coefficients that follow from the values on through memory, too.
    const bool complete = job.policy.tokens && !plan.one_read();
    const Tensor completed = kldiv::new_floats(logits, complete ? values.size(0) : 0, job.rows);
    if (complete) job.completed = static_cast<float*>(completed.data_ptr());
    const bool find = job.topk.teacher && !plan.one_read();
    const Tensor found = kldiv::new_floats(logits, find ? values.size(0) : 0, job.rows);
    if (find) job.topk.coefficients = static_cast<float*>(found.data_ptr());
    kldiv::gpu::run_forward(job, plan);
    return {values, state, dlogits, dreference};
}

Outputs forward(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                std::optional<Tensor> mask, std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                std::vector<double> parameters, std::vector<std::string> stats, int64_t vocab_size,
                std::optional<Tensor> coefficients, bool with_state, bool student, bool teacher, bool in_place) {
    const OnDevice device(logits);
    Job job = make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    return run(job, device, logits, reference, coefficients, with_state, student, teacher, in_place);
}

std::tuple<Tensor, Tensor> policy(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                                  std::optional<Tensor> mask, std::optional<Tensor> exclude,
                                  std::optional<Tensor> token_parameters, std::vector<double> parameters,
                                  std::vector<std::string> stats, int64_t vocab_size, const Tensor& coefficients,
                                  const Tensor& policy_tokens, std::string policy_term, std::string policy_kl,
                                  std::vector<double> policy_bounds, bool in_place) {
    const OnDevice device(logits);
    Job job = make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    kldiv::take_policy(job, logits, policy_tokens, policy_term, policy_kl, policy_bounds);
    const Outputs out = run(job, device, logits, reference, coefficients, false, true, false, in_place);
    return {std::get<0>(out), std::get<2>(out)};
}

std::tuple<Tensor, Tensor, Tensor> policy_outcome(const Tensor& values, const Tensor& coefficients,
                                                  const Tensor& policy_tokens, const Tensor& valid, const Tensor& scale,
                                                  std::optional<Tensor> old, std::optional<Tensor> sampling,
                                                  std::optional<Tensor> off_policy_weight,
                                                  std::optional<Tensor> token_weights, std::optional<Tensor> kl_weights,
                                                  bool anchored, bool reference, bool exact, double kl_coef,
                                                  std::string policy_term, std::string policy_kl,
                                                  std::vector<double> policy_bounds) {
    const OnDevice device(values);
    const Tensor per_token = torch::stable::new_empty(values, {values.size(1)});
    const Tensor sums = torch::stable::new_empty(values, {kldiv::kPolicySums});
    const Tensor tokens = torch::stable::new_empty(values, {}, ScalarType::Long);
    const kldiv::PolicyOutcomes outcomes = kldiv::policy_outcomes_of(
        values, coefficients, policy_tokens, valid, scale, old, sampling, off_policy_weight, token_weights, kl_weights,
        anchored, reference, exact, kl_coef, policy_term, policy_kl, policy_bounds, per_token);
    const Tensor partial =
        kldiv::new_floats(values, kldiv::gpu::policy_outcome_warps(outcomes.rows), kldiv::kPolicySums);
    kldiv::gpu::run_policy_outcome(outcomes, static_cast<float*>(partial.data_ptr()),
                                   static_cast<float*>(sums.data_ptr()), static_cast<int64_t*>(tokens.data_ptr()),
                                   device.stream());
    return {per_token, sums, tokens};
}

std::tuple<Tensor, Tensor, Tensor> topk(const Tensor& logits, std::optional<Tensor> reference,
                                        std::optional<Tensor> labels, std::optional<Tensor> mask,
                                        std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                                        std::vector<double> parameters, std::vector<std::string> stats,
                                        int64_t vocab_size, const Tensor& teacher, const Tensor& scale,
                                        std::string kind, double alpha, double beta, bool in_place) {
    const OnDevice device(logits);
    Job job = make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    const Tensor divergences = kldiv::take_topk(job.topk, job, logits, stats, teacher, scale, alpha, beta);
    const int code = kldiv::gpu::statistic_code(kind);
    STD_TORCH_CHECK(code >= 0 && kldiv::gpu::compares_two(code), "kind must be a divergence, not ", kind);
    job.topk.kind = code;
    const Outputs out = run(job, device, logits, reference, std::nullopt, false, true, false, in_place);
    return {std::get<0>(out), divergences, std::get<2>(out)};
}

std::tuple<Tensor, Tensor> backward(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                                    std::optional<Tensor> mask, std::optional<Tensor> exclude,
                                    std::optional<Tensor> token_parameters, std::vector<double> parameters,
                                    std::vector<std::string> stats, int64_t vocab_size, const Tensor& state,
                                    const Tensor& coefficients, bool student, bool teacher) {
    const OnDevice device(logits);
    Job job = make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    teacher = teacher && reference;
    job.state = const_cast<float*>(
        kldiv::per_token<float>(state, logits, kldiv::gpu::state_rows(job) * job.rows, ScalarType::Float, "state"));
    job.coefficients =
        kldiv::per_token<float>(coefficients, logits, kldiv::gpu::value_rows(job, job.stat_count) * job.rows,
                                ScalarType::Float, "coefficients");
    const Tensor dlogits = student_gradient(job, logits, student, false);
    const Tensor dreference = teacher ? new_gradient(*reference, &job.d_teacher) : new_empty(logits, {0});
    if (job.rows == 0 || !(student || teacher)) return {dlogits, dreference};

    job.stream = device.stream();
    kldiv::gpu::run_backward(job);
    return {dlogits, dreference};
}

std::vector<std::string> cuda_served() { return kldiv::gpu::statistic_names(); }
std::string cuda_archs() { return KLDIV_CUDA_ARCHS; }
std::string cuda_refusal() { return kldiv::gpu::refusal(); }

}  // namespace

#ifdef KLDIV_CUDA_HOST
STABLE_TORCH_LIBRARY(kldiv_cuda_host, m) {
    m.def(KLDIV_FORWARD);
    m.def(KLDIV_BACKWARD);
    m.def(KLDIV_POLICY);
    m.def(KLDIV_POLICY_OUTCOME);
    m.def(KLDIV_TOPK);
    m.def(KLDIV_SHARD_STATE);
    m.def(KLDIV_SHARD_SUMS);
    m.def(KLDIV_SHARD_FINISH);
#else
STABLE_TORCH_LIBRARY_FRAGMENT(KLDIV_LIBRARY, m) {
#endif
    m.def("cuda_served() -> str[]");
    m.def("cuda_archs() -> str");
    m.def("cuda_refusal() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(KLDIV_LIBRARY, KLDIV_DEVICE_KEY, m) {
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("backward", TORCH_BOX(&backward));
    m.impl("forward_policy", TORCH_BOX(&policy));
    m.impl("finish_policy", TORCH_BOX(&policy_outcome));
    m.impl("forward_topk", TORCH_BOX(&topk));
}

STABLE_TORCH_LIBRARY_IMPL(KLDIV_LIBRARY, CompositeExplicitAutograd, m) {
    m.impl("cuda_served", TORCH_BOX(&cuda_served));
    m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
    m.impl("cuda_refusal", TORCH_BOX(&cuda_refusal));
}
