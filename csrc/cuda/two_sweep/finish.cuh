// The two-sweep kernel between sums and gradient (slices.cuh): from a row's merged slices to its values, and to the
// state that the gradient needs.
#pragma once

#include "slice_states.cuh"

namespace kldiv::gpu {

// The value of a statistic without labels, the sums of its gradients and its constants. `sums` are the merged ones of a
// statistic that takes them.
KLDIV_DEVICE Finished finish_statistic(int code, const RowInput& row, const State& state, const Normalised& n,
                                       Sums sums) {
    Finished done{};
    if (code == kLogsumexp) done.value = logsumexp_of(n);
    if (code == kMaxLogprob) done.value = fma(fma(state.best, row.s.c, -n.ms), kLn2, -n.log_zs);
    if (code == kArgmaxCode) done.value = is_nan(n.zs) ? -1.0f : static_cast<float>(state.column);
    if (code < k_entropy) return done;
    const Resolved resolved = resolve(code, row.alpha, row.beta);
    if (finishes_first(code)) sums.sum[0] = first_value(resolved.code, state, n);
    with_divergence(resolved.code, [&](auto divergence) {
        using D = decltype(divergence);
        done = finish_as<D>(sums, flags_of(row, state), n, resolved.alpha, row.beta);
    });
    return done;
}

// A warp a row. The values and the state of a row that the mask leaves out are 0.
KLDIV_KERNEL(kSweepThreads, 1) finish(SweepArguments a) {
    const Call& call = a.call;
    const int64_t index = block_index() * (block_threads() / 32) + thread_index() / 32, n = call.rows;
    const int lane = thread_index() % 32;
    if (index >= n) return;
    const bool active = !call.mask || call.mask[index];
    const RowInput row = open_row(call, index);
    State state;
    if (active) state = row_state(a, index);
    const Normalised normal = normalise(row, state, call.teacher.data != nullptr);
    const auto log_probability = [&](int code, const Softmax& untempered, float logit, bool left_out) {
        if (code == kReferenceLogprob) return log_softmax(logit, row.t, normal.mt, normal.zt, normal.log_zt, left_out);
        if (code == kUntemperedLogprob)
            return log_softmax(logit, {kLog2e, row.s.floor}, untempered.m, untempered.z, ::logf(untempered.z),
                               left_out);
        return log_softmax(logit, row.s, normal.ms, normal.zs, normal.log_zs, left_out);
    };
    const auto save_state = [&](int at, float x) {
        if (call.state && lane == 0) call.state[at * n + index] = active ? x : 0;
    };
    const float of_row[kStateOfRow] = {normal.ms, normal.zs, normal.mt, normal.zt};
#pragma unroll
    for (int i = 0; i < kStateOfRow; ++i) save_state(i, of_row[i]);
    // The coefficient of a value, which that of logprob follows from in a policy loss.
    const auto complete = [&](const float* of, bool logprob, float x) {
        const int64_t cell = of - call.values;
        call.completed[cell] =
            logprob ? policy_coefficient(call.policy, x, policy_token(call.policy, n, index)) : call.coefficients[cell];
    };
    float* value = call.values + index;
    int at = 0;
    for (int i = 0; i < call.stat_count; ++i) {
        const int code = call.stats[i];
        Finished done{};
        if (per_label(code)) {
            const bool student = code != kReferenceLogprob;
            Softmax untempered;
            if (code == kUntemperedLogprob && active) {
                untempered = row_softmax(a, a.untempered, index);
                if (untempered.z == 0) untempered.z = std::numeric_limits<float>::quiet_NaN();
                done.k[0] = untempered.m;
                done.k[1] = untempered.z;
            }
            for (int64_t j = lane; j < call.labels_per_row; j += 32) {
                const int64_t cell = index * call.labels_per_row + j, label = call.labels[cell];
                const bool beyond = label >= call.columns;
                float x = beyond ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
                if (call.picked ? label != kNoLabel : label >= 0 && !beyond) {
                    const float logit = call.picked ? call.picked[(student ? 0 : n * call.labels_per_row) + cell]
                                        : student   ? load_column(row.student, call.student.element, label)
                                                    : load_column(row.teacher, call.teacher.element, label);
                    x = log_probability(code, untempered, logit, label == row.exclude);
                }
                if (!active) x = 0;
                value[j * n] = x;
                if (call.completed) complete(value + j * n, code == kLogprob, x);
            }
            value += call.labels_per_row * n;
        } else {
            Sums sums;
            if (!finishes_first(code)) {
                if (active && lane < a.slices)
                    sums = saved_sums(a.sums + ((index * a.sums_count + at) * a.slices + lane) * kSumsFloats);
                merge_lanes(sums);
                ++at;
            }
            done = finish_statistic(code, row, state, normal, sums);
            if (code == kTailLogprob && active) {
                const Softmax tail = row_softmax(a, a.tails, index);
                done.value = log_mass(tail, normal);
                done.k[0] = tail.m;
                done.k[1] = tail.z;
            }
            if (lane == 0) *value = active ? done.value : 0;
            if (call.completed && lane == 0) complete(value, false, 0);
            value += n;
        }
        const int first = kStateOfRow + i * kStateOfStatistic;
        save_state(first, done.sum_q);
        save_state(first + 1, done.sum_p);
#pragma unroll
        for (int j = 0; j < kRowConstants; ++j) save_state(first + 2 + j, done.k[j]);
    }
}

}  // namespace kldiv::gpu
