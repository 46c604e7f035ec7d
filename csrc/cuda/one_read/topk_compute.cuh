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

    KLDIV_DEVICE bool sweep(int k, const Stage& stage, const Places& places, bool* masses) const {
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
        *masses = true;
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            const Raw<element> raw = this->raw_at(student, column);
            Columns s = unpack<element>(raw);
            Range range_s = range<element>(raw, s);
            if (range_s.smallest <= row.s.floor || this->holds(column, row.excluded)) {
                *masses = false;
                leave_out(row, column, s);
                range_s = range_of(s);
            }
            add_columns<0>(state, s, s, range_s.largest, 0, row.s.c, 0, 0);
        }
        Traits<TailSum>::merge(state);
        if (thread_index() % 32 == 0) {
            shared->left[k % 2][thread_index() / 32] = Traits<TailSum>::exchange(state);
            mbarrier_arrive(&shared->swept[k % 2]);
        }
        return true;
    }
    KLDIV_DEVICE static void leave_out(const StageRow& row, int column, Columns& s) {
        replace(row.excluded - column, row.s.floor, s);
        raise_to(row.s.floor, s);
    }

    KLDIV_DEVICE void gradient(int k, const Stage& stage, const Places& places, bool masses) const {
        mbarrier_wait(&shared->ready[k % 2], parity_of(k));
        const RowResult& result = shared->result[k % 2];
        const StageRow row = shared->row[stage.index];
        char* student = this->student_slot(stage.index);
        const float m = result.k[kTailM], share = result.share;
        const bool any = result.any;
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            Columns g{};
            if (any) {
                Columns s = unpack<element>(this->raw_at(student, column));
                if (!masses) leave_out(row, column, s);
#pragma unroll
                for (int i = 0; i < kColumns; ++i) g.x[i] = exp2(fma(s.x[i], row.s.c, -m)) * share;
                if (this->holds(column, row.excluded)) replace(row.excluded - column, 0.0f, g);
            }
            *reinterpret_cast<Raw<element>*>(student + column * bytes) = pack<element>(g);
        }
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
        bool masses = true, next_masses = true, swept = false;
        Labels ahead = next_labels();
        Places here, next_here;
        const auto sweep_next = [&](int k, const Stage& stage) {
            next_here = places_of(ahead);
            ahead = next_labels();
            return sweep(k, stage, next_here, &next_masses);
        };
        Stage stage;
        for (int k = 0;; ++k) {
            if (!swept && !sweep_next(k, stage)) return;
            masses = next_masses;
            here = next_here;
            Stage next = stage;
            next.next(a.stages);
            // With one stage the next row comes only after this one has left.
            swept = a.stages > 1 && sweep_next(k + 1, next);
            gradient(k, stage, here, masses);
            if (a.stages > 1 && !swept) return;
            stage = next;
        }
    }
};

}  // namespace kldiv::gpu
