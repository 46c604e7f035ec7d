"""Paper 42: χ² to the reference holds a proxy that can be hacked, where KL does not.

10,000 actions under a uniform reference. An action's proxy is its true reward plus ½ · noise, but 0.2 % of the actions
have a true reward of −5 and a proxy of +15. One row of logits maximises the proxy, less λ·KL, λ·χ² or λ·√χ², by Adam
from the reference. All λ are rows of one batch. What counts is the true reward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from claim import Claim, finish, options, over_seeds, say, spread
from matplotlib.figure import Figure
from torch import Tensor

import kldiv_kernels as kk

ACTIONS, HACKS, STEPS, RATE = 10_000, 20, 400, 0.05
LAMBDAS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
# Statistics of token_stats: KL(π‖ref) and χ²(π‖ref).
PENALTIES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "KL": ("reverse_kl", lambda x: x),
    "χ²": ("reverse_chi2", lambda x: x),
    # The root's slope is infinite at the reference, where the policy starts.
    "√χ²": ("reverse_chi2", lambda x: (x + 1e-8).sqrt()),
}


def rewards(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    true, noise = torch.randn(2, ACTIONS, generator=generator)
    proxy = true + 0.5 * noise
    true[:HACKS], proxy[:HACKS] = -5.0, 15.0
    return true, proxy


def optimised(proxy: Tensor, penalty: str) -> Tensor:
    """Logits [λ, actions] after the steps."""
    statistic, of = PENALTIES[penalty]
    reference = torch.zeros(len(LAMBDAS), ACTIONS)
    logits = torch.zeros_like(reference).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE, eps=1e-12)
    for step in range(STEPS):
        divergence = kk.token_stats(logits, reference, stats=(statistic,))[statistic]
        objective = logits.softmax(-1) @ proxy - torch.tensor(LAMBDAS) * of(divergence)
        optimizer.zero_grad()
        (-objective.sum()).backward()
        optimizer.step()
        # Smaller steps towards the end: Adam's do not shrink by themselves.
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
    return logits.detach()


def main() -> None:
    given = options(__doc__ or "", "chi2_proxy", seeds=5, example="--seeds 2 --output runs/claims")
    improvements: dict[str, list[list[float]]] = {name: [] for name in PENALTIES}
    correlations = []
    for seed in over_seeds(given.seeds):
        true, proxy = rewards(seed)
        correlations.append(torch.corrcoef(torch.stack([true, proxy]))[0, 1].item())
        for name in PENALTIES:
            improvements[name].append((optimised(proxy, name).softmax(-1) @ true - true.mean()).tolist())
            best = max(range(len(LAMBDAS)), key=improvements[name][-1].__getitem__)
            say(f"  {name}: best true improvement {improvements[name][-1][best]:.2f} at λ = {LAMBDAS[best]}")
    claim = Claim(
        "chi2_proxy", "42: Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking",
        "under χ² the true reward rises, under KL the policy hacks the proxy or stays where it is",
    )  # fmt: skip
    best_of = {name: [max(of_seed) for of_seed in runs] for name, runs in improvements.items()}
    for name, runs in improvements.items():
        means = [statistics.mean(of_lambda) for of_lambda in zip(*runs, strict=True)]
        at = max(range(len(means)), key=means.__getitem__)
        safe = sum(mean > 0.01 for mean in means)
        claim.rows.append(
            (f"{name}: best true improvement over λ",
             f"{spread(best_of[name])} (best at λ = {LAMBDAS[at]}; above .01 at {safe} of {len(LAMBDAS)} λ)")
        )  # fmt: skip
    shown = min(min(best_of["χ²"]), min(best_of["√χ²"])) > 2 * max(best_of["KL"])
    gain = statistics.mean(best_of["χ²"]) / statistics.mean(best_of["KL"])
    claim.shown = "yes" if shown else "no"
    claim.verdict = (
        f"the best χ² has {gain:.1f} times the best KL's true improvement; √χ² comes as far, at fewer λ"
        if shown
        else "in some seed χ² or √χ² is below twice the best of KL"
    )
    claim.numbers = {
        "lambdas": LAMBDAS, "true_improvement": improvements, "correlation_of_proxy_and_true": correlations,
        "actions": ACTIONS, "steps": STEPS, "learning_rate": RATE,
    }  # fmt: skip
    finish(claim, given, plot(improvements))


def plot(improvements: dict[str, list[list[float]]]) -> Figure:
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for name, runs in improvements.items():
        values = torch.tensor(runs)
        (line,) = axis.plot(LAMBDAS, values.mean(0), marker="o", markersize=3, label=name)
        axis.fill_between(LAMBDAS, values.amin(0), values.amax(0), color=line.get_color(), alpha=0.2)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xscale="log", ylim=(-1.5, 1.2), xlabel="λ", ylabel="true reward over the reference's")
    axis.set_title("A proxy with hacks: true reward after optimisation\n(mean and range over seeds; below: hacked)")
    axis.legend()
    return figure


if __name__ == "__main__":
    main()
