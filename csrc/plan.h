// Chooses how a call runs on the CPU. The launcher and `kldiv_kernels.plan` use the same function.
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

}  // namespace kldiv
