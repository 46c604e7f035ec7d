// Small problems for the kernels: what is asked, of which tensors, in which plan.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/row/columns.cuh"
#include "cuda/job.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace kldiv::gpu {

struct Problem {
    const char* name;
    std::vector<const char*> stats;
    const char* plan;  // KLDIV_CUDA_PLAN
    int element = kBfloat16;
    int64_t rows = 5, columns = 1096;
    // Columns that a tensor's rows have behind those that are read, and elements between its rows and before the first.
    int64_t padding = 0, gap = 0, offset = 0;
    int64_t beyond = 0;  // columns that are claimed and are not there
    bool teacher = true, teacher_gradient = false, mask = false, exclude = false, saved = false;
    int64_t labels_per_row = 1, repeated = 1;  // each label so many times
    const char* topk = nullptr;                // the divergence of a top-k loss on the statistics
    const char* clusters = "2";                // KLDIV_HOST_CLUSTERS
    int64_t shards = 0;                        // processes that have its columns; 0: one call
};

// Numbers that depend on nothing but where they stand.
inline float noise(int64_t i) {
    uint64_t z = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<float>(static_cast<int64_t>(z ^ z >> 31) >> 40) * 0x1p-23f;  // in [-1, 1)
}

// Exactly so many bytes, at a multiple of 16; every one of them bad until it is written.
class Memory {
  public:
    explicit Memory(int64_t bytes) : bytes_(bytes) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 16, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
        memory_.reset(static_cast<char*>(memory));
        std::memset(data(), 0xff, static_cast<size_t>(bytes));
    }
    char* data() { return memory_.get(); }
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(data());
    }
    void append_to(std::string* all) const { all->append(memory_.get(), static_cast<size_t>(bytes_)); }
    // Neither read nor written from here on, where AddressSanitizer watches.
    void forbid(int64_t begin, int64_t end) {
#if defined(__SANITIZE_ADDRESS__)
        if (begin < end) __asan_poison_memory_region(data() + begin, static_cast<size_t>(end - begin));
#else
        (void)begin, (void)end;
#endif
    }

  private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    int64_t bytes_;
    std::unique_ptr<char, Free> memory_;
};

// Rows of logits with gaps, and with columns at -inf in some of them.
class Logits {
  public:
    Logits(const Problem& p, int64_t salt)
        : stride_(p.columns + p.padding + p.gap),
          memory_((p.offset + (p.rows - 1) * stride_ + p.columns) * element_bytes(p.element)) {
        const int size = element_bytes(p.element);
        for (int64_t row = 0; row < p.rows; ++row) {
            const int64_t start = p.offset + row * stride_;
            for (int64_t column = 0; column < p.columns; ++column) {
                const bool massless = row % 3 == 1 && (column + salt) % 97 == 0;
                store_column(memory_.data(), p.element, start + column,
                             massless ? -std::numeric_limits<float>::infinity()
                                      : 4 * noise((salt * 64 + row) * 100000 + column));
            }
            if (row + 1 < p.rows) memory_.forbid((start + p.columns) * size, (start + stride_) * size);
        }
        memory_.forbid(0, p.offset * size);
        rows.data = memory_.data() + p.offset * size;
        rows.dimensions = 1;
        rows.sizes[0] = static_cast<uint32_t>(p.rows);
        rows.strides[0] = stride_;
        rows.element = p.element;
    }
    Rows rows;

  private:
    int64_t stride_;
    Memory memory_;
};

// The answer of processes that have some of the columns each, in their order. `whole` has coefficients.
inline std::string solve_in_shards(const Job& whole, int64_t shards) {
    const int64_t n = whole.rows, cells = n * whole.labels_per_row;
    std::vector<Memory> kept;
    const auto keep = [&](int64_t bytes) { return kept.emplace_back(bytes > 0 ? bytes : 16).data(); };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(keep(4 * count)); };
    const auto start = [&](int64_t shard) { return shard * whole.columns / shards; };
    float* picked = floats(2 * cells);
    std::fill(picked, picked + 2 * cells, 0.0f);
    std::vector<Job> jobs;
    for (int64_t shard = 0; shard < shards; ++shard) {
        const int64_t begin = start(shard), end = start(shard + 1);
        const auto here = [&](int64_t column) { return column >= begin && column < end; };
        Job job = whole;
        job.columns = end - begin;
        job.coefficients = nullptr;
        job.picked = picked;
        for (Rows* side : {&job.student, &job.teacher})
            if (side->data) side->data = static_cast<const char*>(side->data) + begin * element_bytes(side->element);
        for (Gradient* gradient : {&job.d_student, &job.d_teacher})
            if (gradient->data) *gradient = {keep(n * job.columns * element_bytes(job.student.element)), job.columns};
        int64_t* labels = reinterpret_cast<int64_t*>(keep(8 * cells));
        int64_t* exclude = reinterpret_cast<int64_t*>(keep(8 * n));
        for (int64_t i = 0; i < n; ++i)
            exclude[i] = whole.exclude && here(whole.exclude[i]) ? whole.exclude[i] - begin : -1;
        for (int64_t i = 0; i < cells; ++i) {
            const int64_t label = whole.labels[i], row = i / whole.labels_per_row;
            labels[i] = here(label) ? label - begin : label < 0 ? kNoLabel : kElsewhere;
            if (!here(label) || (whole.mask && !whole.mask[row])) continue;
            const bool left_out = whole.exclude && label == whole.exclude[row];
            int side = 0;
            for (const Rows& rows : {whole.student, whole.teacher}) {
                if (rows.data)
                    picked[side * cells + i] = left_out ? -std::numeric_limits<float>::infinity()
                                                        : load_column(static_cast<const char*>(rows.data), rows.element,
                                                                      row * rows.strides[0] + label);
                ++side;
            }
        }
        job.labels = labels;
        if (whole.exclude) job.exclude = exclude;
        job.workspace = floats(workspace_floats(job));
        job.values = floats(value_rows(job, job.stat_count) * n);
        job.state = floats(state_rows(job) * n);
        jobs.push_back(job);
    }
    const int64_t of_state = n * shard_state_floats(whole), of_sums = n * shard_sums_floats(whole);
    float* states = floats(shards * of_state);
    float* sums = floats(shards * of_sums);
    for (int64_t i = 0; i < shards; ++i) run_shard_state(jobs[i], start(i), states + i * of_state);
    for (int64_t i = 0; i < shards && of_sums > 0; ++i) run_shard_sums(jobs[i], states, shards, sums + i * of_sums);
    std::string all;
    for (Job& job : jobs) {
        run_shard_finish(job, states, sums, shards);
        job.coefficients = whole.coefficients;
        run_backward(job);
        all.append(reinterpret_cast<const char*>(job.values), 4 * value_rows(job, job.stat_count) * n);
        for (const Gradient& gradient : {job.d_student, job.d_teacher})
            if (gradient.data)
                all.append(static_cast<const char*>(gradient.data),
                           n * job.columns * element_bytes(job.student.element));
    }
    return all;
}

// The bytes of everything that the problem's answer is.
inline std::string solve(const Problem& p) {
    setenv("KLDIV_CUDA_PLAN", p.plan, 1);
    setenv("KLDIV_HOST_CLUSTERS", p.clusters, 1);
    Logits student(p, 0), teacher(p, 1);
    Job job;
    job.student = student.rows;
    if (p.teacher) job.teacher = teacher.rows;
    job.rows = p.rows;
    job.columns = p.columns + p.beyond;
    for (const char* name : p.stats) job.stats[job.stat_count++] = statistic_code(name);
    job.labels_per_row = p.labels_per_row;
    const int64_t values = value_rows(job, job.stat_count), width = p.columns + p.padding;
    Memory labels(p.rows * p.labels_per_row * 8), mask(p.rows), exclude(p.rows * 8);
    Memory out(values * p.rows * 4), coefficients(values * p.rows * 4);
    for (int64_t i = 0; i < p.rows * p.labels_per_row; ++i)
        labels.as<int64_t>()[i] = i % 4 == 3 ? -1 : (i / p.repeated * 7919 + 5) % p.columns;
    for (int64_t i = 0; i < p.rows; ++i) {
        mask.as<bool>()[i] = i % 3 != 2;
        exclude.as<int64_t>()[i] = i % 4 == 2 ? -1 : (i * 811) % p.columns;
    }
    for (int64_t i = 0; i < values * p.rows; ++i) coefficients.as<float>()[i] = noise(-i) + 2;
    job.labels = labels.as<int64_t>();
    job.parameters[0] = 0.7f;
    job.parameters[1] = 1.3f;
    job.parameters[3] = 0.4f;
    if (p.mask) job.mask = mask.as<bool>();
    if (p.exclude) job.exclude = exclude.as<int64_t>();
    job.values = out.as<float>();
    const auto gradient_bytes = p.rows * width * element_bytes(p.element);
    Memory d_student(gradient_bytes), d_teacher(p.teacher_gradient ? gradient_bytes : 16);
    job.d_student = {d_student.data(), width};
    if (p.teacher_gradient) job.d_teacher = {d_teacher.data(), width};
    Memory theirs(values * p.rows * 4), scale(p.rows * 4), divergences(p.rows * 4), found(values * p.rows * 4);
    for (int64_t i = 0; i < values * p.rows; ++i) theirs.as<float>()[i] = 3 * noise(2 * i) - 3;
    for (int64_t i = 0; i < p.rows; ++i) scale.as<float>()[i] = noise(i) + 2;
    if (p.topk) {
        job.topk.teacher = theirs.as<float>();
        job.topk.outcomes = values;
        job.topk.kind = statistic_code(p.topk);
        job.topk.scale = scale.as<float>();
        job.topk.divergences = divergences.as<float>();
        job.topk.coefficients = found.as<float>();
    }
    if (!p.saved && !p.topk) job.coefficients = coefficients.as<float>();
    if (p.shards) return solve_in_shards(job, p.shards);
    const CudaPlan chosen = plan(job);
    if (chosen.one_read() != (p.plan[0] == 'c')) throw std::runtime_error("another plan: " + chosen.reason);
    Memory state(chosen.one_read() ? 16 : state_rows(job) * p.rows * 4);
    Memory workspace(chosen.one_read() ? 16 : workspace_floats(job) * 4);
    job.state = chosen.one_read() ? nullptr : state.as<float>();
    job.workspace = chosen.one_read() ? nullptr : workspace.as<float>();
    run_forward(job, chosen);
    if (p.saved) {
        job.coefficients = coefficients.as<float>();
        run_backward(job);
    }
    std::string all;
    out.append_to(&all);
    divergences.append_to(&all);
    d_student.append_to(&all);
    d_teacher.append_to(&all);
    return all;
}

}  // namespace kldiv::gpu
