// The one-read kernel of top-k divergences (outcomes.cuh): the roles and the order of kernel.cuh, 1u + 1u.
//
// The compute warps take a row's labels out of its slice before they sweep it, so that what they find is the tail's own
// sum. The merger asks for the labels' logits meanwhile, from the second-level cache, where the row has just been; with
// the tail it makes the whole softmax of them, and from the outcomes the coefficients. Every CTA's merger does so, with
// equal bits. A gradient is then
//
//   a column of the tail   c_tail q_j / q_tail, without 1 - sum of q
//   a label                c_j, put into the slice after its neighbours
//
// because the coefficients of all outcomes add up to 0. Where the tail has no mass no column takes c_tail, and what the
// labels' sum is short of 0 by goes to their softmax.
#pragma once

#include "mover.cuh"
#include "topk_compute.cuh"
#include "topk_merger.cuh"

namespace kldiv::gpu {

template <int element>
KLDIV_KERNEL(kOneReadThreads, 1)
one_read_topk(TopKArguments arguments) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    Cta<TailSum, element>(arguments).start();
    const int warp = thread_index() / 32;
    if (warp < kComputeWarps)
        TopKCompute<element>(arguments).run();
    else if (warp == kMerger)
        TopKMerger<element>(arguments).run();
    else if (thread_index() % 32 == 0)
        Mover<TailSum, element>(arguments).run();
#else
    // `plan` (launch.cu) does not choose it where it was compiled for less.
    __trap();
#endif
}

}  // namespace kldiv::gpu
