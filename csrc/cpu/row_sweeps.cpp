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
// Beyond this, x kLog2e as a float is no longer known to a fraction of 1, and rows are shifted by their maximum.
constexpr float kLargestPlain = 1 << 20;
double round_to_grid(double x) { return std::nearbyint(x * kDeltaGrid) / kDeltaGrid; }

}  // namespace

FirstSweep Row::first_sweep(int64_t block) const {
    Buffers b;
    FirstSweep out;
    const Kernels& kernels = *job_.kernels;
    const bool teacher = t_ != nullptr;
    const int64_t end = std::min(job_.columns, (block + 1) * kBlock);
    for (int64_t start = block * kBlock; start < end; start += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - start));
        const int padded = padded_to_lanes(count);
        const Loaded ls = measured_load(true, start, count, b.s);
        const Loaded lt = teacher ? measured_load(false, start, count, b.t) : Loaded{-INFINITY, false};
        FirstSweep tile;
        tile.largest_s = ls.largest;
        tile.largest_t = lt.largest;
        if (argmax_ && ls.largest > out.largest_s)
            tile.argmax = start + (std::find(b.s, b.s + count, ls.largest) - b.s);
        if (teacher && (ls.has_no_mass || lt.has_no_mass))
            for (int i = 0; i < count; ++i) {
                if (b.s[i] == kNoMass && b.t[i] > kNoMass) tile.t.blocked = std::max(tile.t.blocked, b.t[i]);
                if (b.t[i] == kNoMass && b.s[i] > kNoMass) tile.s.blocked = std::max(tile.s.blocked, b.s[i]);
            }
        const bool mass_s = ls.largest > -INFINITY, mass_t = lt.largest > -INFINITY;
        // Without mass the sum is 0, or NaN where the tile is all NaN; any exponent will do.
        float m_s = std::ceil(ls.largest * kLog2e), m_t = std::ceil(lt.largest * kLog2e);
        if (!mass_s) m_s = mass_t ? m_t : 0;
        if (!mass_t) m_t = m_s;
        tile.s.m = m_s;
        tile.t.m = m_t;
        bool have_z = false;
        for (int i = 0; i < kOnlineCount; ++i) {
            if (!online_[i]) continue;
            const bool by_student = first_is_student(i);
            const float m_first = by_student ? m_s : m_t, m_second = by_student ? m_t : m_s;
            OnlineState& online = tile.online[i];
            // The estimate so far, where the columns so far have mass to speak of. Else the tile's own maxima: an
            // estimate from massless columns can be far off, and moving away from it would cost digits.
            const SoftmaxState& so_far = by_student ? out.s : out.t;
            const bool weighty = out.online[i].started && so_far.z * std::exp2(so_far.m - m_first) >= 8;
            const double own = round_to_grid((double(m_first) - m_second) * kExponentToLog);
            online.delta = weighty && std::fabs(out.online[i].delta - own) < 20 ? out.online[i].delta : own;
            online.m = m_first;
            online.started = true;
            const double kappa = std::exp(online.delta + (double(m_second) - m_first) * kExponentToLog);
            const OnlineTile how{m_first, m_second, static_cast<float>(online.delta), static_cast<float>(kappa)};
            const OnlineKernel* kernel = i == kForwardKl   ? kernels.forward_kl
                                         : i == kReverseKl ? kernels.reverse_kl
                                                           : kernels.hellinger;
            OnlineSums sums;
            const bool park = park_ != nullptr;
            kernel[park](by_student ? b.t : b.s, by_student ? b.s : b.t, padded, how, &sums,
                         park ? parked_x(start) : nullptr, park ? parked_y(start) : nullptr);
            if (park) parked_tiles_[start / kTile] = how;
            online.g = sums.g;
            tile.s.z = by_student ? sums.z_first : sums.z_second;
            tile.t.z = by_student ? sums.z_second : sums.z_first;
            have_z = true;
        }
        if (tail_ >= 0) {
            const SoftmaxState whole = sweep_tail(b.s, start, count, ls.largest, &tile.tail);
            // A divergence moves by the sums that it was taken with.
            if (!have_z) tile.s.m = whole.m, tile.s.z = whole.z, tile.s.a = whole.a;
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
        const double scale = first.has_mass() ? first.m : online[i].m;
        OnlineState& a = online[i];
        OnlineState& b = right.online[i];
        // One estimate for both: the union's once it differs by more than the grid can hold without loss.
        double delta = a.delta;
        if (first.has_mass() && second.has_mass()) {
            const double ratio = second.z / first.z * std::exp(delta + (second.m - first.m) * kExponentToLog);
            if (!(std::fabs(ratio - 1) < 1e-3)) delta = round_to_grid(first.lse() - second.lse());
        }
        if (!std::isfinite(delta)) delta = a.delta;
        a.move(online_kind(i), delta, by_student ? s : t, by_student ? t : s);
        b.move(online_kind(i), delta, by_student ? right.s : right.t, by_student ? right.t : right.s);
        a.rebase(scale);
        b.rebase(scale);
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

bool Row::needs_offsets(const FirstSweep& whole) {
    const auto offset = [](float largest, float* to) {
        const bool wanted = *to == 0 && std::isfinite(largest) && std::fabs(largest) > kLargestPlain;
        if (wanted) *to = largest;
        return wanted;
    };
    const bool student = offset(whole.largest_s, &offset_s_);
    const bool teacher = t_ && offset(whole.largest_t, &offset_t_);
    return student || teacher;
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
    q_is_zero_ = t_ && whole.t.has_mass() && whole.t.blocked - whole.t.lse() > kLogZero;
    p_is_zero_ = t_ && whole.s.has_mass() && whole.s.blocked - whole.s.lse() > kLogZero;
    normalise(whole.s, whole.t);
    if (tail_ >= 0) {
        SoftmaxState tail = whole.tail;
        tail.normalise();
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
        } else if (r.online >= 0) {
            const bool by_student = first_is_student(r.online);
            const SoftmaxState& first = by_student ? whole.s : whole.t;
            const SoftmaxState& second = by_student ? whole.t : whole.s;
            OnlineState online = whole.online[r.online];
            online.rebase(first.m);
            online.move(online_kind(r.online), first.lse() - second.lse(), first, second);
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
