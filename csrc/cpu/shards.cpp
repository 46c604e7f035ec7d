#include "shards.h"

#include <algorithm>

#include "for_each.h"
#include "row.h"

namespace kldiv {

namespace {

class Writer {
  public:
    explicit Writer(double* to) : to_(to) {}
    void operator()(double x) { *to_++ = x; }

  private:
    double* to_;
};
class Reader {
  public:
    explicit Reader(const double* from) : from_(from) {}
    void operator()(double& x) { x = *from_++; }
    void operator()(float& x) { x = static_cast<float>(*from_++); }
    void operator()(int64_t& x) { x = static_cast<int64_t>(*from_++); }
    void operator()(bool& x) { x = *from_++ != 0; }

  private:
    const double* from_;
};

bool asks(const Job& job, Kind kind) {
    return std::any_of(job.stats.begin(), job.stats.end(), [kind](const Request& x) { return x.kind == kind; });
}

// One list of what is exchanged, for both directions.
template <class Take, class State>
void each_of(Take take, const Job& job, State& x) {
    for (auto* softmax : {&x.s, &x.t}) take(softmax->m), take(softmax->z), take(softmax->a);
    if (asks(job, Kind::tail_logprob)) take(x.tail.m), take(x.tail.z);
    if (asks(job, Kind::untempered_logprob)) take(x.untempered.m), take(x.untempered.z);
    take(x.s.blocked), take(x.t.blocked);
    for (auto& online : x.online) take(online.delta), take(online.g), take(online.m), take(online.started);
    take(x.largest_s), take(x.largest_t), take(x.argmax);
}

template <class Take, class Sums>
void each_sum(Take take, Sums& x) {
    for (auto& sum : x.sums) take(sum);
    take(x.log_sum.max), take(x.log_sum.sum);
}

bool active(const Job& job, int64_t index) { return !job.mask || job.mask[index]; }

// The whole row, merged in the order of the processes: the same bits in each of them.
void finish_first(const Job& job, Row& row, int64_t index, const double* states, int64_t shards) {
    FirstSweep whole;
    for (int64_t shard = 0; shard < shards; ++shard) {
        FirstSweep next;
        each_of(Reader(states + (shard * job.rows + index) * shard_state(job)), job, next);
        if (shard == 0)
            whole = next;
        else
            row.merge_first(whole, next);
    }
    row.finish_first(whole);
}

}  // namespace

int64_t shard_state(const Job& job) {
    return 2 * 3 + 2 + kOnlineCount * 4 + 3 + 2 * asks(job, Kind::tail_logprob) +
           2 * asks(job, Kind::untempered_logprob);
}

void run_shard_state(const Job& job, int64_t first_column, double* states) {
    for_each(job.threads, job.rows, [&](int64_t index) {
        double* to = states + index * shard_state(job);
        std::fill(to, to + shard_state(job), 0.0);
        if (!active(job, index)) return;
        Row row(job, index);
        row.begin_sweep();
        FirstSweep whole = row.first_sweep(0);
        for (int64_t b = 1; b < row.blocks(); ++b) row.merge_first(whole, row.first_sweep(b));
        if (whole.argmax >= 0) whole.argmax += first_column;
        each_of(Writer(to), job, whole);
    });
}

void run_shard_sums(const Job& job, const double* states, int64_t shards, double* sums) {
    const int64_t count = static_cast<int64_t>(job.stats.size());
    for_each(job.threads, job.rows, [&](int64_t index) {
        std::vector<NormalisedSums> total(count);
        if (active(job, index)) {
            Row row(job, index);
            finish_first(job, row, index, states, shards);
            for (int64_t b = 0; b < row.blocks(); ++b) {
                std::vector<NormalisedSums> of_block(count);
                row.second_sweep(b, of_block);
                Row::merge(total, of_block);
            }
        }
        for (int64_t i = 0; i < count; ++i) each_sum(Writer(sums + (index * count + i) * kShardSums), total[i]);
    });
}

void run_shard_finish(const Job& job, const double* states, const double* sums, int64_t shards) {
    const int64_t count = static_cast<int64_t>(job.stats.size());
    leave_out_masked(job);
    for_each(job.threads, job.rows, [&](int64_t index) {
        if (!active(job, index)) return;
        Row row(job, index);
        finish_first(job, row, index, states, shards);
        if (row.needs_second_sweep()) {
            std::vector<NormalisedSums> total(count), next(count);
            for (int64_t shard = 0; shard < shards; ++shard) {
                for (int64_t i = 0; i < count; ++i)
                    each_sum(Reader(sums + ((shard * job.rows + index) * count + i) * kShardSums), next[i]);
                Row::merge(total, next);
            }
            row.finish_second(total);
        }
        row.write_values();
        if (job.state) row.save_state();
    });
}

}  // namespace kldiv
