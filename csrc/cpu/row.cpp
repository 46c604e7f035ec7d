#include "row.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../plan.h"

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

struct Row::Buffers {
    alignas(64) float s[kTile], t[kTile], out[kTile];
};

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
    resolve();
}

void Row::resolve() {
    for (size_t i = 0; i < job_.stats.size(); ++i) {
        const Request& request = job_.stats[i];
        argmax_ |= request.kind == Kind::argmax;
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
        if (r.online < 0 && !r.entropy_s && !r.entropy_t) {
            parked_ = second_sweep_ || !r.divergence->terms_and_park ? -1 : static_cast<int>(i);
            second_sweep_ = true;
        }
    }
    // One float a column of one row, instead of the exponentials and the logarithm once more: only in the one-read
    // form, and only where there is one such gradient to park.
    if (!job_.values || !job_.coefficients || !job_.d_student || job_.d_teacher) parked_ = -1;
    if (parked_ >= 0) park_.reset(new float[(job_.columns + kPad - 1) / kPad * kPad]);
}

int64_t Row::blocks() const { return (job_.columns + kBlock - 1) / kBlock; }

void Row::load(bool student, int64_t start, int count, float* to) const {
    const Rows& rows = student ? job_.student : job_.teacher;
    const char* from = (student ? s_ : t_) + start * rows.element_bytes();
    job_.kernels->load[static_cast<int>(rows.dtype)](from, count, student ? scale_s_ : scale_t_,
                                                     student ? offset_s_ : offset_t_, to);
    if (exclude_ >= start && exclude_ < start + count) to[exclude_ - start] = kNoMass;
}

Loaded Row::measured_load(bool student, int64_t start, int count, float* to) const {
    const Rows& rows = student ? job_.student : job_.teacher;
    const char* from = (student ? s_ : t_) + start * rows.element_bytes();
    Loaded loaded = job_.kernels->measured_load[static_cast<int>(rows.dtype)](
        from, count, student ? scale_s_ : scale_t_, student ? offset_s_ : offset_t_, to);
    if (exclude_ >= start && exclude_ < start + count) {
        to[exclude_ - start] = kNoMass;
        loaded.has_no_mass = true;
        loaded.largest = -std::numeric_limits<float>::infinity();
        for (int i = 0; i < count; ++i)
            if (to[i] > kNoMass && to[i] > loaded.largest) loaded.largest = to[i];
    }
    if (loaded.largest <= kNoMass) loaded.largest = -std::numeric_limits<float>::infinity();
    return loaded;
}

FirstSweep Row::first_sweep(int64_t block) const {
    Buffers b;
    FirstSweep out;
    const Kernels& kernels = *job_.kernels;
    const bool teacher = t_ != nullptr;
    const int64_t end = std::min(job_.columns, (block + 1) * kBlock);
    for (int64_t start = block * kBlock; start < end; start += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - start));
        const int padded = (count + kPad - 1) / kPad * kPad;
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
            // The estimate so far, unless this tile is far from it: then its own maxima give one.
            const double own = round_to_grid((double(m_first) - m_second) * kExponentToLog);
            const double so_far = out.online[i].delta;
            online.delta = out.online[i].started && std::fabs(so_far - own) < 20 ? so_far : own;
            online.m = m_first;
            online.started = true;
            const double kappa = std::exp(online.delta + (double(m_second) - m_first) * kExponentToLog);
            double z_first, z_second;
            (online_kind(i) == OnlineKind::kl ? kernels.online_kl : kernels.online_hellinger)(
                by_student ? b.t : b.s, by_student ? b.s : b.t, padded, m_second, m_first,
                static_cast<float>(online.delta), static_cast<float>(kappa), &z_second, &z_first, &online.g);
            tile.s.z = by_student ? z_first : z_second;
            tile.t.z = by_student ? z_second : z_first;
            have_z = true;
        }
        if (entropy_s_)
            kernels.sum_exp_entropy(b.s, padded, m_s, &tile.s.z, &tile.s.a);
        else if (!have_z)
            tile.s.z = kernels.sum_exp(b.s, padded, m_s);
        if (entropy_t_)
            kernels.sum_exp_entropy(b.t, padded, m_t, &tile.t.z, &tile.t.a);
        else if (teacher && !have_z)
            tile.t.z = kernels.sum_exp(b.t, padded, m_t);
        out.merge(tile, online_);
    }
    return out;
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
    const bool bad = std::isnan(lse_s_) || std::isnan(lse_t_);
    f.value = bad ? kNaN : out[0];
    f.sum_q = bad ? kNaN : out[1];
    f.sum_p = bad ? kNaN : out[2];
}

void Row::second_sweep(int64_t block, std::vector<NormalisedSums>& sums) const {
    Buffers b;
    const int64_t end = std::min(job_.columns, (block + 1) * kBlock);
    for (int64_t start = block * kBlock; start < end; start += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - start));
        const int padded = (count + kPad - 1) / kPad * kPad;
        load(true, start, count, b.s);
        if (t_) load(false, start, count, b.t);
        for (size_t i = 0; i < resolved_.size(); ++i) {
            const Resolved& r = resolved_[i];
            if (!r.divergence || r.online >= 0 || r.entropy_s || r.entropy_t) continue;
            NormalisedRow row = normalised_;
            row.alpha = r.alpha;
            row.beta = r.beta;
            const bool park = parked_ == static_cast<int>(i);
            (park ? r.divergence->terms_and_park : r.divergence->terms)(
                b.s, b.t, padded, row, sums[i].sums, &sums[i].log_sum, park ? park_.get() + start : nullptr);
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

double Row::logprob(bool student, int64_t label) const {
    if (label == exclude_) return -kInfinity;
    float x;
    const Rows& rows = student ? job_.student : job_.teacher;
    // The tile loader converts one column; it pads its output.
    alignas(64) float buffer[kPad];
    job_.kernels->load[static_cast<int>(rows.dtype)]((student ? s_ : t_) + label * rows.element_bytes(), 1,
                                                     student ? scale_s_ : scale_t_, student ? offset_s_ : offset_t_,
                                                     buffer);
    x = buffer[0];
    const double lse = student ? lse_s_ : lse_t_;
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
                for (int64_t j = 0; j < job_.labels_per_row; ++j) {
                    const int64_t label = job_.labels[index_ * job_.labels_per_row + j];
                    put(label < 0 ? 0.0 : logprob(job_.stats[i].kind == Kind::logprob, label));
                }
                break;
            case Kind::logsumexp:
                put(lse_s_ + offset_s_);
                break;
            case Kind::max_logprob:
                put(largest_s_ - lse_s_);
                break;
            case Kind::argmax:
                put(std::isnan(lse_s_) ? -1.0 : static_cast<double>(argmax_index_));
                break;
            case Kind::divergence:
                put(finished_[i].value);
                break;
        }
    }
}

void Row::save_state() const {
    float* to = job_.state + index_;
    const int64_t n = job_.rows;
    const float of_row[kStateOfRow] = {normalised_.s.m, normalised_.s.inverse_z, offset_s_,
                                       normalised_.t.m, normalised_.t.inverse_z, offset_t_};
    for (int i = 0; i < kStateOfRow; ++i) to[i * n] = of_row[i];
    to += kStateOfRow * n;
    for (const FinishedStatistic& f : finished_) {
        const double of_statistic[kStateOfStatistic] = {f.sum_q, f.sum_p, f.k[0], f.k[1], f.k[2]};
        for (int i = 0; i < kStateOfStatistic; ++i) to[i * n] = static_cast<float>(of_statistic[i]);
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
    from += kStateOfRow * n;
    for (FinishedStatistic& f : finished_) {
        f.sum_q = from[0];
        f.sum_p = from[n];
        for (int i = 0; i < 3; ++i) f.k[i] = from[(2 + i) * n];
        from += kStateOfStatistic * n;
    }
}

bool Row::load_coefficients() {
    bool any = false;
    int64_t at = 0;
    share_s_ = share_t_ = 0;
    const double inverse_s = scale_s_, inverse_t = scale_t_;
    const auto take = [&] {
        const double c = job_.coefficients[at++ * job_.rows + index_];
        any |= c != 0;
        return c;
    };
    // 0 * inf: a coefficient of 0 takes no part.
    const auto times = [](double c, double x) { return c == 0 ? 0.0 : c * x; };
    for (size_t i = 0; i < job_.stats.size(); ++i) {
        const Kind kind = job_.stats[i].kind;
        if (kind == Kind::logprob || kind == Kind::reference_logprob) {
            const bool student = kind == Kind::logprob;
            std::vector<double>& weights = student ? label_weight_s_ : label_weight_t_;
            weights.resize(job_.labels_per_row);
            for (int64_t j = 0; j < job_.labels_per_row; ++j) {
                const double c = take();
                const bool present = job_.labels[index_ * job_.labels_per_row + j] >= 0;
                weights[j] = present ? c * (student ? inverse_s : inverse_t) : 0.0;
                (student ? share_s_ : share_t_) -= weights[j];
            }
            continue;
        }
        const double c = take();
        if (kind == Kind::logsumexp) share_s_ += c * inverse_s;
        if (kind != Kind::divergence) continue;
        weight_[i] = c;
        share_s_ -= times(c, finished_[i].sum_q) * inverse_s;
        share_t_ -= times(c, finished_[i].sum_p) * inverse_t;
    }
    return any;
}

void Row::gradient(int64_t block) const {
    if (job_.d_student) gradient_of(true, block);
    if (job_.d_teacher) gradient_of(false, block);
}

void Row::gradient_of(bool student, int64_t block) const {
    Buffers b;
    const Kernels& kernels = *job_.kernels;
    const Gradient& to = student ? job_.d_student : job_.d_teacher;
    char* row = to.data + index_ * to.width * to.element_bytes();
    const double share = student ? share_s_ : share_t_;
    // An infinite sum (an infinite divergence) times a softmax of 0 must stay 0; see below.
    const bool plain = std::isfinite(share);
    const float kernel_share = plain ? static_cast<float>(share) : 0.0f;
    const Softmax& softmax = student ? normalised_.s : normalised_.t;
    const double inverse = student ? scale_s_ : scale_t_;
    const std::vector<double>& label_weight = student ? label_weight_s_ : label_weight_t_;
    const bool streaming = job_.rows * to.width * to.element_bytes() > (int64_t{1} << 25);
    const int64_t end = std::min(job_.columns, (block + 1) * kBlock);
    for (int64_t start = block * kBlock; start < end; start += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - start));
        const int padded = (count + kPad - 1) / kPad * kPad;
        bool loaded_s = false, loaded_t = false, first = true;
        const auto need = [&](bool of_student) {
            bool& done = of_student ? loaded_s : loaded_t;
            if (!done) load(of_student, start, count, of_student ? b.s : b.t);
            done = true;
        };
        for (size_t i = 0; i < resolved_.size(); ++i) {
            const Resolved& r = resolved_[i];
            if (!r.divergence || weight_[i] == 0) continue;
            if (parked_ == static_cast<int>(i)) {
                need(true);
                kernels.parked_gradient(b.s, park_.get() + start, padded, softmax,
                                        static_cast<float>(weight_[i] * inverse), kernel_share, first, b.out);
                first = false;
                continue;
            }
            const auto kernel = student ? r.divergence->grad_q : r.divergence->grad_p;
            if (!kernel) continue;
            need(true);
            if (r.divergence->needs_p) need(false);
            NormalisedRow normalised = normalised_;
            normalised.alpha = r.alpha;
            normalised.beta = r.beta;
            normalised.k = finished_[i].k;
            kernel(b.s, b.t, padded, normalised, static_cast<float>(weight_[i] * inverse), kernel_share, first, b.out);
            first = false;
        }
        const float* x = student ? b.s : b.t;
        if (first) {
            need(student);
            kernels.softmax(x, padded, softmax, kernel_share, b.out);
        }
        if (!plain) {
            need(student);
            for (int i = 0; i < count; ++i) {
                const double exponent = double(x[i]) * kLog2e - softmax.m;
                const double q = std::exp2(exponent) * softmax.inverse_z;
                if (!(q <= 0)) b.out[i] += static_cast<float>(q * share);
            }
        }
        for (size_t j = 0; j < label_weight.size(); ++j) {
            const int64_t at = job_.labels[index_ * job_.labels_per_row + j] - start;
            if (at >= 0 && at < count) b.out[at] += static_cast<float>(label_weight[j]);
        }
        if (exclude_ >= start && exclude_ < start + count) b.out[exclude_ - start] = 0;
        kernels.store[static_cast<int>(to.dtype)](b.out, count, streaming, row + start * to.element_bytes());
    }
    if (streaming) kernels.fence();
    if (end == job_.columns) std::memset(row + end * to.element_bytes(), 0, (to.width - end) * to.element_bytes());
}

void Row::zero_gradient() const {
    for (const Gradient* to : {&job_.d_student, &job_.d_teacher})
        if (*to) {
            const int64_t bytes = to->width * to->element_bytes();
            std::memset(to->data + index_ * bytes, 0, bytes);
        }
}

}  // namespace kldiv
