// The one-read kernel (sm_90 and later): each logit is read once, each gradient written once. 1u = one tensor:
// 2u + 1u for a divergence, 1u + 1u for the statistics of the student alone.
//
// A cluster of CTAs holds `stages` rows in its shared memory, a slice of each row in each CTA. Warps have roles:
//   mover    loads rows by bulk copies, stores their gradients, which stand where the student's logits were
//   compute  16 warps: sweep the slice, later turn it into the gradient
//   merger   merges what the warps found, exchanges it with the other CTAs, finishes the row
// The compute warps sweep row k + 1 before they write the gradient of row k: so nobody waits for an exchange.
//
//   mover              compute                    merger
//   load k+1 .. ----full--> sweep(k+1) --swept--> merge, exchange, finish(k+1)
//                           gradient(k) <--ready-- (k)
//   store k    <---done----
//
// A divergence that needs the sums of normalised terms takes them in a sweep in between, from chip:
//   sums(k), sweep(k+1), gradient(k), with the merger's answers to sweep and sums on `normal` and `ready`.
//
// What is exchanged is double-buffered by the row's parity. That is enough: nobody sends for row k + 2 before everyone
// has answered for row k + 1, which they do after reading what was exchanged for row k.
#pragma once

#include "compute.cuh"
#include "merger.cuh"
#include "mover.cuh"

namespace kldiv::gpu {

template <class D, int element>
KLDIV_KERNEL(kOneReadThreads, 1)
one_read(OneReadArguments arguments) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    Cta<D, element>(arguments).start();
    const int warp = thread_index() / 32;
    if (warp < kComputeWarps)
        Compute<D, element>(arguments).run();
    else if (warp == kMerger)
        Merger<D, element>(arguments).run();
    else if (thread_index() % 32 == 0)
        Mover<D, element>(arguments).run();
#else
    // `plan` (launch.cu) does not choose it where it was compiled for less.
    __trap();
#endif
}

}  // namespace kldiv::gpu
