// From coefficients to gradients.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../plan.h"
#include "row.h"

namespace kldiv {

namespace {

bool before(const LabelWeight& a, const LabelWeight& b) { return a.column < b.column; }

}  // namespace

bool Row::load_coefficients() {
    bool any = false;
    int64_t at = 0;
    share_s_ = share_t_ = tail_weight_ = untempered_share_ = label_share_ = 0;
    const double inverse_s = scale_s_, inverse_t = scale_t_;
    const auto take = [&](bool logprob) {
        const int64_t cell = at++ * job_.rows + index_;
        double c = job_.coefficients[cell];
        if (logprob && job_.policy.tokens)
            c = policy_coefficient(job_.policy, job_.values[cell], policy_token(job_.policy, job_.rows, index_));
        any |= c != 0;
        return c;
    };
    // 0 * inf: a coefficient of 0 takes no part.
    const auto times = [](double c, double x) { return c == 0 ? 0.0 : c * x; };
    for (size_t i = 0; i < job_.stats.size(); ++i) {
        const Kind kind = job_.stats[i].kind;
        if (per_label(kind)) {
            const bool student = kind != Kind::reference_logprob;
            const double inverse = kind == Kind::untempered_logprob ? 1 : (student ? inverse_s : inverse_t);
            double& share = kind == Kind::untempered_logprob ? untempered_share_ : (student ? label_share_ : share_t_);
            std::vector<LabelWeight>& weights = student ? label_weights_s_ : label_weights_t_;
            for (int64_t j = 0; j < job_.labels_per_row; ++j) {
                const double c = take(kind == Kind::logprob);
                const int64_t label = job_.labels[index_ * job_.labels_per_row + j];
                if (label == kNoLabel) continue;
                const double weight = c * inverse;
                if (label >= 0) weights.push_back({label, weight});
                share -= weight;
            }
            // What several labels add to one column is added in their order.
            std::stable_sort(weights.begin(), weights.end(), before);
            continue;
        }
        const double c = take(false);
        if (kind == Kind::logsumexp) share_s_ += c * inverse_s;
        // A tail without mass has no gradient.
        if (kind == Kind::tail_logprob && finished_[i].k[1] != 0) {
            tail_weight_ = c * inverse_s;
            share_s_ -= tail_weight_;
        }
        if (kind != Kind::divergence) continue;
        weight_[i] = c;
        share_s_ -= times(c, finished_[i].sum_q) * inverse_s;
        share_t_ -= times(c, finished_[i].sum_p) * inverse_t;
    }
    share_s_ += label_share_;
    return any;
}

void Row::gradient(int64_t block) const {
    // An infinite sum of gradients has no combination of parked values: columns without mass must stay 0. Nor has a row
    // without a softmax, whose gradients are NaN, and one whose divergence counts nothing, whatever is parked of it.
    if (park_ && std::isfinite(share_s_) && !std::isnan(lse_s_) && weight_[parked_stat_] != 0)
        return parked_gradient(block);
    // The student's last: it may take the place of the logits, which both are made of.
    if (job_.d_teacher) gradient_of(false, block);
    if (job_.d_student) gradient_of(true, block);
}

// With e the error of a tile's estimate of lse_first - lse_second and D the divergence, dD/ds is
//   forward KL   q - p
//   reverse KL   q (u - e - D)        parked: q, q u, in the tile's units
//   Hellinger    (q (1 - D) - sqrt(pq)) / 2
//   the others   g - q sum g          parked: q, g, normalised
// and a log-probability takes its share of q, or of the softmax at temperature 1.
void Row::parked_gradient(int64_t block) const {
    Buffers b;
    const Gradient& to = job_.d_student;
    const Resolved& r = resolved_[parked_stat_];
    const double weight = weight_[parked_stat_] * scale_s_, value = finished_[parked_stat_].value;
    const int64_t begin = block * kBlock, end = std::min(job_.columns, begin + kBlock);
    // Backwards: the columns parked last are still in cache.
    for (int64_t start = begin + (end - begin - 1) / kTile * kTile; start >= begin; start -= kTile) {
        const ParkedTile& tile = parked_tiles_[start / kTile];
        double c_x = share_s_, c_y = weight;
        if (r.online >= 0) c_x = label_share_ * unit(tile.m_s, state_s_);
        if (r.online == kForwardKl) {
            c_x += weight * unit(tile.m_s, state_s_);
            c_y = -weight * unit(tile.m_t, state_t_);
        } else if (r.online == kReverseKl) {
            c_y = weight * unit(tile.m_s, state_s_);
            c_x -= c_y * ((lse_s_ - lse_t_) - tile.delta + value);
        } else if (r.online == kHellinger) {
            c_x += 0.5 * weight * (1 - value) * unit(tile.m_s, state_s_);
            c_y = -0.5 * weight * std::sqrt(unit(tile.m_s, state_s_) * unit(tile.m_t, state_t_));
        }
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - start)), padded = padded_to_lanes(count);
        job_.kernels->combine(parked_x(start), parked_y(start), padded, static_cast<float>(c_x),
                              static_cast<float>(c_y), b.out);
        if (untempered_share_ != 0) {
            SoftmaxState untempered;
            untempered.m = finished_[untempered_].k[0];
            untempered.z = finished_[untempered_].k[1];
            job_.kernels->add(parked_untempered(start), padded,
                              static_cast<float>(untempered_share_ * unit(tile.m_untempered, untempered)), b.out);
        }
        store_gradient(true, start, count, b.out);
    }
    zero_padding(to, to.row(index_), end);
}

void Row::store_gradient(bool student, int64_t start, int count, float* from) const {
    const Gradient& to = student ? job_.d_student : job_.d_teacher;
    const std::vector<LabelWeight>& label_weights = student ? label_weights_s_ : label_weights_t_;
    auto label = std::lower_bound(label_weights.begin(), label_weights.end(), LabelWeight{start, 0}, before);
    for (; label != label_weights.end() && label->column < start + count; ++label)
        from[label->column - start] += static_cast<float>(label->weight);
    if (exclude_ >= start && exclude_ < start + count) from[exclude_ - start] = 0;
    job_.kernels->store[static_cast<int>(to.dtype)](from, count, to.row(index_) + start * to.element_bytes());
}

void Row::zero_padding(const Gradient& to, char* row, int64_t end) const {
    if (end == job_.columns) std::memset(row + end * to.element_bytes(), 0, (to.width - end) * to.element_bytes());
}

void Row::gradient_of(bool student, int64_t block) const {
    Buffers b;
    const Kernels& kernels = *job_.kernels;
    const Gradient& to = student ? job_.d_student : job_.d_teacher;
    const double share = student ? share_s_ : share_t_;
    // An infinite sum (an infinite divergence) times a softmax of 0 must stay 0, and outweighs all own terms; see
    // below.
    const bool plain = std::isfinite(share);
    const float kernel_share = plain ? static_cast<float>(share) : 0.0f;
    const Softmax& softmax = student ? normalised_.s : normalised_.t;
    const double inverse = student ? scale_s_ : scale_t_;
    const int64_t end = std::min(job_.columns, (block + 1) * kBlock);
    for (int64_t start = block * kBlock; start < end; start += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - start));
        const int padded = padded_to_lanes(count);
        bool loaded_s = false, loaded_t = false, first = true;
        const auto need = [&](bool of_student) {
            bool& done = of_student ? loaded_s : loaded_t;
            if (!done) load(of_student, start, count, of_student ? b.s : b.t);
            done = true;
        };
        if (student && tail_weight_ != 0) {
            need(true);
            softmax_with_tail(b.s, start, count, kernel_share, b.out);
            first = false;
        }
        for (size_t i = 0; i < resolved_.size(); ++i) {
            const Resolved& r = resolved_[i];
            if (!r.divergence || weight_[i] == 0) continue;
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
                b.out[i] = q <= 0 ? 0 : static_cast<float>(q * share);
            }
        }
        if (student && untempered_share_ != 0) {
            need(true);
            const FinishedStatistic& f = finished_[untempered_];
            kernels.add_exp(b.s, padded, untempered_factor_, static_cast<float>(f.k[0]),
                            static_cast<float>(f.k[1] == 0 ? kNaN : untempered_share_ / f.k[1]), b.out);
        }
        store_gradient(student, start, count, b.out);
    }
    zero_padding(to, to.row(index_), end);
}

// out = share q + tail_weight q / (sum of q over the tail), the second without the labels.
void Row::softmax_with_tail(const float* x, int64_t start, int count, float share, float* out) const {
    const int padded = padded_to_lanes(count);
    const Softmax& q = normalised_.s;
    const double m = finished_[tail_].k[0], z = finished_[tail_].k[1];
    const double mass = std::exp2(m - q.m) * z * q.inverse_z;
    // A tail with next to no mass is taken in its own units, in which nothing of it underflows.
    if (mass > 1e-20)
        job_.kernels->softmax(x, padded, q, static_cast<float>(share + tail_weight_ / mass), out);
    else
        job_.kernels->softmax(x, padded, {static_cast<float>(m), static_cast<float>(1 / z), 0},
                              static_cast<float>(tail_weight_), out);
    const auto first = std::lower_bound(support_.begin(), support_.end(), start);
    for (auto label = first; label != support_.end() && *label < start + count; ++label) {
        const int64_t at = *label - start;
        out[at] = static_cast<float>(share * std::exp2(double(x[at]) * kLog2e - q.m) * q.inverse_z);
    }
}

void Row::zero_gradient() const {
    for (const Gradient* to : {&job_.d_student, &job_.d_teacher})
        if (*to) std::memset(to->row(index_), 0, to->width * to->element_bytes());
}

}  // namespace kldiv
