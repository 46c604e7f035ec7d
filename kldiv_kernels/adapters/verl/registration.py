"""All policy losses by verl's names, and `register` for verl's registry."""

from __future__ import annotations

from kldiv_kernels.adapters.replacing import replace_everywhere
from kldiv_kernels.adapters.verl import megatron
from kldiv_kernels.adapters.verl.bypass import bypass_mode
from kldiv_kernels.adapters.verl.logits import compute_forward_kl_topk
from kldiv_kernels.adapters.verl.policy import TOKEN_LOSSES, PolicyLossFn

POLICY_LOSSES: dict[str, PolicyLossFn] = {**TOKEN_LOSSES, "bypass_mode": bypass_mode}


def register(prefix: str = "kldiv_") -> list[str]:
    """Registers every loss of `POLICY_LOSSES` with verl, as prefix + verl's name, and the hook of top-k distillation.

    `actor_rollout_ref.actor.policy_loss.loss_mode=kldiv_gspo` then takes ours; with prefix="" ours replace verl's own.
    The hook has no names to choose from: where this verl has `compute_forward_kl_topk`, for FSDP or for Megatron, ours
    takes its place in every module of verl that has imported it.

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
    hooks = {"fsdp": compute_forward_kl_topk, "megatron": megatron.compute_forward_kl_topk}
    places = [
        place
        for engine, hook in hooks.items()
        for place in replace_everywhere(f"verl.trainer.distillation.{engine}.losses", hook.__name__, hook)
    ]
    return [*(prefix + name for name in POLICY_LOSSES), *places]
