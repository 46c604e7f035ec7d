// The first sweep of a slice where columns need no more than their exponentials: a thread reads a batch of its columns
// ahead, as they stand in memory, and takes the batch's largest logits before any exponential. So references move once
// a batch, and all reads of a batch are on their way together.
#pragma once

#include "slices.cuh"

namespace kldiv::gpu {

// `element`: of both rows; kFloat32 also serves rows of other and different elements, converted.
template <int FIRST, int element>
struct Batches {
    static constexpr bool two = (FIRST & kTeacher) != 0;
    // Times eight columns: 16 registers of each row.
    static constexpr int kBatch = 8 / kElementBytes<element>;
    static constexpr int kStride = kSweepThreads * kColumns;

    struct Batch {
        Raw<element> s[kBatch], t[two ? kBatch : 1];
    };

    const Call& call;
    const RowInput& row;
    int64_t begin, limit;
    bool words;  // groups of columns are words in memory

    KLDIV_DEVICE Batches(const Call& call, const RowInput& row, int64_t begin, int64_t limit)
        : call(call), row(row), begin(begin), limit(limit) {
        words = call.student.element == element && aligned(row.student, element, begin);
        if constexpr (two) words = words && call.teacher.element == element && aligned(row.teacher, element, begin);
    }

    // Whether the batch from `start` on is words in memory, none of them beyond the limit or with the excluded column.
    KLDIV_DEVICE bool whole(int64_t start) const {
        constexpr int64_t span = (kBatch - 1) * kStride + kColumns;
        const int64_t excluded = row.exclude - start;
        return words && start + span <= limit && !(excluded >= 0 && excluded < span);
    }
    KLDIV_DEVICE void load_words_of(int64_t start, int i, Batch& batch) const {
        batch.s[i] = load_aligned<element>(row.student + (start + i * kStride) * kElementBytes<element>);
        if constexpr (two)
            batch.t[i] = load_aligned<element>(row.teacher + (start + i * kStride) * kElementBytes<element>);
    }
    KLDIV_DEVICE void load_any(int64_t start, Batch& batch) const {
        RawPair raw[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) raw[i] = load_ahead<two>(call, row, start + i * kStride, limit);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const Pair pair = pair_of<two>(raw[i], call, row, start + i * kStride);
            batch.s[i] = pack<element>(pair.s);
            if constexpr (two) batch.t[i] = pack<element>(pair.t);
        }
    }

    // The batch is added to the state, and the one from `following` on takes its place; false where it is not whole.
    KLDIV_DEVICE bool add(State& state, Batch& batch, int64_t following) const {
        Extremes<element> of_s, of_t;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            of_s.add(batch.s[i]);
            if constexpr (two) of_t.add(batch.t[i]);
        }
        const Range s = of_s.range(), t = of_t.range();
        move_up<FIRST>(state, s.largest, t.largest, row.s.c, row.t.c);
        const bool masks = s.smallest <= row.s.floor || (two && t.smallest <= row.t.floor), more = whole(following);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            Columns x = unpack<element>(batch.s[i]), y = two ? unpack<element>(batch.t[i]) : x;
            if (more) load_words_of(following, i, batch);
            if (masks) {
                raise_to(row.s.floor, x);
                raise_to(row.t.floor, y);
                if constexpr (two) note_blocked(state, x, y, row.s.floor, row.t.floor);
            }
            add_exponentials<FIRST>(state, x, y, row.s.c, row.t.c);
        }
        return more;
    }

    KLDIV_DEVICE State sweep() const {
        State state;
        int64_t start = begin + thread_index() * kColumns;
        Batch batch;
        bool loaded = whole(start);
        if (loaded) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) load_words_of(start, i, batch);
        }
        for (; start < limit; start += kBatch * kStride) {
            if (!loaded) load_any(start, batch);
            loaded = add(state, batch, start + kBatch * kStride);
        }
        return state;
    }
};

}  // namespace kldiv::gpu
