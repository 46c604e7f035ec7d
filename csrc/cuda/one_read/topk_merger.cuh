// The merger of topk_kernel.cuh: from the tail's sum and the labels' logits to the coefficients of all outcomes.
#pragma once

#include "merger.cuh"
#include "../row/outcomes.cuh"
#include "topk_parts.cuh"

namespace kldiv::gpu {

template <int element>
struct TopKMerger : TopKCta<element> {
    using Base = TopKCta<element>;
    using Base::a, Base::call, Base::labels, Base::outcomes, Base::rank, Base::shared, Base::teacher, Base::topk;
    const TopKArguments& arguments;

    KLDIV_DEVICE explicit TopKMerger(const TopKArguments& arguments) : Base(arguments), arguments(arguments) {}

    // What `fetch` leaves of a label that is none, and of one beyond the row; both without mass, as is kNoMass.
    static constexpr float kNone = -std::numeric_limits<float>::infinity(), kBeyond = kNoLogit;

    KLDIV_DEVICE float logit_of(const RowInput& row, int64_t label) const {
        if (label < 0) return kNone;
        if (label >= call.columns) return kBeyond;
        const float x = load_column(row.student, element, label);
        return x <= row.s.floor || label == row.exclude ? kNoMass : x;
    }

    // The row's logits at its labels, and the teacher's side of all outcomes. Every lane has the outcomes that
    // compare_outcomes asks of it, here and below.
    KLDIV_DEVICE void fetch(const RowInput& row, const int64_t* of_row, const float* theirs) const {
        for (int start = thread_index() % 32 * kColumns; start < topk.outcomes; start += kOutcomes) {
            const auto take = [&](float* to, auto from) {
                Columns x;
#pragma unroll
                for (int i = 0; i < kColumns; ++i) x.x[i] = from(start + i);
#pragma unroll
                for (int i = 0; i < kColumns; ++i)
                    if (start + i < topk.outcomes) to[start + i] = x.x[i];
            };
            take(teacher, [&](int j) { return j < topk.outcomes ? theirs[j] : kNone; });
            take(outcomes, [&](int j) { return logit_of(row, j < labels ? of_row[j] : -1); });
        }
    }

    // change(j, outcomes[j]) in the place of each label's outcome.
    template <class Change>
    KLDIV_DEVICE void for_labels(Change change) const {
        for (int start = thread_index() % 32 * kColumns; start < labels; start += kOutcomes) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
                if (start + i < labels) change(start + i, outcomes[start + i]);
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
            for (int i = 0; i < kColumns; ++i) s.x[i] = start + i < labels ? outcomes[start + i] : kNone;
            if (twice) {
                for (int i = 0; i < kColumns; ++i)
                    if (start + i < labels && again(of_row, start + i)) replace(i, kNone, s);
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
    KLDIV_DEVICE void take_logs(int64_t index, const State& tail, const RowInput& row, const Normalised& n) const {
        const auto write = [&](int at, float x) {
            if (rank == 0) call.values[at * call.rows + index] = x;
        };
        for_labels([&](int j, float& outcome) {
            const float logit = outcome, x = log_softmax(logit, row.s, n.ms, n.zs, n.log_zs, false);
            outcome = logit == kNone ? kNone : (logit == kBeyond ? std::numeric_limits<float>::quiet_NaN() : x);
            write(a.logprob_row + j, logit == kNone ? 0.0f : outcome);
        });
        if (arguments.tail_row < 0 || thread_index() % 32 != labels / kColumns % 32) return;
        outcomes[labels] = log_mass(tail.s, n);
        write(arguments.tail_row, outcomes[labels]);
    }

    KLDIV_DEVICE void run() const {
        const Merger<TailSum, element> merger(a);
        const bool first = thread_index() % 32 == 0;
        Stage stage;
        for (int k = 0;; ++k, stage.next(a.stages)) {
            mbarrier_wait(&shared->full[stage.index], stage.parity);
            const int64_t index = shared->row[stage.index].index;
            if (index < 0) return;
            const float scale = topk.scale[index];
            RowResult& result = shared->result[k % 2];
            {
                const RowInput row = open_row(call, index);
                const int64_t* of_row = this->labels_of(index);
                fetch(row, of_row, topk.teacher + index * topk.outcomes);
                const State tail = merger.merged_state(k);
                const bool twice = tail.s.blocked == infinity;
                const Normalised n = normalise(row, whole_of(tail, row, of_row, twice), false);
                take_logs(index, tail, row, n);
                // Not in registers, which the outcomes want.
                if (first) {
                    result.n = n;
                    result.k[kTailM] = tail.s.m;
                    result.k[kTailZ] = tail.s.z;
                    result.k[kTwice] = twice;
                }
            }
            bool any = false;
            const float value = compare_outcomes(
                topk, scale, [&](int j) { return outcomes[j]; }, [&](int j) { return teacher[j]; },
                [&](int j, float coefficient) {
                    outcomes[j] = coefficient;
                    any |= coefficient != 0;
                });
            if (rank == 0 && first) topk.divergences[index] = value;
            // Coefficients of other lanes are looked at now.
            warp_sync();
            finish(k, index, value, any);
            warp_sync();
            if (first) mbarrier_arrive(&shared->ready[k % 2]);
        }
    }

    // The labels' gradients, and what makes the tail's of its columns.
    KLDIV_DEVICE void finish(int k, int64_t index, float value, bool any) const {
        RowResult& result = shared->result[k % 2];
        const float cs = result.n.cs, z = result.k[kTailZ], over_temperature = cs / kLog2e;
        const float of_tail = arguments.tail_row < 0 ? 0.0f : outcomes[labels];
        const bool twice = result.k[kTwice] != 0, massless = z == 0 && of_tail != 0;
        const int64_t* of_row = this->labels_of(index);
        char* gradients = this->gradients(k);
        any = any_lane(any);
        for_labels([&](int j, float& outcome) {
            float g = outcome;
            if (twice) {
                g = 0;
                for (int i = 0; i < labels; ++i) g += of_row[i] == of_row[j] ? outcomes[i] : 0.0f;
            }
            if (massless) {
                const RowInput row = open_row(call, index);
                const float x = ::fmaxf(logit_of(row, of_row[j]), row.s.floor);
                g = fma(of_tail, exp2(fma(x, cs, -result.n.ms)) * result.n.over_zs, g);
            }
            store_column(gradients, element, j, g * over_temperature);
        });
        if (thread_index() % 32 != 0) return;
        result.share = is_nan(value) ? value : (z == 0 ? 0.0f : of_tail / z * over_temperature);
        result.any = any;
    }
};

}  // namespace kldiv::gpu
