// What the blocks of `sweep` leave for the kernels after it, in memory: the state of each slice, the softmax of its
// tail, and that of the student at temperature 1.
#pragma once

#include "slices.cuh"

namespace kldiv::gpu {

constexpr int kStateFloats = 13, kSoftmaxFloats = 2;
constexpr int kEverything = kTeacher | kEntropy | kReferenceEntropy | kForwardKl | kReverseKl | kHellinger | kArgmax;

KLDIV_DEVICE void save(const State& x, float* to) {
    const float all[kStateFloats] = {x.s.m,
                                     x.s.z,
                                     x.s.a,
                                     x.s.blocked,
                                     x.t.m,
                                     x.t.z,
                                     x.t.a,
                                     x.t.blocked,
                                     x.forward_kl,
                                     x.reverse_kl,
                                     x.hellinger,
                                     x.best,
                                     bits_float(static_cast<uint32_t>(x.column))};
#pragma unroll
    for (int i = 0; i < kStateFloats; ++i) to[i] = all[i];
}
KLDIV_DEVICE State saved_state(const float* from) {
    State x;
    x.s = {from[0], from[1], from[2], from[3]};
    x.t = {from[4], from[5], from[6], from[7]};
    x.forward_kl = from[8];
    x.reverse_kl = from[9];
    x.hellinger = from[10];
    x.best = from[11];
    x.column = static_cast<int>(float_bits(from[12]));
    return x;
}
KLDIV_DEVICE void save(const Softmax& x, float* to) {
    to[0] = x.m;
    to[1] = x.z;
}
KLDIV_DEVICE Softmax saved_softmax(const float* from) { return {from[0], from[1]}; }

// What the block's threads have, merged, in its first warp. What `save` and `load` exchange goes through shared memory,
// `floats` a warp.
template <class X, class Merge, class Load>
KLDIV_DEVICE X merge_block(X x, int floats, Merge merge, Load load) {
    float* left = reinterpret_cast<float*>(shared_memory());
    const int warp = thread_index() / 32, lane = thread_index() % 32, warps = block_threads() / 32;
    merge(x);
    block_sync(0, block_threads());
    if (lane == 0) save(x, left + warp * floats);
    block_sync(0, block_threads());
    if (warp == 0) {
        x = lane < warps ? load(left + lane * floats) : X{};
        merge(x);
    }
    return x;
}

// The merged state of a row, in every lane of every warp that asks.
KLDIV_DEVICE State row_state(const SweepArguments& a, int64_t index) {
    const int lane = thread_index() % 32;
    State state;
    if (lane < a.states_a_row) state = saved_state(a.states + (index * a.states_a_row + lane) * kStateFloats);
    merge_lanes<kEverything>(state);
    return state;
}

// The same of one of the softmaxes beside it.
KLDIV_DEVICE Softmax row_softmax(const SweepArguments& a, const float* softmaxes, int64_t index) {
    const int lane = thread_index() % 32;
    Softmax x;
    if (lane < a.states_a_row) x = saved_softmax(softmaxes + (index * a.states_a_row + lane) * kSoftmaxFloats);
    merge_lanes(x);
    return x;
}

}  // namespace kldiv::gpu
