// Rows whose columns are spread over processes: this one's part of them, and what follows from all parts.
#pragma once

#include "rows.h"

namespace kldiv {

// What a process says of its columns of a row (FirstSweep), and of the sums of a statistic (NormalisedSums), in
// doubles.
int64_t shard_state(const Job& job);
constexpr int kShardSums = 6;

// [N, shard_state]; `first_column` is added to the place of a largest logit. Rows that the mask leaves out have 0.
void run_shard_state(const Job& job, int64_t first_column, double* states);
// [N, statistics, kShardSums] from the states of all processes, [shards, N, shard_state].
void run_shard_sums(const Job& job, const double* states, int64_t shards, double* sums);
// Values, and the state for a gradient, from those and the sums [shards, N, statistics, kShardSums].
void run_shard_finish(const Job& job, const double* states, const double* sums, int64_t shards);

}  // namespace kldiv
