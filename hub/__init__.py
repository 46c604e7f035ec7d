"""The package as a kernel of the Hugging Face Hub: `python -m hub`, or `make hub`.

    csrc/*, kldiv_kernels/*  ──layout──▶  build/hub/kldiv-kernels         C++ and CUDA, for kernel-builder
                             ──layout──▶  build/hub/kldiv-kernels-triton  Triton and PyTorch alone, nothing to compile
    each of them             ──variant─▶  <kernel>/build/<variant>        this machine's CPU: `kernels.get_local_kernel`

The sources are the same. What differs is what the Hub asks for: imports are relative, the operators stand in a
namespace that the build chooses, and nothing but PyTorch and Triton is imported.
"""
