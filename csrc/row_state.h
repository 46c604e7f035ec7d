// The state of a slice of a row, a monoid: slices merge in any grouping without cancellation.
//
// Per softmax: m (an integer exponent), z = sum 2^(x kLog2e - m), a = sum 2^(x kLog2e - m) (m / kLog2e - x).
// Per divergence taken in the first sweep: G = sum of its non-negative terms under an estimate delta of
// Delta = lse_t - lse_s, in units of 2^m_t. G moves exactly to another estimate:
//   with eta = delta' - delta and Q = z_s e^(delta + (m_s - m_t) / kLog2e),
//   KL:        G' = G + Q (e^eta - 1 - eta) + (Q - z_t) eta
//   Hellinger: G' = (h + 1) G + h (Q (h + 1) - z_t) / 2,  h = e^(eta/2) - 1
// so that after moving to Delta itself D = G / z_t. All of it in double: a tile's float sums are what gets merged.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/kernels.h"

namespace kldiv {

struct SoftmaxState {
    double m = 0, z = 0, a = 0;
    // The largest logit of this row among columns where the other row has no mass.
    float blocked = -std::numeric_limits<float>::infinity();

    bool has_mass() const { return !(z == 0); }

    void rebase(double to) {
        const double shift = m - to, scale = std::exp2(shift);
        a = scale * (a - z * shift * kExponentToLog);
        z *= scale;
        m = to;
    }

    void merge(SoftmaxState other) {
        blocked = blocked > other.blocked ? blocked : other.blocked;
        if (!other.has_mass()) return;
        if (!has_mass()) {
            m = other.m, z = other.z, a = other.a;
            return;
        }
        const double top = std::fmax(m, other.m);
        rebase(top);
        other.rebase(top);
        z += other.z;
        a += other.a;
    }

    // z into [1, 2), so that the float exponentials of the later sweeps neither overflow nor underflow.
    void normalise() {
        if (z > 0 && std::isfinite(z)) rebase(m + std::ilogb(z));
    }

    double lse() const { return (m + std::log2(z)) * kExponentToLog; }
};

enum class OnlineKind { kl, hellinger };

// Roles are "first" (whose units G is in: the teacher of forward KL and Hellinger) and "second".
struct OnlineState {
    double delta = 0, g = 0;
    double m = 0;  // the exponent of G's units
    bool started = false;

    // To another estimate of Delta; `first` and `second` are the softmax states of the same slice.
    void move(OnlineKind kind, double to, const SoftmaxState& first, const SoftmaxState& second) {
        const double eta = to - delta;
        if (eta == 0) return;
        const double q = second.has_mass() ? second.z * std::exp(delta + (second.m - m) * kExponentToLog) : 0.0;
        const double p = first.has_mass() ? first.z * std::exp2(first.m - m) : 0.0;
        if (kind == OnlineKind::kl) {
            g += q * (std::expm1(eta) - eta) + (q - p) * eta;
        } else {
            const double h = std::expm1(0.5 * eta);
            g = (h + 1) * g + 0.5 * h * (q * (h + 1) - p);
        }
        delta = to;
    }

    void rebase(double to) {
        g *= std::exp2(m - to);
        m = to;
    }
};

}  // namespace kldiv
