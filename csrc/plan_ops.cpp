// The planner, and what the library was built with, as operators: any Python asks them, without the module _C.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "namespace.h"
#include "plan.h"

// A Hub kernel's builder is not told what setup.py says of the build.
#ifndef KLDIV_TORCH_TARGET
#define KLDIV_TEXT(macro) #macro
#define KLDIV_TEXT_OF(macro) KLDIV_TEXT(macro)
#define KLDIV_TORCH_TARGET KLDIV_TEXT_OF(TORCH_TARGET_VERSION)
#endif
#ifndef KLDIV_CUDA_ARCHS
#define KLDIV_CUDA_ARCHS ""
#endif

namespace {

using Texts = std::vector<std::string>;
// Numbers and texts of a plan, in the order of the schema. No numbers and one text: why there is no such plan.
using Told = std::tuple<std::vector<int64_t>, Texts>;

template <class Plan>
Told told(Plan plan) {
    try {
        return plan();
    } catch (const std::invalid_argument& error) {
        return {{}, {error.what()}};
    }
}

Told plan_cpu(int64_t rows, int64_t columns, Texts stats, int64_t student_bytes, int64_t teacher_bytes, bool gradient,
              bool one_read, int64_t threads) {
    return told([&]() -> Told {
        const bool sums = kldiv::needs_normalised_sums(stats);
        const kldiv::CpuPlan plan =
            kldiv::plan_cpu({rows, columns, student_bytes, teacher_bytes, sums, gradient, one_read}, threads);
        return {{plan.sweeps, plan.threads, plan.bytes}, {plan.kernel, plan.reason}};
    });
}

Told plan_cuda(int64_t capability, int64_t rows, int64_t columns, Texts stats, int64_t student_bytes,
               int64_t teacher_bytes, bool student_gradient, bool known_coefficients, int64_t labels_per_row,
               int64_t topk_outcomes, bool float16) {
    return told([&]() -> Told {
        kldiv::CudaShape shape;
        shape.rows = rows;
        shape.columns = columns;
        shape.student_bytes = student_bytes;
        shape.teacher_bytes = teacher_bytes;
        shape.student_gradient = student_gradient;
        shape.known_coefficients = known_coefficients;
        shape.labels_per_row = labels_per_row;
        shape.topk_outcomes = topk_outcomes;
        shape.float16 = float16;
        shape.stats = stats;
        const kldiv::CudaPlan plan = kldiv::plan_cuda(shape, kldiv::cuda_target(static_cast<int>(capability)));
        return {{plan.sweeps, plan.cluster, plan.stages, plan.threads, plan.shared_bytes, plan.bytes},
                {plan.kernel, plan.reason}};
    });
}

// A name, its value, the next name.
Texts build_info() {
    return {"compiler", __VERSION__, "torch_target", KLDIV_TORCH_TARGET, "cuda_archs", KLDIV_CUDA_ARCHS};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KLDIV_NAMESPACE, m) {
    // sweeps, threads, bytes; kernel, reason
    m.def(
        "plan_cpu(int rows, int columns, str[] stats, int student_bytes, int teacher_bytes, bool gradient, "
        "bool one_read, int threads) -> (int[], str[])");
    // sweeps, cluster, stages, threads, shared_bytes, bytes; kernel, reason
    m.def(
        "plan_cuda(int capability, int rows, int columns, str[] stats, int student_bytes, int teacher_bytes, "
        "bool student_gradient, bool known_coefficients, int labels_per_row, int topk_outcomes, bool float16)"
        " -> (int[], str[])");
    m.def("build_info() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(KLDIV_NAMESPACE, CompositeExplicitAutograd, m) {
    m.impl("plan_cpu", TORCH_BOX(&plan_cpu));
    m.impl("plan_cuda", TORCH_BOX(&plan_cuda));
    m.impl("build_info", TORCH_BOX(&build_info));
}
