"""All policy losses by verl's names, and `register` for verl's registry."""

from __future__ import annotations

import sys
from importlib import import_module

from kldiv_kernels.adapters.verl.bypass import bypass_mode
from kldiv_kernels.adapters.verl.logits import compute_forward_kl_topk
from kldiv_kernels.adapters.verl.policy import TOKEN_LOSSES, PolicyLossFn

POLICY_LOSSES: dict[str, PolicyLossFn] = {**TOKEN_LOSSES, "bypass_mode": bypass_mode}


def register(prefix: str = "kldiv_") -> list[str]:
    """Registers every loss of `POLICY_LOSSES` with verl, as prefix + verl's name, and the hook of top-k distillation.

    `actor_rollout_ref.actor.policy_loss.loss_mode=kldiv_gspo` then takes ours; with prefix="" ours replace verl's own.
    The hook has no names to choose from: where this verl has `compute_forward_kl_topk`, ours takes its place in every
    module of verl that has imported it.

    Returns:
        The names of the losses, and of the places of the hook.

    Raises:
        ImportError: verl cannot be imported, or has no `register_policy_loss`.
    """
    try:
        from verl.trainer.ppo.core_algos import register_policy_loss
    except ImportError as error:
        raise ImportError(
            f"register: verl.trainer.ppo.core_algos.register_policy_loss cannot be imported ({error}); expected verl "
            f"0.9.1 in this environment (0.7 and later have the same signatures). POLICY_LOSSES, but for bypass_mode, "
            f"work without it"
        ) from error
    for name, loss in POLICY_LOSSES.items():
        register_policy_loss(prefix + name)(loss)
    return [*(prefix + name for name in POLICY_LOSSES), *_hook()]


def _hook() -> list[str]:
    name = compute_forward_kl_topk.__name__
    try:
        original = getattr(import_module("verl.trainer.distillation.fsdp.losses"), name)
    except (ImportError, AttributeError):
        return []
    places = [
        key for key, module in sys.modules.items() if key.startswith("verl.") and vars(module).get(name) is original
    ]
    for place in places:
        setattr(sys.modules[place], name, compute_forward_kl_topk)
    return [f"{place}.{name}" for place in sorted(places)]
