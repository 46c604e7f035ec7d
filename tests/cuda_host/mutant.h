// What mutations.py writes into the kernels' headers.
#pragma once

namespace kldiv::gpu {

namespace host {
// The number of the call that is left out; -1: none.
extern int mutant;
inline bool left_out(int number) { return mutant == number; }
}  // namespace host

}  // namespace kldiv::gpu
