// What follows from a row's merged sweeps: the softmaxes, and the value and gradient's constants of each statistic.
#include <algorithm>
#include <cmath>

#include "row.h"

namespace kldiv {

namespace {

// A float64 softmax underflows below this log-probability: such a column counts as having no mass.
constexpr double kLogZero = -745.0;

}  // namespace

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
    const double base_s = exponent_of_offset(offset_s_, scale_s_), base_t = exponent_of_offset(offset_t_, scale_t_);
    whole.s.shift(base_s);
    whole.t.shift(base_t);
    whole.tail.shift(base_s);
    const double base_untempered = exponent_of_offset(offset_s_, 1);
    whole.untempered.shift(base_untempered);
    for (int i = 0; i < kOnlineCount; ++i) {
        whole.online[i].m -= first_is_student(i) ? base_s : base_t;
        whole.online[i].delta -= (first_is_student(i) ? -1 : 1) * (base_t - base_s) * kExponentToLog;
    }
    for (ParkedTile& tile : parked_tiles_) {
        tile.m_s -= base_s;
        tile.m_t -= base_t;
        tile.m_untempered -= base_untempered;
        tile.delta -= (online_[kReverseKl] ? -1 : 1) * (base_t - base_s) * kExponentToLog;
    }
    q_is_zero_ = t_ && whole.t.has_mass() && whole.t.blocked - whole.t.lse() > kLogZero;
    p_is_zero_ = t_ && whole.s.has_mass() && whole.s.blocked - whole.s.lse() > kLogZero;
    normalise(whole.s, whole.t);
    const auto keep = [&](SoftmaxState state, int statistic) {
        state.normalise();
        // In an exponent that the saved state, and the kernels, hold: far below the labels not every integer is one.
        state.rebase(static_cast<float>(state.m));
        finished_[statistic].k[0] = state.m;
        finished_[statistic].k[1] = state.z;
        return state;
    };
    if (untempered_ >= 0) keep(whole.untempered, untempered_);
    if (tail_ >= 0) {
        const SoftmaxState tail = keep(whole.tail, tail_);
        finished_[tail_].value = std::isnan(lse_s_) ? kNaN : (tail.has_mass() ? tail.lse() - lse_s_ : -kInfinity);
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
    // No divergence is negative; its terms may be, by what float has no place for.
    f.value = bad ? kNaN : (r.divergence->needs_p ? std::max(0.0, out[0]) : out[0]);
    f.sum_q = bad ? kNaN : out[1];
    f.sum_p = bad ? kNaN : out[2];
}

void Row::finish_second(const std::vector<NormalisedSums>& sums) {
    for (size_t i = 0; i < resolved_.size(); ++i) {
        const Resolved& r = resolved_[i];
        if (!r.divergence || r.online >= 0 || r.entropy_s || r.entropy_t) continue;
        finish(i, sums[i].sums, sums[i].log_sum.max + std::log(sums[i].log_sum.sum));
    }
}

}  // namespace kldiv
