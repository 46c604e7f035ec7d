// Which columns of a slice are labels of its row: a bit a column, in shared memory behind what warps leave for each
// other. A row may have as many labels as columns, and one of them twice.
#pragma once

#include "../row/columns.cuh"
#include "../job.h"

namespace kldiv::gpu {

struct LabelBits {
    uint32_t *twice, *words;  // whether some label of the slice occurs twice; 32 columns a word
    int64_t begin;

    KLDIV_DEVICE explicit LabelBits(int64_t begin) : begin(begin) {
        twice = reinterpret_cast<uint32_t*>(shared_memory() + kSweepSharedBytes);
        words = twice + kLabelHeadBytes / 4;
    }

    // The labels of row `index` in columns [begin, limit); all threads of the block together.
    KLDIV_DEVICE void find(const Call& call, int64_t index, int64_t limit) const {
        if (thread_index() == 0) *twice = 0;
        for (int64_t i = thread_index(); 32 * i < limit - begin; i += block_threads()) words[i] = 0;
        block_sync(0, block_threads());
        const int64_t* labels = call.labels + index * call.labels_per_row;
        for (int64_t j = thread_index(); j < call.labels_per_row; j += block_threads()) {
            if (labels[j] < begin || labels[j] >= limit) continue;
            const uint32_t at = static_cast<uint32_t>(labels[j] - begin), bit = 1u << at % 32;
            if (shared_or(words + at / 32, bit) & bit) *twice = 1;
        }
        block_sync(0, block_threads());
    }

    // Of the slice whose labels were found.
    KLDIV_DEVICE static bool some_twice() { return *LabelBits(0).twice != 0; }
    // Of columns [start, start + 8), the first in the lowest bit.
    KLDIV_DEVICE uint32_t of(int64_t start) const {
        const uint32_t at = static_cast<uint32_t>(start - begin);
        return words[at / 32] >> at % 32 & 0xff;
    }
};

// The columns whose bits are set have no mass.
KLDIV_DEVICE void leave_out(uint32_t which, Columns& columns) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
        columns.x[i] = which >> i & 1 ? -std::numeric_limits<float>::infinity() : columns.x[i];
}

}  // namespace kldiv::gpu
