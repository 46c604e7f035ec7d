"""Our functions in the place of OpenRLHF's, which has no registry for them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kldiv_kernels.adapters.openrlhf.logits import compute_entropy, log_probs_from_logits
from kldiv_kernels.adapters.openrlhf.policy import PolicyLoss
from kldiv_kernels.adapters.replacing import replace_everywhere

_OURS: dict[str, list[Any]] = {
    "openrlhf.models.utils": [log_probs_from_logits, compute_entropy],
    "openrlhf.models.loss": [PolicyLoss],
}


def register() -> list[str]:
    """Puts `log_probs_from_logits`, `compute_entropy` and `PolicyLoss` in the place of OpenRLHF's, in this process.

    Each where it is defined and where OpenRLHF's modules have imported it by name. To be called in the processes that
    train, before they make their losses.

    Returns:
        The places, such as "openrlhf.models.actor.log_probs_from_logits".

    Raises:
        ImportError: OpenRLHF cannot be imported, or has none of these.
    """
    try:
        for home in _OURS:
            import_module(home)
    except ImportError as error:
        raise ImportError(
            f"register: {error.name or 'openrlhf'} cannot be imported ({error}); expected OpenRLHF 0.11.2 in this "
            f"environment. All others work without it"
        ) from error
    places = [
        place for home, ours in _OURS.items() for one in ours for place in replace_everywhere(home, one.__name__, one)
    ]
    if not places:
        raise ImportError(f"register: {', '.join(_OURS)} have none of these names; expected OpenRLHF 0.11.2")
    return places
