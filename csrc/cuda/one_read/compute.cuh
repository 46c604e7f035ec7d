// The compute warps of the one-read kernel: they sweep a CTA's slice of a row, and turn it into the gradient.
#pragma once

#include "parts.cuh"

namespace kldiv::gpu {

template <class D, int element>
struct Compute : Cta<D, element> {
    using Base = Cta<D, element>;
    using Base::a, Base::begin, Base::bytes, Base::call, Base::count, Base::shared, Base::two;
    using Base::holds, Base::raw_at;
    using T = Traits<D>;
    // Where the sums' sweep leaves grad_logq / q for the gradient, in the teacher's place: as float16, rounded by up to
    // 2^-11 of it where a bfloat16 result is by up to 2^-8, and exactly where the logits are float32.
    static constexpr bool parks = D::parks && element != kFloat16;
    static constexpr int parked_element = element == kFloat32 ? kFloat32 : kFloat16;
    // Keeps small ratios, of rows that are close, above float16's subnormal numbers. Where q is not 0 in float32 a
    // ratio is at most 88.
    static constexpr float parked_scale = 512;

    KLDIV_DEVICE explicit Compute(const OneReadArguments& arguments) : Base(arguments) {}

    // The columns that a sweep takes as having no mass, in both rows.
    KLDIV_DEVICE static void leave_out(const StageRow& row, int column, Columns& s, Columns& t) {
        replace(row.excluded - column, row.s.floor, s);
        replace(row.excluded - column, row.t.floor, t);
        raise_to(row.s.floor, s);
        raise_to(row.t.floor, t);
    }

    // The first sweep of row k; false where there is none. `masses` becomes false where some column of this thread has
    // no mass.
    KLDIV_DEVICE bool sweep(int k, const Stage& stage, bool* masses) const {
        mbarrier_wait(&shared->full[stage.index], stage.parity);
        const StageRow row = shared->row[stage.index];
        if (row.index < 0) return false;
        const char *student = this->student_slot(stage.index), *teacher = this->teacher_slot(stage.index);
        State state;
        *masses = true;
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            const Raw<element> raw_s = raw_at(student, column), raw_t = two ? raw_at(teacher, column) : raw_s;
            Columns s = unpack<element>(raw_s), t = unpack<element>(raw_t);
            Range range_s = range<element>(raw_s, s), range_t = two ? range<element>(raw_t, t) : range_s;
            if (range_s.smallest <= row.s.floor || (two && range_t.smallest <= row.t.floor) ||
                holds(column, row.excluded)) {
                *masses = false;
                leave_out(row, column, s, t);
                range_s = range_of(s);
                range_t = range_of(t);
                if constexpr (two) note_blocked(state, s, t, row.s.floor, row.t.floor);
            }
            add_columns<T::first>(state, s, t, range_s.largest, range_t.largest, row.s.c, row.t.c, 0);
        }
        T::merge(state);
        if (thread_index() % 32 == 0) {
            shared->left[k % 2][thread_index() / 32] = T::exchange(state);
            mbarrier_arrive(&shared->swept[k % 2]);
        }
        return true;
    }

    KLDIV_DEVICE void sums(int k, const Stage& stage, bool masses) const {
        mbarrier_wait(&shared->normal[k % 2], parity_of(k));
        const Normalised n = shared->result[k % 2].n;
        const StageRow row = shared->row[stage.index];
        const float unknown[kRowConstants] = {};
        const typename D::template Constants<float> constants(this->alpha_of(row.alpha), row.beta, unknown);
        const char* student = this->student_slot(stage.index);
        char* teacher = this->teacher_slot(stage.index);
        Sums total;
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            Columns s = unpack<element>(raw_at(student, column));
            Columns t = two ? unpack<element>(raw_at(teacher, column)) : s;
            if (!masses) leave_out(row, column, s, t);
            add_terms<D>(total, constants, n, s, t);
            if constexpr (parks) {
                Columns ratio;
#pragma unroll
                for (int i = 0; i < kColumns; ++i)
                    ratio.x[i] =
                        ::fmaxf(-6e4f, parked_scale * D::grad_logq_over_q(element_of<D>(n, s.x[i], t.x[i]), constants));
                *reinterpret_cast<Raw<parked_element>*>(teacher + column * bytes) = pack<parked_element>(ratio);
            }
        }
        merge_lanes(total);
        if (thread_index() % 32 == 0) {
            shared->left_sums[k % 2][thread_index() / 32] = T::exchange(total);
            mbarrier_arrive(&shared->summed[k % 2]);
        }
    }

    // The gradient of eight columns, the label's apart.
    KLDIV_DEVICE Columns gradient_of(const StageRow& row, const RowResult& result, bool bounded, bool masses,
                                     const typename D::template Constants<float>& constants, int column,
                                     const char* student, const char* teacher) const {
        const Normalised& n = result.n;
        Columns s = unpack<element>(raw_at(student, column)), g;
        Columns t = two && !parks ? unpack<element>(raw_at(teacher, column)) : s;
        if (!masses) leave_out(row, column, s, t);
        if constexpr (parks) {
            const Columns ratio =
                unpack<parked_element>(*reinterpret_cast<const Raw<parked_element>*>(teacher + column * bytes));
            const float weight = result.weight / parked_scale;
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
                g.x[i] = exp2(fma(s.x[i], n.cs, -n.ms)) * n.over_zs * fma(weight, ratio.x[i], result.share);
        } else if constexpr (T::forward) {
            // w (q - p) + share q with what q and p are multiplied by taken together; exactly 0 where the rows are
            // equal.
            const float of_q = (result.weight + result.share) * n.over_zs, of_p = result.weight * n.over_zt;
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
                g.x[i] = exp2(fma(s.x[i], n.cs, -n.ms)) * of_q - exp2(fma(t.x[i], n.ct, -n.mt)) * of_p;
        } else if (bounded) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const Element<float> e = element_of<D>(n, s.x[i], t.x[i]);
                g.x[i] = fma(result.weight, D::grad_logq(e, constants), result.share * e.q);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const Element<float> e = element_of<D>(n, opaque(s.x[i]), opaque(t.x[i]));
                // 0 * inf: a column without mass takes no share of an infinite sum, which outweighs all own terms.
                g.x[i] = e.q == 0 ? 0.0f : result.share * e.q;
            }
        }
        return g;
    }

    KLDIV_DEVICE void gradient(int k, const Stage& stage, bool masses) const {
        mbarrier_wait(&shared->ready[k % 2], parity_of(k));
        const RowResult result = shared->result[k % 2];
        const StageRow row = shared->row[stage.index];
        char* student = this->student_slot(stage.index);
        const char* teacher = this->teacher_slot(stage.index);
        if (result.any) {
            const typename D::template Constants<float> constants(this->alpha_of(row.alpha), row.beta, result.k);
            const bool bounded = abs(result.share) < infinity;
            for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
                Columns g = gradient_of(row, result, bounded, masses, constants, column, student, teacher);
                if (holds(column, result.label)) {
#pragma unroll
                    for (int i = 0; i < kColumns; ++i)
                        g.x[i] += result.label - column == i ? result.label_weight : 0.0f;
                }
                if (holds(column, row.excluded)) replace(row.excluded - column, 0.0f, g);
                *reinterpret_cast<Raw<element>*>(student + column * bytes) = pack<element>(g);
            }
        } else {
            for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns)
                *reinterpret_cast<Raw<element>*>(student + column * bytes) = Raw<element>{};
        }
        if (begin + count == call.columns)
            zero_columns(call.d_student, element, row.index, call.columns, call.d_student.width, kComputeThreads);
        fence_async_proxy();
        warp_sync();
        if (thread_index() % 32 == 0) mbarrier_arrive(&shared->done[stage.index]);
    }

    KLDIV_DEVICE void run() const {
        bool masses = true, next_masses = true, swept = false;
        Stage stage;
        for (int k = 0;; ++k) {
            if (!swept && !sweep(k, stage, &next_masses)) return;
            masses = next_masses;
            if constexpr (T::needs_sums) sums(k, stage, masses);
            Stage next = stage;
            next.next(a.stages);
            // With one stage the next row comes only after this one has left.
            swept = a.stages > 1 && sweep(k + 1, next, &next_masses);
            gradient(k, stage, masses);
            if (a.stages > 1 && !swept) return;
            stage = next;
        }
    }
};

}  // namespace kldiv::gpu
