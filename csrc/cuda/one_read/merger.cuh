// The merger of the one-read kernel: a warp that merges what the compute warps and the other CTAs found of a row, and
// finishes it.
#pragma once

#include "parts.cuh"

namespace kldiv::gpu {

// One number for each statistic that a call may ask for: their values, or their coefficients.
struct RowNumbers {
    float divergence, logprob, logsumexp;
};

template <class D, int element>
struct Merger : Cta<D, element> {
    using Base = Cta<D, element>;
    using Base::a, Base::call, Base::rank, Base::received, Base::received_sums, Base::shared, Base::two;
    using T = Traits<D>;

    int width = 1;  // lanes that merge CTAs: a power of two

    KLDIV_DEVICE explicit Merger(const OneReadArguments& arguments) : Base(arguments) {
        while (width < a.cluster) width *= 2;
    }

    // This CTA's part to every CTA of the cluster, itself included; then everyone's parts are in `to`.
    KLDIV_DEVICE void share(const Exchanged& part, Exchanged* to, uint64_t* barrier, uint32_t parity) const {
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
        mbarrier_wait_cluster(barrier, parity);
    }

    // Of each so many neighbouring lanes, which merge the same parts, so that all of them get the result.
    KLDIV_DEVICE static int lane_of(int width) { return thread_index() % width; }

    KLDIV_DEVICE State merged_state(int k) const {
        mbarrier_wait(&shared->swept[k % 2], parity_of(k));
        State state = T::state_of(shared->left[k % 2][lane_of(kComputeWarps)]);
        T::merge(state, kComputeWarps);
        Exchanged* to = received + k % 2 * a.cluster;
        share(T::exchange(state), to, &shared->exchanged[k % 2], parity_of(k));
        state = lane_of(width) < a.cluster ? T::state_of(to[lane_of(width)]) : State{};
        T::merge(state, width);
        return state;
    }

    KLDIV_DEVICE Sums merged_sums(int k) const {
        mbarrier_wait(&shared->summed[k % 2], parity_of(k));
        Sums sums = saved_sums(shared->left_sums[k % 2][lane_of(kComputeWarps)].x);
        merge_lanes<D>(sums, kComputeWarps);
        Exchanged* to = received_sums + k % 2 * a.cluster;
        share(T::exchange(sums), to, &shared->exchanged_sums[k % 2], parity_of(k));
        sums = lane_of(width) < a.cluster ? saved_sums(to[lane_of(width)].x) : Sums{};
        merge_lanes<D>(sums, width);
        return sums;
    }

    KLDIV_DEVICE void run() const {
        const int lane = thread_index() % 32;
        Stage stage;
        for (int k = 0;; ++k, stage.next(a.stages)) {
            mbarrier_wait(&shared->full[stage.index], stage.parity);
            const int64_t index = shared->row[stage.index].index;
            if (index < 0) return;
            // Asked for now, used when the row has been swept.
            const RowInput row = open_row(call, index);
            const auto coefficient = [&](int at) { return at < 0 ? 0.0f : call.coefficients[at * call.rows + index]; };
            const RowNumbers given = {coefficient(a.divergence_row), coefficient(a.logprob_row),
                                      coefficient(a.logsumexp_row)};
            PolicyToken token{};
            if (call.policy.tokens) token = policy_token(call.policy, call.rows, index);
            const int64_t label = a.logprob_row < 0 ? -1 : call.labels[index];
            const bool labelled = label >= 0 && label < call.columns;
            const float logit = labelled ? load_column(row.student, element, label) : 0.0f;
            if (call.in_place) fence_cluster();

            const State state = merged_state(k);
            const Normalised n = normalise(row, state, two);
            RowResult& result = shared->result[k % 2];
            if (lane == 0) result.n = n;
            Sums sums;
            if constexpr (T::needs_sums) {
                if (lane == 0) mbarrier_arrive(&shared->normal[k % 2]);
                sums = merged_sums(k);
            } else {
                sums.sum[0] = first_value(T::code, state, n);
            }
            if (lane == 0) finish(index, row, state, n, sums, given, token, label, labelled, logit, result, k);
        }
    }

    KLDIV_DEVICE void finish(int64_t index, const RowInput& row, const State& state, const Normalised& n,
                             const Sums& sums, const RowNumbers& given, const PolicyToken& token, int64_t label,
                             bool labelled, float logit, RowResult& result, int k) const {
        const Finished finished = finish_as<D>(sums, flags_of(row, state), n, this->alpha_of(row.alpha), row.beta);
        const float nan = std::numeric_limits<float>::quiet_NaN();
        const float logprob = labelled ? log_softmax(logit, row.s, n.ms, n.zs, n.log_zs, label == row.exclude) : nan;
        const RowNumbers values = {finished.value, label < 0 ? 0.0f : logprob, logsumexp_of(n)};
        RowNumbers c = given;
        if (call.policy.tokens) c.logprob = policy_coefficient(call.policy, values.logprob, token);
        const float over_temperature = n.cs / kLog2e;
        result.any = c.divergence != 0 || c.logprob != 0 || c.logsumexp != 0;
        result.weight = c.divergence * over_temperature;
        result.share =
            (c.logsumexp - times(c.divergence, finished.sum_q) - (label >= 0 ? c.logprob : 0)) * over_temperature;
        result.label = this->in_slice(label);
        result.label_weight = c.logprob * over_temperature;
#pragma unroll
        for (int j = 0; j < kRowConstants; ++j) result.k[j] = finished.k[j];
        mbarrier_arrive(&shared->ready[k % 2]);
        if (rank != 0) return;
        const auto write = [&](int at, float x) {
            if (at >= 0) call.values[at * call.rows + index] = x;
        };
        write(a.divergence_row, values.divergence);
        write(a.logprob_row, values.logprob);
        write(a.logsumexp_row, values.logsumexp);
    }
};

}  // namespace kldiv::gpu
