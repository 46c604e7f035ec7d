// What the operators of every device ask of their arguments. They check only what would crash: inputs/ stands above.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "plan.h"
#include "policy_outcome.h"
#include "tokens.h"

// The arguments of every operator, and what follows them. With `in_place` the gradient of the logits takes their place,
// and an empty tensor is returned for it; that of the reference is written elsewhere.
#define KLDIV_CALL                                                                                                \
    "Tensor logits, Tensor? reference, Tensor? labels, Tensor? mask, Tensor? exclude, Tensor? token_parameters, " \
    "float[] parameters, str[] stats, int vocab_size"
#define KLDIV_FORWARD                                                       \
    "forward(" KLDIV_CALL                                                   \
    ", Tensor? coefficients, bool with_state, bool student, bool teacher, " \
    "bool in_place)"                                                        \
    " -> (Tensor, Tensor, Tensor, Tensor)"
#define KLDIV_BACKWARD \
    "backward(" KLDIV_CALL ", Tensor state, Tensor coefficients, bool student, bool teacher) -> (Tensor, Tensor)"
// Values and dlogits of a token-level policy loss; what `coefficients` has for logprob is not looked at (policy.h).
#define KLDIV_POLICY                                                                \
    "forward_policy(" KLDIV_CALL                                                    \
    ", Tensor coefficients, Tensor policy_tokens, str policy_term, str policy_kl, " \
    "float[] policy_bounds, bool in_place) -> (Tensor, Tensor)"

// After `forward_policy`, of its values [rows, N] for logprob, entropy and, with `exact`, an exact KL: per_token [N],
// sums [kPolicySums] and the number of tokens (policy_outcome.h).
#define KLDIV_POLICY_OUTCOME                                                                                \
    "finish_policy(Tensor values, Tensor coefficients, Tensor policy_tokens, Tensor valid, Tensor scale, "  \
    "Tensor? old, Tensor? sampling, Tensor? off_policy_weight, Tensor? token_weights, Tensor? kl_weights, " \
    "bool anchored, bool reference, bool exact, float kl_coef, str policy_term, str policy_kl, "            \
    "float[] policy_bounds) -> (Tensor, Tensor, Tensor)"

// Values, the divergences of the outcomes from `teacher`, and dlogits of Σ scale · divergence (cpu/rows.h, TopK).
#define KLDIV_TOPK                                                                      \
    "forward_topk(" KLDIV_CALL                                                          \
    ", Tensor teacher, Tensor scale, str kind, float alpha, float beta, bool in_place)" \
    " -> (Tensor, Tensor, Tensor)"

// A row whose columns are spread over processes (DESIGN 11). `logits` and `vocab_size` are those of this process,
// labels and exclude are counted from its first column; a label below -1 is a column of another process. state: what
// its columns have to say before the softmaxes are known. All processes' are then given to the other two, [processes,
// N, ...]. sums: of the terms of normalised columns. finish: values, and the state for `backward`; `picked` [2, N, K]
// are the logits at the labels, of both sides.
#define KLDIV_SHARD_STATE "shard_state(" KLDIV_CALL ", int first_column) -> Tensor"
#define KLDIV_SHARD_SUMS "shard_sums(" KLDIV_CALL ", Tensor states) -> Tensor"
#define KLDIV_SHARD_FINISH \
    "shard_finish(" KLDIV_CALL ", Tensor states, Tensor sums, Tensor? picked) -> (Tensor, Tensor)"

namespace kldiv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return kFloat32;
        case ScalarType::BFloat16:
            return kBfloat16;
        case ScalarType::Half:
            return kFloat16;
        default:
            break;
    }
    STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
}

inline bool same_device(const Tensor& a, const Tensor& b) {
    return a.is_cpu() ? b.is_cpu() : (a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index());
}

// An empty tensor may have no address, and a null pointer means that an argument is absent.
inline const void* address(const Tensor& tensor) {
    static const int64_t empty = 0;
    return tensor.numel() == 0 ? static_cast<const void*>(&empty) : tensor.data_ptr();
}

// The `count` elements of an argument that has so many a token, on the device of `logits`.
template <class T>
const T* per_token(const std::optional<Tensor>& tensor, const Tensor& logits, int64_t count, ScalarType type,
                   const char* name) {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(same_device(*tensor, logits) && tensor->is_contiguous() && tensor->scalar_type() == type &&
                        tensor->numel() == count,
                    name, " must be a contiguous tensor of its type with ", count,
                    " elements, on the device of logits");
    return static_cast<const T*>(address(*tensor));
}

inline void check_rows(const Tensor& tensor, const Tensor& logits, int64_t columns, const char* name) {
    STD_TORCH_CHECK(same_device(tensor, logits) && tensor.dim() >= 1, name,
                    " must have at least one dimension and be on the device of logits");
    const int64_t last = tensor.dim() - 1;
    STD_TORCH_CHECK(columns >= 1 && columns <= tensor.size(last), "vocab_size must be 1 to the width of ", name);
    STD_TORCH_CHECK(tensor.size(last) == 1 || tensor.stride(last) == 1, name, " must have unit stride in its columns");
    STD_TORCH_CHECK(tensor.dim() == logits.dim(), name, " must have the dimensions of logits");
    for (int64_t i = 0; i < last; ++i)
        STD_TORCH_CHECK(tensor.size(i) == logits.size(i), name, " must have the leading sizes of logits");
}

inline int64_t row_count(const Tensor& logits) { return logits.numel() / logits.size(logits.dim() - 1); }

inline int64_t labels_per_row(const std::optional<Tensor>& labels) {
    STD_TORCH_CHECK(!labels || labels->dim() == 2, "labels must be [N, K]");
    return labels ? labels->size(1) : 1;
}

template <class Real>
void take_parameters(const std::vector<double>& parameters, Real (&to)[4]) {
    STD_TORCH_CHECK(parameters.size() == 4, "parameters must be temperature, reference temperature, alpha, beta");
    std::copy(parameters.begin(), parameters.end(), to);
}

inline void take_tokens(Tokens& job, const Tensor& logits, const std::optional<Tensor>& labels,
                        const std::optional<Tensor>& mask, const std::optional<Tensor>& exclude,
                        const std::optional<Tensor>& token_parameters) {
    job.rows = row_count(logits);
    job.labels_per_row = labels_per_row(labels);
    job.labels = per_token<int64_t>(labels, logits, job.rows * job.labels_per_row, ScalarType::Long, "labels");
    job.mask = per_token<bool>(mask, logits, job.rows, ScalarType::Bool, "mask");
    job.exclude = per_token<int64_t>(exclude, logits, job.rows, ScalarType::Long, "exclude");
    job.token_parameters =
        per_token<float>(token_parameters, logits, 4 * job.rows, ScalarType::Float, "token_parameters");
}

template <int count>
int position(const std::string& name, const char* const (&names)[count], const char* argument) {
    for (int i = 0; i < count; ++i)
        if (name == names[i]) return i;
    STD_TORCH_CHECK(false, argument, " must not be ", name);
}

inline Policy policy_of(int64_t rows, const Tensor& like, const Tensor& tokens, const std::string& term,
                        const std::string& kl, const std::vector<double>& bounds) {
    STD_TORCH_CHECK(bounds.size() == kPolicyBounds, "policy_bounds must be ", kPolicyBounds, " numbers");
    Policy policy;
    policy.tokens = per_token<float>(tokens, like, kPolicyTokens * rows, ScalarType::Float, "policy_tokens");
    policy.term = position(term, kPolicyTermNames, "policy_term");
    policy.kl = position(kl, kSampledKlNames, "policy_kl");
    float in_order[kPolicyBounds];
    std::copy(bounds.begin(), bounds.end(), in_order);
    std::memcpy(&policy.bounds, in_order, sizeof in_order);
    return policy;
}

inline void take_policy(Tokens& job, const Tensor& logits, const Tensor& tokens, const std::string& term,
                        const std::string& kl, const std::vector<double>& bounds) {
    STD_TORCH_CHECK(job.labels && job.labels_per_row == 1, "a policy loss needs one label a row");
    job.policy = policy_of(job.rows, logits, tokens, term, kl, bounds);
}

inline Tensor new_floats(const Tensor& like, int64_t rows, int64_t columns) {
    return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}

// The arguments of `policy_outcome`, and where its first result goes.
inline PolicyOutcomes policy_outcomes_of(const Tensor& values, const Tensor& coefficients, const Tensor& tokens,
                                         const Tensor& valid, const Tensor& scale, const std::optional<Tensor>& old,
                                         const std::optional<Tensor>& sampling,
                                         const std::optional<Tensor>& off_policy_weight,
                                         const std::optional<Tensor>& token_weights,
                                         const std::optional<Tensor>& kl_weights, bool anchored, bool reference,
                                         bool exact, double kl_coef, const std::string& term, const std::string& kl,
                                         const std::vector<double>& bounds, const Tensor& per_token_loss) {
    STD_TORCH_CHECK(values.dim() == 2 && values.size(0) >= 2 + exact, "values must be [2 or more, N]");
    PolicyOutcomes o;
    const int64_t n = o.rows = values.size(1), all = values.numel();
    const auto given = [&](const std::optional<Tensor>& tensor, int64_t count, const char* name) {
        return per_token<float>(tensor, values, count, ScalarType::Float, name);
    };
    o.policy = policy_of(n, values, tokens, term, kl, bounds);
    o.logprob = given(values, all, "values");
    o.entropy = o.logprob + n;
    o.entropy_coefficient = given(coefficients, all, "coefficients") + n;
    if (exact) o.exact = o.logprob + 2 * n;
    o.scale = given(scale, n, "scale");
    o.old = given(old, n, "old");
    o.sampling = given(sampling, n, "sampling");
    o.off_policy_weight = given(off_policy_weight, n, "off_policy_weight");
    o.token_weights = given(token_weights, n, "token_weights");
    o.kl_weights = given(kl_weights, n, "kl_weights");
    o.valid = per_token<bool>(valid, values, n, ScalarType::Bool, "valid");
    o.anchored = anchored;
    o.reference = reference;
    o.kl_coef = static_cast<float>(kl_coef);
    o.per_token = static_cast<float*>(per_token_loss.data_ptr());
    return o;
}

// What is told of a top-k loss, but for its kind; the tensor of its divergences.
template <class TopK>
Tensor take_topk(TopK& topk, const Tokens& tokens, const Tensor& logits, const std::vector<std::string>& stats,
                 const Tensor& teacher, const Tensor& scale, double alpha, double beta) {
    const bool tail = stats.size() == 2 && stats[1] == "tail_logprob";
    STD_TORCH_CHECK(tokens.labels && !stats.empty() && stats[0] == "logprob" && (stats.size() == 1 || tail),
                    "topk takes logprob, and tail_logprob after it");
    topk.outcomes = tokens.labels_per_row + tail;
    topk.teacher = per_token<float>(teacher, logits, topk.outcomes * tokens.rows, ScalarType::Float, "teacher");
    topk.scale = per_token<float>(scale, logits, tokens.rows, ScalarType::Float, "scale");
    topk.alpha = static_cast<decltype(topk.alpha)>(alpha);
    topk.beta = static_cast<decltype(topk.beta)>(beta);
    const Tensor divergences = new_floats(logits, 1, tokens.rows);
    topk.divergences = static_cast<float*>(divergences.data_ptr());
    return divergences;
}

}  // namespace kldiv
