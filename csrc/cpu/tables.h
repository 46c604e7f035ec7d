// The tables of the instruction sets that this build has.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define KLDIV_X86
#endif

namespace kldiv {

struct Kernels;

const Kernels& baseline_kernels();
#ifdef KLDIV_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace kldiv
