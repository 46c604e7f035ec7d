// Work for PyTorch's threads.
#pragma once

#include <cstdint>
#include <functional>

namespace kldiv {

// Hands out 0 .. count-1 to the threads one by one: masked rows and a busy core leave nobody waiting, and no result
// depends on who computed it.
void for_each(int64_t threads, int64_t count, const std::function<void(int64_t)>& work);

}  // namespace kldiv
