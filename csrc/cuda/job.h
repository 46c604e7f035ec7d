// A call of the cuda backend, between the operators and the launchers. No CUDA and no PyTorch in it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../plan.h"
#include "../policy_outcome.h"
#include "../tokens.h"

namespace kldiv::gpu {

// Rows of a tensor with these leading dimensions, neighbours that one stride joins taken as one.
constexpr int kMostDimensions = 4;
struct Rows {
    const void* data = nullptr;
    int dimensions = 0;
    uint32_t sizes[kMostDimensions];
    int64_t strides[kMostDimensions];  // in elements
    int element = kFloat32;
};

// A contiguous [N, width] gradient.
struct Gradient {
    void* data = nullptr;
    int64_t width = 0;
};

constexpr int kMostStatistics = 32;

// As the kernels get it, by value.
struct Call : Tokens {
    Rows student, teacher;  // teacher.data null: none
    float parameters[4] = {1, 1, 0.5f, 0.5f};
    int stats[kMostStatistics];  // codes of `statistic_code`
    int stat_count = 0;
    float* values = nullptr;              // [value rows, N]
    float* state = nullptr;               // [state rows, N], written by `run_forward`, read by `run_backward`
    const float* coefficients = nullptr;  // [value rows, N]; null: no gradient
    float* completed = nullptr;           // the same, written by a two-sweep `run_forward` of a policy loss
    Gradient d_student, d_teacher;
    bool in_place = false;  // the student's gradient takes the place of its logits
};

// A divergence on a row's labels, and on its tail as one more outcome. Its gradients by their log-probabilities are the
// coefficients of a loss, found when a row's values are.
struct TopK {
    const float* teacher = nullptr;  // [N, outcomes] log-probabilities; null: no such loss
    int64_t outcomes = 0;            // labels a row, and one more with the tail
    int kind = 0;                    // a statistic's code
    float alpha = 0.5f, beta = 0.5f;
    const float* scale = nullptr;   // [N]: what each row counts
    float* divergences = nullptr;   // [N]
    float* coefficients = nullptr;  // [value rows, N], between two sweeps
};

struct Job : Call {
    TopK topk;
    float* workspace = nullptr;  // `workspace_floats` of them
    void* stream = nullptr;
};

// The code of a statistic's name, -1 for a name that this backend does not have, and their names.
int statistic_code(const std::string& name);
const char* statistic_name(int code);
std::vector<std::string> statistic_names();
bool needs_labels(int code);
bool needs_reference(int code);
bool compares_two(int code);

// Why nothing can be launched here, whatever the device; "" where it can.
std::string refusal();

// Rows of the table of values that the first `stats` statistics have.
int64_t value_rows(const Job& job, int stats);
int64_t state_rows(const Job& job);
int64_t workspace_floats(const Job& job);

// The plan that `run_forward` will follow on the current device. `state` need not be there when `one_read` is its
// kernel.
CudaPlan plan(const Job& job);

// Values; the state where the plan is not the one-read form; gradients when `coefficients` are given, or a top-k loss.
void run_forward(const Job& job, const CudaPlan& plan);
// Gradients from a saved state.
void run_backward(const Job& job);

// A row whose columns are spread over processes. Floats a row: what a process says of its columns, and of the sums over
// them. Those of all processes are [shards, N, ...]; `workspace` is needed as above.
int64_t shard_state_floats(const Job& job);
int64_t shard_sums_floats(const Job& job);
// `first_column` is added to the place of a largest logit. A row that the mask leaves out has the state of no columns.
void run_shard_state(const Job& job, int64_t first_column, float* states);
void run_shard_sums(const Job& job, const float* states, int64_t shards, float* sums);
// Values and state of `job`, with the logits at its labels in `picked`.
void run_shard_finish(const Job& job, const float* states, const float* sums, int64_t shards);

// The losses of tokens and the sums of a batch, [kPolicySums]; `partial` has `policy_outcome_warps` times as many.
int64_t policy_outcome_warps(int64_t rows);
void run_policy_outcome(const PolicyOutcomes& outcomes, float* partial, float* sums, int64_t* tokens, void* stream);

}  // namespace kldiv::gpu
