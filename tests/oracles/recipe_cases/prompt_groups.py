"""Papers 73, 109: definitions over batches with masks, a prompt at a time, and the facts' numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from recipe_case import Case, S, Y, batch, logprob, pick, row
from torch import Tensor

BATCH = batch(sequences=8, tokens=6, seed=7)
# Two prompts with both kinds of answers, one without a wrong one.
BATCH |= {
    "groups": torch.tensor([9, 9, 9, 9, 2, 2, 2, 5]),
    "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64),
    "answers": torch.tensor([3, 4, 3, 1, 0, 1, 1, 8]),
    "local_advantages": BATCH["advantages"],
    "global_advantages": torch.tensor([0.4] * 4 + [-1.1] * 3 + [0.7], dtype=torch.float64),
}
# Less likely than under the policy that sampled, on average: the trust region's penalty counts.
LEFT = BATCH | {"old_logprobs": BATCH["old_logprobs"] + 0.1}
FAR = BATCH | {"old_logprobs": BATCH["base_logprobs"]}


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].mean() if mask.any() else x[mask].sum()


def drpo(logits: Tensor, token_ids: Tensor, rewards: Tensor, groups: Tensor, old_logprobs: Tensor, mask: Tensor,
         tau: float = 10.0, length_temperature: float = 0.1, beta: float = 1e3, delta: float = 1e-4,
         kl_estimator: str = "k1", max_length: float | None = None, temperature: float = 1.0) -> Tensor:  # fmt: skip
    logp = logprob(logits / temperature, token_ids)
    total, prompts = torch.zeros((), dtype=torch.float64), groups.unique().tolist()
    for prompt in prompts:
        answers = [i for i in range(len(groups)) if groups[i] == prompt]
        score = {i: logp[i][mask[i]].mean() for i in answers}
        length = {i: int(mask[i].sum()) / (max_length or mask.shape[1]) for i in answers}
        good, bad = [i for i in answers if rewards[i] == 1], [i for i in answers if rewards[i] == 0]
        if good and bad:
            w = {i: math.exp((1 - length[i]) / length_temperature) for i in good}
            total = total + sum(w[i] * score[i] for i in good) / sum(w.values())
            total = total - tau * sum((score[i] / tau).exp() for i in bad).log()
    moved = logp - old_logprobs
    kl = mean(-moved if kl_estimator == "k1" else moved.exp() - moved - 1, mask)
    return -total / len(prompts) + (beta * (kl - delta).clamp_min(0)).detach() * kl


def answer_entropy(answers: Tensor, groups: Tensor) -> Tensor:
    out = []
    for group in groups.tolist():
        given = answers[groups == group].tolist()
        shares = [given.count(x) / len(given) for x in set(given)]
        out.append(-sum(x * math.log2(x) for x in shares))
    return torch.tensor(out, dtype=torch.float64)


def copo_global_advantages(rewards: Tensor, groups: Tensor, answers: Tensor | None = None,
                           eps: float = 1e-6) -> Tensor:  # fmt: skip
    of_prompt = {}
    for group in groups.unique().tolist():
        n = int((groups == group).sum())
        coefficient = 1.0
        if answers is not None and n > 1:
            entropy = answer_entropy(answers, groups)[groups == group][0].item()
            coefficient = 1 - (1 - 1 / n) / math.log2(n) * entropy
        of_prompt[group] = rewards[groups == group].mean() * coefficient
    values = torch.stack(list(of_prompt.values()))
    return torch.stack([(of_prompt[group] - values.mean()) / (values.std() + eps) for group in groups.tolist()])


def ppo(ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float) -> Tensor:
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def copo(logits: Tensor, token_ids: Tensor, local_advantages: Tensor, global_advantages: Tensor, answers: Tensor,
         groups: Tensor, rewards: Tensor, old_logprobs: Tensor, mask: Tensor, sharpness: float = 5.0,
         midpoint: float = 1.0, zero_wrong: bool = True, clip_low: float = 0.2, clip_high: float = 0.2,
         dual_clip: float = 3.0, normalizer: float | None = None) -> Tensor:  # fmt: skip
    weight = 1 / (1 + (-sharpness * (answer_entropy(answers, groups) - midpoint)).exp())
    weight = (weight * (rewards != 0) if zero_wrong else weight)[:, None]
    ratio = (logprob(logits, token_ids) - old_logprobs).exp()
    local, between = (
        ppo(ratio, x[:, None].expand_as(ratio), clip_low, clip_high, dual_clip)
        for x in (local_advantages, global_advantages)
    )
    loss = weight * local + (1 - weight) * between
    return sum(loss[i][mask[i]].mean() for i in range(len(mask))) / (normalizer or len(mask))  # type: ignore[return-value]


DRPO = ("logits", "token_ids", "rewards", "groups", "old_logprobs", "mask")
COPO = ("logits", "token_ids", "local_advantages", "global_advantages", "answers", "groups", "rewards", "old_logprobs",
        "mask")  # fmt: skip
# All of one answer, H = 0: 1 − σ(−5) of the advantage between prompts, and none of that within.
UNANIMOUS: dict[str, Any] = {
    "logits": row(S), "token_ids": torch.tensor([[Y]]), "local_advantages": torch.zeros(1).double(),
    "global_advantages": torch.ones(1).double(), "answers": torch.tensor([3]), "groups": torch.tensor([0]),
    "old_logprobs": torch.tensor(S).double().log_softmax(-1)[Y].reshape(1, 1),
}  # fmt: skip
SCORE = [q.item() - (v == Y) for v, q in enumerate(torch.tensor(S).double().softmax(-1))]


def unanimous(reward: float, share: float) -> Case:
    tensors = UNANIMOUS | {"rewards": torch.tensor([reward]).double()}
    return Case("copo_loss", tensors, value=-share, gradients={"logits": [share * x for x in SCORE]},
                name=f"golden-unanimous-{reward}")  # fmt: skip


CASES = [
    Case("drpo_loss", pick(LEFT, *DRPO), expected=drpo),
    Case("drpo_loss", pick(BATCH, *DRPO),
         {"tau": 0.5, "length_temperature": 1.0, "beta": 20.0, "delta": 1e-3, "kl_estimator": "k3", "max_length": 10.0,
          "temperature": 0.8}, expected=drpo, name="k3"),
    Case("copo_loss", pick(FAR, *COPO), {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5}, expected=copo,
         roles=("local_advantages", "global_advantages")),
    Case("copo_loss", pick(FAR, *COPO), {"sharpness": 1.0, "midpoint": 0.5, "zero_wrong": False, "normalizer": 20.0},
         expected=copo, name="only-soft"),
    unanimous(1.0, 1 - 1 / (1 + math.exp(5))),
    unanimous(0.0, 1.0),
    Case("copo_global_advantages", pick(BATCH, "rewards", "groups"), expected=copo_global_advantages, trained=()),
    Case("copo_global_advantages", pick(BATCH, "rewards", "groups", "answers"), expected=copo_global_advantages,
         trained=(), name="answers"),
    Case("answer_entropy", pick(BATCH, "answers", "groups"), expected=answer_entropy, trained=(),
         roles=("answers", "groups")),
]  # fmt: skip
