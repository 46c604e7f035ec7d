#include "for_each.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

namespace kldiv {

void for_each(int64_t threads, int64_t count, const std::function<void(int64_t)>& work) {
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_lock;
    const auto loop = [&](int64_t, int64_t) {
        try {
            for (int64_t i = next++; i < count; i = next++) work(i);
        } catch (...) {
            const std::lock_guard<std::mutex> guard(failure_lock);
            failure = std::current_exception();
        }
    };
    const int64_t workers = std::min(threads, count);
    if (workers <= 1)
        loop(0, 1);
    else
        torch::stable::parallel_for(0, workers, 1, loop);
    if (failure) std::rethrow_exception(failure);
}

}  // namespace kldiv
