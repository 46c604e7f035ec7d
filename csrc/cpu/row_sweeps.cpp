// The sweeps that take a row's sums, and what follows from them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../plan.h"
#include "row.h"

namespace kldiv {

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
// A float64 softmax underflows below this log-probability: such a column counts as having no mass.
constexpr double kLogZero = -745.0;
// Estimates of Delta are rounded to this grid (kernels.h, NormalisedRow).
constexpr double kDeltaGrid = 4096.0;
// Of a tile below this no exponential is above 0 beside the row's offset, and 24 bits do not hold its exponents.
constexpr float kNoExponential = -(1 << 20);
double round_to_grid(double x) { return std::nearbyint(x * kDeltaGrid) / kDeltaGrid; }

// The smallest exponent in which no 2^(x kLog2e - m) is above 1, of a tile with mass.
float exponent_of(float largest) { return std::ceil(largest * kLog2e); }

// What an offset takes off the exponents.
double base(float offset, float scale) { return std::isfinite(offset) ? double(offset) * scale * kLog2e : 0; }

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
    anchor_s_.m = base(offset_s_, scale_s_);
    anchor_t_.m = base(offset_t_, scale_t_);
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
        const double base_s = base(offset_s, scale_s_), base_t = base(offset_t, scale_t_);
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
            const float d = static_cast<float>(first_tile || !known ? round_to_grid(delta) : delta);
            online.delta = d + sign * between;
            online.m = by_student ? tile.s.m : tile.t.m;
            online.started = true;
            const double kappa = std::exp(d - apart);
            const OnlineTile how{m_first, m_second, d, static_cast<float>(kappa)};
            const OnlineKernel* kernel = i == kForwardKl   ? kernels.forward_kl
                                         : i == kReverseKl ? kernels.reverse_kl
                                                           : kernels.hellinger;
            OnlineSums sums;
            const bool park = park_ != nullptr;
            kernel[park](by_student ? b.t : b.s, by_student ? b.s : b.t, padded, how, &sums,
                         park ? parked_x(start) : nullptr, park ? parked_y(start) : nullptr);
            if (park) parked_tiles_[start / kTile] = {tile.s.m, tile.t.m, online.delta};
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
        if (entropy_s_ && (tail_ < 0 || have_z))
            kernels.sum_exp_entropy(b.s, padded, m_s, &tile.s.z, &tile.s.a);
        else if (tail_ < 0 && !have_z)
            tile.s.z = kernels.sum_exp(b.s, padded, m_s);
        if (entropy_t_)
            kernels.sum_exp_entropy(b.t, padded, m_t, &tile.t.z, &tile.t.a);
        else if (teacher && !have_z)
            tile.t.z = kernels.sum_exp(b.t, padded, m_t);
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

void Row::normalise(const SoftmaxState& s, const SoftmaxState& t) {
    const auto finish = [](const SoftmaxState& state) {
        // A row that is -inf everywhere has z = 0: its softmax is 0/0.
        if (!state.has_mass()) return Softmax{0, static_cast<float>(kNaN), static_cast<float>(kNaN)};
        return Softmax{static_cast<float>(state.m), static_cast<float>(1 / state.z), static_cast<float>(state.lse())};
    };
    lse_s_ = s.has_mass() ? s.lse() : kNaN;
    lse_t_ = t_ ? (t.has_mass() ? t.lse() : kNaN) : 0;
    const double delta = lse_t_ - lse_s_, high = t_ ? round_to_grid(delta) : 0;
    normalised_ = {finish(s),
                   t_ ? finish(t) : Softmax{0, 0, 0},
                   static_cast<float>(high),
                   static_cast<float>(t_ ? delta - high : 0),
                   alpha_,
                   beta_,
                   nullptr};
}

void Row::finish_first(FirstSweep whole) {
    largest_s_ = whole.largest_s;
    argmax_index_ = whole.argmax;
    offset_s_ = std::isfinite(whole.largest_s) ? whole.largest_s : 0;
    offset_t_ = std::isfinite(whole.largest_t) ? whole.largest_t : 0;
    // From here on relative to them.
    const double base_s = base(offset_s_, scale_s_), base_t = base(offset_t_, scale_t_);
    whole.s.shift(base_s);
    whole.t.shift(base_t);
    whole.tail.shift(base_s);
    for (int i = 0; i < kOnlineCount; ++i) {
        whole.online[i].m -= first_is_student(i) ? base_s : base_t;
        whole.online[i].delta -= (first_is_student(i) ? -1 : 1) * (base_t - base_s) * kExponentToLog;
    }
    for (ParkedTile& tile : parked_tiles_) {
        tile.m_s -= base_s;
        tile.m_t -= base_t;
        tile.delta -= (online_[kReverseKl] ? -1 : 1) * (base_t - base_s) * kExponentToLog;
    }
    q_is_zero_ = t_ && whole.t.has_mass() && whole.t.blocked - whole.t.lse() > kLogZero;
    p_is_zero_ = t_ && whole.s.has_mass() && whole.s.blocked - whole.s.lse() > kLogZero;
    normalise(whole.s, whole.t);
    if (tail_ >= 0) {
        SoftmaxState tail = whole.tail;
        tail.normalise();
        // In an exponent that the saved state, and the kernels, hold: far below the labels not every integer is one.
        tail.rebase(static_cast<float>(tail.m));
        FinishedStatistic& f = finished_[tail_];
        f.value = std::isnan(lse_s_) ? kNaN : (tail.has_mass() ? tail.lse() - lse_s_ : -kInfinity);
        f.k[0] = tail.m;
        f.k[1] = tail.z;
    }
    for (size_t i = 0; i < resolved_.size(); ++i) {
        const Resolved& r = resolved_[i];
        if (!r.divergence) continue;
        double value;
        if (r.entropy_s || r.entropy_t) {
            const SoftmaxState& state = r.entropy_s ? whole.s : whole.t;
            value = state.has_mass() ? std::log2(state.z) * kExponentToLog + state.a / state.z : kNaN;
            if (value < 0) value = 0;
        } else if (r.online >= 0) {
            const bool by_student = first_is_student(r.online);
            const SoftmaxState& first = by_student ? whole.s : whole.t;
            const SoftmaxState& second = by_student ? whole.t : whole.s;
            OnlineState online = whole.online[r.online];
            online.move(online_kind(r.online), first.lse() - second.lse(), first.m, first, second);
            value = std::max(0.0, online.g / first.z);
            if (!first.has_mass() || !second.has_mass() || std::isnan(first.z + second.z)) value = kNaN;
        } else {
            continue;
        }
        finish(i, &value, 0);
    }
    whole.s.normalise();
    whole.t.normalise();
    state_s_ = whole.s;
    state_t_ = whole.t;
    normalise(state_s_, state_t_);
}

void Row::finish(size_t i, const double* sums, double log_sum) {
    const Resolved& r = resolved_[i];
    FinishedStatistic& f = finished_[i];
    double out[3];
    r.divergence->finish(sums, log_sum, q_is_zero_, p_is_zero_, r.alpha, r.beta, out, f.k);
    const bool of_teacher_alone = r.entropy_t, of_student_alone = !r.divergence->needs_p;
    const bool bad = (!of_teacher_alone && std::isnan(lse_s_)) || (!of_student_alone && std::isnan(lse_t_));
    f.value = bad ? kNaN : out[0];
    f.sum_q = bad ? kNaN : out[1];
    f.sum_p = bad ? kNaN : out[2];
}

void Row::second_sweep(int64_t block, std::vector<NormalisedSums>& sums) const {
    Buffers b;
    const int64_t end = std::min(job_.columns, (block + 1) * kBlock);
    for (int64_t start = block * kBlock; start < end; start += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - start));
        const int padded = padded_to_lanes(count);
        load(true, start, count, b.s);
        if (t_) load(false, start, count, b.t);
        for (size_t i = 0; i < resolved_.size(); ++i) {
            const Resolved& r = resolved_[i];
            if (!r.divergence || r.online >= 0 || r.entropy_s || r.entropy_t) continue;
            NormalisedRow row = normalised_;
            row.alpha = r.alpha;
            row.beta = r.beta;
            const bool park = park_ != nullptr;
            (park ? r.divergence->terms_and_park : r.divergence->terms)(
                b.s, b.t, padded, row, sums[i].sums, &sums[i].log_sum, park ? parked_x(start) : nullptr,
                park ? parked_y(start) : nullptr);
        }
    }
}

void Row::merge(std::vector<NormalisedSums>& into, const std::vector<NormalisedSums>& from) {
    for (size_t i = 0; i < into.size(); ++i) {
        for (int j = 0; j < 4; ++j) into[i].sums[j] += from[i].sums[j];
        LogSum &a = into[i].log_sum, b = from[i].log_sum;
        const double top = std::max(a.max, b.max);
        if (top == -kInfinity) continue;
        a.sum = (a.sum > 0 ? a.sum * std::exp(a.max - top) : 0) + (b.sum > 0 ? b.sum * std::exp(b.max - top) : 0);
        a.max = top;
    }
}

void Row::finish_second(const std::vector<NormalisedSums>& sums) {
    for (size_t i = 0; i < resolved_.size(); ++i) {
        const Resolved& r = resolved_[i];
        if (!r.divergence || r.online >= 0 || r.entropy_s || r.entropy_t) continue;
        finish(i, sums[i].sums, sums[i].log_sum.max + std::log(sums[i].log_sum.sum));
    }
}

}  // namespace kldiv
