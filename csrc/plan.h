// Chooses how a call runs. The launchers and `kldiv_kernels.plan` use the same functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kldiv {

// Rows are cut into blocks of this many columns, whatever the batch and the number of threads: the order of
// summation, and so the bits of a result, depend on the row alone.
constexpr int64_t kBlock = 8192;

struct CpuPlan {
    std::string kernel;
    int sweeps = 0;  // over a row: the first from main memory, the others from cache
    int64_t threads = 1;
    int64_t bytes = 0;        // through main memory
    bool split_rows = false;  // threads share rows by blocks
    std::string reason;
};

struct CpuShape {
    int64_t rows, columns;
    int64_t student_bytes, teacher_bytes;  // an element's; 0: no teacher
    bool normalised_sums;                  // some statistic needs the normalised rows
    bool gradient, one_read;
};

CpuPlan plan_cpu(const CpuShape& shape, int64_t threads);

// Whether a statistic's sum is taken after the softmax is known, in a sweep of its own.
bool needs_normalised_sums(const std::vector<std::string>& stats);

// The cuda backend: what a logit is.
enum Element { kFloat32, kBfloat16, kFloat16 };

// Threads of the two-sweep kernels, and what a block of them takes of a row: a function of the row's length alone, so
// that its bits do not depend on the batch. Slices are merged by a warp.
constexpr int kSweepThreads = 256;
constexpr int64_t kSweepSharedBytes = 1024;  // what warps leave for each other
constexpr int64_t kSliceColumns = 16384;
constexpr int64_t kMostSlices = 32;
int64_t slice_columns(int64_t columns);
// Behind it, in kernels that look for a slice's labels: whether one occurs twice, and a bit a column.
constexpr int64_t kLabelHeadBytes = 16;
int64_t label_bytes(int64_t columns);

// One-read kernel: warps that compute, one that moves data and one that merges what the others found.
constexpr int kComputeThreads = 512;
constexpr int kOneReadThreads = kComputeThreads + 64;
constexpr int kMostStages = 4;
constexpr int64_t kOneReadColumns = 8;  // that a thread takes at a time: a row is a multiple of them
// Columns of a row in a CTA of a cluster: a multiple of 64, so that slices start at multiples of 128 bytes.
int64_t cluster_slice(int64_t columns, int cluster);
// Shared memory of the one-read kernel in front of the rows' slots: barriers, results of rows, what warps exchange
// (cuda/one_read/parts.cuh, Shared), and two exchanges of 32 bytes a CTA, double-buffered.
constexpr int64_t kOneReadHead = 2688, kOneReadExchange = 2 * 2 * 32;
int64_t one_read_head_bytes(int cluster);
// Behind the slots, in the kernel of top-k losses (cuda/one_read/topk_kernel.cuh): two numbers an outcome, and the
// labels' gradients of two rows. A thread has two labels.
constexpr int64_t kMostLabels = 2 * kComputeThreads;
constexpr int64_t multiple_of_16(int64_t bytes) { return (bytes + 15) / 16 * 16; }
constexpr int64_t topk_outcome_bytes(int64_t outcomes) { return multiple_of_16(4 * outcomes); }
constexpr int64_t topk_gradient_bytes(int64_t labels, int64_t element_bytes) {
    return multiple_of_16(labels * element_bytes);
}

struct CudaShape {
    int64_t rows = 0, columns = 0;                 // columns: without padding
    int64_t student_bytes = 0, teacher_bytes = 0;  // an element's; 0: no teacher
    bool same_dtype = true;
    bool aligned = true;  // every row of every tensor starts at a multiple of 16 bytes
    bool student_gradient = false, teacher_gradient = false;
    bool known_coefficients = false;  // the gradient can come out of the forward pass
    bool token_parameters = false;
    int64_t labels_per_row = 1;
    int64_t topk_outcomes = 0;  // of a top-k loss; 0: another call
    bool float16 = false;       // what a student's 2 bytes are
    std::vector<std::string> stats;
};

// `capability` 90 for sm_90; `shared_bytes` the most that a block may have there.
struct CudaTarget {
    int capability;
    int64_t shared_bytes;
    int largest_cluster;
    bool refused_clusters = false;  // the device has refused larger ones, which KLDIV_CUDA_PLAN may have asked for
};
// The target of an "sm_90"; throws std::invalid_argument for what the backend does not serve.
CudaTarget cuda_target(int capability);

struct CudaPlan {
    std::string kernel;  // "one-read" or "two-sweep"
    int sweeps = 0;      // over a row, the ones on chip included
    int cluster = 1, stages = 0, threads = 0;
    int64_t shared_bytes = 0;  // of a block
    int64_t bytes = 0;         // through main memory
    std::string reason;

    bool one_read() const { return kernel == "one-read"; }
};

// KLDIV_CUDA_PLAN, for tuning and tests, takes the choice: "two-sweep", or "cluster=4,stages=2" with either part left
// out. Throws std::invalid_argument where it is malformed or does not fit; a call that has to be two-sweep stays so.
CudaPlan plan_cuda(const CudaShape& shape, const CudaTarget& target);

}  // namespace kldiv
