// One row: what is known of it as its sweeps go by. Each part of its life has a file:
//
//   row.cpp                what it is asked for, its logits, and where its results go
//   row_first_sweep.cpp    the state of its softmaxes, a block at a time
//   row_finish.cpp         the softmaxes, and its statistics
//   row_second_sweep.cpp   sums that need the softmaxes, a block at a time
//   row_gradient.cpp       from coefficients to gradients
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../row_state.h"
#include "rows.h"

namespace kldiv {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The grid of estimates of Delta, lse_t - lse_s (kernels.h, NormalisedRow).
inline double round_to_grid(double delta) {
    constexpr double steps = 4096;
    return std::nearbyint(delta * steps) / steps;
}

// What an offset takes off the exponents.
inline double exponent_of_offset(float offset, float scale) {
    return std::isfinite(offset) ? double(offset) * scale * kLog2e : 0;
}

// The first-sweep divergences. `first` is the softmax whose units G is in (row_state.h).
enum Online { kForwardKl, kReverseKl, kHellinger, kOnlineCount };
inline bool first_is_student(int online) { return online == kReverseKl; }
inline OnlineKind online_kind(int online) { return online == kHellinger ? OnlineKind::hellinger : OnlineKind::kl; }

// A statistic as a row takes it: js at beta = 0 is forward KL, and so on.
struct Resolved {
    const DivergenceKernels* divergence = nullptr;
    double alpha = 0, beta = 0;
    int online = -1;  // an Online, when its value comes out of the first sweep
    bool entropy_s = false, entropy_t = false;
};

// What the first sweep takes of a slice.
struct FirstSweep {
    SoftmaxState s, t;
    SoftmaxState tail;        // of s, without the labels
    SoftmaxState untempered;  // of s at temperature 1
    OnlineState online[kOnlineCount];
    float largest_s = -std::numeric_limits<float>::infinity(), largest_t = largest_s;  // logits as they are given
    int64_t argmax = -1;

    void merge(const FirstSweep& other, const bool* wanted);
};

struct NormalisedSums {
    double sums[4] = {0, 0, 0, 0};
    LogSum log_sum;
};

struct FinishedStatistic {
    double value = 0, sum_q = 0, sum_p = 0;
    double k[kRowConstants] = {};
};

// What a label adds to its column of the gradient.
struct LabelWeight {
    int64_t column;
    double weight;
};

// Exponents and estimate that a tile's parked numbers are in.
struct ParkedTile {
    double m_s = 0, m_t = 0, delta = 0, m_untempered = 0;
};

// From a tile's units to probabilities, at most 2 where the tile has mass. Bounded for one without, whose exponent is
// the other row's: its exponentials are 0, and must not meet an infinity.
inline double unit(double tile_m, const SoftmaxState& row) { return std::min(4.0, std::exp2(tile_m - row.m) / row.z); }

// The scratch of one tile.
struct Buffers {
    alignas(64) float s[kTile], t[kTile], out[kTile];
};

inline int padded_to_lanes(int64_t columns) { return static_cast<int>((columns + kPad - 1) / kPad * kPad); }

class Row {
  public:
    Row(const Job& job, int64_t index);

    int64_t blocks() const;
    bool needs_second_sweep() const { return second_sweep_; }

    // Floats of scratch that the row wants from its first sweep to its gradient, and where they are.
    int64_t park_floats() const { return park_floats_; }
    void park_in(float* scratch) { park_ = scratch; }

    // Takes offsets and a first estimate of lse_t - lse_s from the row's first tile.
    void begin_sweep();
    FirstSweep first_sweep(int64_t block) const;
    void merge_first(FirstSweep& into, const FirstSweep& next) const { into.merge(next, online_); }
    void finish_first(FirstSweep whole);
    // Sums of the statistics that need the softmax, one entry a statistic.
    void second_sweep(int64_t block, std::vector<NormalisedSums>& sums) const;
    void finish_second(const std::vector<NormalisedSums>& sums);

    void write_values() const;
    void save_state() const;
    void load_state();

    // False when every coefficient is 0: then the gradient is 0 and the row need not be read.
    bool load_coefficients();
    void gradient(int64_t block) const;
    void zero_gradient() const;

    static void merge(std::vector<NormalisedSums>& into, const std::vector<NormalisedSums>& from);

  private:
    // Where this is, the first of equals, among columns from `start` that have it.
    int find(int64_t start, int count, float logit) const;
    // Takes the tile's largest logit for the offset where it is far above.
    Loaded measured_load(bool student, int64_t start, int count, float* to, float* offset) const;
    void load(bool student, int64_t start, int count, float scale, float offset, float* to) const;
    void load(bool student, int64_t start, int count, float* to) const;  // as the row's finished softmax has it
    float scaled(bool student, float logit) const {
        return scaled_one(logit, student ? offset_s_ : offset_t_, student ? scale_s_ : scale_t_);
    }
    void normalise(const SoftmaxState& s, const SoftmaxState& t);
    void resolve();
    void finish(size_t i, const double* sums, double log_sum);
    void gradient_of(bool student, int64_t block) const;
    double logprob(Kind kind, int64_t j) const;  // at the j-th label
    double untempered_lse() const;
    SoftmaxState sweep_tail(float* x, int64_t start, int count, float largest, SoftmaxState* tail) const;
    void softmax_with_tail(const float* x, int64_t start, int count, float share, float* out) const;
    void parked_gradient(int64_t block) const;
    // The tile's gradient with what the labels add to it, rounded to its dtype.
    void store_gradient(bool student, int64_t start, int count, float* from) const;
    void zero_padding(const Gradient& to, char* row, int64_t end) const;
    void resolve_parking();
    float* parked(int which, int64_t column) const {
        return park_ ? park_ + which * padded_to_lanes(job_.columns) + column : nullptr;
    }
    float* parked_x(int64_t column) const { return parked(0, column); }
    float* parked_y(int64_t column) const { return parked(1, column); }
    float* parked_untempered(int64_t column) const { return parked(2, column); }

    const Job& job_;
    int64_t index_;
    const char *s_, *t_;
    // A tile holds (logit - offset) scale, the offset being the row's largest logit; in the first sweep, the largest so
    // far, or a little less.
    float scale_s_, scale_t_, offset_s_ = 0, offset_t_ = 0;
    double alpha_, beta_;
    int64_t exclude_;
    // In the one-read form of a single divergence, also beside log-probabilities, the sweeps park floats of a column,
    // [2 or 3, padded columns], and the gradient is a linear combination of them: the logits are not read, nor
    // exponentials taken, a second time. The third is of the softmax at temperature 1.
    float* park_ = nullptr;
    int64_t park_floats_ = 0;
    size_t parked_stat_ = 0;                        // whose the first two are
    mutable std::vector<ParkedTile> parked_tiles_;  // how each tile was taken in the first sweep
    std::vector<Resolved> resolved_;                // one a statistic; empty divergence for the others
    bool online_[kOnlineCount] = {false, false, false};
    bool entropy_s_ = false, entropy_t_ = false, second_sweep_ = false, argmax_ = false;
    // The distinct labels in their order, where tail_logprob is asked for, and that statistic's place.
    std::vector<int64_t> support_;
    int tail_ = -1;
    // The place of untempered_logprob, whose constants are m and z of its softmax.
    int untempered_ = -1;
    // Of a tile's numbers: to the base-2 logarithms of the student's exponentials at temperature 1.
    float untempered_factor_ = 0;

    SoftmaxState anchor_s_, anchor_t_;  // of the first tile, for a first-sweep divergence to start from
    SoftmaxState state_s_, state_t_;
    double lse_s_ = 0, lse_t_ = 0;
    float largest_s_ = 0;
    int64_t argmax_index_ = -1;
    bool q_is_zero_ = false, p_is_zero_ = false;
    NormalisedRow normalised_{};
    std::vector<FinishedStatistic> finished_;
    // Gradient weights, 1/temperature included: of softmax(s), softmax(t), and of each statistic's g.
    std::vector<double> weight_;
    std::vector<LabelWeight> label_weights_s_, label_weights_t_;  // by column
    double share_s_ = 0, share_t_ = 0, tail_weight_ = 0, untempered_share_ = 0;
    double label_share_ = 0;  // what of share_s_ is due to labels
};

}  // namespace kldiv
