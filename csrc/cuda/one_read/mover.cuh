// The mover of the one-read kernel: one thread that loads rows, and stores their gradients, which stand where the
// student's logits were.
#pragma once

#include "parts.cuh"

namespace kldiv::gpu {

template <class D, int element>
struct Mover : Cta<D, element> {
    using Base = Cta<D, element>;
    using Base::a, Base::begin, Base::bytes, Base::call, Base::count, Base::shared, Base::two;

    RowsOfCluster rows;

    KLDIV_DEVICE explicit Mover(const OneReadArguments& arguments) : Base(arguments), rows(a.cluster) {}

    KLDIV_DEVICE uint32_t size() const { return static_cast<uint32_t>(count * bytes); }

    // Asked for before the stage is free: what it reads of global memory has arrived by then.
    KLDIV_DEVICE StageRow following() {
        StageRow out{};
        out.index = rows.following(call);
        if (out.index < 0) return out;
        const RowInput row = open_row(call, out.index);
        return {out.index, row.s, row.t, row.alpha, row.beta, this->in_slice(row.exclude)};
    }

    // The bytes that a stage waits for, and the teacher's on their way.
    KLDIV_DEVICE void announce(int stage, const StageRow& row) const {
        shared->row[stage] = row;
        if (row.index < 0) {
            mbarrier_arrive(&shared->full[stage]);
            return;
        }
        mbarrier_arrive_expect(&shared->full[stage], size() * (1 + two));
        if constexpr (two)
            bulk_load(this->teacher_slot(stage), row_at(call.teacher, row.index) + begin * bytes, size(),
                      &shared->full[stage]);
    }
    KLDIV_DEVICE void load_student(int stage, const StageRow& row) const {
        if (row.index < 0) return;
        bulk_load(this->student_slot(stage), row_at(call.student, row.index) + begin * bytes, size(),
                  &shared->full[stage]);
    }

    KLDIV_DEVICE void run() {
        StageRow row{};
        for (int i = 0; i < a.stages && row.index >= 0; ++i) {
            row = following();
            announce(i, row);
            load_student(i, row);
        }
        bool more = row.index >= 0;
        for (Stage stage;; stage.next(a.stages)) {
            const int i = stage.index;
            const int64_t index = shared->row[i].index;
            if (index < 0) return;
            if (more) row = following();
            mbarrier_wait(&shared->done[i], stage.parity);
            bulk_store(row_at(call.d_student, element, index) + begin * bytes, this->student_slot(i), size());
            // The teacher's place is free already, the student's when its gradient has left.
            if (more) announce(i, row);
            bulk_wait_read();
            if (more) load_student(i, row);
            more = more && row.index >= 0;
        }
    }
};

}  // namespace kldiv::gpu
