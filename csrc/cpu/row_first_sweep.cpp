// A row's first sweep, before its softmaxes are known: the state of each block, and how the states of blocks merge.
#include <algorithm>
#include <cmath>

#include "../plan.h"
#include "row.h"

namespace kldiv {

namespace {

// Of a tile below this no exponential is above 0 beside the row's offset, and 24 bits do not hold its exponents.
constexpr float kNoExponential = -(1 << 20);

// A divergence of rows, in nats, from which on a sum of terms p u + q - p has the digits that it needs: each is right
// to 1e-7 of its p.
constexpr double kFarApart = 0.02;
// Of a divergence, how much more the estimate may be off that it is taken with: what moving it away then costs, 1e-7 of
// that, is a thousandth of it. None is told from one below the smallest.
constexpr double kOffBy = 1e4, kSmallest = 1e-9;

// A tile's G per mass of its first row, moved to the estimate that is `eta` larger, that of its own sums (row_state.h),
// less what it may have lost.
double own_divergence(OnlineKind kind, const OnlineSums& sums, double eta) {
    const double g = sums.g / sums.z_first, second = std::exp(-eta), lost = 1e-6 * g + 1e-7 * second;
    if (kind == OnlineKind::kl) return g - eta + 1 - second - lost;
    return 1 - std::exp(0.5 * eta) * (0.5 * (1 + second) - g + lost);
}

// The smallest exponent in which no 2^(x kLog2e - m) is above 1, of a tile with mass.
float exponent_of(float largest) { return std::ceil(largest * kLog2e); }

}  // namespace

void Row::begin_sweep() {
    Buffers b;
    const int count = static_cast<int>(std::min<int64_t>(kTile, job_.columns)), padded = padded_to_lanes(count);
    offset_s_ = offset_t_ = -INFINITY;
    measured_load(true, 0, count, b.s, &offset_s_);
    if (t_) measured_load(false, 0, count, b.t, &offset_t_);
    if (!std::isfinite(offset_s_) || !std::isfinite(offset_t_)) return;
    if (std::none_of(online_, online_ + kOnlineCount, [](bool wanted) { return wanted; })) return;
    // The largest logits are the offsets.
    anchor_s_.z = job_.kernels->sum_exp(b.s, padded, 0);
    anchor_t_.z = job_.kernels->sum_exp(b.t, padded, 0);
    anchor_s_.m = exponent_of_offset(offset_s_, scale_s_);
    anchor_t_.m = exponent_of_offset(offset_t_, scale_t_);
}

FirstSweep Row::first_sweep(int64_t block) const {
    Buffers b;
    FirstSweep out;
    const Kernels& kernels = *job_.kernels;
    const bool teacher = t_ != nullptr;
    float offset_s = offset_s_, offset_t = offset_t_;
    const int64_t end = std::min(job_.columns, (block + 1) * kBlock);
    for (int64_t start = block * kBlock; start < end; start += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - start));
        const int padded = padded_to_lanes(count);
        const Loaded ls = measured_load(true, start, count, b.s, &offset_s);
        const Loaded lt = teacher ? measured_load(false, start, count, b.t, &offset_t) : Loaded{-INFINITY, false};
        // What a state of the tile's numbers lacks of the logits' own: the exponents, and the difference of both rows.
        const double base_s = exponent_of_offset(offset_s, scale_s_), base_t = exponent_of_offset(offset_t, scale_t_);
        const double between = (base_t - base_s) * kExponentToLog;
        FirstSweep tile;
        tile.largest_s = ls.largest;
        tile.largest_t = lt.largest;
        if (argmax_ && ls.largest > out.largest_s) tile.argmax = start + find(start, count, ls.largest);
        if (teacher && (ls.has_no_mass || lt.has_no_mass))
            for (int i = 0; i < count; ++i) {
                const auto note = [i](const float* x, const float* other, double below, SoftmaxState& state) {
                    if (x[i] > kNoMass && other[i] == kNoMass) state.blocked = std::max(state.blocked, x[i] + below);
                };
                note(b.s, b.t, base_s * kExponentToLog, tile.s);
                note(b.t, b.s, base_t * kExponentToLog, tile.t);
            }
        const float top_s = scaled_one(ls.largest, offset_s, scale_s_),
                    top_t = scaled_one(lt.largest, offset_t, scale_t_);
        const bool mass_s = !(top_s < kNoExponential), mass_t = !(top_t < kNoExponential);
        // Without mass the sum is 0, or NaN where the tile is all NaN; any exponent will do.
        float m_s = mass_s ? exponent_of(top_s) : 0, m_t = mass_t ? exponent_of(top_t) : m_s;
        if (!mass_s) m_s = m_t;
        tile.s.m = base_s + m_s;
        tile.t.m = base_t + m_t;
        bool have_z = false;
        for (int i = 0; i < kOnlineCount; ++i) {
            if (!online_[i]) continue;
            const bool by_student = first_is_student(i);
            const float m_first = by_student ? m_s : m_t, m_second = by_student ? m_t : m_s;
            OnlineState& online = tile.online[i];
            // The estimate so far, at first that of the row's first tile, where the columns so far have mass to speak
            // of in both rows, and the tile's rows are not so far apart that their exponentials leave the range of
            // floats. Else the tile's own, from a sweep for its sums: a term that is taken under an estimate that is
            // off by 1 and moved away from it has lost the digits of a small divergence, and under one that is off by
            // 20 all.
            const bool first_tile = !out.online[i].started;
            const SoftmaxState &s = first_tile ? anchor_s_ : out.s, &t = first_tile ? anchor_t_ : out.t;
            const auto weighty = [](const SoftmaxState& so_far, const SoftmaxState& tile_state) {
                return so_far.z * std::exp2(so_far.m - tile_state.m) >= 0.5;
            };
            const double sign = by_student ? -1 : 1, apart = sign * (double(m_t) - m_s) * kExponentToLog;
            double delta = apart;
            bool known = weighty(s, tile.s) && weighty(t, tile.t);
            if (known) {
                delta = (first_tile ? sign * (t.lse() - s.lse()) : out.online[i].delta) - sign * between;
                known = std::fabs(delta - apart) < 20;
            }
            if (!known && mass_s && mass_t) {
                const double z_s = kernels.sum_exp(b.s, padded, m_s), z_t = kernels.sum_exp(b.t, padded, m_t);
                delta = apart + sign * std::log(z_t / z_s);
            }
            if (!std::isfinite(delta)) delta = 0;
            float d = static_cast<float>(first_tile || !known ? round_to_grid(delta) : delta);
            OnlineSums sums;
            const bool park = park_ != nullptr;
            const auto run = [&](OnlineKernel kernel) {
                const OnlineTile how{m_first, m_second, d, static_cast<float>(std::exp(d - apart))};
                kernel(by_student ? b.t : b.s, by_student ? b.s : b.t, padded, how, &sums, parked_x(start),
                       parked_y(start));
            };
            const auto& kl = (i == kForwardKl ? kernels.forward_kl : kernels.reverse_kl)[park];
            const OnlineKernel careful = i == kHellinger ? kernels.hellinger[park] : kl[false];
            const SoftmaxState& first = by_student ? out.s : out.t;
            const bool far = i != kHellinger && out.online[i].started && out.online[i].g >= kFarApart * first.z;
            run(far ? kl[true] : careful);
            // The tile's divergence under the estimate of its own sums, per mass, and how far that one is off.
            const double eta = std::log(sums.z_first / sums.z_second) - (d - apart);
            const double own = own_divergence(online_kind(i), sums, eta);
            const float better = static_cast<float>(round_to_grid(d + eta));
            if (std::isfinite(better) && better != d && std::fabs(eta) > kOffBy * std::max(own, kSmallest)) {
                d = better;
                run(careful);
            } else if (far && !(own >= kFarApart)) {
                run(careful);
            }
            online.delta = d + sign * between;
            online.m = by_student ? tile.s.m : tile.t.m;
            online.started = true;
            if (park) parked_tiles_[start / kTile].delta = online.delta;
            online.g = sums.g;
            tile.s.z = by_student ? sums.z_first : sums.z_second;
            tile.t.z = by_student ? sums.z_second : sums.z_first;
            have_z = true;
        }
        if (tail_ >= 0) {
            const SoftmaxState whole = sweep_tail(b.s, start, count, top_s, &tile.tail);
            tile.tail.m += base_s;
            // A divergence moves by the sums that it was taken with.
            if (!have_z) tile.s.m = base_s + whole.m, tile.s.z = whole.z, tile.s.a = whole.a;
        }
        if (park_) {
            parked_tiles_[start / kTile].m_s = tile.s.m;
            parked_tiles_[start / kTile].m_t = tile.t.m;
        }
        if (park_ && !have_z) {
            tile.s.z = kernels.sum_exp_times[1](b.s, padded, kLog2e, m_s, parked_x(start));
            tile.t.z = kernels.sum_exp_times[1](b.t, padded, kLog2e, m_t, parked_y(start));
            have_z = true;
        }
        if (entropy_s_ && (tail_ < 0 || have_z))
            kernels.sum_exp_entropy(b.s, padded, m_s, &tile.s.z, &tile.s.a);
        else if (tail_ < 0 && !have_z)
            tile.s.z = kernels.sum_exp(b.s, padded, m_s);
        if (entropy_t_)
            kernels.sum_exp_entropy(b.t, padded, m_t, &tile.t.z, &tile.t.a);
        else if (teacher && !have_z)
            tile.t.z = kernels.sum_exp(b.t, padded, m_t);
        if (untempered_ >= 0) {
            const float top = scaled_one(ls.largest, offset_s, 1), m = top < kNoExponential ? 0 : exponent_of(top);
            tile.untempered.m = exponent_of_offset(offset_s, 1) + m;
            tile.untempered.z =
                kernels.sum_exp_times[park_ != nullptr](b.s, padded, untempered_factor_, m, parked_untempered(start));
            if (park_) parked_tiles_[start / kTile].m_untempered = tile.untempered.m;
        }
        out.merge(tile, online_);
    }
    return out;
}

// The tile's tail, and with the labels' own terms the whole. The labels' places are empty meanwhile.
SoftmaxState Row::sweep_tail(float* x, int64_t start, int count, float largest, SoftmaxState* tail) const {
    const int padded = padded_to_lanes(count);
    const auto first = std::lower_bound(support_.begin(), support_.end(), start);
    const auto last = std::lower_bound(first, support_.end(), start + count);
    SoftmaxState whole;
    float labels[kTile];
    for (auto label = first; label != last; ++label) {
        float& place = x[*label - start];
        const double logit = labels[label - first] = place;
        place = kNoMass;
        if (logit <= kNoMass) continue;
        // As the kernels take it: 2^y with y = fma(x, kLog2e, -m).
        const double m = std::ceil(logit * kLog2e), z = std::exp2(logit * kLog2e - m);
        SoftmaxState one;
        one.m = m;
        one.z = z;
        one.a = z * (m * kExponentToLog - logit);
        whole.merge(one);
    }
    // Loaded onto itself for what the loader measures.
    if (first != last)
        largest = job_.kernels->measured_load[static_cast<int>(Dtype::float32)](x, count, 1, 0, x).largest;
    tail->m = largest > kNoMass ? std::ceil(largest * kLog2e) : 0;
    if (entropy_s_)
        job_.kernels->sum_exp_entropy(x, padded, static_cast<float>(tail->m), &tail->z, &tail->a);
    else
        tail->z = job_.kernels->sum_exp(x, padded, static_cast<float>(tail->m));
    for (auto label = first; label != last; ++label) x[*label - start] = labels[label - first];
    whole.merge(*tail);
    return whole;
}

void FirstSweep::merge(const FirstSweep& other, const bool* wanted) {
    FirstSweep right = other;
    SoftmaxState both_s = s, both_t = t;
    both_s.merge(right.s);
    both_t.merge(right.t);
    for (int i = 0; i < kOnlineCount; ++i) {
        if (!wanted[i] || !right.online[i].started) continue;
        if (!online[i].started) {
            online[i] = right.online[i];
            continue;
        }
        const bool by_student = first_is_student(i);
        const SoftmaxState& first = by_student ? both_s : both_t;
        const SoftmaxState& second = by_student ? both_t : both_s;
        OnlineState& a = online[i];
        OnlineState& b = right.online[i];
        // One estimate for both: the union's once it differs by more than the grid can hold without loss.
        double delta = a.delta;
        if (first.has_mass() && second.has_mass()) {
            const double ratio = second.z / first.z * std::exp(delta + (second.m - first.m) * kExponentToLog);
            if (!(std::fabs(ratio - 1) < 1e-3)) delta = round_to_grid(first.lse() - second.lse());
        }
        if (!std::isfinite(delta)) delta = a.delta;
        const double m = first.has_mass() ? first.m : second.m + delta / kExponentToLog;
        a.move(online_kind(i), delta, m, by_student ? s : t, by_student ? t : s);
        b.move(online_kind(i), delta, m, by_student ? right.s : right.t, by_student ? right.t : right.s);
        a.g += b.g;
    }
    s = both_s;
    t = both_t;
    tail.merge(right.tail);
    untempered.merge(right.untempered);
    if (right.largest_s > largest_s) {
        largest_s = right.largest_s;
        argmax = right.argmax;
    }
    largest_t = std::max(largest_t, right.largest_t);
}

int Row::find(int64_t start, int count, float logit) const {
    Buffers b;
    load(true, start, count, 1, 0, b.s);
    return static_cast<int>(std::find(b.s, b.s + count, scaled_one(logit, 0, 1)) - b.s);
}

}  // namespace kldiv
