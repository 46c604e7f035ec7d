#include "rows.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "../plan.h"
#include "for_each.h"
#include "row.h"

namespace kldiv {

const char* Rows::row(int64_t index) const {
    int64_t offset = 0;
    for (size_t i = sizes.size(); i-- > 0;) {
        offset += index % sizes[i] * strides[i];
        index /= sizes[i];
    }
    return data + offset * element_bytes();
}

int64_t Job::value_rows() const {
    int64_t count = 0;
    for (const Request& request : stats) count += per_label(request.kind) ? labels_per_row : 1;
    return count;
}

namespace {

struct Named {
    const char* name;
    Kind kind;
};
constexpr Named kPlain[] = {{"logprob", Kind::logprob},
                            {"reference_logprob", Kind::reference_logprob},
                            {"untempered_logprob", Kind::untempered_logprob},
                            {"tail_logprob", Kind::tail_logprob},
                            {"logsumexp", Kind::logsumexp},
                            {"max_logprob", Kind::max_logprob},
                            {"argmax", Kind::argmax}};

std::vector<int64_t> active_rows(const Job& job) {
    std::vector<int64_t> rows;
    rows.reserve(job.rows);
    for (int64_t i = 0; i < job.rows; ++i)
        if (!job.mask || job.mask[i]) rows.push_back(i);
    return rows;
}

void gradient_of_row(Row& row, const std::function<void()>& blocks) {
    if (row.load_coefficients())
        blocks();
    else
        row.zero_gradient();
}

// Scratch that stays with its thread: up to three floats a column of the widest row seen. Allocated per row, its pages
// would be given back and faulted in again for every row.
float* thread_scratch(int64_t floats) {
    thread_local std::vector<float> scratch;
    if (static_cast<int64_t>(scratch.size()) < floats) scratch = std::vector<float>(floats);
    return scratch.data();
}

void forward_row(const Job& job, int64_t index);

// The outcomes as a row of logits, which log-probabilities are, of the same machinery.
void find_coefficients(const Job& job, int64_t index) {
    const TopK& topk = job.topk;
    const int64_t n = topk.outcomes;
    thread_local std::vector<float> logits, gradient;
    logits.resize(n);
    gradient.resize(n);
    for (int64_t j = 0; j < n; ++j) {
        const bool none = j < job.labels_per_row && job.labels[index * job.labels_per_row + j] < 0;
        logits[j] = none ? -std::numeric_limits<float>::infinity() : job.values[j * job.rows + index];
    }
    Job few;
    few.kernels = job.kernels;
    few.rows = 1;
    few.columns = n;
    const auto row = [n](const float* data) {
        Rows rows;
        rows.data = reinterpret_cast<const char*>(data);
        rows.sizes = {1};
        rows.strides = {n};
        return rows;
    };
    few.student = row(logits.data());
    few.teacher = row(topk.teacher + index * n);
    few.parameters[2] = topk.alpha;
    few.parameters[3] = topk.beta;
    few.stats = {topk.divergence};
    few.values = topk.divergences + index;
    few.coefficients = topk.scale + index;
    few.d_student = {reinterpret_cast<char*>(gradient.data()), Dtype::float32, n};
    forward_row(few, 0);
    for (int64_t j = 0; j < n; ++j) topk.coefficients[j * job.rows + index] = gradient[j];
}

void forward_row(const Job& job, int64_t index) {
    Row row(job, index);
    if (row.park_floats() > 0) row.park_in(thread_scratch(row.park_floats()));
    const int64_t blocks = row.blocks();
    row.begin_sweep();
    FirstSweep whole = row.first_sweep(0);
    for (int64_t b = 1; b < blocks; ++b) row.merge_first(whole, row.first_sweep(b));
    row.finish_first(whole);
    if (row.needs_second_sweep()) {
        std::vector<NormalisedSums> total(job.stats.size());
        for (int64_t b = 0; b < blocks; ++b) {
            std::vector<NormalisedSums> sums(job.stats.size());
            row.second_sweep(b, sums);
            Row::merge(total, sums);
        }
        row.finish_second(total);
    }
    row.write_values();
    if (job.state) row.save_state();
    if (!job.coefficients) return;
    if (job.topk.teacher) find_coefficients(job, index);
    gradient_of_row(row, [&] {
        // Backwards: what the last sweep touched last is still in cache.
        for (int64_t b = blocks; b-- > 0;) row.gradient(b);
    });
}

// The same row by row, with every sweep's blocks shared among the threads. Blocks are merged in their order.
void forward_split(const Job& job, const int64_t* active, int64_t active_count) {
    std::vector<Row> rows;
    rows.reserve(active_count);
    int64_t floats = 0;
    for (int64_t i = 0; i < active_count; ++i) {
        rows.emplace_back(job, active[i]);
        floats += rows.back().park_floats();
    }
    if (floats > 0) {
        float* scratch = thread_scratch(floats);
        for (Row& row : rows) {
            if (row.park_floats() > 0) row.park_in(scratch);
            scratch += row.park_floats();
        }
    }
    const int64_t blocks = rows[0].blocks(), count = static_cast<int64_t>(rows.size());
    for (Row& row : rows) row.begin_sweep();
    std::vector<FirstSweep> first(count * blocks);
    const auto sweep_first = [&](int64_t i) { first[i] = rows[i / blocks].first_sweep(i % blocks); };
    const auto merge_first = [&](int64_t r) {
        FirstSweep whole = first[r * blocks];
        for (int64_t b = 1; b < blocks; ++b) rows[r].merge_first(whole, first[r * blocks + b]);
        return whole;
    };
    for_each(job.threads, count * blocks, sweep_first);
    for (int64_t r = 0; r < count; ++r) {
        FirstSweep whole = merge_first(r);
        rows[r].finish_first(whole);
    }
    if (std::any_of(rows.begin(), rows.end(), [](const Row& row) { return row.needs_second_sweep(); })) {
        std::vector<std::vector<NormalisedSums>> sums(count * blocks);
        for_each(job.threads, count * blocks, [&](int64_t i) {
            sums[i].resize(job.stats.size());
            rows[i / blocks].second_sweep(i % blocks, sums[i]);
        });
        for (int64_t r = 0; r < count; ++r) {
            std::vector<NormalisedSums> total(job.stats.size());
            for (int64_t b = 0; b < blocks; ++b) Row::merge(total, sums[r * blocks + b]);
            rows[r].finish_second(total);
        }
    }
    for (const Row& row : rows) {
        row.write_values();
        if (job.state) row.save_state();
    }
    if (!job.coefficients) return;
    if (job.topk.teacher)
        for (int64_t r = 0; r < count; ++r) find_coefficients(job, active[r]);
    std::vector<Row*> wanted;
    for (Row& row : rows) gradient_of_row(row, [&] { wanted.push_back(&row); });
    for_each(job.threads, static_cast<int64_t>(wanted.size()) * blocks,
             [&](int64_t i) { wanted[i / blocks]->gradient(i % blocks); });
}

}  // namespace

void leave_out_masked(const Job& job) {
    if (!job.mask) return;
    const int64_t values = job.values ? job.value_rows() : 0;
    for_each(job.threads, job.rows, [&](int64_t i) {
        if (job.mask[i]) return;
        for (int64_t j = 0; j < values; ++j) job.values[j * job.rows + i] = 0;
        if (job.values && job.topk.teacher) job.topk.divergences[i] = 0;
        const int64_t states = job.values && job.state ? kStateOfRow + kStateOfStatistic * job.stats.size() : 0;
        for (int64_t j = 0; j < states; ++j) job.state[j * job.rows + i] = 0;
        Row(job, i).zero_gradient();
    });
}

std::vector<std::string> served_statistics() {
    std::vector<std::string> names;
    for (const Named& plain : kPlain) names.emplace_back(plain.name);
    const Kernels& kernels = best_kernels();
    for (int i = 0; i < kernels.divergence_count; ++i) names.emplace_back(kernels.divergences[i].name);
    return names;
}

Request find_statistic(const std::string& name) {
    for (const Named& plain : kPlain)
        if (name == plain.name) return {plain.kind};
    const Kernels& kernels = best_kernels();
    for (int i = 0; i < kernels.divergence_count; ++i)
        if (name == kernels.divergences[i].name) return {Kind::divergence, &kernels.divergences[i]};
    throw std::invalid_argument("kldiv_kernels: the cpu backend has no statistic " + name);
}

void run_forward(const Job& job) {
    leave_out_masked(job);
    const std::vector<int64_t> active = active_rows(job);
    const int64_t count = static_cast<int64_t>(active.size());
    if (!job.split_rows) {
        for_each(job.threads, count, [&](int64_t i) { forward_row(job, active[i]); });
        return;
    }
    // Just enough rows at a time to keep the threads busy: a row may park V floats.
    const int64_t blocks = (job.columns + kBlock - 1) / kBlock, group = (4 * job.threads + blocks - 1) / blocks;
    for (int64_t i = 0; i < count; i += group) forward_split(job, &active[i], std::min(group, count - i));
}

void run_backward(const Job& job) {
    leave_out_masked(job);
    const std::vector<int64_t> active = active_rows(job);
    const auto prepare = [&](Row& row, const std::function<void()>& blocks) {
        row.load_state();
        gradient_of_row(row, blocks);
    };
    if (!job.split_rows) {
        for_each(job.threads, static_cast<int64_t>(active.size()), [&](int64_t i) {
            Row row(job, active[i]);
            prepare(row, [&] {
                for (int64_t b = 0; b < row.blocks(); ++b) row.gradient(b);
            });
        });
        return;
    }
    std::vector<Row> rows;
    for (int64_t index : active) rows.emplace_back(job, index);
    std::vector<std::pair<Row*, int64_t>> items;
    for (Row& row : rows)
        prepare(row, [&] {
            for (int64_t b = 0; b < row.blocks(); ++b) items.emplace_back(&row, b);
        });
    for_each(job.threads, static_cast<int64_t>(items.size()),
             [&](int64_t i) { items[i].first->gradient(items[i].second); });
}

void run_scale(void* data, Dtype dtype, int64_t count, float factor, int64_t threads) {
    if (factor == 1.0f) return;
    const int64_t bytes = dtype == Dtype::float32 ? 4 : 2;
    for_each(threads, (count + kBlock - 1) / kBlock, [&](int64_t block) {
        const int64_t end = std::min(count, (block + 1) * kBlock);
        for (int64_t i = block * kBlock; i < end; i += kTile)
            best_kernels().scale[static_cast<int>(dtype)](static_cast<char*>(data) + i * bytes,
                                                          static_cast<int>(std::min<int64_t>(kTile, end - i)), factor);
    });
}

}  // namespace kldiv
