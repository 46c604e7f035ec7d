"""Paper 36: who learns from a teacher's distributions memorises less of the texts than who learns from labels.

64 sequences of a Markov chain over 32 tokens are all there is to train on. Copies of one small model see them 200
times: with cross-entropy, and with `kd_loss` (temperature 2) from each of two teachers. One is the chain itself, the
best there can be. The other is the model that learned the same sequences from labels. Memorised is a sequence whose
second half the model writes, greedily, from its first half.
"""

from __future__ import annotations

import torch
from claim import Claim, finish, options, over_seeds, say, spread
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kldiv_kernels as kk

TOKENS, SEQUENCES, LENGTH, STEPS, RATE, EVERY = 32, 64, 32, 200, 3e-3, 20
LEARNERS = ("labels", "the chain", "a trained teacher")


def chain(seed: int) -> Tensor:
    """Log-probabilities of the next token, [token, next]; about 5 likely ones each."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(TOKENS, TOKENS, generator=generator)).log_softmax(-1)


def texts(transitions: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, TOKENS, (count, 1), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(transitions[tokens[-1][:, 0]].exp(), 1, generator=generator))
    return torch.cat(tokens, 1)


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


@torch.no_grad()
def memorised(model: LlamaForCausalLM, known: Tensor) -> float:
    tokens = known[:, : LENGTH // 2]
    for _ in range(LENGTH - LENGTH // 2):
        tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    return (tokens == known).all(-1).float().mean().item()


@torch.no_grad()
def held_out_kl(model: LlamaForCausalLM, transitions: Tensor, unseen: Tensor) -> float:
    return kk.forward_kl(model(input_ids=unseen).logits[:, :-1], transitions[unseen[:, :-1]]).item()


def run(learner: str, seed: int, teacher: LlamaForCausalLM | None) -> tuple[dict[str, list[float]], LlamaForCausalLM]:
    transitions = chain(seed)
    known, unseen = texts(transitions, SEQUENCES, 1000 + seed), texts(transitions, SEQUENCES, 2000 + seed)
    inputs, labels = known[:, :-1], known[:, 1:]
    target = transitions[inputs]
    if teacher is not None:
        with torch.no_grad():
            target = teacher(input_ids=known).logits[:, :-1]
    model = model_of(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    curves: dict[str, list[float]] = {"step": [], "memorised": [], "held_out_kl": []}
    for step in range(1, STEPS + 1):
        logits = model(input_ids=known).logits[:, :-1]
        if learner == "labels":
            loss = -kk.selective_log_softmax(logits, labels).mean()
        else:
            loss = kk.recipes.kd_loss(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            curves["step"].append(step)
            curves["memorised"].append(memorised(model, known))
            curves["held_out_kl"].append(held_out_kl(model, transitions, unseen))
    say(f"  from {learner}: {curves['memorised'][-1]:.0%} memorised, held-out KL {curves['held_out_kl'][-1]:.2f}")
    return curves, model


def main() -> None:
    given = options(__doc__ or "", "distilled_memory", seeds=3, example="--seeds 1")
    curves: dict[str, list[dict[str, list[float]]]] = {learner: [] for learner in LEARNERS}
    for seed in over_seeds(given.seeds):
        teacher = None
        for learner in LEARNERS:
            found, model = run(learner, seed, teacher if learner == "a trained teacher" else None)
            curves[learner].append(found)
            teacher = model if learner == "labels" else teacher
    claim = Claim(
        "distilled_memory", "36: Memorization Dynamics in Knowledge Distillation for Language Models",
        "a distilled student memorises less of the training texts than one from labels, and generalises better",
    )  # fmt: skip
    last = {name: {x: [run[name][-1] for run in curves[x]] for x in LEARNERS} for name in ("memorised", "held_out_kl")}
    for learner in LEARNERS:
        share = [100 * x for x in last["memorised"][learner]]
        claim.rows.append((f"memorised, from {learner}", f"{spread(share, 0)} % of {SEQUENCES} sequences"))
        claim.rows.append((f"held-out KL, from {learner}", f"{spread(last['held_out_kl'][learner])} nats a token"))
    less = [x for x in LEARNERS[1:] if all(max(of[x]) < min(of["labels"]) for of in last.values())]
    claim.shown = {0: "no", 1: "in part", 2: "yes"}[len(less)]
    claim.verdict = ", and ".join(
        f"the student of {x} memorises {'less' if x in less else 'no less, or generalises no better'}"
        for x in LEARNERS[1:]
    )
    claim.numbers = {"curves": curves, "steps": STEPS, "learning_rate": RATE, "sequences": SEQUENCES, "tokens": TOKENS}
    finish(claim, given, plot(curves))


def plot(curves: dict[str, list[dict[str, list[float]]]]) -> Figure:
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    names = {"memorised": "share of training sequences memorised", "held_out_kl": "held-out KL(chain ∥ model)"}
    for axis, (name, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for learner, runs in curves.items():
            values = torch.tensor([run[name] for run in runs])
            (line,) = axis.plot(runs[0]["step"], values.mean(0), marker="o", markersize=3, label=f"from {learner}")
            axis.fill_between(runs[0]["step"], values.amin(0), values.amax(0), color=line.get_color(), alpha=0.2)
        axis.set(xlabel="step", title=title)
        axis.legend()
    return figure


if __name__ == "__main__":
    main()
