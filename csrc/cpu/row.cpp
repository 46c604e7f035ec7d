// What a row is asked for, its logits, and where its results go.
#include "row.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../plan.h"

namespace kldiv {

namespace {

// How far above the offset so far a logit may be, in units of the temperature: from here on the rounding of a scaled
// logit is 5e-7, of which the contract allows 1e-5.
constexpr double kFarAboveOffset = 8;

}  // namespace

Row::Row(const Job& job, int64_t index)
    : job_(job),
      index_(index),
      s_(job.student.row(index)),
      t_(job.teacher ? job.teacher.row(index) : nullptr),
      exclude_(job.exclude ? job.exclude[index] : -1),
      resolved_(job.stats.size()),
      finished_(job.stats.size()),
      weight_(job.stats.size()) {
    double parameters[4];
    for (int i = 0; i < 4; ++i)
        parameters[i] = job.token_parameters ? job.token_parameters[i * job.rows + index] : job.parameters[i];
    scale_s_ = static_cast<float>(1 / parameters[0]);
    scale_t_ = static_cast<float>(1 / parameters[1]);
    alpha_ = parameters[2];
    beta_ = parameters[3];
    untempered_factor_ = static_cast<float>(parameters[0] * kLog2e);
    resolve();
    resolve_parking();
}

void Row::resolve() {
    for (size_t i = 0; i < job_.stats.size(); ++i) {
        const Request& request = job_.stats[i];
        argmax_ |= request.kind == Kind::argmax;
        if (request.kind == Kind::untempered_logprob) untempered_ = static_cast<int>(i);
        if (request.kind == Kind::tail_logprob) {
            tail_ = static_cast<int>(i);
            const int64_t* labels = job_.labels + index_ * job_.labels_per_row;
            std::copy_if(labels, labels + job_.labels_per_row, std::back_inserter(support_),
                         [](int64_t label) { return label >= 0; });
            std::sort(support_.begin(), support_.end());
            support_.erase(std::unique(support_.begin(), support_.end()), support_.end());
        }
        if (request.kind != Kind::divergence) continue;
        Resolved& r = resolved_[i];
        r = {request.divergence, alpha_, beta_};
        std::string name = request.divergence->name;
        if (name == "js" && (beta_ <= 0 || beta_ >= 1)) name = beta_ <= 0 ? "forward_kl" : "reverse_kl";
        if (name == "alpha" && (alpha_ == 0 || alpha_ == 1)) name = alpha_ == 1 ? "forward_kl" : "reverse_kl";
        if (name == "skew_kl" && alpha_ == 0) name = "forward_kl";
        if (name == "skew_reverse_kl" && alpha_ == 0) name = "reverse_kl";
        if (name == "alpha" && alpha_ < 0.5) {
            name = "alpha_below_half";
            r.alpha = 1 - alpha_;
        }
        if (name != request.divergence->name) r.divergence = find_statistic(name).divergence;
        r.online = name == "forward_kl"   ? kForwardKl
                   : name == "reverse_kl" ? kReverseKl
                   : name == "hellinger"  ? kHellinger
                                          : -1;
        r.entropy_s = name == "entropy";
        r.entropy_t = name == "reference_entropy";
        if (r.online >= 0) online_[r.online] = true;
        entropy_s_ |= r.entropy_s;
        entropy_t_ |= r.entropy_t;
        second_sweep_ |= !r.divergence->finishes_first;
    }
}

void Row::resolve_parking() {
    if (!job_.values || !job_.coefficients || !job_.d_student || job_.d_teacher) return;
    int divergences = 0;
    for (size_t i = 0; i < job_.stats.size(); ++i) {
        const Kind kind = job_.stats[i].kind;
        if (kind == Kind::divergence) {
            ++divergences;
            parked_stat_ = i;
        } else if (kind != Kind::logprob && kind != Kind::untempered_logprob) {
            return;
        }
    }
    if (divergences != 1) return;
    const Resolved& only = resolved_[parked_stat_];
    if (only.online < 0 && !(second_sweep_ && only.divergence->terms_and_park)) return;
    park_floats_ = (untempered_ < 0 ? 2 : 3) * padded_to_lanes(job_.columns);
    parked_tiles_.resize((job_.columns + kTile - 1) / kTile);
}

int64_t Row::blocks() const { return (job_.columns + kBlock - 1) / kBlock; }

void Row::load(bool student, int64_t start, int count, float scale, float offset, float* to) const {
    const Rows& rows = student ? job_.student : job_.teacher;
    const char* from = (student ? s_ : t_) + start * rows.element_bytes();
    job_.kernels->load[static_cast<int>(rows.dtype)](from, count, scale, offset, to);
    if (exclude_ >= start && exclude_ < start + count) to[exclude_ - start] = kNoMass;
}

void Row::load(bool student, int64_t start, int count, float* to) const {
    load(student, start, count, student ? scale_s_ : scale_t_, student ? offset_s_ : offset_t_, to);
}

Loaded Row::measured_load(bool student, int64_t start, int count, float* to, float* offset) const {
    const Rows& rows = student ? job_.student : job_.teacher;
    const float scale = student ? scale_s_ : scale_t_;
    const char* from = (student ? s_ : t_) + start * rows.element_bytes();
    const auto measure = job_.kernels->measured_load[static_cast<int>(rows.dtype)];
    Loaded loaded = measure(from, count, scale, *offset, to);
    if (exclude_ >= start && exclude_ < start + count) {
        const int at = static_cast<int>(exclude_ - start);
        Buffers rest;
        loaded.largest =
            std::max(measure(from, at, 1, 0, rest.s).largest,
                     measure(from + (at + 1) * rows.element_bytes(), count - at - 1, 1, 0, rest.s).largest);
        loaded.has_no_mass = true;
        to[at] = kNoMass;
    }
    if (loaded.largest <= kNoMass) loaded.largest = -std::numeric_limits<float>::infinity();
    const double sharpest = student && untempered_ >= 0 ? std::max(scale, 1.0f) : scale;
    if (std::isfinite(loaded.largest) && (double(loaded.largest) - *offset) * sharpest > kFarAboveOffset) {
        *offset = loaded.largest;
        load(student, start, count, scale, *offset, to);
    }
    return loaded;
}

double Row::untempered_lse() const {
    const double m = finished_[untempered_].k[0], z = finished_[untempered_].k[1];
    return z == 0 ? kNaN : (m + std::log2(z)) * kExponentToLog;
}

double Row::logprob(Kind kind, int64_t j) const {
    const bool student = kind != Kind::reference_logprob, untempered = kind == Kind::untempered_logprob;
    const float scale = untempered ? 1 : (student ? scale_s_ : scale_t_), offset = student ? offset_s_ : offset_t_;
    const int64_t cell = index_ * job_.labels_per_row + j, label = job_.labels[cell];
    if (label == kNoLabel) return 0;
    if (label >= 0 && label == exclude_) return -kInfinity;
    float x;
    if (job_.picked) {
        x = scaled_one(job_.picked[(student ? 0 : job_.rows * job_.labels_per_row) + cell], offset, scale);
    } else {
        const Rows& rows = student ? job_.student : job_.teacher;
        // The tile loader converts one column; it pads its output.
        alignas(64) float buffer[kPad];
        job_.kernels->load[static_cast<int>(rows.dtype)]((student ? s_ : t_) + label * rows.element_bytes(), 1, scale,
                                                         offset, buffer);
        x = buffer[0];
    }
    const double lse = untempered ? untempered_lse() : (student ? lse_s_ : lse_t_);
    if (std::isnan(lse)) return kNaN;
    return x <= kNoMass ? -kInfinity : x - lse;
}

void Row::write_values() const {
    int64_t at = 0;
    const auto put = [&](double value) { job_.values[at++ * job_.rows + index_] = static_cast<float>(value); };
    for (size_t i = 0; i < job_.stats.size(); ++i) {
        switch (job_.stats[i].kind) {
            case Kind::logprob:
            case Kind::reference_logprob:
            case Kind::untempered_logprob:
                for (int64_t j = 0; j < job_.labels_per_row; ++j) put(logprob(job_.stats[i].kind, j));
                break;
            case Kind::logsumexp:
                put(lse_s_ + static_cast<double>(offset_s_) * scale_s_);
                break;
            case Kind::max_logprob:
                put(scaled(true, largest_s_) - lse_s_);
                break;
            case Kind::argmax:
                put(std::isnan(lse_s_) ? -1.0 : static_cast<double>(argmax_index_));
                break;
            case Kind::tail_logprob:
            case Kind::divergence:
                put(finished_[i].value);
                break;
        }
    }
}

void Row::save_state() const {
    float* to = job_.state + index_;
    const int64_t n = job_.rows;
    const float of_row[kStateOfRow] = {normalised_.s.m,        normalised_.s.inverse_z, offset_s_,
                                       normalised_.t.m,        normalised_.t.inverse_z, offset_t_,
                                       normalised_.delta_high, normalised_.delta_low};
    for (int i = 0; i < kStateOfRow; ++i) to[i * n] = of_row[i];
    to += kStateOfRow * n;
    for (const FinishedStatistic& f : finished_) {
        to[0] = static_cast<float>(f.sum_q);
        to[n] = static_cast<float>(f.sum_p);
        for (int i = 0; i < kRowConstants; ++i) to[(2 + i) * n] = static_cast<float>(f.k[i]);
        to += kStateOfStatistic * n;
    }
}

void Row::load_state() {
    const float* from = job_.state + index_;
    const int64_t n = job_.rows;
    const auto softmax = [&](int at, SoftmaxState* state, float* offset) {
        state->m = from[at * n];
        state->z = 1.0 / from[(at + 1) * n];
        *offset = from[(at + 2) * n];
    };
    softmax(0, &state_s_, &offset_s_);
    softmax(3, &state_t_, &offset_t_);
    normalise(state_s_, state_t_);
    // As the sums of the forward pass took it: the sign of log p - log q must not differ between the two.
    normalised_.delta_high = from[6 * n];
    normalised_.delta_low = from[7 * n];
    from += kStateOfRow * n;
    for (FinishedStatistic& f : finished_) {
        f.sum_q = from[0];
        f.sum_p = from[n];
        for (int i = 0; i < kRowConstants; ++i) f.k[i] = from[(2 + i) * n];
        from += kStateOfStatistic * n;
    }
}

}  // namespace kldiv
