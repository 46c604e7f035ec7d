// The state of a slice of a row, a monoid: slices merge in any grouping without cancellation.
//
// Per softmax: m (an integer exponent), z = sum 2^(x kLog2e - m), a = sum 2^(x kLog2e - m) (m / kLog2e - x).
// Per divergence taken in the first sweep: G = sum of its non-negative terms under an estimate delta of
// Delta = lse_t - lse_s, in units of 2^m_t. It moves exactly to another estimate delta' and other units m'. With
// eta = delta' - delta, b = 2^(m - m'), and what the slice weighs in the new units,
//   B = sum e^(t - m' / kLog2e), C = sum e^(s + delta - m' / kLog2e), A = e^eta C, M = e^(eta/2) C, N = e^(eta/2) B:
//   KL:        G' = b G + C (e^eta - 1 - eta) + (C - B) eta  =  b G - B eta + A - C
//   Hellinger: G' = b e^(eta/2) G + (B - M - N + A) / 2
// so that after moving to Delta itself D = G / z_t. Each weight is taken by one exponential of its own: a mask of -1e4
// over a tile makes eta 1e4, and products such as b e^eta would be 0 * inf. All of it in double: a tile's float sums
// are what gets merged.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/kernels.h"

namespace kldiv {

struct SoftmaxState {
    double m = 0, z = 0, a = 0;
    // The largest logit of this row among columns where the other row has no mass.
    double blocked = -std::numeric_limits<double>::infinity();

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

    // To logits with an offset taken off.
    void shift(double base) {
        m -= base;
        blocked -= base * kExponentToLog;
    }

    // z to about 1 and m to an integer, so that the float exponentials of the later sweeps neither overflow nor
    // underflow.
    void normalise() {
        if (z > 0 && std::isfinite(z)) rebase(std::rint(m + std::log2(z)));
    }

    double lse() const { return (m + std::log2(z)) * kExponentToLog; }
};

enum class OnlineKind { kl, hellinger };

// Roles are "first" (whose units G is in: the teacher of forward KL and Hellinger) and "second".
struct OnlineState {
    double delta = 0, g = 0;
    double m = 0;  // the exponent of G's units
    bool started = false;

    // To another estimate of Delta, and another exponent; `first` and `second` are the softmax states of the slice.
    void move(OnlineKind kind, double to, double to_m, const SoftmaxState& first, const SoftmaxState& second) {
        const double eta = to - delta, units = (m - to_m) * kExponentToLog;
        const auto weight = [&](const SoftmaxState& of, double shift) {
            return of.has_mass() ? of.z * std::exp((of.m - to_m) * kExponentToLog + shift) : 0.0;
        };
        const double p = weight(first, 0), q_new = weight(second, to);
        if (!first.has_mass()) {
            // Only the terms of the second row are left, whatever the estimate was.
            g = kind == OnlineKind::kl ? q_new : 0.5 * q_new;
        } else if (!second.has_mass()) {
            g = kind == OnlineKind::kl ? std::exp(units) * g - p * eta : 0.5 * p;
        } else if (kind == OnlineKind::kl) {
            const double q = weight(second, delta), moved = std::exp(units) * g;
            g = std::fabs(eta) < 1 ? moved + q * (std::expm1(eta) - eta) + (q - p) * eta : moved - p * eta + q_new - q;
        } else {
            const double middle = std::exp(units + 0.5 * eta) * g;
            if (std::fabs(eta) < 1) {
                const double h = std::expm1(0.5 * eta);
                g = middle + 0.5 * h * (weight(second, delta) * (h + 1) - p);
            } else {
                g = middle + 0.5 * (p - weight(second, 0.5 * (delta + to)) - weight(first, 0.5 * eta) + q_new);
            }
        }
        delta = to;
        m = to_m;
    }
};

}  // namespace kldiv
