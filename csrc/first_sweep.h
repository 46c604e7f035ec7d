// Which statistics the first sweep of a row finishes. Every other divergence takes a sweep more, once the softmaxes are
// known. The planner, the CPU's rows, the CUDA kernels and the Triton backend's tests all read this table.
#pragma once

#include <string_view>

// No divergences: log-probabilities, sums and maxima.
#define KLDIV_OF_ONE_COLUMN(X) \
    X(logprob)                 \
    X(reference_logprob)       \
    X(untempered_logprob)      \
    X(tail_logprob)            \
    X(logsumexp)               \
    X(max_logprob)             \
    X(argmax)
// Those of `divergences.h` whose sums merge before the softmaxes are known (row_state.h, cuda/row/state.cuh).
#define KLDIV_FIRST_SWEEP(X) \
    X(entropy)               \
    X(reference_entropy)     \
    X(forward_kl)            \
    X(reverse_kl)            \
    X(hellinger)

namespace kldiv {

constexpr bool finishes_first(std::string_view name) {
#define KLDIV_IS(one) name == #one ||
    return KLDIV_OF_ONE_COLUMN(KLDIV_IS) KLDIV_FIRST_SWEEP(KLDIV_IS) false;
#undef KLDIV_IS
}

}  // namespace kldiv
