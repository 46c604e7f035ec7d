"""Paper 72: TOPR learns from answers that older policies sampled, where REINFORCE collapses.

The sums model after its warm-up answers 16 batches of 256 sums, and learns from one batch a step, with a reward of 1 or
−1 an answer: the last batch is 15 steps old. Then it answers the next 16. REINFORCE takes all answers as its own;
`topr_loss` weighs wrong ones by min(π/π_old, 1). Both have Adam, at two learning rates.
"""

from __future__ import annotations

import statistics

import torch
from claim import Claim, finish, options, over_seeds, say, spread
from matplotlib.figure import Figure
from sums import SUMS, Answers, accuracy, answer_logits, by, sample, warm
from torch import Tensor

import kldiv_kernels as kk

BATCH, AGES, STEPS, EVERY = 256, 16, 160, 16
RATES = (1e-4, 5e-4)
METHODS = ("REINFORCE", "TOPR")
# Of one accuracy.
ERROR = (0.25 / len(SUMS.held_out)) ** 0.5
Curve = list[float]


def loss_of(method: str, logits: Tensor, answers: Answers) -> Tensor:
    rewards = 2 * answers.correct.float() - 1
    if method == "TOPR":
        return kk.recipes.topr_loss(logits, answers.ids, rewards, old_logprobs=answers.logprobs, mask=answers.mask).loss
    return kk.policy_loss(
        logits, answers.ids, rewards, loss_type="reinforce", aggregation="seq-mean-token-mean", mask=answers.mask
    ).loss


def run(method: str, rate: float, seed: int) -> Curve:
    """Held-out accuracy at the start and every `EVERY` steps."""
    model = warm(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    curve, batches = [accuracy(model)], []
    for step in range(STEPS):
        if step % AGES == 0:
            chosen = torch.randint(len(SUMS.train), (AGES, BATCH), generator=generator)
            batches = [sample(by(model), [SUMS.train[i] for i in row], generator) for row in chosen.tolist()]
        loss = loss_of(method, answer_logits(model, batches[step % AGES]), batches[step % AGES])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            curve.append(accuracy(model))
    say(f"  {method}, rate {rate:g}: " + " ".join(f"{100 * x:.0f}" for x in curve) + " % right")
    return curve


def main() -> None:
    given = options(__doc__ or "", "topr_stale", seeds=3, example="--seeds 1")
    curves: dict[str, dict[float, list[Curve]]] = {method: {rate: [] for rate in RATES} for method in METHODS}
    for seed in over_seeds(given.seeds):
        for method in METHODS:
            for rate in RATES:
                curves[method][rate].append(run(method, rate, seed))
    claim = Claim(
        "topr_stale", "72: Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs",
        "on answers of older policies REINFORCE collapses, TOPR goes on learning",
    )  # fmt: skip
    last = {method: {rate: [100 * c[-1] for c in runs] for rate, runs in of.items()} for method, of in curves.items()}
    start = [100 * curve[0] for curve in curves["TOPR"][RATES[0]]]
    claim.rows.append(("held-out accuracy at the start", f"{spread(start, 0)} %"))
    for rate in RATES:
        for method in METHODS:
            claim.rows.append((f"after {STEPS} steps at rate {rate:g}, {method}", f"{spread(last[method][rate], 0)} %"))
    # The end of a curve is its last three accuracies: one alone has a standard error of three points.
    end = {m: {r: [statistics.mean(c[-3:]) for c in runs] for r, runs in of.items()} for m, of in curves.items()}
    first = statistics.mean(curve[0] for curve in curves["TOPR"][RATES[0]])
    collapsed = [rate for rate in RATES if max(end["REINFORCE"][rate]) < first / 2 < min(end["TOPR"][rate])]
    learned = [rate for rate in collapsed if statistics.mean(end["TOPR"][rate]) > first + 2 * ERROR / given.seeds**0.5]
    claim.shown = "yes" if learned else "in part" if collapsed else "no"
    names = [", ".join(f"{rate:g}" for rate in rates) or "no rate" for rates in (collapsed, learned)]
    claim.verdict = (
        f"at rate {names[0]} REINFORCE loses more than half of what it knew, in every seed, and TOPR in none; TOPR "
        f"learns by more than chance at {names[1]}"
    )
    claim.numbers = {
        "curves": {method: {f"{rate:g}": runs for rate, runs in of.items()} for method, of in curves.items()},
        "steps": STEPS, "evaluated_every": EVERY, "batch": BATCH, "batches_of_one_policy": AGES,
        "standard_error_of_an_accuracy_in_points": 100 * ERROR,
        "mean_at_the_end": {m: {f"{r:g}": statistics.mean(x) for r, x in of.items()} for m, of in last.items()},
    }  # fmt: skip
    finish(claim, given, plot(curves))


def plot(curves: dict[str, dict[float, list[Curve]]]) -> Figure:
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    steps = range(0, STEPS + 1, EVERY)
    for axis, rate in zip(figure.subplots(1, 2, sharey=True), RATES, strict=True):
        for method in METHODS:
            values = 100 * torch.tensor(curves[method][rate])
            (line,) = axis.plot(steps, values.mean(0), marker="o", markersize=3, label=method)
            axis.fill_between(steps, values.amin(0), values.amax(0), color=line.get_color(), alpha=0.2)
        axis.set(xlabel="step", title=f"learning rate {rate:g}")
        axis.legend()
    figure.axes[0].set_ylabel("held-out sums right, %")
    figure.suptitle(f"Answers up to {AGES - 1} steps old (mean and range over seeds)")
    return figure


if __name__ == "__main__":
    main()
