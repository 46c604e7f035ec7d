// The last of the two-sweep kernels (slices.cuh): gradients from coefficients and saved state.
#pragma once

#include "labels.cuh"
#include "slices.cuh"

namespace kldiv::gpu {

// What a row's gradient is made of beside its statistics' own terms.
struct Shares {
    float s = 0, t = 0;  // of the two softmaxes
    float tail = 0;      // of the softmax of the columns that are no label
    Softmax of_tail;
    float untempered = 0;  // of the student's softmax at temperature 1
    bool any = false;      // some coefficient is not 0
};

// Whether labels get their gradient after all other columns: a look for each of them at every eight columns would take
// longer than the rest.
KLDIV_HOST_DEVICE bool labels_apart(const Call& call) {
    bool tail = false;
    for (int i = 0; i < call.stat_count; ++i) tail |= call.stats[i] == kTailLogprob;
    return call.labels && (tail || call.labels_per_row > 1);
}

// In every lane of every warp.
KLDIV_DEVICE Shares shares_of(const Call& call, int64_t index) {
    Shares out;
    const int64_t n = call.rows;
    const float* coefficient = call.coefficients + index;
    for (int i = 0; i < call.stat_count; ++i) {
        const int code = call.stats[i];
        if (per_label(code)) {
            float sum = 0;
            bool any = false;
            for (int64_t j = thread_index() % 32; j < call.labels_per_row; j += 32) {
                const float c = coefficient[j * n];
                any |= c != 0;
                // Those of other processes take their shares here, too.
                sum += call.labels[index * call.labels_per_row + j] == kNoLabel ? 0 : c;
            }
            (code == kLogprob ? out.s : code == kReferenceLogprob ? out.t : out.untempered) -= warp_sum(sum);
            out.any |= any_lane(any);
            coefficient += call.labels_per_row * n;
            continue;
        }
        const float c = *coefficient;
        coefficient += n;
        out.any |= c != 0;
        if (code == kLogsumexp) out.s += c;
        const float* of = call.state + (kStateOfRow + i * kStateOfStatistic) * n + index;
        // A tail without mass has no gradient.
        if (code == kTailLogprob && of[3 * n] != 0) {
            out.s -= c;
            out.tail = c;
            out.of_tail = {of[2 * n], of[3 * n]};
        }
        if (code < k_entropy) continue;
        out.s -= times(c, of[0]);
        out.t -= times(c, of[n]);
    }
    return out;
}

// The coefficients of a column that is a label, the j-th of its row; of all that name it where there are others. Those
// of untempered_logprob are times the temperature, by which all of a gradient is divided at the end.
KLDIV_DEVICE float label_weight(const Call& call, int64_t index, int64_t j, bool others, bool student,
                                float temperature) {
    const float* coefficient = call.coefficients + index;
    const int64_t* labels = call.labels + index * call.labels_per_row;
    float weight = 0;
    for (int i = 0; i < call.stat_count; ++i) {
        const int code = call.stats[i];
        const int64_t values = per_label(code) ? call.labels_per_row : 1;
        if (per_label(code) && student == (code != kReferenceLogprob)) {
            const float unit = code == kUntemperedLogprob ? temperature : 1.0f;
            for (int64_t other = others ? 0 : j; other < (others ? values : j + 1); ++other)
                weight += labels[other] == labels[j] ? unit * coefficient[other * call.rows] : 0.0f;
        }
        coefficient += values * call.rows;
    }
    return weight;
}

// share q, as factor 2^(x c - m). Columns that are no label take a tail's gradient with it, in the tail's own units: a
// tail with next to no mass has a gradient all the same.
struct Dense {
    float m, factor;
};
KLDIV_DEVICE Dense with_tail(const Normalised& n, const Shares& shares) {
    if (shares.tail == 0) return {n.ms, shares.s * n.over_zs};
    const float mass = exp2(shares.of_tail.m - n.ms) * shares.of_tail.z * n.over_zs;
    // 0 * inf: as below.
    return {shares.of_tail.m, (shares.tail + (mass == 0 ? 0.0f : shares.s * mass)) / shares.of_tail.z};
}

// One gradient, of the columns of a slice: eight at a time, and then, where labels are apart, label by label.
template <bool student>
KLDIV_DEVICE void slice_gradient(const SweepArguments& a, const RowInput& row, const Normalised& n,
                                 const Shares& shares, const Place& at, bool apart) {
    const Call& call = a.call;
    const int64_t index = at.index;
    const Gradient& to = student ? call.d_student : call.d_teacher;
    const int element = student ? call.student.element : call.teacher.element;
    char* out = row_at(to, element, index);
    const int begin = static_cast<int>(at.begin), limit = static_cast<int>(at.limit);
    const auto label_at = [&](int64_t j) { return call.labels[index * call.labels_per_row + j]; };
    const auto temperature = [&] { return kLog2e / opaque(n.cs); };
    // `alone`: of these columns only the one that is the j-th label. Asked for again at the end, not kept in registers.
    const auto body = [&](int start, Pair& pair, const Dense& dense, bool alone, int j) {
        raise_to(n.floor_s, pair.s);
        raise_to(n.floor_t, pair.t);
        Columns g;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const float y = student ? fma(pair.s.x[i], n.cs, -dense.m) : fma(pair.t.x[i], n.ct, -dense.m);
            const float e = exp2(y), q = e * (student ? n.over_zs : n.over_zt);
            // 0 * inf: a column without mass takes no share of an infinite sum. In a row without a softmax q is NaN.
            g.x[i] = q == 0 ? 0.0f : dense.factor * e;
        }
        const float* coefficient = call.coefficients + index;
        // An infinite share outweighs the columns' own terms. (Asked before the loop: nothing is kept for it within.)
        const bool own_terms = abs(dense.factor) != infinity;
        for (int i = 0; own_terms && i < call.stat_count; ++i) {
            const int code = call.stats[i];
            const float c = *coefficient;
            coefficient += (per_label(code) ? call.labels_per_row : 1) * call.rows;
            const float* k_at = call.state + (kStateOfRow + i * kStateOfStatistic + 2) * call.rows + index;
            if (student && code == kUntemperedLogprob && shares.untempered != 0) {
                const float m = k_at[0], factor = shares.untempered * temperature() / k_at[call.rows];
#pragma unroll
                for (int j = 0; j < kColumns; ++j)
                    g.x[j] = fma(factor, exp2(fma(opaque(pair.s.x[j]), kLog2e, -m)), g.x[j]);
            }
            if (code < k_entropy || c == 0) continue;
            const Resolved resolved = resolve(code, row.alpha, row.beta);
            with_divergence(resolved.code, [&](auto divergence) {
                using D = decltype(divergence);
                if constexpr (student || D::needs_p) {
                    float k[kRowConstants] = {};
                    if constexpr (D::grad_needs_row) {
#pragma unroll
                        for (int j = 0; j < kRowConstants; ++j) k[j] = k_at[j * call.rows];
                    }
                    const typename D::template Constants<float> constants(resolved.alpha, row.beta, k);
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        const Element<float> e = element_of<D>(n, opaque(pair.s.x[j]), opaque(pair.t.x[j]));
                        g.x[j] = fma(c, student ? D::grad_logq(e, constants) : D::grad_logp(e, constants), g.x[j]);
                    }
                }
            });
        }
        int64_t label = -1;
        if (alone || (call.labels && !apart)) label = label_at(alone ? j : 0) - start;
        if (label >= 0 && label < kColumns) {
            const bool others = alone && LabelBits::some_twice();
            const float weight = label_weight(call, index, alone ? j : 0, others, student, temperature());
#pragma unroll
            for (int i = 0; i < kColumns; ++i) g.x[i] += label == i ? weight : 0.0f;
        }
        // Computed here: a register less in all that comes before.
        const float over_temperature = opaque(student ? n.cs : n.ct) / kLog2e;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) g.x[i] *= over_temperature;
        const int64_t excluded = row.exclude - start;
        if (excluded >= 0 && excluded < kColumns) replace(static_cast<int>(excluded), 0.0f, g);
        if (!alone) return store_columns(out, element, start, limit, g);
        float only = g.x[0];
#pragma unroll
        for (int i = 1; i < kColumns; ++i) only = label == i ? g.x[i] : only;
        store_column(out, element, start + label, only);
    };
    const Dense plain = student ? Dense{n.ms, shares.s * n.over_zs} : Dense{n.mt, shares.t * n.over_zt};
    const auto columns_and_labels = [&](auto two) {
        Dense dense = student ? with_tail(n, shares) : plain;
        int count = (limit - begin + kColumns - 1) / kColumns;
        for (int pass = 0; pass <= apart; ++pass) {
            if (pass == 1) {
                // A label's column is written after its neighbours.
                block_sync(0, block_threads());
                dense = plain;
                count = static_cast<int>(call.labels_per_row);
            }
            for (int i = thread_index(); i < count; i += kSweepThreads) {
                int start = begin + i * kColumns;
                if (pass == 1) {
                    const int64_t label = label_at(i);
                    if (label < begin || label >= limit) continue;
                    start = static_cast<int>(label) - (static_cast<int>(label) - begin) % kColumns;
                }
                Pair pair = load_pair<decltype(two)::value>(call, row, start, limit);
                body(start, pair, dense, pass == 1, i);
            }
        }
    };
    if (call.teacher.data)
        columns_and_labels(std::true_type());
    else
        columns_and_labels(std::false_type());
}

KLDIV_KERNEL(kSweepThreads, 2) gradient(SweepArguments a) {
    const Call& call = a.call;
    const Place at = place_of(a);
    const int64_t index = at.index;
    // The last slice's block also has the padding.
    const bool last = at.limit == call.columns;
    const auto zero = [&](int64_t from) {
        const auto side = [&](const Gradient& to, int element) {
            zero_columns(to, element, index, from, last ? to.width : at.limit, kSweepThreads);
        };
        if (a.student) side(call.d_student, call.student.element);
        if (a.teacher) side(call.d_teacher, call.teacher.element);
    };
    const bool active = !call.mask || call.mask[index];
    const Shares shares = active ? shares_of(call, index) : Shares{};
    if (!shares.any) {
        zero(at.begin);
        return;
    }
    if (last) zero(call.columns);
    const RowInput row = open_row(call, index);
    const float* state = call.state + index;
    const Normalised n = normalise(row, state[0], state[call.rows], state[2 * call.rows], state[3 * call.rows]);
    const bool apart = labels_apart(call);
    if (apart) LabelBits(at.begin).find(call, index, at.limit);
    if (a.student) slice_gradient<true>(a, row, n, shares, at, apart);
    if (a.teacher) slice_gradient<false>(a, row, n, shares, at, apart);
}

// The rows that the mask leaves out, for kernels that do not visit them: values and gradient are 0.
KLDIV_KERNEL(kSweepThreads, 2) zero_masked(SweepArguments a) {
    const Call& call = a.call;
    const int64_t index = block_index();
    if (call.mask[index]) return;
    int64_t values = 0;
    for (int i = 0; i < call.stat_count; ++i) values += per_label(call.stats[i]) ? call.labels_per_row : 1;
    for (int64_t i = thread_index(); i < values; i += kSweepThreads) call.values[i * call.rows + index] = 0;
    if (a.divergences && thread_index() == 0) a.divergences[index] = 0;
    zero_columns(call.d_student, call.student.element, index, 0, call.d_student.width, kSweepThreads);
}

}  // namespace kldiv::gpu
