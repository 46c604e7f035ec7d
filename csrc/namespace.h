// Where the operators are: torch.ops.kldiv_kernels, beside those that are defined in Python (kldiv_kernels/ops.py).
// A build may say otherwise: each version of a Hub kernel has a namespace, so that several live in one process.
#pragma once

#ifndef KLDIV_NAMESPACE
#define KLDIV_NAMESPACE kldiv_kernels
#endif
