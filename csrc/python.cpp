// The Python module _C: launch plans of the cuda backend with all that they depend on, for tests and tools. Users ask
// the operators of plan_ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "plan.h"

namespace py = pybind11;

namespace {

kldiv::CudaPlan plan_cuda(int capability, int64_t rows, int64_t columns, const std::vector<std::string>& stats,
                          int64_t student_bytes, int64_t teacher_bytes, bool student_gradient, bool teacher_gradient,
                          bool known_coefficients, bool same_dtype, bool aligned, bool token_parameters,
                          int64_t labels_per_row, int64_t topk_outcomes, bool float16) {
    kldiv::CudaShape shape;
    shape.rows = rows;
    shape.columns = columns;
    shape.student_bytes = student_bytes;
    shape.teacher_bytes = teacher_bytes;
    shape.same_dtype = same_dtype;
    shape.aligned = aligned;
    shape.student_gradient = student_gradient;
    shape.teacher_gradient = teacher_gradient;
    shape.known_coefficients = known_coefficients;
    shape.token_parameters = token_parameters;
    shape.labels_per_row = labels_per_row;
    shape.topk_outcomes = topk_outcomes;
    shape.float16 = float16;
    shape.stats = stats;
    return kldiv::plan_cuda(shape, kldiv::cuda_target(capability));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    py::class_<kldiv::CudaPlan>(m, "CudaPlan")
        .def_readonly("kernel", &kldiv::CudaPlan::kernel)
        .def_readonly("sweeps", &kldiv::CudaPlan::sweeps)
        .def_readonly("cluster", &kldiv::CudaPlan::cluster)
        .def_readonly("stages", &kldiv::CudaPlan::stages)
        .def_readonly("threads", &kldiv::CudaPlan::threads)
        .def_readonly("shared_bytes", &kldiv::CudaPlan::shared_bytes)
        .def_readonly("bytes", &kldiv::CudaPlan::bytes)
        .def_readonly("reason", &kldiv::CudaPlan::reason);
    py::class_<kldiv::CudaTarget>(m, "CudaTarget")
        .def_readonly("capability", &kldiv::CudaTarget::capability)
        .def_readonly("shared_bytes", &kldiv::CudaTarget::shared_bytes)
        .def_readonly("largest_cluster", &kldiv::CudaTarget::largest_cluster);
    m.def("plan_cuda", &plan_cuda, py::kw_only(), py::arg("capability"), py::arg("rows"), py::arg("columns"),
          py::arg("stats"), py::arg("student_bytes"), py::arg("teacher_bytes") = 0, py::arg("student_gradient") = true,
          py::arg("teacher_gradient") = false, py::arg("known_coefficients") = true, py::arg("same_dtype") = true,
          py::arg("aligned") = true, py::arg("token_parameters") = false, py::arg("labels_per_row") = 1,
          py::arg("topk_outcomes") = 0, py::arg("float16") = false);
    m.def("cuda_target", &kldiv::cuda_target);
}
