// What the roles of the one-read kernel (kernel.cuh) share: a CTA's shared memory, and what stands in it.
#pragma once

#include "../row/row.cuh"

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

// What warps and CTAs exchange: a state or sums.
struct alignas(16) Exchanged {
    float x[8];
};

// The row in a stage, as the compute warps take it.
struct StageRow {
    int64_t index;  // -1: there are no more rows
    Scale s, t;
    float alpha, beta;
    int excluded;  // a column of this CTA's slice, if it is there
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
    StageRow row[kMostStages];
    RowResult result[2];
    Exchanged left[2][kComputeWarps], left_sums[2][kComputeWarps];
};
// Behind it: Exchanged received[2][cluster] and received_sums[2][cluster], then the stages.
static_assert(sizeof(Shared) <= kOneReadHead && 4 * sizeof(Exchanged) == kOneReadExchange, "as plan.h has it");

// The stages, one after the other, and the parity of their barriers.
struct Stage {
    int index = 0;
    uint32_t parity = 0;

    KLDIV_DEVICE void next(int stages) {
        if (++index < stages) return;
        index = 0;
        parity ^= 1;
    }
};
// The rows of a cluster, one after the other: every so many, those apart that the mask leaves out.
struct RowsOfCluster {
    int64_t next, clusters;

    KLDIV_DEVICE explicit RowsOfCluster(int cluster)
        : next(block_index() / cluster), clusters(grid_blocks() / cluster) {}

    // -1: there are no more.
    KLDIV_DEVICE int64_t following(const Call& call) {
        while (next < call.rows && call.mask && !call.mask[next]) next += clusters;
        if (next >= call.rows) return -1;
        next += clusters;
        return next - clusters;
    }
};
// Of the barriers that rows use in turns.
KLDIV_DEVICE uint32_t parity_of(int row) { return row / 2 % 2; }

template <class D>
struct Traits {
    static constexpr bool forward = std::is_same_v<D, ForwardKl>, reverse = std::is_same_v<D, ReverseKl>;
    static constexpr bool hellinger = std::is_same_v<D, Hellinger>, entropy = std::is_same_v<D, Entropy>;
    static constexpr int first = (D::needs_p ? kTeacher : 0) | (forward ? kForwardKl : 0) | (reverse ? kReverseKl : 0) |
                                 (hellinger ? kHellinger : 0) | (entropy ? kEntropy : 0);
    static constexpr int code = code_of<D>();
    static constexpr bool needs_sums = !finishes_first(code);

    KLDIV_DEVICE static void merge(State& x, int width) { merge_lanes<first>(x, width); }
    KLDIV_DEVICE static Exchanged exchange(const State& x) {
        const float g = forward ? x.forward_kl : (reverse ? x.reverse_kl : x.hellinger);
        return {{x.s.m, x.s.z, x.s.a, x.s.blocked, x.t.m, x.t.z, g, x.t.blocked}};
    }
    KLDIV_DEVICE static State state_of(const Exchanged& from) {
        State x;
        x.s = {from.x[0], from.x[1], from.x[2], from.x[3]};
        x.t = {from.x[4], from.x[5], 0, from.x[7]};
        (forward ? x.forward_kl : (reverse ? x.reverse_kl : x.hellinger)) = from.x[6];
        return x;
    }
    KLDIV_DEVICE static Exchanged exchange(const Sums& x) {
        Exchanged out{};
        save(x, out.x);
        return out;
    }
};

// A CTA of the cluster, as every role sees it.
template <class D, int element>
struct Cta {
    static constexpr bool two = D::needs_p;
    static constexpr int bytes = kElementBytes<element>;

    const OneReadArguments& a;
    const Call& call;
    Shared* shared;
    Exchanged *received, *received_sums;
    char* stages;
    int64_t begin;  // this CTA's columns are [begin, begin + count)
    int count, rank;

    KLDIV_DEVICE explicit Cta(const OneReadArguments& arguments) : a(arguments), call(arguments.call) {
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
    // A column of the row as one of this CTA's slice; outside of it, and for -1, no column of the slice.
    KLDIV_DEVICE int in_slice(int64_t column) const {
        return column < begin || column >= begin + count ? -1 : static_cast<int>(column - begin);
    }
    KLDIV_DEVICE static Raw<element> raw_at(const char* slot, int column) {
        return *reinterpret_cast<const Raw<element>*>(slot + column * bytes);
    }
    // Whether `wanted` is one of the eight columns from `column` on.
    KLDIV_DEVICE static bool holds(int column, int wanted) { return static_cast<unsigned>(wanted - column) < kColumns; }
    // Whether a column of the slice, -1 for none, is one of this thread's.
    KLDIV_DEVICE bool sweeps(int column) const {
        return column >= 0 && column < count && column / kColumns % kComputeThreads == thread_index();
    }
    KLDIV_DEVICE static void store(char* slot, int column, const Columns& columns) {
        *reinterpret_cast<Raw<element>*>(slot + column * bytes) = pack<element>(columns);
    }
    // alpha as D takes it, of this row.
    KLDIV_DEVICE float alpha_of(float alpha) const { return call.token_parameters ? alpha : a.alpha; }

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
                if constexpr (Traits<D>::needs_sums) {
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
};

}  // namespace kldiv::gpu
