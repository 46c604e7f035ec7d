// The tensor operators, on PyTorch's stable ABI: one build serves every Python and every PyTorch from 2.10 on.
// They are functional but for scale_, carry no autograd and check only what would crash: kldiv_kernels/ops.py and
// inputs/ stand above them.
#include <tuple>

#include "cpu/largest.h"
#include "cpu/rows.h"
#include "op_arguments.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using kldiv::Dtype;
using kldiv::ScalarType;
using kldiv::Tensor;
using torch::stable::new_empty;

static_assert(static_cast<int>(Dtype::float32) == kldiv::kFloat32 &&
              static_cast<int>(Dtype::bfloat16) == kldiv::kBfloat16 &&
              static_cast<int>(Dtype::float16) == kldiv::kFloat16);
Dtype dtype_of(const Tensor& tensor, const char* name) { return static_cast<Dtype>(kldiv::element_of(tensor, name)); }

kldiv::Rows rows_of(const Tensor& tensor, const Tensor& logits, int64_t columns, const char* name) {
    kldiv::check_rows(tensor, logits, columns, name);
    kldiv::Rows rows;
    rows.data = static_cast<const char*>(kldiv::address(tensor));
    rows.dtype = dtype_of(tensor, name);
    for (int64_t i = 0; i < tensor.dim() - 1; ++i) {
        rows.sizes.push_back(tensor.size(i));
        rows.strides.push_back(tensor.stride(i));
    }
    return rows;
}

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
    *gradient = {static_cast<char*>(out.data_ptr()), dtype_of(like, name), like.size(like.dim() - 1)};
    return out;
}

// The arguments that describe the rows, the same for every operator.
kldiv::Job make_job(const Tensor& logits, const std::optional<Tensor>& reference, const std::optional<Tensor>& labels,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& exclude,
                    const std::optional<Tensor>& token_parameters, const std::vector<double>& parameters,
                    const std::vector<std::string>& stats, int64_t vocab_size) {
    kldiv::Job job;
    job.kernels = &kldiv::best_kernels();
    job.columns = vocab_size;
    job.student = rows_of(logits, logits, vocab_size, "logits");
    if (reference) job.teacher = rows_of(*reference, logits, vocab_size, "reference");
    kldiv::take_tokens(job, logits, labels, mask, exclude, token_parameters);
    kldiv::take_parameters(parameters, job.parameters);
    for (int64_t i = 0; job.labels && i < job.rows * job.labels_per_row; ++i)
        STD_TORCH_CHECK(job.labels[i] < vocab_size, "labels must be below vocab_size");
    for (const std::string& name : stats) {
        job.stats.push_back(kldiv::find_statistic(name));
        const kldiv::Request& request = job.stats.back();
        const bool labelled = request.kind == kldiv::Kind::logprob || request.kind == kldiv::Kind::reference_logprob ||
                              request.kind == kldiv::Kind::tail_logprob;
        STD_TORCH_CHECK(job.labels || !labelled, name, " needs labels");
        const bool two_rows =
            request.kind == kldiv::Kind::reference_logprob || (request.divergence && request.divergence->needs_p);
        STD_TORCH_CHECK(job.teacher || !two_rows, name, " needs reference");
    }
    job.threads = torch::stable::get_num_threads();
    return job;
}

void use_plan(kldiv::Job& job, const std::vector<std::string>& stats, bool gradient, bool one_read) {
    const kldiv::CpuPlan plan = kldiv::plan_cpu(
        {job.rows, job.columns, job.student.element_bytes(), job.teacher ? job.teacher.element_bytes() : 0,
         kldiv::needs_normalised_sums(stats), gradient, one_read},
        job.threads);
    job.threads = plan.threads;
    job.split_rows = plan.split_rows;
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
    use_plan(job, stats, coefficients.has_value(), true);
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
        make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    return run(job, logits, reference, stats, coefficients, with_state, student, teacher, in_place);
}

std::tuple<Tensor, Tensor> policy(const Tensor& logits, std::optional<Tensor> reference, std::optional<Tensor> labels,
                                  std::optional<Tensor> mask, std::optional<Tensor> exclude,
                                  std::optional<Tensor> token_parameters, std::vector<double> parameters,
                                  std::vector<std::string> stats, int64_t vocab_size, const Tensor& coefficients,
                                  const Tensor& policy_tokens, std::string policy_term, std::string policy_kl,
                                  std::vector<double> policy_bounds, bool in_place) {
    kldiv::Job job =
        make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
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
        make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    use_plan(job, stats, true, false);
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
        make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
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
    selection.logits = rows_of(logits, logits, columns, "logits");
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
    kldiv::run_scale(gradient.data_ptr(), dtype_of(gradient, "gradient"), gradient.numel(),
                     *static_cast<const float*>(factor.data_ptr()), torch::stable::get_num_threads());
}

std::vector<std::string> served() { return kldiv::served_statistics(); }
std::string isa() { return kldiv::best_kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY(kldiv_kernels_native, m) {
    m.def(KLDIV_FORWARD);
    m.def(KLDIV_BACKWARD);
    m.def(KLDIV_POLICY);
    m.def(KLDIV_POLICY_OUTCOME);
    m.def(KLDIV_TOPK);
    m.def("largest(Tensor logits, Tensor? mask, int k, int columns) -> Tensor");
    m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
    m.def("served() -> str[]");
    m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kldiv_kernels_native, CPU, m) {
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("backward", TORCH_BOX(&backward));
    m.impl("policy", TORCH_BOX(&policy));
    m.impl("policy_outcome", TORCH_BOX(&policy_outcome));
    m.impl("topk", TORCH_BOX(&topk));
    m.impl("largest", TORCH_BOX(&largest));
    m.impl("scale_", TORCH_BOX(&scale_));
}

STABLE_TORCH_LIBRARY_IMPL(kldiv_kernels_native, CompositeExplicitAutograd, m) {
    m.impl("served", TORCH_BOX(&served));
    m.impl("isa", TORCH_BOX(&isa));
}
