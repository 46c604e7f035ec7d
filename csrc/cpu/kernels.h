// The table of tile kernels that each instruction set fills, and what they exchange with the row code.
//
// A tile is up to kTile columns of a row, converted to float32, less the row's offset, scaled by 1/temperature and
// padded with kNoMass to a multiple of kPad. The offset is near the row's largest logit: what is added to all logits of
// a row is taken off before anything is rounded. Exponents are taken in base 2: y = fma(x, kLog2e, -m) with an integer
// m, so that changing m rescales by an exact power of two.
#pragma once

#include <cstdint>
#include <limits>

#include "../first_sweep.h"

// In front of what CUDA kernels share with this code.
#define KLDIV_FN

namespace kldiv {

// What a finished row is computed in.
using Real = double;

// 2048 columns of two rows and of a gradient are 24 KiB of a 32 KiB first-level cache. Tiles of half that took 10 %
// more (forward KL, AVX-512): every tile is merged in double.
constexpr int kTile = 2048;
constexpr int kPad = 16;
// Stands for -inf and for anything below itself: finite, so that differences stay finite, and without mass next to any
// column that has some.
constexpr float kNoMass = -1e30f;
// Its neighbour: the least that stands for a logit with mass.
constexpr float kAboveNoMass = -9.9999995e29f;
constexpr float kLog2e = 1.44269504f;
// log2(e) as the float32 that the sweeps use: dividing by it undoes the multiplication, rounding included.
constexpr double kExponentToLog = 1.0 / static_cast<double>(kLog2e);

// Constants of a finished row that a divergence's gradients may use.
constexpr int kRowConstants = 5;

enum class Dtype { float32, bfloat16, float16 };
constexpr int kDtypes = 3;

// What stands for a logit in a tile (convert.h). Static: compiled for one instruction set in each file.
static inline float scaled_one(float x, float offset, float scale) {
    const float y = (x - offset) * scale;
    return x <= kNoMass ? kNoMass : (y < kAboveNoMass ? kAboveNoMass : y);
}

struct Loaded {
    float largest;     // the logit itself, NaN apart; -inf where no column has mass
    bool has_no_mass;  // some column is at or below kNoMass
};

// A finished softmax: log softmax(x) = x - lse, softmax(x) = 2^(x kLog2e - m) * inverse_z.
struct Softmax {
    float m, inverse_z, lse;
};

struct NormalisedRow {
    Softmax s, t;
    // lse of the teacher - lse of the student; the high part is a multiple of 2^-12, so that taking it off a difference
    // of logits is exact where that is near it.
    float delta_high, delta_low;
    double alpha, beta;
    const double* k;  // the row's constants, from Finished; not for the second sweep
};

// A log-sum-exp under way: log_sum = log(sum) + max.
struct LogSum {
    double max = -std::numeric_limits<double>::infinity();
    double sum = 0;
};

// How a tile enters a first-sweep divergence (row_state.h): the exponents of both rows, the estimate of the difference
// of their lse, and kappa, which brings exponentials of the second row to the first one's units.
struct OnlineTile {
    float m_first, m_second, delta, kappa;
};
struct OnlineSums {
    double z_second, z_first, g;
};
using OnlineKernel = void (*)(const float* second, const float* first, int columns, const OnlineTile&, OnlineSums*,
                              float* x, float* y);

struct DivergenceKernels {
    const char* name;
    int sums;
    bool log_sum, needs_p, finishes_first;
    bool (*infinite_where_q_is_zero)(double alpha);
    bool (*infinite_where_p_is_zero)(double alpha);
    void (*finish)(const double* sums, double log_sum, bool q_is_zero, bool p_is_zero, double alpha, double beta,
                   double* value_and_sums, double* k);
    // Adds the tile's terms to sums[0 .. sums) and, if the struct takes one, to the log-sum.
    void (*terms)(const float* s, const float* t, int columns, const NormalisedRow&, double* sums, LogSum*, float*,
                  float*);
    // The same with exponentials that are parked, in units of the row's 1/z; it parks q and grad_logq in their place.
    // Null where a gradient needs the finished row, and where the divergence takes roots.
    void (*terms_and_park)(const float* s, const float* t, int columns, const NormalisedRow&, double* sums, LogSum*,
                           float* x, float* y);
    // to = (first ? share * softmax : to) + weight * grad_logq (grad_logp)
    void (*grad_q)(const float* s, const float* t, int columns, const NormalisedRow&, float weight, float share,
                   bool first, float* to);
    void (*grad_p)(const float* s, const float* t, int columns, const NormalisedRow&, float weight, float share,
                   bool first, float* to);
};

struct Kernels {
    const char* isa;
    // to = (x - offset) * scale as float32; `load` leaves what it returns undefined
    Loaded (*measured_load[kDtypes])(const void* from, int columns, float scale, float offset, float* to);
    Loaded (*load[kDtypes])(const void* from, int columns, float scale, float offset, float* to);
    void (*store[kDtypes])(const float* from, int columns, void* to);
    void (*scale[kDtypes])(void* data, int columns, float factor);
    // z = sum 2^(x kLog2e - m)
    double (*sum_exp)(const float* x, int columns, float m);
    // z = sum 2^(x factor - m), [1]: parking its terms
    double (*sum_exp_times[2])(const float* x, int columns, float factor, float m, float* terms);
    // z, and sum 2^(x kLog2e - m) (m / kLog2e - x), from which the entropy follows without cancellation
    void (*sum_exp_entropy)(const float* x, int columns, float m, double* z, double* a);
    // The first-sweep divergences of a second row s from a first row t, [1]: parking x and y. Forward KL parks both
    // exponentials (of s, of t), reverse KL that of t and its product with u, Hellinger that of s and the root of both.
    // [.][1]: of rows that are far apart, where a sum of plain terms has all its digits.
    OnlineKernel forward_kl[2][2], reverse_kl[2][2], hellinger[2];
    // to = c_x x + c_y y
    void (*combine)(const float* x, const float* y, int columns, float c_x, float c_y, float* to);
    // to += c x
    void (*add)(const float* x, int columns, float c, float* to);
    // to = share * softmax
    void (*softmax)(const float* x, int columns, const Softmax&, float share, float* to);
    // to += share * 2^(x factor - m)
    void (*add_exp)(const float* x, int columns, float factor, float m, float share, float* to);
    const DivergenceKernels* divergences;
    int divergence_count;
};

// The fastest table for this processor; KLDIV_CPU_ISA=baseline|avx2|avx512 narrows the choice.
const Kernels& best_kernels();

}  // namespace kldiv
