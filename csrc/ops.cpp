// The tensor operators, on PyTorch's stable ABI: one build serves every Python and every PyTorch from 2.10 on.
// They are functional but for scale_, carry no autograd and check only what would crash: kldiv_kernels/ops.py and
// inputs.py stand above them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/rows.h"
#include "plan.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using kldiv::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Dtype::float32;
        case ScalarType::BFloat16:
            return Dtype::bfloat16;
        case ScalarType::Half:
            return Dtype::float16;
        default:
            break;
    }
    STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
}

template <class T>
const T* per_token(const std::optional<Tensor>& tensor, int64_t count, ScalarType type, const char* name) {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(
        tensor->is_cpu() && tensor->is_contiguous() && tensor->scalar_type() == type && tensor->numel() == count, name,
        " must be a contiguous CPU tensor of its type with ", count, " elements");
    static const T empty{};  // an empty tensor may have no address
    return count == 0 ? &empty : static_cast<const T*>(tensor->data_ptr());
}

kldiv::Rows rows_of(const Tensor& tensor, int64_t columns, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() >= 1, name, " must be a CPU tensor of at least one dimension");
    const int64_t last = tensor.dim() - 1;
    STD_TORCH_CHECK(columns >= 1 && columns <= tensor.size(last), "vocab_size must be 1 to the width of ", name);
    STD_TORCH_CHECK(tensor.size(last) == 1 || tensor.stride(last) == 1, name, " must have unit stride in its columns");
    kldiv::Rows rows;
    static const char empty = 0;  // an empty tensor may have no address
    rows.data = tensor.numel() == 0 ? &empty : static_cast<const char*>(tensor.data_ptr());
    rows.dtype = dtype_of(tensor, name);
    for (int64_t i = 0; i < last; ++i) {
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
    const Tensor out = torch::stable::new_empty(like, like.sizes());
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
    job.student = rows_of(logits, vocab_size, "logits");
    job.rows = logits.numel() / logits.size(logits.dim() - 1);
    if (reference) {
        job.teacher = rows_of(*reference, vocab_size, "reference");
        STD_TORCH_CHECK(job.teacher.sizes == job.student.sizes, "reference must have the leading sizes of logits");
    }
    if (labels) {
        STD_TORCH_CHECK(labels->dim() == 2, "labels must be [N, K]");
        job.labels_per_row = labels->size(1);
    }
    job.labels = per_token<int64_t>(labels, job.rows * job.labels_per_row, ScalarType::Long, "labels");
    if (job.labels)
        for (int64_t i = 0; i < job.rows * job.labels_per_row; ++i)
            STD_TORCH_CHECK(job.labels[i] < vocab_size, "labels must be below vocab_size");
    job.mask = per_token<bool>(mask, job.rows, ScalarType::Bool, "mask");
    job.exclude = per_token<int64_t>(exclude, job.rows, ScalarType::Long, "exclude");
    job.token_parameters = per_token<float>(token_parameters, 4 * job.rows, ScalarType::Float, "token_parameters");
    STD_TORCH_CHECK(parameters.size() == 4, "parameters must be temperature, reference temperature, alpha, beta");
    std::copy(parameters.begin(), parameters.end(), job.parameters);
    for (const std::string& name : stats) {
        job.stats.push_back(kldiv::find_statistic(name));
        const kldiv::Request& request = job.stats.back();
        const bool labelled = request.kind == kldiv::Kind::logprob || request.kind == kldiv::Kind::reference_logprob;
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

Tensor floats(const Tensor& like, int64_t rows, int64_t columns) {
    return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, std::optional<Tensor> reference,
                                                   std::optional<Tensor> labels, std::optional<Tensor> mask,
                                                   std::optional<Tensor> exclude,
                                                   std::optional<Tensor> token_parameters,
                                                   std::vector<double> parameters, std::vector<std::string> stats,
                                                   int64_t vocab_size, std::optional<Tensor> coefficients,
                                                   bool with_state, bool student, bool teacher) {
    kldiv::Job job =
        make_job(logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size);
    use_plan(job, stats, coefficients.has_value(), true);
    const Tensor values = floats(logits, job.value_rows(), job.rows);
    const int64_t state_rows = kldiv::kStateOfRow + kldiv::kStateOfStatistic * static_cast<int64_t>(stats.size());
    const Tensor state = floats(logits, with_state ? state_rows : 0, job.rows);
    job.values = static_cast<float*>(values.data_ptr());
    job.state = with_state ? static_cast<float*>(state.data_ptr()) : nullptr;
    job.coefficients = per_token<float>(coefficients, job.value_rows() * job.rows, ScalarType::Float, "coefficients");
    const Tensor none = torch::stable::new_empty(logits, {0});
    const Tensor dlogits = student ? new_gradient(logits, &job.d_student, "logits") : none;
    const Tensor dreference = teacher && reference ? new_gradient(*reference, &job.d_teacher, "reference") : none;
    kldiv::run_forward(job);
    return {values, state, dlogits, dreference};
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
    job.state = const_cast<float*>(per_token<float>(state, state_rows * job.rows, ScalarType::Float, "state"));
    job.coefficients = per_token<float>(coefficients, job.value_rows() * job.rows, ScalarType::Float, "coefficients");
    const Tensor none = torch::stable::new_empty(logits, {0});
    const Tensor dlogits = student ? new_gradient(logits, &job.d_student, "logits") : none;
    const Tensor dreference = teacher && reference ? new_gradient(*reference, &job.d_teacher, "reference") : none;
    kldiv::run_backward(job);
    return {dlogits, dreference};
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

#define KLDIV_CALL                                                                                                \
    "Tensor logits, Tensor? reference, Tensor? labels, Tensor? mask, Tensor? exclude, Tensor? token_parameters, " \
    "float[] parameters, str[] stats, int vocab_size"

STABLE_TORCH_LIBRARY(kldiv_kernels_native, m) {
    m.def("forward(" KLDIV_CALL
          ", Tensor? coefficients, bool with_state, bool student, bool teacher) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("backward(" KLDIV_CALL
          ", Tensor state, Tensor coefficients, bool student, bool teacher) -> (Tensor, Tensor)");
    m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
    m.def("served() -> str[]");
    m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kldiv_kernels_native, CPU, m) {
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("backward", TORCH_BOX(&backward));
    m.impl("scale_", TORCH_BOX(&scale_));
}

STABLE_TORCH_LIBRARY_IMPL(kldiv_kernels_native, CompositeExplicitAutograd, m) {
    m.impl("served", TORCH_BOX(&served));
    m.impl("isa", TORCH_BOX(&isa));
}
