// The tensor operators, on PyTorch's stable ABI: one build serves every Python and every PyTorch from 2.10 on.
// They are functional but for scale_, carry no autograd and check only what would crash: kldiv_kernels/ops.py and
// inputs/ stand above them.
#include <tuple>

#include "cpu/largest.h"
#include "cpu_job.h"
#include "namespace.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using kldiv::Dtype;
using kldiv::ScalarType;
using kldiv::Tensor;
using torch::stable::new_empty;

// Fresh pages of a large gradient cost as much as writing it; huge pages cost far less.
void use_huge_pages(const Tensor& tensor) {
#ifdef __linux__
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t end = begin + tensor.numel() * tensor.element_size();
    const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
    if (last > first + 8 * page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)tensor;
#endif
}

Tensor new_gradient(const Tensor& like, kldiv::Gradient* gradient, const char* name) {
    const Tensor out = new_empty(like, like.sizes());
    use_huge_pages(out);
    *gradient = {static_cast<char*>(out.data_ptr()), kldiv::dtype_of(like, name), like.size(like.dim() - 1)};
    return out;
}

// The gradient of `logits`, or an empty tensor where it is not wanted or takes their place.
Tensor student_gradient(kldiv::Job& job, const Tensor& logits, bool wanted, bool in_place) {
    if (wanted && !in_place) return new_gradient(logits, &job.d_student, "logits");
    if (wanted)
        job.d_student = {static_cast<char*>(logits.data_ptr()), job.student.dtype, logits.size(logits.dim() - 1),
                         &job.student};
    return new_empty(logits, {0});
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // values, state, dlogits, dreference

Outputs run(kldiv::Job& job, const Tensor& logits, const std::optional<Tensor>& reference,
            const std::vector<std::string>& stats, const std::optional<Tensor>& coefficients, bool with_state,
            bool student, bool teacher, bool in_place) {
    kldiv::use_plan(job, stats, coefficients.has_value(), true);
    const Tensor values = kldiv::new_floats(logits, job.value_rows(), job.rows);
    const int64_t state_rows = kldiv::kStateOfRow + kldiv::kStateOfStatistic * static_cast<int64_t>(stats.size());
    const Tensor state = kldiv::new_floats(logits, with_state ? state_rows : 0, job.rows);
    job.values = static_cast<float*>(values.data_ptr());
    job.state = with_state ? static_cast<float*>(state.data_ptr()) : nullptr;
    job.coefficients =
        kldiv::per_token<float>(coefficients, logits, job.value_rows() * job.rows, ScalarType::Float, "coefficients");
    const Tensor dlogits = student_gradient(job, logits, student, in_place);
    const Tensor dreference =
        teacher && reference ? new_gradient(*reference, &job.d_teacher, "reference") : new_empty(logits, {0});
    kldiv::run_forward(job);
    return {values, state, dlogits, dreference};
}

Outputs forward(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                std::optional<Tensor> mask, std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                std::vector<double> parameters, std::vector<std::string> stats, int64_t vocab_size,
                std::optional<Tensor> coefficients, bool with_state, bool student, bool teacher, bool in_place) {
    kldiv::Job job =
        kldiv::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    return run(job, logits, reference, stats, coefficients, with_state, student, teacher, in_place);
}

std::tuple<Tensor, Tensor> policy(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                                  std::optional<Tensor> mask, std::optional<Tensor> exclude,
                                  std::optional<Tensor> token_parameters, std::vector<double> parameters,
                                  std::vector<std::string> stats, int64_t vocab_size, const Tensor& coefficients,
                                  const Tensor& policy_tokens, std::string policy_term, std::string policy_kl,
                                  std::vector<double> policy_bounds, bool in_place) {
    kldiv::Job job =
        kldiv::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    kldiv::take_policy(job, logits, policy_tokens, policy_term, policy_kl, policy_bounds);
    const Outputs out = run(job, logits, reference, stats, coefficients, false, true, false, in_place);
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
    const Tensor per_token = torch::stable::new_empty(values, {values.size(1)});
    const Tensor sums = torch::stable::new_empty(values, {kldiv::kPolicySums});
    const Tensor tokens = torch::stable::new_empty(values, {}, kldiv::ScalarType::Long);
    const kldiv::PolicyOutcomes outcomes = kldiv::policy_outcomes_of(
        values, coefficients, policy_tokens, valid, scale, old, sampling, off_policy_weight, token_weights, kl_weights,
        anchored, reference, exact, kl_coef, policy_term, policy_kl, policy_bounds, per_token);
    double found[kldiv::kPolicySums] = {};
    for (int64_t i = 0; i < outcomes.rows; ++i) kldiv::add_outcome(outcomes, i, found);
    for (int i = 0; i < kldiv::kPolicySums; ++i)
        static_cast<float*>(sums.data_ptr())[i] = kldiv::finish_sum(i, found[i], found[kldiv::kTokens]);
    *static_cast<int64_t*>(tokens.data_ptr()) = static_cast<int64_t>(found[kldiv::kTokens]);
    return {per_token, sums, tokens};
}

std::tuple<Tensor, Tensor> backward(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                                    std::optional<Tensor> mask, std::optional<Tensor> exclude,
                                    std::optional<Tensor> token_parameters, std::vector<double> parameters,
                                    std::vector<std::string> stats, int64_t vocab_size, const Tensor& state,
                                    const Tensor& coefficients, bool student, bool teacher) {
    kldiv::Job job =
        kldiv::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    kldiv::use_plan(job, stats, true, false);
    const int64_t state_rows = kldiv::kStateOfRow + kldiv::kStateOfStatistic * static_cast<int64_t>(stats.size());
    job.state =
        const_cast<float*>(kldiv::per_token<float>(state, logits, state_rows * job.rows, ScalarType::Float, "state"));
    job.coefficients =
        kldiv::per_token<float>(coefficients, logits, job.value_rows() * job.rows, ScalarType::Float, "coefficients");
    const Tensor dlogits = student_gradient(job, logits, student, false);
    const Tensor dreference =
        teacher && reference ? new_gradient(*reference, &job.d_teacher, "reference") : new_empty(logits, {0});
    kldiv::run_backward(job);
    return {dlogits, dreference};
}

std::tuple<Tensor, Tensor, Tensor> topk(const Tensor& logits, std::optional<Tensor> reference,
                                        std::optional<Tensor> labels, std::optional<Tensor> mask,
                                        std::optional<Tensor> exclude, std::optional<Tensor> token_parameters,
                                        std::vector<double> parameters, std::vector<std::string> stats,
                                        int64_t vocab_size, const Tensor& teacher, const Tensor& scale,
                                        std::string kind, double alpha, double beta, bool in_place) {
    kldiv::Job job =
        kldiv::make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    const Tensor divergences = kldiv::take_topk(job.topk, job, logits, stats, teacher, scale, alpha, beta);
    job.topk.divergence = kldiv::find_statistic(kind);
    const Tensor coefficients = kldiv::new_floats(logits, job.topk.outcomes, job.rows);
    job.topk.coefficients = static_cast<float*>(coefficients.data_ptr());
    const Outputs out = run(job, logits, reference, stats, coefficients, false, true, false, in_place);
    return {std::get<0>(out), divergences, std::get<2>(out)};
}

// Column numbers [N, k] of the k largest of the first `columns` logits of each row (cpu/largest.h).
Tensor largest(const Tensor& logits, std::optional<Tensor> mask, int64_t k, int64_t columns) {
    kldiv::Selection selection;
    selection.kernels = &kldiv::best_kernels();
    selection.logits = kldiv::rows_of(logits, logits, columns, "logits");
    selection.rows = kldiv::row_count(logits);
    selection.columns = columns;
    selection.k = k;
    STD_TORCH_CHECK(k >= 1 && k <= columns, "k must be 1 to ", columns, ", not ", k);
    selection.mask = kldiv::per_token<bool>(mask, logits, selection.rows, ScalarType::Bool, "mask");
    const Tensor ids = new_empty(logits, {selection.rows, k}, ScalarType::Long);
    selection.ids = static_cast<int64_t*>(ids.data_ptr());
    selection.threads = torch::stable::get_num_threads();
    kldiv::run_largest(selection);
    return ids;
}

void scale_(Tensor gradient, const Tensor& factor) {
    STD_TORCH_CHECK(gradient.is_cpu() && gradient.is_contiguous(), "gradient must be a contiguous CPU tensor");
    STD_TORCH_CHECK(factor.is_cpu() && factor.numel() == 1 && factor.scalar_type() == ScalarType::Float,
                    "factor must be one float32 on the CPU");
    kldiv::run_scale(gradient.data_ptr(), kldiv::dtype_of(gradient, "gradient"), gradient.numel(),
                     *static_cast<const float*>(factor.data_ptr()), torch::stable::get_num_threads());
}

std::vector<std::string> served() { return kldiv::served_statistics(); }
std::vector<std::string> finished_first() {
    std::vector<std::string> names = served();
    names.erase(std::remove_if(names.begin(), names.end(),
                               [](const std::string& name) { return !kldiv::finishes_first(name); }),
                names.end());
    return names;
}
std::string isa() { return kldiv::best_kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KLDIV_NAMESPACE, m) {
    m.def(KLDIV_FORWARD);
    m.def(KLDIV_BACKWARD);
    m.def(KLDIV_POLICY);
    m.def(KLDIV_POLICY_OUTCOME);
    m.def(KLDIV_TOPK);
    m.def(KLDIV_SHARD_STATE);
    m.def(KLDIV_SHARD_SUMS);
    m.def(KLDIV_SHARD_FINISH);
    m.def("largest_columns(Tensor logits, Tensor? mask, int k, int columns) -> Tensor");
    m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
    m.def("served() -> str[]");
    m.def("finished_first() -> str[]");
    m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(KLDIV_NAMESPACE, CPU, m) {
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("backward", TORCH_BOX(&backward));
    m.impl("forward_policy", TORCH_BOX(&policy));
    m.impl("finish_policy", TORCH_BOX(&policy_outcome));
    m.impl("forward_topk", TORCH_BOX(&topk));
    m.impl("largest_columns", TORCH_BOX(&largest));
    m.impl("scale_", TORCH_BOX(&scale_));
}

STABLE_TORCH_LIBRARY_IMPL(KLDIV_NAMESPACE, CompositeExplicitAutograd, m) {
    m.impl("served", TORCH_BOX(&served));
    m.impl("finished_first", TORCH_BOX(&finished_first));
    m.impl("isa", TORCH_BOX(&isa));
}
