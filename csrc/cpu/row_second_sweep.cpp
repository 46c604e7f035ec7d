// A row's second sweep, for statistics whose sums need the finished softmaxes: the sums of each block, and how those of
// blocks merge.
#include <algorithm>
#include <cmath>

#include "../plan.h"
#include "row.h"

namespace kldiv {

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
            if (park) {
                const ParkedTile& tile = parked_tiles_[start / kTile];
                row.s.inverse_z = static_cast<float>(unit(tile.m_s, state_s_));
                row.t.inverse_z = static_cast<float>(unit(tile.m_t, state_t_));
            }
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

}  // namespace kldiv
