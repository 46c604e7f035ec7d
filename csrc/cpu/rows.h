// The CPU backend above the tile kernels: rows, blocks of a row, threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../tokens.h"
#include "kernels.h"

namespace kldiv {

// Rows of a tensor [*, V] with unit stride in V and any strides before it.
struct Rows {
    const char* data = nullptr;
    Dtype dtype = Dtype::float32;
    std::vector<int64_t> sizes, strides;  // of the leading dimensions, in elements

    explicit operator bool() const { return data != nullptr; }
    int64_t element_bytes() const { return dtype == Dtype::float32 ? 4 : 2; }
    const char* row(int64_t index) const;
};

// A contiguous [N, width] gradient, or one that takes the place of the logits.
struct Gradient {
    char* data = nullptr;
    Dtype dtype = Dtype::float32;
    int64_t width = 0;
    const Rows* logits = nullptr;  // whose place it takes

    char* row(int64_t index) const {
        return logits ? const_cast<char*>(logits->row(index)) : data + index * width * element_bytes();
    }
    explicit operator bool() const { return data != nullptr; }
    int64_t element_bytes() const { return dtype == Dtype::float32 ? 4 : 2; }
};

enum class Kind {
    logprob,
    reference_logprob,
    untempered_logprob,
    tail_logprob,
    logsumexp,
    max_logprob,
    argmax,
    divergence
};
inline bool per_label(Kind kind) {
    return kind == Kind::logprob || kind == Kind::reference_logprob || kind == Kind::untempered_logprob;
}

struct Request {
    Kind kind;
    const DivergenceKernels* divergence = nullptr;
};

// The saved state of a row: for student and teacher (m, 1/z, offset), the two parts of delta, then for each statistic
// (sum of grad_logq, sum of grad_logp, its constants), as [state_rows, N] floats.
constexpr int kStateOfRow = 8, kStateOfStatistic = 2 + kRowConstants;

// A divergence on a row's labels, and on its tail as one more outcome: its gradients by their log-probabilities are the
// coefficients of a loss, found when a row's values are.
struct TopK {
    const float* teacher = nullptr;  // [N, outcomes] log-probabilities; null: no such loss
    int64_t outcomes = 0;            // labels a row, and one more with the tail
    Request divergence{};
    double alpha = 0.5, beta = 0.5;
    const float* scale = nullptr;   // [N]: what each row counts
    float* divergences = nullptr;   // [N]
    float* coefficients = nullptr;  // [value rows, N]
};

struct Job : Tokens {
    const Kernels* kernels;
    Rows student, teacher;
    double parameters[4] = {1, 1, 0.5, 0.5};
    std::vector<Request> stats;
    float* values = nullptr;              // [value rows, N], or null in a backward pass
    float* state = nullptr;               // written by a forward pass when wanted, read by a backward pass
    const float* coefficients = nullptr;  // [value rows, N]; null: no gradient
    Gradient d_student, d_teacher;
    TopK topk;
    int64_t threads = 1;
    bool split_rows = false;

    int64_t value_rows() const;
};

std::vector<std::string> served_statistics();
Request find_statistic(const std::string& name);

// Values, the state when `state` is given, and gradients when `coefficients` are.
void run_forward(const Job& job);
// Values, state and gradients of the rows that the mask leaves out: 0.
void leave_out_masked(const Job& job);
// Gradients from the saved state.
void run_backward(const Job& job);
// data[0 .. count) *= factor; returns at once when the factor is 1.
void run_scale(void* data, Dtype dtype, int64_t count, float factor, int64_t threads);

}  // namespace kldiv
