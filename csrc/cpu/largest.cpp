// A row goes by in chunks, of which the loader measures the largest logit: only a chunk that has more than the k-th
// largest so far is looked at column by column. In no particular order the n-th chunk is one with probability about
// k / n, so a row of 150k has a few hundred of them at k = 64.
#include "largest.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "for_each.h"

namespace kldiv {

namespace {

// The fastest of 64, 128 and 256 for k = 8 and 64 (152k columns, AVX-512).
constexpr int kChunk = 64;

struct Candidate {
    float x;
    int64_t column;
};
bool comes_first(const Candidate& a, const Candidate& b) { return a.x > b.x || (a.x == b.x && a.column < b.column); }

class Candidates {
  public:
    explicit Candidates(int64_t k) : k_(k), most_(2 * k + kChunk) { kept_.reserve(most_ + kChunk); }

    bool wants(float largest) const { return !full_ || largest > threshold_; }

    // `x` is padded to a multiple of kPad.
    void add(const float* x, int count, int64_t start) {
        for (int run = 0; run < count; run += kPad) {
            // Without a branch, so that the compiler takes them together.
            int any = !full_;
            for (int i = run; i < run + kPad; ++i) any |= x[i] > threshold_;
            for (int i = run; any && i < std::min(run + kPad, count); ++i) {
                // NaN compares with nothing, and sorting wants an order.
                const float value = x[i] == x[i] ? x[i] : -std::numeric_limits<float>::infinity();
                if (wants(value)) kept_.push_back({value, start + i});
            }
        }
        if (static_cast<int64_t>(kept_.size()) >= (full_ ? most_ : k_)) narrow();
    }

    void take(int64_t* ids) {
        narrow();
        std::sort(kept_.begin(), kept_.end(), comes_first);
        for (int64_t i = 0; i < k_; ++i) ids[i] = kept_[i].column;
    }

  private:
    // The k first, of which the last is the new threshold: a later column that is equal to it comes after it.
    void narrow() {
        std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end(), comes_first);
        kept_.resize(k_);
        threshold_ = kept_.back().x;
        full_ = true;
    }

    int64_t k_, most_;
    bool full_ = false;    // k have been seen
    float threshold_ = 0;  // then: the k-th largest, when last narrowed down
    std::vector<Candidate> kept_;
};

}  // namespace

void run_largest(const Selection& selection) {
    const Rows& rows = selection.logits;
    const auto load = selection.kernels->measured_load[static_cast<int>(rows.dtype)];
    for_each(selection.threads, selection.rows, [&](int64_t index) {
        int64_t* ids = selection.ids + index * selection.k;
        if (selection.mask && !selection.mask[index]) {
            std::iota(ids, ids + selection.k, 0);
            return;
        }
        Candidates candidates(selection.k);
        const char* row = rows.row(index);
        alignas(64) float x[kChunk];
        for (int64_t start = 0; start < selection.columns; start += kChunk) {
            const int count = static_cast<int>(std::min<int64_t>(kChunk, selection.columns - start));
            const Loaded loaded = load(row + start * rows.element_bytes(), count, 1, 0, x);
            if (candidates.wants(loaded.largest)) candidates.add(x, count, start);
        }
        candidates.take(ids);
    });
}

}  // namespace kldiv
