// From a job to kernel launches. Everything goes to the job's stream, nothing waits for the device, and what has to be
// asked of the runtime is asked once, so that a call can be captured in a graph.
#include <algorithm>
#include <stdexcept>

#include "one_read/kernels.h"
#include "machine/runtime.cuh"
#include "two_sweep/coefficients.cuh"
#include "two_sweep/finish.cuh"
#include "two_sweep/gradient.cuh"
#include "two_sweep/merge.cuh"
#include "two_sweep/sweeps.cuh"
#include "one_read/topk_kernel.cuh"

namespace kldiv::gpu {

namespace {

int sums_count(const Job& job) {
    return static_cast<int>(
        std::count_if(job.stats, job.stats + job.stat_count, [](int code) { return !finishes_first(code); }));
}

bool has(const Job& job, int code) {
    return std::find(job.stats, job.stats + job.stat_count, code) != job.stats + job.stat_count;
}
bool has_tail(const Job& job) { return has(job, kTailLogprob); }

// Of the softmaxes that a state has beside it.
int64_t softmax_floats(const Job& job) { return kSoftmaxFloats * (has_tail(job) + has(job, kUntemperedLogprob)); }

int64_t slices_of(const Job& job) {
    const int64_t slice = slice_columns(job.columns);
    return (job.columns + slice - 1) / slice;
}

SweepArguments sweep_arguments(const Job& job) {
    SweepArguments a{};
    a.call = job;
    a.slices = a.states_a_row = slices_of(job);
    a.slice = slice_columns(job.columns);
    a.sums_count = sums_count(job);
    float* next = job.workspace;
    const auto take = [&](int64_t floats) {
        float* taken = next && floats > 0 ? next : nullptr;
        if (taken) next += job.rows * a.slices * floats;
        return taken;
    };
    a.states = take(kStateFloats);
    a.sums = take(kSumsFloats * a.sums_count);
    a.tails = take(kSoftmaxFloats * has_tail(job));
    a.untempered = take(kSoftmaxFloats * has(job, kUntemperedLogprob));
    a.student = job.d_student.data != nullptr;
    a.teacher = job.d_teacher.data != nullptr;
    a.divergences = job.topk.divergences;
    return a;
}

// `labels`: the kernel looks for those of its slices.
template <class Arguments>
void launch_sweep(Kernel<Arguments> kernel, int64_t blocks, const Job& job, const Arguments& arguments,
                  const char* what, bool labels = false) {
    if (blocks > std::numeric_limits<int>::max())
        throw std::invalid_argument("kldiv_kernels: " + std::to_string(job.rows) + " rows of " +
                                    std::to_string(job.columns) + " columns are more than one launch can take");
    LaunchShape shape;
    shape.blocks = blocks;
    shape.threads = kSweepThreads;
    shape.shared_bytes = kSweepSharedBytes + (labels ? label_bytes(job.columns) : 0);
    launch(kernel, shape, job.stream, arguments, [&] { return std::string("two-sweep kernel ") + what; });
}

// A warp for each of `count`.
template <class Arguments>
void launch_warps(Kernel<Arguments> kernel, int64_t count, const Job& job, const Arguments& arguments,
                  const char* what) {
    constexpr int64_t warps = kSweepThreads / 32;
    launch_sweep(kernel, (count + warps - 1) / warps, job, arguments, what);
}

// What the first sweep takes for these statistics, and the kernel that takes as little more as possible.
int first_of(const Job& job) {
    int first = job.teacher.data ? kTeacher : 0;
    for (int i = 0; i < job.stat_count; ++i) {
        const int code = job.stats[i];
        if (code == k_entropy) first |= kEntropy;
        if (code == k_reference_entropy) first |= kReferenceEntropy;
        if (code == k_forward_kl) first |= kForwardKl;
        if (code == k_reverse_kl) first |= kReverseKl;
        if (code == k_hellinger) first |= kHellinger;
        if (code == kMaxLogprob || code == kArgmaxCode) first |= kArgmax;
        if (code == kTailLogprob) first |= kTail;
        if (code == kUntemperedLogprob) first |= kUntempered;
    }
    return first;
}
Kernel<SweepArguments> sweep_kernel(int first) {
    struct Variant {
        int first;
        Kernel<SweepArguments> kernel;
    };
    static const Variant variants[] = {
        {0, sweep<0>},
        {kEntropy, sweep<kEntropy>},
        {kEntropy | kArgmax, sweep<kEntropy | kArgmax>},
        {kTeacher, sweep<kTeacher>},
        {kTeacher | kForwardKl, sweep<kTeacher | kForwardKl>},
        {kTeacher | kReverseKl, sweep<kTeacher | kReverseKl>},
        {kTeacher | kHellinger, sweep<kTeacher | kHellinger>},
        {kEverything, sweep<kEverything>},
        {kUntempered | kEntropy | kArgmax, sweep<kUntempered | kEntropy | kArgmax>},
        {kUntempered | kTeacher, sweep<kUntempered | kTeacher>},
        {kUntempered | kTeacher | kForwardKl, sweep<kUntempered | kTeacher | kForwardKl>},
        {kUntempered | kTeacher | kReverseKl, sweep<kUntempered | kTeacher | kReverseKl>},
        {kUntempered | kEverything, sweep<kUntempered | kEverything>},
        {kTail, sweep<kTail>},
        {kTail | kEntropy | kArgmax, sweep<kTail | kEntropy | kArgmax>},
        {kTail | kEverything, sweep<kTail | kEverything>},
        {kUntempered | kTail | kEntropy | kArgmax, sweep<kUntempered | kTail | kEntropy | kArgmax>},
        {kUntempered | kTail | kEverything, sweep<kUntempered | kTail | kEverything>},
    };
    return std::find_if(std::begin(variants), std::end(variants),
                        [&](const Variant& v) { return (first & ~v.first) == 0 && !((v.first & ~first) & kTeacher); })
        ->kernel;
}

// Floats of things: from item to item, and from part to part of one.
struct From {
    const float* at;
    int64_t item, part;
};
struct To {
    float* at;
    int64_t item;
};
// `items` of every row, from parts.
template <class X>
void merge(const Job& job, int64_t items, const From& from, int64_t parts, const To& to, int64_t first_column = 0) {
    const MergeArguments a{job.mask,  job.rows * items,
                           items,     from.at,
                           from.item, from.part,
                           parts,     to.at,
                           to.item,   static_cast<int>(first_column)};
    launch_warps(merge_parts<X>, a.items, job, a, "merge");
}

// One state a row, and of each softmax beside it, from those of all processes.
void merge_shards(const Job& job, const float* states, int64_t shards, SweepArguments* a) {
    const int64_t width = shard_state_floats(job);
    merge<State>(job, 1, {states, width, job.rows * width}, shards, {a->states, kStateFloats});
    const float* from = states + kStateFloats;
    for (float* to : {a->tails, a->untempered}) {
        if (!to) continue;
        merge<Softmax>(job, 1, {from, width, job.rows * width}, shards, {to, kSoftmaxFloats});
        from += kSoftmaxFloats;
    }
    a->states_a_row = 1;
}

// The one statistic beside log-probabilities that a one-read call has, as its rows take it; entropy, with a
// coefficient of 0, where it has none.
Resolved one_read_statistic(const Job& job) {
    for (int i = 0; i < job.stat_count; ++i)
        if (job.stats[i] >= k_entropy) return resolve(job.stats[i], job.parameters[2], job.parameters[3]);
    return {k_entropy, 0};
}

OneReadKernel kernel_of(const Job& job) {
    const int code = one_read_statistic(job).code;
    switch (job.student.element) {
        case kFloat32:
            return one_read_float32(code);
        case kBfloat16:
            return one_read_bfloat16(code);
        default:
            return one_read_float16(code);
    }
}

int64_t clusters_of(const Job& job, const LaunchShape& shape) {
    return job.topk.teacher ? active_clusters(one_read_topk_kernel(job.student.element), shape)
                            : active_clusters(kernel_of(job), shape);
}

LaunchShape shape_of(const CudaPlan& plan) {
    LaunchShape shape;
    shape.threads = plan.threads;
    shape.cluster = plan.cluster;
    shape.shared_bytes = plan.shared_bytes;
    return shape;
}

void run_one_read(const Job& job, const CudaPlan& plan) {
    LaunchShape shape = shape_of(plan);
    shape.blocks = plan.cluster * std::min(job.rows, clusters_of(job, shape));
    TopKArguments a{};
    a.call = job;
    a.topk = job.topk;
    a.divergence_row = a.logprob_row = a.logsumexp_row = a.tail_row = -1;
    for (int i = 0; i < job.stat_count; ++i) {
        const int code = job.stats[i], row = static_cast<int>(value_rows(job, i));
        (code == kLogprob       ? a.logprob_row
         : code == kTailLogprob ? a.tail_row
         : code == kLogsumexp   ? a.logsumexp_row
                                : a.divergence_row) = row;
    }
    a.alpha = one_read_statistic(job).alpha;
    a.cluster = plan.cluster;
    a.stages = plan.stages;
    a.slice = cluster_slice(job.columns, plan.cluster);
    if (job.mask) launch_sweep(zero_masked, job.rows, job, sweep_arguments(job), "zero_masked");
    const auto what = [&] { return "one-read kernel (" + plan.reason + ")"; };
    if (job.topk.teacher)
        launch(one_read_topk_kernel(job.student.element), shape, job.stream, a, what);
    else
        launch<OneReadArguments>(kernel_of(job), shape, job.stream, a, what);
}

}  // namespace

std::string refusal() { return driver_refusal(); }

int64_t state_rows(const Job& job) { return kStateOfRow + kStateOfStatistic * job.stat_count; }

int64_t workspace_floats(const Job& job) {
    return job.rows * slices_of(job) * (kStateFloats + kSumsFloats * sums_count(job) + softmax_floats(job));
}

CudaPlan plan(const Job& job) {
    const DeviceInfo& device = device_info();
    // Code from older PTX has no clusters, whatever the device has.
    CudaTarget target = cuda_target(std::min(device.capability, compiled_for<SweepArguments>(zero_masked)));
    target.shared_bytes = device.shared_bytes;
    CudaShape shape;
    shape.rows = job.rows;
    shape.columns = job.columns;
    shape.student_bytes = element_bytes(job.student.element);
    shape.teacher_bytes = job.teacher.data ? element_bytes(job.teacher.element) : 0;
    shape.same_dtype = !job.teacher.data || job.teacher.element == job.student.element;
    const auto multiple = [](int64_t elements, int element) { return elements * element_bytes(element) % 16 == 0; };
    const auto aligned = [&](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    const auto rows_aligned = [&](const Rows& rows) {
        return aligned(rows.data) && std::all_of(rows.strides, rows.strides + rows.dimensions,
                                                 [&](int64_t stride) { return multiple(stride, rows.element); });
    };
    shape.aligned = job.columns % kColumns == 0 && rows_aligned(job.student) &&
                    (!job.teacher.data || rows_aligned(job.teacher)) && aligned(job.d_student.data) &&
                    multiple(job.d_student.width, job.student.element);
    shape.student_gradient = job.d_student.data != nullptr;
    shape.teacher_gradient = job.d_teacher.data != nullptr;
    shape.known_coefficients = job.coefficients || job.topk.teacher;
    shape.token_parameters = job.token_parameters != nullptr;
    shape.labels_per_row = job.labels_per_row;
    shape.topk_outcomes = job.topk.teacher ? job.topk.outcomes : 0;
    shape.float16 = job.student.element == kFloat16;
    for (int i = 0; i < job.stat_count; ++i) shape.stats.emplace_back(statistic_name(job.stats[i]));
    CudaPlan plan = plan_cuda(shape, target);
    // Clusters of 16 may be refused, and any shape by a device that is shared.
    std::string refused;
    while (plan.one_read() && clusters_of(job, shape_of(plan)) == 0) {
        refused = "this device refuses clusters of " + std::to_string(plan.cluster) + " CTAs; ";
        target.largest_cluster = plan.cluster / 2;
        target.refused_clusters = true;
        if (target.largest_cluster == 0) target.capability = std::min(target.capability, 89);
        plan = plan_cuda(shape, target);
        plan.reason = refused + (plan.one_read() ? plan.reason : "two-sweep");
    }
    return plan;
}

void run_forward(const Job& job, const CudaPlan& plan) {
    if (job.rows == 0) return;
    if (plan.one_read()) return run_one_read(job, plan);
    SweepArguments a = sweep_arguments(job);
    launch_sweep(sweep_kernel(first_of(job)), job.rows * a.slices, job, a, "sweep", has_tail(job));
    if (a.sums_count > 0) {
        a.backwards = true;
        launch_sweep(sums, job.rows * a.slices, job, a, "sums");
    }
    launch_warps(finish, job.rows, job, a, "finish");
    Job known = job;
    if (job.completed) known.coefficients = job.completed;
    if (job.topk.teacher) {
        launch_warps(outcomes, job.rows, job, OutcomeArguments{job, job.topk}, "outcomes");
        known.coefficients = job.topk.coefficients;
    }
    if (!known.coefficients) return;
    run_backward(known);
}

void run_backward(const Job& job) {
    if (job.rows == 0) return;
    SweepArguments a = sweep_arguments(job);
    a.backwards = a.sums_count == 0;
    if (a.student || a.teacher) launch_sweep(gradient, job.rows * a.slices, job, a, "gradient", labels_apart(job));
}

int64_t shard_state_floats(const Job& job) { return kStateFloats + softmax_floats(job); }
int64_t shard_sums_floats(const Job& job) { return kSumsFloats * sums_count(job); }

void run_shard_state(const Job& job, int64_t first_column, float* states) {
    if (job.rows == 0) return;
    const SweepArguments a = sweep_arguments(job);
    launch_sweep(sweep_kernel(first_of(job)), job.rows * a.slices, job, a, "sweep", a.tails != nullptr);
    const int64_t width = shard_state_floats(job);
    merge<State>(job, 1, {a.states, a.slices * kStateFloats, kStateFloats}, a.slices, {states, width}, first_column);
    float* to = states + kStateFloats;
    for (const float* from : {a.tails, a.untempered}) {
        if (!from) continue;
        merge<Softmax>(job, 1, {from, a.slices * kSoftmaxFloats, kSoftmaxFloats}, a.slices, {to, width});
        to += kSoftmaxFloats;
    }
}

void run_shard_sums(const Job& job, const float* states, int64_t shards, float* to) {
    if (job.rows == 0) return;
    SweepArguments a = sweep_arguments(job);
    merge_shards(job, states, shards, &a);
    a.backwards = true;
    launch_sweep(sums, job.rows * a.slices, job, a, "sums");
    merge<Sums>(job, a.sums_count, {a.sums, a.slices * kSumsFloats, kSumsFloats}, a.slices, {to, kSumsFloats});
}

void run_shard_finish(const Job& job, const float* states, const float* sums, int64_t shards) {
    if (job.rows == 0) return;
    SweepArguments a = sweep_arguments(job);
    merge_shards(job, states, shards, &a);
    a.slices = 1;
    if (a.sums_count > 0)
        merge<Sums>(job, a.sums_count, {sums, kSumsFloats, job.rows * shard_sums_floats(job)}, shards,
                    {a.sums, kSumsFloats});
    launch_warps(finish, job.rows, job, a, "finish");
}

}  // namespace kldiv::gpu
