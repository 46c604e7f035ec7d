// What a call says of its tokens, on any device.
#pragma once

#include <cstdint>

#include "policy.h"

namespace kldiv {

// As a label: none; and, from here down, a column of another process.
constexpr int64_t kNoLabel = -1, kElsewhere = -2;

struct Tokens {
    int64_t rows = 0, columns = 0;    // columns: without padding
    const int64_t* labels = nullptr;  // [N, labels_per_row]
    int64_t labels_per_row = 1;
    const float* picked = nullptr;  // [2, N, labels_per_row]: logits at the labels, where they may be elsewhere
    const bool* mask = nullptr;
    const int64_t* exclude = nullptr;
    const float* token_parameters = nullptr;  // [4, N]
    Policy policy;                            // what the coefficients of logprob follow from, or none
};

}  // namespace kldiv
