// The compute warps of topk_kernel.cuh: they sweep a CTA's slice of a row without the row's labels, and turn it into
// the gradient.
#pragma once

#include "topk_parts.cuh"

namespace kldiv::gpu {

template <int element>
struct TopKCompute : TopKCta<element> {
    using Base = TopKCta<element>;
    using Base::a, Base::begin, Base::bytes, Base::call, Base::count, Base::labels, Base::shared;
    using Bits = std::conditional_t<element == kFloat32, uint32_t, uint16_t>;
    static constexpr int kEach = kMostLabels / kComputeThreads;
    // Turns of a sweep's loops taken together: float32 has no registers for more.
    static constexpr int kTurns = element == kFloat32 ? 1 : 4;

    // This thread's labels of a row: as they are, and as columns of this CTA's slice, -1 outside.
    struct Labels {
        int64_t of_row[kEach];
    };
    struct Places {
        int column[kEach];
    };

    RowsOfCluster rows;  // ahead of the sweeps

    KLDIV_DEVICE explicit TopKCompute(const TopKArguments& arguments) : Base(arguments), rows(a.cluster) {}

    // Asked for a row ahead.
    KLDIV_DEVICE Labels next_labels() {
        const int64_t index = rows.following(call);
        Labels out;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int j = thread_index() + i * kComputeThreads;
            out.of_row[i] = index >= 0 && j < labels ? this->labels_of(index)[j] : -1;
        }
        return out;
    }
    KLDIV_DEVICE Places places_of(const Labels& from) const {
        Places out;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const bool here = from.of_row[i] >= begin && from.of_row[i] < begin + count;
            out.column[i] = here ? static_cast<int>(from.of_row[i] - begin) : -1;
        }
        return out;
    }

    // -2^100 and numbers below it, all without mass: which of a row's labels a column is.
    KLDIV_DEVICE static Bits mark(int label) {
        return static_cast<Bits>((element == kFloat32 ? 0xf1800000u : 0xf180u) + static_cast<uint32_t>(label));
    }
    KLDIV_DEVICE static Bits& bits_at(char* slot, int column) { return reinterpret_cast<Bits*>(slot)[column]; }

    KLDIV_DEVICE bool sweep(int k, const Stage& stage, const Places& places) const {
        mbarrier_wait(&shared->full[stage.index], stage.parity);
        const StageRow row = shared->row[stage.index];
        if (row.index < 0) return false;
        char* student = this->student_slot(stage.index);
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (places.column[i] >= 0) bits_at(student, places.column[i]) = mark(thread_index() + i * kComputeThreads);
        block_sync(1, kComputeThreads);
        State state;
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (places.column[i] >= 0 &&
                bits_at(student, places.column[i]) != mark(thread_index() + i * kComputeThreads))
                state.s.blocked = infinity;
        // A label that is left out has no mass already, and its mark is being read.
        if (this->sweeps(row.excluded) && !(load_column(student, element, row.excluded) <= row.s.floor))
            store_column(student, element, row.excluded, -std::numeric_limits<float>::infinity());
        Extremes<element> extremes;
#pragma unroll kTurns
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns)
            extremes.add(this->raw_at(student, column));
        // Columns without mass need no care: 2^-inf is 0 here and in the gradient.
        state.s.m = max(kNoReference, warp_max(extremes.range().largest) * row.s.c);
#pragma unroll kTurns
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            const Columns s = unpack<element>(this->raw_at(student, column));
            add_exponentials<0>(state, s, s, row.s.c, 0);
        }
        merge_alike<0>(state);
        state.s.blocked = warp_max(state.s.blocked);
        if (thread_index() % 32 == 0) {
            shared->left[k % 2][thread_index() / 32] = Traits<TailSum>::exchange(state);
            mbarrier_arrive(&shared->swept[k % 2]);
        }
        return true;
    }

    KLDIV_DEVICE void gradient(int k, const Stage& stage, const Places& places) const {
        mbarrier_wait(&shared->ready[k % 2], parity_of(k));
        const RowResult& result = shared->result[k % 2];
        const StageRow row = shared->row[stage.index];
        char* student = this->student_slot(stage.index);
        const float m = result.k[kTailM], share = result.share;
        const bool any = result.any;
        for (int column = thread_index() * kColumns; any && column < count; column += kComputeThreads * kColumns) {
            const Columns s = unpack<element>(this->raw_at(student, column));
            Columns g;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) g.x[i] = exp2(fma(s.x[i], row.s.c, -m)) * share;
            this->store(student, column, g);
        }
        for (int column = thread_index() * kColumns; !any && column < count; column += kComputeThreads * kColumns)
            this->store(student, column, Columns{});
        if (this->sweeps(row.excluded)) store_column(student, element, row.excluded, 0);
        if (begin + count == call.columns)
            zero_columns(call.d_student, element, row.index, call.columns, call.d_student.width, kComputeThreads);
        // A label's column is written after its neighbours.
        block_sync(1, kComputeThreads);
        const Bits* of_labels = reinterpret_cast<const Bits*>(this->gradients(k));
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (any && places.column[i] >= 0 && places.column[i] != row.excluded)
                bits_at(student, places.column[i]) = of_labels[thread_index() + i * kComputeThreads];
        fence_async_proxy();
        warp_sync();
        if (thread_index() % 32 == 0) mbarrier_arrive(&shared->done[stage.index]);
    }

    KLDIV_DEVICE void run() {
        bool swept = false;
        Labels ahead = next_labels();
        Places here, next_here;
        const auto sweep_next = [&](int k, const Stage& stage) {
            next_here = places_of(ahead);
            ahead = next_labels();
            return sweep(k, stage, next_here);
        };
        Stage stage;
        for (int k = 0;; ++k) {
            if (!swept && !sweep_next(k, stage)) return;
            here = next_here;
            Stage next = stage;
            next.next(a.stages);
            // With one stage the next row comes only after this one has left.
            swept = a.stages > 1 && sweep_next(k + 1, next);
            gradient(k, stage, here);
            if (a.stages > 1 && !swept) return;
            stage = next;
        }
    }
};

}  // namespace kldiv::gpu
