"""Our log-probabilities in the place of those of torchtitan's RL losses, which have no configuration for them."""

from __future__ import annotations

from importlib import import_module

from kldiv_kernels.adapters.replacing import replace_everywhere
from kldiv_kernels.adapters.torchtitan.functions import compute_logprobs

_HOME = "torchtitan.components.loss"


def register() -> list[str]:
    """Puts `compute_logprobs` in the place of torchtitan's, in this process: where it is defined and where imported.

    Of a vocabulary that is spread over ranks, torchtitan's gathers whole rows; ours gathers a few numbers a row.

    Returns:
        The places, such as "torchtitan.components.loss.compute_logprobs".

    Raises:
        ImportError: torchtitan cannot be imported, or has no such function.
    """
    try:
        import_module(_HOME)
    except ImportError as error:
        raise ImportError(
            f"register: {_HOME} cannot be imported ({error}); expected torchtitan 0.3 in this environment. All others "
            f"work without it"
        ) from error
    places = replace_everywhere(_HOME, "compute_logprobs", compute_logprobs)
    if not places:
        raise ImportError(f"register: {_HOME} has no compute_logprobs; expected torchtitan 0.3")
    return places
