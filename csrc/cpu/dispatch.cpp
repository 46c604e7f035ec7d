// Chooses the instruction set once, when the first kernel runs.
#include <cstdlib>
#include <string>

#include "kernels.h"
#include "tables.h"

namespace kldiv {

namespace {

const Kernels& choose() {
    const char* asked = std::getenv("KLDIV_CPU_ISA");
    const std::string limit = asked ? asked : "avx512";
#ifdef KLDIV_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512 && limit == "avx512") return avx512_kernels();
    if (avx2 && limit != "baseline") return avx2_kernels();
#endif
    return baseline_kernels();
}

}  // namespace

const Kernels& best_kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace kldiv
