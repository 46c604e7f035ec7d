// The one-read kernel (sm_90 and later): each logit is read once, each gradient written once. 1u = one tensor:
// 2u + 1u for a divergence, 1u + 1u for the statistics of the student alone.
//
// A cluster of CTAs holds `stages` rows in its shared memory, a slice of each row in each CTA. Warps have roles:
//   mover    loads rows by bulk copies, stores their gradients, which stand where the student's logits were
//   compute  16 warps: sweep the slice, later turn it into the gradient
//   merger   merges what the warps found, exchanges it with the other CTAs, finishes the row
// The compute warps sweep row k + 1 before they write the gradient of row k: so nobody waits for an exchange.
//
//   mover              compute                    merger
//   load k+1 .. ----full--> sweep(k+1) --swept--> merge, exchange, finish(k+1)
//                           gradient(k) <--ready-- (k)
//   store k    <---done----
//
// A divergence that needs the sums of normalised terms takes them in a sweep in between, from chip:
//   sums(k), sweep(k+1), gradient(k), with the merger's answers to sweep and sums on `normal` and `ready`.
//
// What is exchanged is double-buffered by the row's parity. That is enough: nobody sends for row k + 2 before everyone
// has answered for row k + 1, which they do after reading what was exchanged for row k.
#pragma once

#include <type_traits>

#include "row.cuh"

namespace kldiv::gpu {

constexpr int kComputeWarps = kComputeThreads / 32;
constexpr int kMover = kComputeWarps, kMerger = kComputeWarps + 1;
static_assert(kOneReadThreads == 32 * (kComputeWarps + 2), "a mover and a merger beside the warps that compute");

struct OneReadArguments {
    Call call;
    int divergence_row, logprob_row, logsumexp_row;  // of the table of values; -1: not asked for
    float alpha;                                     // alpha_below_half takes 1 - alpha
    int cluster, stages;
    int64_t slice;  // columns of a CTA
};

// One number for each statistic that a call may ask for: their values, or their coefficients.
struct RowNumbers {
    float divergence, logprob, logsumexp;
};

// How a row's coefficients follow from its own statistics. Those of a plain loss are given; a token-level policy loss
// is another struct like this, whose coefficient of logprob depends on the value.
struct GivenCoefficients {
    KLDIV_DEVICE static RowNumbers of(const RowNumbers& given, const RowNumbers&) { return given; }
};

// What warps and CTAs exchange: a state or sums.
struct alignas(16) Exchanged {
    float x[8];
};

// What the merger tells the compute warps of a row.
struct RowResult {
    Normalised n;
    float weight, share, label_weight;  // 1/temperature included
    float k[kRowConstants];
    int label;  // the column in this CTA's slice, if it is there
    bool any;   // some coefficient is not 0; else there is no gradient, whatever the logits are
};

struct Shared {
    uint64_t full[kMostStages], done[kMostStages];
    uint64_t swept[2], exchanged[2], normal[2], summed[2], exchanged_sums[2], ready[2];
    int64_t row[kMostStages];  // in each stage; -1: there are no more
    RowResult result[2];
    Exchanged left[2][kComputeWarps], left_sums[2][kComputeWarps];
};
// Behind it: Exchanged received[2][cluster] and received_sums[2][cluster], then the stages.
static_assert(sizeof(Shared) <= kOneReadHead && 4 * sizeof(Exchanged) == kOneReadExchange, "as plan.h has it");

template <class D>
struct Traits {
    static constexpr bool forward = std::is_same_v<D, ForwardKl>, reverse = std::is_same_v<D, ReverseKl>;
    static constexpr bool hellinger = std::is_same_v<D, Hellinger>, entropy = std::is_same_v<D, Entropy>;
    static constexpr int first = (D::needs_p ? kTeacher : 0) | (forward ? kForwardKl : 0) | (reverse ? kReverseKl : 0) |
                                 (hellinger ? kHellinger : 0) | (entropy ? kEntropy : 0);
    static constexpr bool needs_sums = !(forward || reverse || hellinger || entropy);
    static constexpr int code = forward     ? k_forward_kl
                                : reverse   ? k_reverse_kl
                                : hellinger ? k_hellinger
                                            : k_entropy;  // of first_value
};

template <class D, int element, class Coefficients>
struct OneRead {
    using T = Traits<D>;
    static constexpr bool two = D::needs_p;
    static constexpr int64_t bytes = kElementBytes<element>;
    // Where the sums' sweep leaves grad_logq / q for the gradient, in the teacher's place: as float16, rounded by
    // up to 2^-11 of it where a bfloat16 result is by up to 2^-8, and exactly where the logits are float32.
    static constexpr bool parks = D::parks && element != kFloat16;
    static constexpr int parked_element = element == kFloat32 ? kFloat32 : kFloat16;

    const OneReadArguments& a;
    const Call& call;
    Shared* shared;
    Exchanged *received, *received_sums;
    char* stages;
    int64_t begin;  // this CTA's columns are [begin, begin + count)
    int count, rank;

    KLDIV_DEVICE explicit OneRead(const OneReadArguments& arguments) : a(arguments), call(arguments.call) {
        shared = reinterpret_cast<Shared*>(shared_memory());
        received = reinterpret_cast<Exchanged*>(shared_memory() + kOneReadHead);
        received_sums = received + 2 * a.cluster;
        stages = shared_memory() + kOneReadHead + kOneReadExchange * a.cluster;
        rank = static_cast<int>(cluster_rank());
        begin = rank * a.slice;
        count = static_cast<int>(call.columns - begin < a.slice ? call.columns - begin : a.slice);
    }

    KLDIV_DEVICE char* student_slot(int stage) const { return stages + stage * a.slice * bytes * (1 + two); }
    KLDIV_DEVICE char* teacher_slot(int stage) const { return student_slot(stage) + a.slice * bytes; }

    KLDIV_DEVICE void start() const {
        if (thread_index() == 0) {
            for (int i = 0; i < a.stages; ++i) {
                mbarrier_init(&shared->full[i], 1);
                mbarrier_init(&shared->done[i], kComputeWarps);
            }
            for (int i = 0; i < 2; ++i) {
                mbarrier_init(&shared->swept[i], kComputeWarps);
                mbarrier_init(&shared->exchanged[i], 1);
                mbarrier_init(&shared->ready[i], 1);
                if constexpr (T::needs_sums) {
                    mbarrier_init(&shared->normal[i], 1);
                    mbarrier_init(&shared->summed[i], kComputeWarps);
                    mbarrier_init(&shared->exchanged_sums[i], 1);
                }
            }
            fence_mbarrier_init();
        }
        // Barriers are there before anyone, peers included, uses them.
        cluster_sync();
    }

    // --- mover -------------------------------------------------------------------------------------------------------
    KLDIV_DEVICE void load(int stage, int64_t index) const {
        shared->row[stage] = index;
        if (index < 0) {
            mbarrier_arrive(&shared->full[stage]);
            return;
        }
        const uint32_t size = static_cast<uint32_t>(count * bytes);
        mbarrier_arrive_expect(&shared->full[stage], size * (1 + two));
        bulk_load(student_slot(stage), row_at(call.student, index) + begin * bytes, size, &shared->full[stage]);
        if constexpr (two)
            bulk_load(teacher_slot(stage), row_at(call.teacher, index) + begin * bytes, size, &shared->full[stage]);
    }

    KLDIV_DEVICE void move_rows() const {
        const int64_t clusters = grid_blocks() / a.cluster;
        int64_t next = block_index() / a.cluster;
        const auto next_row = [&] {
            while (next < call.rows && call.mask && !call.mask[next]) next += clusters;
            const int64_t index = next < call.rows ? next : -1;
            next += clusters;
            return index;
        };
        bool more = true;
        for (int stage = 0; stage < a.stages && more; ++stage) {
            const int64_t index = next_row();
            load(stage, index);
            more = index >= 0;
        }
        for (int k = 0;; ++k) {
            const int stage = k % a.stages;
            const int64_t index = shared->row[stage];
            if (index < 0) return;
            mbarrier_wait(&shared->done[stage], k / a.stages % 2);
            bulk_store(row_at(call.d_student, element, index) + begin * bytes, student_slot(stage),
                       static_cast<uint32_t>(count * bytes));
            bulk_wait_read();
            if (!more) continue;
            const int64_t following = next_row();
            load(stage, following);
            more = following >= 0;
        }
    }

    // --- compute -----------------------------------------------------------------------------------------------------
    KLDIV_DEVICE static Raw<element> raw_at(const char* slot, int column) {
        return *reinterpret_cast<const Raw<element>*>(slot + column * bytes);
    }
    // A column of the row as one of this CTA's slice; outside of it, and for -1, no column of the slice.
    KLDIV_DEVICE int in_slice(int64_t column) const { return column < begin ? -1 : static_cast<int>(column - begin); }
    KLDIV_DEVICE static bool holds(int column, int wanted) { return static_cast<unsigned>(wanted - column) < kColumns; }
    // The columns that a sweep takes as having no mass, in both rows.
    KLDIV_DEVICE static void leave_out(int excluded, int column, const Scale& scale_s, const Scale& scale_t, Columns& s,
                                       Columns& t) {
        replace(excluded - column, scale_s.floor, s);
        replace(excluded - column, scale_t.floor, t);
        raise_to(scale_s.floor, s);
        raise_to(scale_t.floor, t);
    }

    // The first sweep of row k; false where there is none. `masses` becomes false where some column has no mass.
    KLDIV_DEVICE bool sweep(int k, bool* masses) const {
        const int stage = k % a.stages;
        mbarrier_wait(&shared->full[stage], k / a.stages % 2);
        const int64_t index = shared->row[stage];
        if (index < 0) return false;
        const RowInput row = open_row(call, index);
        const char *student = student_slot(stage), *teacher = teacher_slot(stage);
        const int excluded = in_slice(row.exclude);
        State state;
        *masses = true;
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            const Raw<element> raw_s = raw_at(student, column), raw_t = two ? raw_at(teacher, column) : raw_s;
            Columns s = unpack<element>(raw_s), t = unpack<element>(raw_t);
            Range range_s = range<element>(raw_s, s), range_t = two ? range<element>(raw_t, t) : range_s;
            if (range_s.smallest <= row.s.floor || (two && range_t.smallest <= row.t.floor) ||
                holds(column, excluded)) {
                *masses = false;
                leave_out(excluded, column, row.s, row.t, s, t);
                range_s.largest = largest_of(s);
                range_t.largest = largest_of(t);
                if constexpr (two) note_blocked(state, s, t, row.s.floor, row.t.floor);
            }
            add_columns<T::first>(state, s, t, range_s.largest, range_t.largest, row.s.c, row.t.c, 0);
        }
        merge_lanes<T::first>(state);
        if (thread_index() % 32 == 0) {
            shared->left[k % 2][thread_index() / 32] = exchange(state);
            mbarrier_arrive(&shared->swept[k % 2]);
        }
        return true;
    }
    KLDIV_DEVICE static float largest_of(const Columns& columns) {
        float out = columns.x[0];
#pragma unroll
        for (int i = 1; i < kColumns; ++i) out = ::fmaxf(out, columns.x[i]);
        return out;
    }

    KLDIV_DEVICE void sums(int k, bool masses) const {
        const int stage = k % a.stages;
        mbarrier_wait(&shared->normal[k % 2], k / 2 % 2);
        const Normalised n = shared->result[k % 2].n;
        const RowInput row = open_row(call, shared->row[stage]);
        const int excluded = in_slice(row.exclude);
        const float unknown[kRowConstants] = {};
        const typename D::template Constants<float> constants(alpha_of(row), row.beta, unknown);
        const char* student = student_slot(stage);
        char* teacher = teacher_slot(stage);
        Sums total;
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            const Raw<element> raw_s = raw_at(student, column);
            Columns s = unpack<element>(raw_s), t = two ? unpack<element>(raw_at(teacher, column)) : s;
            if (!masses) leave_out(excluded, column, row.s, row.t, s, t);
            add_terms<D>(total, constants, n, s, t);
            if constexpr (parks) {
                Columns ratio;
#pragma unroll
                for (int i = 0; i < kColumns; ++i)
                    ratio.x[i] = ::fmaxf(-6e4f, D::grad_logq_over_q(element_of<D>(n, s.x[i], t.x[i]), constants));
                *reinterpret_cast<Raw<parked_element>*>(teacher + column * bytes) = pack<parked_element>(ratio);
            }
        }
        merge_lanes(total);
        if (thread_index() % 32 == 0) {
            shared->left_sums[k % 2][thread_index() / 32] = exchange(total);
            mbarrier_arrive(&shared->summed[k % 2]);
        }
    }

    KLDIV_DEVICE void gradient(int k, bool masses) const {
        const int stage = k % a.stages;
        mbarrier_wait(&shared->ready[k % 2], k / 2 % 2);
        const RowResult result = shared->result[k % 2];
        const Normalised& n = result.n;
        const int64_t index = shared->row[stage];
        const RowInput row = open_row(call, index);
        const int excluded = in_slice(row.exclude);
        const typename D::template Constants<float> constants(alpha_of(row), row.beta, result.k);
        const bool bounded = abs(result.share) < infinity;
        char* student = student_slot(stage);
        const char* teacher = teacher_slot(stage);
        for (int column = thread_index() * kColumns; column < count; column += kComputeThreads * kColumns) {
            Columns s = unpack<element>(raw_at(student, column)), g;
            if constexpr (parks) {
                const Columns ratio =
                    unpack<parked_element>(*reinterpret_cast<const Raw<parked_element>*>(teacher + column * bytes));
                if (!masses) raise_to(row.s.floor, s);
#pragma unroll
                for (int i = 0; i < kColumns; ++i)
                    g.x[i] = exp2(fma(s.x[i], n.cs, -n.ms)) * n.over_zs * fma(result.weight, ratio.x[i], result.share);
            } else {
                Columns t = two ? unpack<element>(raw_at(teacher, column)) : s;
                if (!masses) leave_out(excluded, column, row.s, row.t, s, t);
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    const Element<float> e = element_of<D>(n, s.x[i], t.x[i]);
                    g.x[i] = result.weight * D::grad_logq(e, constants);
                    // 0 * inf: a column without mass takes no share of an infinite sum.
                    if (bounded || e.q != 0) g.x[i] = fma(result.share, e.q, g.x[i]);
                }
            }
            if (holds(column, result.label)) {
#pragma unroll
                for (int i = 0; i < kColumns; ++i) g.x[i] += result.label - column == i ? result.label_weight : 0.0f;
            }
            if (holds(column, excluded)) replace(excluded - column, 0.0f, g);
            if (!result.any) g = Columns{};
            *reinterpret_cast<Raw<element>*>(student + column * bytes) = pack<element>(g);
        }
        if (begin + count == call.columns) {
            char* out = row_at(call.d_student, element, index);
            for (int64_t column = call.columns + thread_index() * kColumns; column < call.d_student.width;
                 column += kComputeThreads * kColumns)
                store_columns(out, element, column, call.d_student.width, Columns{});
        }
        fence_async_proxy();
        warp_sync();
        if (thread_index() % 32 == 0) mbarrier_arrive(&shared->done[stage]);
    }

    KLDIV_DEVICE void compute() const {
        bool masses = true, next_masses = true, swept = false;
        for (int k = 0;; ++k) {
            if (!swept && !sweep(k, &next_masses)) return;
            masses = next_masses;
            if constexpr (T::needs_sums) sums(k, masses);
            // With one stage the next row comes only after this one has left.
            const bool ahead = a.stages > 1;
            swept = ahead && sweep(k + 1, &next_masses);
            gradient(k, masses);
            if (ahead && !swept) return;
        }
    }

    // --- merger ------------------------------------------------------------------------------------------------------
    KLDIV_DEVICE static Exchanged exchange(const State& x) {
        const float g = T::forward ? x.forward_kl : (T::reverse ? x.reverse_kl : x.hellinger);
        return {{x.s.m, x.s.z, x.s.a, x.s.blocked, x.t.m, x.t.z, g, x.t.blocked}};
    }
    KLDIV_DEVICE static State state_of(const Exchanged& from) {
        State x;
        x.s = {from.x[0], from.x[1], from.x[2], from.x[3]};
        x.t = {from.x[4], from.x[5], 0, from.x[7]};
        (T::forward ? x.forward_kl : (T::reverse ? x.reverse_kl : x.hellinger)) = from.x[6];
        return x;
    }
    KLDIV_DEVICE static Exchanged exchange(const Sums& x) {
        return {{x.sum[0], x.sum[1], x.sum[2], x.sum[3], x.log_top, x.log_sum, 0, 0}};
    }
    KLDIV_DEVICE static Sums sums_of(const Exchanged& from) {
        Sums x;
#pragma unroll
        for (int j = 0; j < 4; ++j) x.sum[j] = from.x[j];
        x.log_top = from.x[4];
        x.log_sum = from.x[5];
        return x;
    }

    // This CTA's part to every CTA of the cluster, itself included; then everyone's parts are in `to`.
    KLDIV_DEVICE void share(const Exchanged& part, Exchanged* to, uint64_t* barrier, int k) const {
        const int lane = thread_index() % 32;
        if (lane == 0) mbarrier_arrive_expect(barrier, a.cluster * static_cast<uint32_t>(sizeof(Exchanged)));
        if (lane < a.cluster) {
            Words half[2];
#pragma unroll
            for (int i = 0; i < 8; ++i) half[i / 4].w[i % 4] = float_bits(part.x[i]);
            char* mine = reinterpret_cast<char*>(to + rank);
            store_async(mine, barrier, lane, half[0]);
            store_async(mine + 16, barrier, lane, half[1]);
        }
        mbarrier_wait(barrier, k / 2 % 2);
    }

    // alpha as D takes it, of this row.
    KLDIV_DEVICE float alpha_of(const RowInput& row) const { return call.token_parameters ? row.alpha : a.alpha; }

    KLDIV_DEVICE void merge_rows() const {
        const int lane = thread_index() % 32;
        for (int k = 0;; ++k) {
            const int stage = k % a.stages, parity = k % 2;
            mbarrier_wait(&shared->full[stage], k / a.stages % 2);
            const int64_t index = shared->row[stage];
            if (index < 0) return;
            // Asked for now, used when the row has been swept.
            const RowInput row = open_row(call, index);
            const auto coefficient = [&](int at) { return at < 0 ? 0.0f : call.coefficients[at * call.rows + index]; };
            const RowNumbers given = {coefficient(a.divergence_row), coefficient(a.logprob_row),
                                      coefficient(a.logsumexp_row)};
            const int64_t label = a.logprob_row < 0 ? -1 : call.labels[index];
            const bool labelled = label >= 0 && label < call.columns;
            const float logit = labelled ? load_column(row.student, element, label) : 0.0f;

            mbarrier_wait(&shared->swept[parity], k / 2 % 2);
            State state;
            if (lane < kComputeWarps) state = state_of(shared->left[parity][lane]);
            merge_lanes<T::first>(state);
            Exchanged* to = received + parity * a.cluster;
            share(exchange(state), to, &shared->exchanged[parity], k);
            state = lane < a.cluster ? state_of(to[lane]) : State{};
            merge_lanes<T::first>(state);
            const Normalised n = normalise(row, state, two);

            RowResult& result = shared->result[parity];
            Sums sums;
            if constexpr (T::needs_sums) {
                if (lane == 0) {
                    result.n = n;
                    mbarrier_arrive(&shared->normal[parity]);
                }
                mbarrier_wait(&shared->summed[parity], k / 2 % 2);
                if (lane < kComputeWarps) sums = sums_of(shared->left_sums[parity][lane]);
                merge_lanes(sums);
                to = received_sums + parity * a.cluster;
                share(exchange(sums), to, &shared->exchanged_sums[parity], k);
                sums = lane < a.cluster ? sums_of(to[lane]) : Sums{};
                merge_lanes(sums);
            } else {
                sums.sum[0] = first_value(T::code, state, n);
            }
            if (lane != 0) continue;
            Finished finished = finish_as<D>(sums, flags_of(row, state), alpha_of(row), row.beta);
            const float nan = std::numeric_limits<float>::quiet_NaN();
            if (is_nan(n.zs) || (two && is_nan(n.zt))) finished.value = finished.sum_q = nan;
            const RowNumbers values = {
                finished.value,
                label < 0 ? 0.0f
                          : (labelled ? log_softmax(logit, row.s, n.ms, n.zs, n.log_zs, label == row.exclude) : nan),
                logsumexp_of(n)};
            const RowNumbers c = Coefficients::of(given, values);
            const float over_temperature = n.cs / kLog2e;
            result.n = n;
            result.any = c.divergence != 0 || c.logprob != 0 || c.logsumexp != 0;
            result.weight = c.divergence * over_temperature;
            result.share =
                (c.logsumexp - times(c.divergence, finished.sum_q) - (label >= 0 ? c.logprob : 0)) * over_temperature;
            result.label = in_slice(label);
            result.label_weight = c.logprob * over_temperature;
#pragma unroll
            for (int j = 0; j < kRowConstants; ++j) result.k[j] = finished.k[j];
            mbarrier_arrive(&shared->ready[parity]);
            if (rank != 0) continue;
            const auto write = [&](int at, float x) {
                if (at >= 0) call.values[at * call.rows + index] = x;
            };
            write(a.divergence_row, values.divergence);
            write(a.logprob_row, values.logprob);
            write(a.logsumexp_row, values.logsumexp);
        }
    }
};

template <class D, int element, class Coefficients = GivenCoefficients>
KLDIV_KERNEL(kOneReadThreads, 1)
one_read(OneReadArguments arguments) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const OneRead<D, element, Coefficients> kernel(arguments);
    kernel.start();
    const int warp = thread_index() / 32;
    if (warp < kComputeWarps)
        kernel.compute();
    else if (warp == kMerger)
        kernel.merge_rows();
    else if (thread_index() % 32 == 0)
        kernel.move_rows();
#endif
}

}  // namespace kldiv::gpu
