// The Python module _C: launch plans and build information, what is not a tensor operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "plan.h"

namespace py = pybind11;

namespace {

std::map<std::string, std::string> build_info() {
    return {{"compiler", __VERSION__}, {"torch_target", KLDIV_TORCH_TARGET}};
}

kldiv::CpuPlan plan_cpu(int64_t rows, int64_t columns, const std::vector<std::string>& stats, int64_t student_bytes,
                        int64_t teacher_bytes, bool gradient, bool one_read, int64_t threads) {
    return kldiv::plan_cpu(
        {rows, columns, student_bytes, teacher_bytes, kldiv::needs_normalised_sums(stats), gradient, one_read},
        threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    py::class_<kldiv::CpuPlan>(m, "CpuPlan")
        .def_readonly("kernel", &kldiv::CpuPlan::kernel)
        .def_readonly("sweeps", &kldiv::CpuPlan::sweeps)
        .def_readonly("threads", &kldiv::CpuPlan::threads)
        .def_readonly("bytes", &kldiv::CpuPlan::bytes)
        .def_readonly("reason", &kldiv::CpuPlan::reason);
    m.def("plan_cpu", &plan_cpu);
    m.def("build_info", &build_info);
}
