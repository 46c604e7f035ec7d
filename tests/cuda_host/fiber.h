// Stacks, and changing from one to another.
#pragma once

#include <cstddef>

// The C library's change of stacks calls the operating system: a warp shuffle takes 7.5 us with it, 0.5 us without.
#if defined(__x86_64__) && !defined(KLDIV_HOST_UCONTEXT)
#define KLDIV_HOST_OWN_CHANGE 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define KLDIV_HOST_ASAN 1
#endif

namespace kldiv::gpu::host {

struct Context {
#ifdef KLDIV_HOST_OWN_CHANGE
    void* stack_pointer = nullptr;
#else
    ucontext_t registers;
#endif
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

// Runs `entry`, which must not return, on stack `slot` when it is first changed to. Stacks are made once and kept.
void prepare(Context* context, size_t slot, void (*entry)());
void change(Context* from, Context* to);
// Changes for good.
[[noreturn]] void leave(Context* from, Context* to);
// To be called first on a new stack.
void arrived();
// After contexts were given up in the middle: their stacks may be used again.
void clean_stacks();

}  // namespace kldiv::gpu::host
