// The one-read kernel of top-k divergences (outcomes.cuh): the roles and the order of one_read.cuh, 1u + 1u.
//
// The compute warps take a row's labels out of its slice before they sweep it, so that what they find is the tail's own
// sum. The merger asks for the labels' logits meanwhile, from the second-level cache, where the row has just been; with
// the tail it makes the whole softmax of them, and from the outcomes the coefficients. Every CTA's merger does so, with
// equal bits. A gradient is then
//
//   a column of the tail   c_tail q_j / q_tail, without 1 - sum of q
//   a label                c_j, put into the slice after its neighbours
//
// since the coefficients of all outcomes add up to 0; but those of a tail without mass, which no column takes.
#pragma once

#include "merger.cuh"
#include "mover.cuh"
#include "outcomes.cuh"

namespace kldiv::gpu {

struct TopKArguments : OneReadArguments {
    TopK topk;
    int tail_row;  // of the table of values; -1: no outcome
};

// In the place of a divergence: the sweep takes the sum of the tail.
struct TailSum {
    static constexpr bool needs_p = false;
};
template <>
struct Traits<TailSum> {
    static constexpr bool needs_sums = false;

    // `blocked` above all logits: some label of the row occurs twice.
    KLDIV_DEVICE static void merge(State& x) {
        merge_lanes<0>(x);
        x.s.blocked = warp_max(x.s.blocked);
    }
    KLDIV_DEVICE static Exchanged exchange(const State& x) { return {{x.s.m, x.s.z, 0, x.s.blocked}}; }
    KLDIV_DEVICE static State state_of(const Exchanged& from) {
        State x;
        x.s = {from.x[0], from.x[1], 0, from.x[3]};
        return x;
    }
};

// Behind the stages: what the outcomes are (one number each), and the labels' gradients by the parity of the row.
template <int element>
struct TopKCta : Cta<TailSum, element> {
    using Base = Cta<TailSum, element>;
    const TopK& topk;
    int labels;  // of a row
    float* outcomes;

    KLDIV_DEVICE explicit TopKCta(const TopKArguments& arguments)
        : Base(arguments), topk(arguments.topk), labels(static_cast<int>(arguments.call.labels_per_row)) {
        outcomes = reinterpret_cast<float*>(this->student_slot(this->a.stages));
    }
    KLDIV_DEVICE char* gradients(int k) const {
        const int64_t behind = topk_outcome_bytes(topk.outcomes);
        return reinterpret_cast<char*>(outcomes) + behind + k % 2 * topk_gradient_bytes(labels, Base::bytes);
    }
    // Those of row `index`; none for -1.
    KLDIV_DEVICE const int64_t* labels_of(int64_t index) const { return this->call.labels + index * labels; }
};

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
        const float m = result.n.ms, share = result.share;
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
            if (any && places.column[i] >= 0)
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

template <int element>
struct TopKMerger : TopKCta<element> {
    using Base = TopKCta<element>;
    using Base::a, Base::call, Base::labels, Base::outcomes, Base::rank, Base::shared, Base::topk;
    static constexpr float none = -std::numeric_limits<float>::infinity();
    const TopKArguments& arguments;

    KLDIV_DEVICE explicit TopKMerger(const TopKArguments& arguments) : Base(arguments), arguments(arguments) {}

    // body(j) for this lane's labels: always the same ones, as compare_outcomes has them.
    template <class Body>
    KLDIV_DEVICE void for_labels(Body body) const {
        for (int start = thread_index() % 32 * kColumns; start < labels; start += kOutcomes)
            for (int j = start; j < start + kColumns && j < labels; ++j) body(j);
    }

    // The row's logits at its labels, to `outcomes`; -inf for a label that is none.
    KLDIV_DEVICE void fetch(const RowInput& row, const int64_t* of_row) const {
        for (int start = thread_index() % 32 * kColumns; start < labels; start += kOutcomes) {
            float x[kColumns];
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const int64_t label = start + i < labels ? of_row[start + i] : -1;
                const bool there = label >= 0 && label < call.columns && label != row.exclude;
                x[i] = there ? load_column(row.student, element, label) : none;
            }
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
                if (start + i < labels) outcomes[start + i] = x[i];
        }
    }

    // Whether an earlier label of the row is the same.
    KLDIV_DEVICE static bool again(const int64_t* of_row, int j) {
        for (int i = 0; i < j; ++i)
            if (of_row[i] == of_row[j]) return true;
        return false;
    }

    // Of the whole row, in every lane: of its tail, and of its labels, each once.
    KLDIV_DEVICE State whole_of(const State& tail, const RowInput& row, const int64_t* of_row, bool twice) const {
        State state;
        for (int start = thread_index() % 32 * kColumns; start < labels; start += kOutcomes) {
            Columns s;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) s.x[i] = start + i < labels ? outcomes[start + i] : none;
            if (twice) {
                for (int i = 0; i < kColumns; ++i)
                    if (start + i < labels && again(of_row, start + i)) replace(i, none, s);
            }
            raise_to(row.s.floor, s);
            add_columns<0>(state, s, s, range_of(s).largest, 0, row.s.c, 0, 0);
        }
        merge_lanes<0>(state);
        const int lane = thread_index() % 32;
        if (lane > 0) state = lane == 1 ? tail : State{};
        merge_lanes<0>(state);
        return state;
    }

    // Log-probabilities in the place of logits, the tail's behind them; the table of values.
    KLDIV_DEVICE void take_logs(int64_t index, const State& tail, const RowInput& row, const Normalised& n,
                                const int64_t* of_row) const {
        const auto write = [&](int at, float x) {
            if (rank == 0) call.values[at * call.rows + index] = x;
        };
        for_labels([&](int j) {
            const int64_t label = of_row[j];
            float x = log_softmax(outcomes[j], row.s, n.ms, n.zs, n.log_zs, false);
            if (label >= call.columns) x = std::numeric_limits<float>::quiet_NaN();
            outcomes[j] = label < 0 ? none : x;
            write(a.logprob_row + j, label < 0 ? 0.0f : x);
        });
        if (arguments.tail_row < 0 || thread_index() % 32 != labels / kColumns % 32) return;
        outcomes[labels] = log_mass(tail.s, n);
        write(arguments.tail_row, outcomes[labels]);
    }

    KLDIV_DEVICE void run() const {
        const Merger<TailSum, element> merger(a);
        Stage stage;
        for (int k = 0;; ++k, stage.next(a.stages)) {
            mbarrier_wait(&shared->full[stage.index], stage.parity);
            const int64_t index = shared->row[stage.index].index;
            if (index < 0) return;
            const RowInput row = open_row(call, index);
            const int64_t* of_row = this->labels_of(index);
            const float scale = topk.scale[index];
            fetch(row, of_row);

            const State tail = merger.merged_state(k);
            const bool twice = tail.s.blocked == infinity;
            const Normalised n = normalise(row, whole_of(tail, row, of_row, twice), false);
            take_logs(index, tail, row, n, of_row);
            const float* teacher = topk.teacher + index * topk.outcomes;
            const float value = compare_outcomes(
                topk, scale, [&](int j) { return outcomes[j]; }, [&](int j) { return teacher[j]; },
                [&](int j, float coefficient) { outcomes[j] = coefficient; });
            if (rank == 0 && thread_index() % 32 == 0) topk.divergences[index] = value;
            // Coefficients of other lanes are looked at now.
            warp_sync();
            finish(k, row, n, tail, of_row, twice, value);
        }
    }

    // The labels' gradients, and what makes the tail's of its columns.
    KLDIV_DEVICE void finish(int k, const RowInput& row, const Normalised& n, const State& tail, const int64_t* of_row,
                             bool twice, float value) const {
        const float of_tail = arguments.tail_row < 0 ? 0.0f : outcomes[labels], over_temperature = n.cs / kLog2e;
        const bool massless = tail.s.z == 0;
        bool any = of_tail != 0;
        for_labels([&](int j) {
            float g = outcomes[j];
            any |= g != 0;
            if (twice) {
                g = 0;
                for (int i = 0; i < labels; ++i) g += of_row[i] == of_row[j] ? outcomes[i] : 0.0f;
            }
            const bool there = of_row[j] >= 0 && of_row[j] < call.columns && of_row[j] != row.exclude;
            if (massless && there && of_tail != 0) {
                const float x = ::fmaxf(load_column(row.student, element, of_row[j]), row.s.floor);
                g = fma(of_tail, exp2(fma(x, n.cs, -n.ms)) * n.over_zs, g);
            }
            store_column(this->gradients(k), element, j, there ? g * over_temperature : 0.0f);
        });
        any = any_lane(any);
        RowResult& result = shared->result[k % 2];
        if (thread_index() % 32 == 0) {
            result.n.ms = tail.s.m;
            result.share = massless ? 0.0f : of_tail / tail.s.z * over_temperature;
            if (is_nan(value)) result.share = value;
            result.any = any;
        }
        warp_sync();
        if (thread_index() % 32 == 0) mbarrier_arrive(&shared->ready[k % 2]);
    }
};

template <int element>
KLDIV_KERNEL(kOneReadThreads, 1)
one_read_topk(TopKArguments arguments) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    Cta<TailSum, element>(arguments).start();
    const int warp = thread_index() / 32;
    if (warp < kComputeWarps)
        TopKCompute<element>(arguments).run();
    else if (warp == kMerger)
        TopKMerger<element>(arguments).run();
    else if (thread_index() % 32 == 0)
        Mover<TailSum, element>(arguments).run();
#else
    // `plan` (launch.cu) does not choose it where it was compiled for less.
    __trap();
#endif
}

}  // namespace kldiv::gpu
