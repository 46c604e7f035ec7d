#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#ifdef KLDIV_HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kldiv::gpu::host {
namespace {

#ifdef KLDIV_HOST_ASAN
constexpr size_t kStackBytes = 256 << 10;  // frames with red zones
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
// Stacks that start at the same offset in their pages would share a few sets of the cache.
constexpr size_t kColours = 61, kColourBytes = 192;

Context* previous = nullptr;

char* stack(size_t slot) {
    static std::vector<char*> stacks;
    static const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    while (stacks.size() <= slot) {
        void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
        stacks.push_back(static_cast<char*>(memory) + guard);
    }
    return stacks[slot];
}
size_t stacks_in_use = 0;

void before_change(Context* from, Context* to, bool for_good) {
    previous = from;
#ifdef KLDIV_HOST_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from->fake_stack, to->bottom, to->size);
#else
    (void)to, (void)for_good;
#endif
}

void after_change(void* fake_stack) {
#ifdef KLDIV_HOST_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, &previous->bottom, &previous->size);
#else
    (void)fake_stack;
#endif
}

}  // namespace

#ifdef KLDIV_HOST_OWN_CHANGE
// Keeps what a call must keep (System V ABI) on the stack that is left, and takes it from the other one.
extern "C" void kldiv_host_change(void** from, void* to);
asm(R"(
    .text
    .hidden kldiv_host_change
    .globl kldiv_host_change
    .type kldiv_host_change, @function
kldiv_host_change:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size kldiv_host_change, . - kldiv_host_change
)");

static void change_registers(Context* from, Context* to) { kldiv_host_change(&from->stack_pointer, to->stack_pointer); }

static void prepare_registers(Context* context, char* top, void (*entry)()) {
    // Six registers, the address to return to, and the end of the chain of callers.
    auto* words = reinterpret_cast<uintptr_t*>(top - 64);
    for (int i = 0; i < 8; ++i) words[i] = 0;
    words[6] = reinterpret_cast<uintptr_t>(entry);
    context->stack_pointer = words;
}
#else
static void change_registers(Context* from, Context* to) { swapcontext(&from->registers, &to->registers); }

static void prepare_registers(Context* context, char* top, void (*entry)()) {
    getcontext(&context->registers);
    context->registers.uc_stack.ss_sp = const_cast<void*>(context->bottom);
    context->registers.uc_stack.ss_size = static_cast<size_t>(top - static_cast<const char*>(context->bottom));
    context->registers.uc_link = nullptr;
    makecontext(&context->registers, entry, 0);
}
#endif

void prepare(Context* context, size_t slot, void (*entry)()) {
    char* const bottom = stack(slot);
    if (slot >= stacks_in_use) stacks_in_use = slot + 1;
    context->bottom = bottom;
    context->size = kStackBytes;
    context->fake_stack = nullptr;
    prepare_registers(context, bottom + kStackBytes - slot % kColours * kColourBytes, entry);
}

void change(Context* from, Context* to) {
    before_change(from, to, false);
    change_registers(from, to);
    after_change(from->fake_stack);
}

void leave(Context* from, Context* to) {
    before_change(from, to, true);
    change_registers(from, to);
    std::abort();
}

void arrived() { after_change(nullptr); }

void clean_stacks() {
#ifdef KLDIV_HOST_ASAN
    for (size_t slot = 0; slot < stacks_in_use; ++slot) __asan_unpoison_memory_region(stack(slot), kStackBytes);
#endif
}

}  // namespace kldiv::gpu::host
