"""Our functions in the place of NeMo-RL's own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from kldiv_kernels.adapters.nemo_rl import distillation, logprobs
from kldiv_kernels.adapters.replacing import replace_everywhere

_REPLACED: dict[str, tuple[Callable[..., Any], ...]] = {
    "nemo_rl.distributed.model_utils": (
        logprobs.from_parallel_logits_to_logprobs,
        logprobs.from_parallel_logits_to_logprobs_packed_sequences,
        logprobs.dtensor_from_parallel_logits_to_logprobs,
        logprobs.get_logprobs_from_vocab_parallel_logits,
        logprobs.get_next_token_logprobs_from_logits,
        distillation.get_distillation_topk_logprobs_from_logits,
    ),
    "nemo_rl.algorithms.loss.loss_functions": (distillation.DistillationLossFn,),
}


def register() -> list[str]:
    """Puts the functions and the loss of this module in the place of NeMo-RL's, in this process.

    They are replaced where NeMo-RL defines them, and in every module of it that has imported them. NeMo-RL computes
    losses in its workers, which are processes of their own: call it there.

    Returns:
        The places, such as "nemo_rl.algorithms.loss.utils.get_next_token_logprobs_from_logits".

    Raises:
        ImportError: NeMo-RL cannot be imported, or has none of them.
    """
    for home in _REPLACED:
        try:
            import_module(home)
        except ImportError as error:
            raise ImportError(
                f"register: {home} cannot be imported ({error}); expected NeMo-RL in this environment. All others work "
                f"without it"
            ) from error
    places = [
        place
        for home, replacements in _REPLACED.items()
        for ours in replacements
        for place in replace_everywhere(home, ours.__name__, ours)
    ]
    if not places:
        raise ImportError(f"register: NeMo-RL has none of these functions; expected {', '.join(_REPLACED)} with them")
    return places
