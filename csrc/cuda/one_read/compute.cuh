// The compute warps of the one-read kernel: they sweep a CTA's slice of a row, and turn it into the gradient.
#pragma once

#include "usual_sums.cuh"

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

    KLDIV_DEVICE explicit Compute(const OneReadArguments& arguments) : Base(arguments) {}

    // body(column, its logits) for this thread's columns. `raise`: those without mass come at the floor.
    template <class Body>
    KLDIV_DEVICE void for_columns(const StageRow& row, bool raise, const char* student, const char* teacher,
                                  Body body) const {
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            Columns s = unpack<element>(raw_at(student, column));
            Columns t = two ? unpack<element>(raw_at(teacher, column)) : s;
            if (raise) {
                raise_to(row.s.floor, s);
                raise_to(row.t.floor, t);
            }
            body(column, s, t);
        }
    }

    // The first sweep of row k; false where there is none. `masses` becomes false where some column of this warp has no
    // mass. A look at all columns comes before their exponentials: it costs less than asking at every few columns
    // whether a reference has to move, and lanes with the same references merge by sums.
    KLDIV_DEVICE bool sweep(int k, const Stage& stage, bool* masses) const {
        mbarrier_wait(&shared->full[stage.index], stage.parity);
        const StageRow row = shared->row[stage.index];
        if (row.index < 0) return false;
        char *student = this->student_slot(stage.index), *teacher = this->teacher_slot(stage.index);
        if (this->sweeps(row.excluded)) {
            store_column(student, element, row.excluded, -std::numeric_limits<float>::infinity());
            if constexpr (two) store_column(teacher, element, row.excluded, -std::numeric_limits<float>::infinity());
        }
        Extremes<element> of_s, of_t;
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            of_s.add(raw_at(student, column));
            if constexpr (two) of_t.add(raw_at(teacher, column));
        }
        const Range range_s = of_s.range(), range_t = of_t.range();
        State state;
        state.s.m = max(kNoReference, warp_max(range_s.largest) * row.s.c);
        if constexpr (two) state.t.m = max(kNoReference, warp_max(range_t.largest) * row.t.c);
        *masses = !any_lane(range_s.smallest <= ::fmaxf(row.s.floor, kUsualLogit) ||
                            (two && range_t.smallest <= ::fmaxf(row.t.floor, kUsualLogit)));
        if (*masses) {
            for_columns(row, false, student, teacher, [&](int, const Columns& s, const Columns& t) {
                add_exponentials<T::first>(state, s, t, row.s.c, row.t.c);
            });
        } else {
            for_columns(row, true, student, teacher, [&](int, const Columns& s, const Columns& t) {
                if constexpr (two) note_blocked(state, s, t, row.s.floor, row.t.floor);
                add_exponentials<T::first>(state, s, t, row.s.c, row.t.c);
            });
        }
        merge_alike<T::first>(state);
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
        const auto park = [&](int column, const Columns& ratio) {
            if constexpr (parks)
                *reinterpret_cast<Raw<parked_element>*>(teacher + column * bytes) = pack_finite<parked_element>(ratio);
        };
        const auto add = [&](int column, const Columns& s, const Columns& t) {
            add_terms<D>(total, constants, n, s, t);
            if constexpr (parks) {
                Columns ratio;
#pragma unroll
                for (int i = 0; i < kColumns; ++i)
                    ratio.x[i] =
                        ::fmaxf(-6e4f, kParkedScale * D::grad_logq_over_q(element_of<D>(n, s.x[i], t.x[i]), constants));
                park(column, ratio);
            }
        };
        if constexpr (UsualSums<D>::exists) {
            if (masses) {
                UsualSums<D> usual(n, constants);
                for_columns(row, false, student, teacher, [&](int column, const Columns& s, const Columns& t) {
                    Columns ratio;
#pragma unroll
                    for (int i = 0; i < kColumns; ++i) ratio.x[i] = usual.add(s.x[i], t.x[i]);
                    park(column, ratio);
                });
                usual.finish(total);
            } else {
                for_columns(row, true, student, teacher, add);
            }
        } else {
            for_columns(row, !masses, student, teacher, add);
        }
        merge_lanes<D>(total);
        if (thread_index() % 32 == 0) {
            shared->left_sums[k % 2][thread_index() / 32] = T::exchange(total);
            mbarrier_arrive(&shared->summed[k % 2]);
        }
    }

    // What the gradient of a column is made of beside the student's logits.
    KLDIV_DEVICE static Columns others_at(const char* teacher, int column) {
        if constexpr (parks) {
            // A copy: of a reference the compiler makes four loads, not one.
            const Raw<parked_element> raw = *reinterpret_cast<const Raw<parked_element>*>(teacher + column * bytes);
            return unpack<parked_element>(raw);
        } else {
            return unpack<element>(raw_at(teacher, column));
        }
    }

    // The label's column is read before its neighbours are written, and written after them.
    template <class Usual>
    KLDIV_DEVICE void usual_gradient(const RowResult& result, const Usual& usual, char* student,
                                     const char* teacher) const {
        const bool labelled = this->sweeps(result.label);
        float label_s = 0;
        if (labelled) label_s = load_column(student, element, result.label);
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            const Columns s = unpack<element>(raw_at(student, column)), t = two ? others_at(teacher, column) : s;
            Columns g;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) g.x[i] = usual.of(s.x[i], t.x[i]);
            this->store(student, column, g);
        }
        if (labelled) {
            const float t = two ? load_column(teacher, parks ? parked_element : element, result.label) : label_s;
            store_column(student, element, result.label, usual.of(label_s, t) + result.label_weight);
        }
    }

    // The gradient of any row.
    KLDIV_DEVICE void any_gradient(const StageRow& row, const RowResult& result, bool masses, char* student,
                                   const char* teacher) const {
        const Normalised& n = result.n;
        const typename D::template Constants<float> constants(this->alpha_of(row.alpha), row.beta, result.k);
        const bool bounded = abs(result.share) < infinity;
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            Columns s = unpack<element>(raw_at(student, column)), t = two ? others_at(teacher, column) : s, g;
            if (!masses) {
                raise_to(row.s.floor, s);
                if constexpr (!parks) raise_to(row.t.floor, t);
            }
            if constexpr (parks) {
                const UsualGradient<D> usual(result);
#pragma unroll
                for (int i = 0; i < kColumns; ++i) g.x[i] = usual.of(s.x[i], t.x[i]);
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
            if (holds(column, result.label)) {
#pragma unroll
                for (int i = 0; i < kColumns; ++i) g.x[i] += result.label - column == i ? result.label_weight : 0.0f;
            }
            if (holds(column, row.excluded)) replace(row.excluded - column, 0.0f, g);
            this->store(student, column, g);
        }
    }

    KLDIV_DEVICE void gradient(int k, const Stage& stage, bool masses) const {
        mbarrier_wait(&shared->ready[k % 2], parity_of(k));
        const RowResult result = shared->result[k % 2];
        const StageRow row = shared->row[stage.index];
        char* student = this->student_slot(stage.index);
        const char* teacher = this->teacher_slot(stage.index);
        if (!result.any) {
            for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns)
                *reinterpret_cast<Raw<element>*>(student + column * bytes) = Raw<element>{};
        } else if constexpr (UsualGradient<D>::exists && (parks || !D::parks)) {
            const UsualGradient<D> usual(result);
            if (masses && usual.usual())
                usual_gradient(result, usual, student, teacher);
            else
                any_gradient(row, result, masses, student, teacher);
        } else {
            any_gradient(row, result, masses, student, teacher);
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
