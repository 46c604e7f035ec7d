// The k largest columns of each row: one read of the logits, in memory's time where k is small.
#pragma once

#include "rows.h"

namespace kldiv {

struct Selection {
    const Kernels* kernels;
    Rows logits;
    int64_t rows, columns, k;
    const bool* mask = nullptr;  // [N]; rows that it leaves out are not read and get columns 0 .. k-1
    int64_t* ids = nullptr;      // [N, k], the largest first; of equal ones that of the smaller number
    int64_t threads = 1;
};

void run_largest(const Selection& selection);

}  // namespace kldiv
