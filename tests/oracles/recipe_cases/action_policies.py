"""Papers 64, 71, 75: definitions over steps with several dimensions and over classes with a mask."""

from __future__ import annotations

import torch
from recipe_case import Case
from torch import Tensor

STEPS, DIMENSIONS, CLASSES = 5, (3, 2), 6


def steps() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    out = {"logprobs": randn(2, STEPS)}
    out["old_logprobs"] = out["logprobs"] + 0.2 * randn(2, STEPS)
    out["advantages"] = 4 * randn(2, STEPS)
    out["means"] = randn(2, STEPS, *DIMENSIONS)
    out["other_means"] = out["means"] + 0.5 * randn(2, STEPS, *DIMENSIONS)
    out["positive"] = randn(2, STEPS).exp()
    return out


def candidates() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits, moved, advantages = torch.randn(3, 4, CLASSES, generator=generator, dtype=torch.float64)
    mask = torch.ones(4, CLASSES, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2] = False
    mask[3, 0] = False
    return {"logits": logits, "old_logits": logits + 1.5 * moved, "advantages": advantages, "mask": mask}


ALL, ROWS = steps(), candidates()
GIVEN = {name: ALL[name] for name in ("logprobs", "old_logprobs", "advantages")}
NEAR = GIVEN | {"means": ALL["means"], "reference_means": ALL["other_means"]}
GUARD = GIVEN | {"means": ALL["means"], "old_means": ALL["other_means"]}


def ppo(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def gaussian_grpo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, means: Tensor | None = None,
                  reference_means: Tensor | None = None, advantage_clip: float = 5.0, clip: float = 1e-5,
                  kl_coef: float = 0.0, sigma: Tensor | float | None = None) -> Tensor:  # fmt: skip
    advantages = advantages.clamp(-advantage_clip, advantage_clip)
    loss = ppo((logprobs - old_logprobs).exp(), advantages, clip).mean()
    if kl_coef:
        assert means is not None
        assert reference_means is not None
        squares = ((means - reference_means) ** 2).mean((-1, -2))
        loss = loss + kl_coef * (squares if sigma is None else squares / (2 * sigma**2)).mean()
    return loss


def centred(logprobs: Tensor, old_logprobs: Tensor, means: Tensor, old_means: Tensor, scale: Tensor | float) -> Tensor:
    shift = ((means - old_means) ** 2).mean((-1, -2)) / (2 * scale**2)
    return (logprobs - old_logprobs + shift) * scale


def guard(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, means: Tensor, old_means: Tensor,
          step_size: Tensor | float, sigma: Tensor | float, clip: float = 2e-6) -> Tensor:  # fmt: skip
    ratio = centred(logprobs, old_logprobs, means, old_means, step_size**0.5 * sigma).exp()
    return (ppo(ratio, advantages, clip) / step_size).mean()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    return 0.5 * (torch.maximum(1 - real, zero).mean() + torch.maximum(1 + fake, zero).mean())


def categorical_ppo(logits: Tensor, advantages: Tensor, old_logits: Tensor, mask: Tensor, clip: float = 0.2,
                    dual_clip: float = 3.0, temperature: float = 1.0) -> Tensor:  # fmt: skip
    total, count = torch.zeros((), dtype=torch.float64), 0
    for s, t, a, kept in zip(logits, old_logits, advantages, mask, strict=True):
        q, old = (x[kept].div(temperature).softmax(-1) for x in (s, t))
        for ratio, given in zip(q / old, a[kept], strict=True):
            objective = torch.minimum(given * ratio, given * ratio.clamp(1 - clip, 1 + clip))
            total = total - (torch.maximum(objective, dual_clip * given) if given < 0 else objective)
            count += 1
    return total / count


CASES = [
    Case("gaussian_grpo_loss", NEAR, {"clip": 0.2, "kl_coef": 0.5}, expected=gaussian_grpo,
         trained=("logprobs", "means"), roles=("logprobs", "old_logprobs")),
    Case("gaussian_grpo_loss", NEAR | {"sigma": ALL["positive"]}, {"advantage_clip": 2.0, "clip": 0.1, "kl_coef": 0.5},
         expected=gaussian_grpo, trained=("logprobs", "means"), name="flow-grpo"),
    Case("gaussian_grpo_loss", GIVEN, expected=gaussian_grpo, trained=("logprobs",), name="defaults"),
    Case("hinge_discriminator_loss", {"real": ALL["logprobs"], "fake": ALL["positive"] - 1.5}, expected=hinge,
         trained=("real", "fake"), roles=("real", "fake")),
    Case("centred_log_ratio", {k: v for k, v in GUARD.items() if k != "advantages"} | {"scale": ALL["positive"]},
         expected=centred, trained=("logprobs", "means"), roles=("logprobs", "old_logprobs")),
    Case("grpo_guard_loss", GUARD, {"clip": 0.3, "step_size": 0.25, "sigma": 0.8}, expected=guard,
         trained=("logprobs", "means"), roles=("logprobs", "old_logprobs")),
    Case("grpo_guard_loss", GUARD | {"sigma": ALL["positive"], "step_size": ALL["positive"].flip(1)},
         expected=guard, trained=("logprobs", "means"), name="each-step-its-own"),
    Case("categorical_ppo_loss", ROWS, expected=categorical_ppo, roles=("logits", "old_logits")),
    Case("categorical_ppo_loss", ROWS, {"clip": 0.05, "dual_clip": 1.2, "temperature": 2.0}, expected=categorical_ppo,
         name="tighter"),
]  # fmt: skip
