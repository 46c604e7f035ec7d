"""Papers 4, 17, 24, 78: definitions sample by sample, from the papers' formulas."""

from __future__ import annotations

import torch
from recipe_case import Case
from torch import Tensor

SAMPLES, STEPS, DIMENSIONS, CLASSES = 3, 4, (2, 3), 5


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    out = {name: randn(SAMPLES, *DIMENSIONS) for name in ("x", "teacher_score", "fake_score", "third")}
    out |= {name: randn(SAMPLES, STEPS, *DIMENSIONS) for name in ("velocity", "reference_velocity")}
    out |= {"class_logits": randn(SAMPLES, CLASSES), "labels": torch.tensor([1, 0, 4]), "reward": randn(SAMPLES)}
    # One ratio beyond each bound, of log 0.1 and log 20.
    out |= {"log_ratio": torch.tensor([-3.0, 0.7, 4.0], dtype=torch.float64), "positive": randn(SAMPLES).exp()}
    out["step_weights"] = torch.linspace(0.5, 2.0, STEPS, dtype=torch.float64)
    return out


ALL = tensors()
DRIFT = {"drift_difference": ALL["velocity"], "weights": ALL["step_weights"]}
FLOW = {name: ALL[name] for name in ("reward", "velocity", "reference_velocity", "step_weights")}
DISTILLED = {name: ALL[name] for name in ("x", "teacher_score", "fake_score", "log_ratio")}
SCORES = {"score": ALL["x"], "reference_score": ALL["teacher_score"], "target_score": ALL["third"]}


def path_kl(drift_difference: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for sample in drift_difference:
        for step, weight in zip(sample, weights, strict=True):
            total = total + weight * (step**2).sum()
    return total / len(drift_difference)


def controlled(class_logits: Tensor, labels: Tensor, drift_difference: Tensor, weights: Tensor, guidance: float = 5.0,
               kl_coef: float = 5e-6) -> Tensor:  # fmt: skip
    chosen = torch.stack([row.softmax(-1)[label].log() for row, label in zip(class_logits, labels, strict=True)])
    return -guidance * chosen.mean() + kl_coef * path_kl(drift_difference, weights)


# h(r) = r²f''(r), from f by hand, as the paper's table has them but for constants.
H = {
    "reverse_kl": lambda r: r**0, "forward_kl": lambda r: r, "js": lambda r: r / (1 + r) / 2,
    "softened_reverse_kl": lambda r: 1 / (1 + r), "reverse_chi2": lambda r: 2 / r, "hellinger": lambda r: r**0.5 / 4,
    "jeffreys": lambda r: 1 + r,
}  # fmt: skip


def f_distill(x: Tensor, teacher_score: Tensor, fake_score: Tensor, log_ratio: Tensor, divergence: str = "js",
              normalize: bool = True, ratio_clamp: tuple[float, float] = (0.1, 20.0),
              weight: Tensor | float = 1.0) -> Tensor:  # fmt: skip
    h = H[divergence](log_ratio.exp().clamp(*ratio_clamp))
    h = h / h.mean() if normalize else h
    step = (weight * h)[:, None, None] * (fake_score - teacher_score)
    return 0.5 * torch.nn.functional.mse_loss(x, (x - step).detach())


def identity_reward(reward: Tensor, velocity: Tensor, reference_velocity: Tensor, step_weights: Tensor,
                    reward_coef: float = 0.1, kl_coef: float = 1.0) -> Tensor:  # fmt: skip
    return -reward_coef * reward.mean() + kl_coef * path_kl(velocity - reference_velocity, step_weights)


def score_divergence(score: Tensor, reference_score: Tensor, target_score: Tensor, c: float,
                     weight: Tensor | float = 1.0) -> Tensor:  # fmt: skip
    weights = weight if isinstance(weight, Tensor) else torch.full((len(score),), weight, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for s, ref, target, w in zip(score, reference_score, target_score, weights, strict=True):
        y = (s - ref).reshape(-1)
        slope = y / (y @ y + c * c) ** 0.5
        total = total - w * (slope @ (s - target).reshape(-1))
    return total / len(score)


ALL_THREE = ("score", "reference_score", "target_score")
CASES = [
    Case("path_kl", DRIFT, expected=path_kl, trained=("drift_difference",), reads="none"),
    Case("path_kl", {"drift_difference": ALL["velocity"][:, :, 0, 0], "weights": ALL["step_weights"]},
         expected=path_kl, trained=("drift_difference",), reads="none", name="one-dimension"),
    Case("controlled_diffusion_loss", DRIFT | {name: ALL[name] for name in ("class_logits", "labels")},
         {"kl_coef": 0.1}, expected=controlled, trained=("class_logits", "drift_difference")),
    Case("controlled_diffusion_loss", DRIFT | {name: ALL[name] for name in ("class_logits", "labels")},
         expected=controlled, trained=("class_logits", "drift_difference"), name="defaults"),
    Case("f_distill_loss", DISTILLED, expected=f_distill, trained=("x",)),
    *(Case("f_distill_loss", DISTILLED | {"weight": ALL["positive"]}, {"divergence": name, "normalize": False},
           expected=f_distill, trained=("x",), name=name) for name in H),
    Case("f_distill_loss", DISTILLED, {"divergence": "forward_kl", "ratio_clamp": (0.5, 1.5), "weight": 3.0},
         expected=f_distill, trained=("x",), name="clamped"),
    Case("identity_reward_loss", FLOW, expected=identity_reward, trained=("reward", "velocity")),
    Case("identity_reward_loss", FLOW, {"reward_coef": 0.7, "kl_coef": 0.3}, expected=identity_reward,
         trained=("reward", "velocity"), name="weighted"),
    Case("score_divergence_loss", SCORES, {"c": 0.5}, expected=score_divergence, trained=ALL_THREE,
         roles=("reference_score", "target_score")),
    Case("score_divergence_loss", SCORES | {"weight": ALL["positive"]}, {"c": 3.0}, expected=score_divergence,
         trained=ALL_THREE, name="weighted"),
]  # fmt: skip
