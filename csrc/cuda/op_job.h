// From the arguments of an operator to a job of the cuda backend, and where it runs.
#pragma once

#include <string>
#include <vector>

#include "../namespace.h"
#include "../op_arguments.h"
#include "job.h"

#ifdef KLDIV_CUDA_HOST
#define KLDIV_LIBRARY kldiv_cuda_host
#define KLDIV_DEVICE_KEY CPU
#else
#define KLDIV_LIBRARY KLDIV_NAMESPACE
#define KLDIV_DEVICE_KEY CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace kldiv::gpu {

#ifdef KLDIV_CUDA_HOST
struct OnDevice {
    explicit OnDevice(const Tensor&) {}
    void* stream() const { return nullptr; }
};
#else
// The current device while it lives, and PyTorch's stream there.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

    void* stream() const {
        using CurrentStream = AOTITorchError (*)(int32_t, void**);
        // A CPU-only PyTorch does not have it, and this library has to load there; nor is it in reach of the linker
        // where it exists, since the library names libtorch_cpu alone among its needs.
        static const auto current = []() -> CurrentStream {
            void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
            return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                           : nullptr;
        }();
        STD_TORCH_CHECK(current, "this PyTorch does not say which CUDA stream is current");
        void* stream = nullptr;
        STD_TORCH_CHECK(current(index_, &stream) == AOTI_TORCH_SUCCESS, "PyTorch has no current CUDA stream");
        return stream;
    }

  private:
    int32_t index_;
    torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// backends/strides.py joins dimensions in the same way.
inline Rows rows_of(const Tensor& tensor, const Tensor& logits, int64_t columns, const char* name) {
    check_rows(tensor, logits, columns, name);
    Rows rows;
    rows.data = address(tensor);
    rows.element = element_of(tensor, name);
    int last = -1;
    for (int64_t i = 0; i < tensor.dim() - 1; ++i) {
        const int64_t size = tensor.size(i), stride = tensor.stride(i);
        if (size == 1) continue;
        if (last < 0 || rows.strides[last] != size * stride) {
            ++last;
            STD_TORCH_CHECK(last < kMostDimensions, name, " has strides that need more than ", kMostDimensions,
                            " leading dimensions");
            rows.sizes[last] = 1;
        }
        rows.sizes[last] *= static_cast<uint32_t>(size);
        rows.strides[last] = stride;
    }
    rows.dimensions = last + 1;
    return rows;
}

// The arguments that describe the rows, the same for every operator.
inline Job make_job(const Tensor& logits, const std::optional<Tensor>& reference, const std::optional<Tensor>& labels,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& exclude,
                    const std::optional<Tensor>& token_parameters, const std::vector<double>& parameters,
                    const std::vector<std::string>& stats, int64_t vocab_size) {
    Job job;
    job.columns = vocab_size;
    job.student = rows_of(logits, logits, vocab_size, "logits");
    if (reference) job.teacher = rows_of(*reference, logits, vocab_size, "reference");
    take_tokens(job, logits, labels, mask, exclude, token_parameters);
    take_parameters(parameters, job.parameters);
    STD_TORCH_CHECK(stats.size() <= kMostStatistics, "at most ", kMostStatistics, " stats");
    for (const std::string& name : stats) {
        const int code = statistic_code(name);
        STD_TORCH_CHECK(code >= 0, "the cuda backend has no ", name);
        STD_TORCH_CHECK(job.labels || !needs_labels(code), name, " needs labels");
        STD_TORCH_CHECK(job.teacher.data || !needs_reference(code), name, " needs reference");
        job.stats[job.stat_count++] = code;
    }
    return job;
}

}  // namespace kldiv::gpu
