"""Replaces functions of TRL by this library's, under every name that TRL knows them by, and puts them back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from kldiv_kernels.adapters.trl import divergences, fused_head, logprobs, topk
from kldiv_kernels.adapters.trl.version import require
from kldiv_kernels.backends import names as backend_names
from kldiv_kernels.choices import Backend

Make = Callable[[Callable[..., Any], Backend], Callable[..., Any]]
_JSD = "generalized_jsd_loss"
_METHODS: dict[str, tuple[str, str, Make]] = {
    "trl.experimental.gkd.gkd_trainer": ("GKDTrainer", _JSD, divergences.generalized_jsd_loss),
    "trl.experimental.gold.gold_trainer": ("GOLDTrainer", _JSD, divergences.generalized_jsd_loss),
    "trl.experimental.iw_opd.iw_opd_trainer": ("IWOPDTrainer", _JSD, divergences.generalized_jsd_loss),
}
_SELF_DISTILLATION: dict[str, Make] = {
    "compute_full_logit_self_distillation_loss": divergences.full_logit_loss,
    "compute_sampled_token_self_distillation_loss": divergences.sampled_token_loss,
    "compute_topk_self_distillation_loss": topk.topk_loss,
}
_FUNCTIONS: dict[str, dict[str, Make]] = {
    "trl.trainer.utils": {
        "selective_log_softmax": logprobs.selective_log_softmax,
        "entropy_from_logits": logprobs.entropy_from_logits,
        "selective_log_softmax_and_entropy": logprobs.selective_log_softmax_and_entropy,
    },
    "trl.kernels.chunked_logprob": {"ChunkedLogProbFunction": fused_head.chunked_logprob},
    "trl.trainer.distillation_trainer": {"_chunked_divergence_loss": fused_head.chunked_divergence_loss},
    "trl.experimental.sdft.loss_utils": _SELF_DISTILLATION,
    "trl.experimental.sdpo.loss_utils": _SELF_DISTILLATION,
}
# These import by name, so they must be there to be found; importing them is cheap once trl.trainer.utils is.
_IMPORTERS = ("trl.experimental.sdft.sdft_trainer", "trl.experimental.sdpo.sdpo_trainer")


@dataclass
class _State:
    """What is patched now: the functions put in place by what they replace, and the methods with their classes."""

    functions: list[tuple[Callable[..., Any], Callable[..., Any]]] = field(default_factory=list)
    methods: list[tuple[type, str, Any]] = field(default_factory=list)


_state: _State | None = None


def patch_trl(backend: Backend = "auto") -> list[str]:
    """Replaces functions of TRL 1.14 to 1.16 by this library's until `unpatch_trl()`.

    GKDTrainer, GOLDTrainer and IWOPDTrainer compute their generalised Jensen-Shannon divergence, SDFTTrainer and
    SDPOTrainer their self-distillation divergences, and every trainer that has logits its log-probabilities and entropy
    from one read of the logits. Trainers with TRL 1.16's fused LM head have hidden states in their place: GRPO, RLOO,
    SFT and DPO compute their log-probabilities and what they log beside them, Distillation its divergence, from those.
    Signatures, shapes, dtypes and reductions are TRL's; what the kernels do not serve (elementwise reduction "none",
    probabilities for logits, the "mean" over IW-OPD's top_k, rows without unit stride, KTO's mean of the logits)
    TRL's own functions do. `divergences`, `topk`, `logprobs` and `fused_head` beside this module say where a result
    differs: rows with −inf, the tail of a top-k, and logits that TRL rounds.

    Args:
        backend: of the calls that follow; "auto" or a name from `kldiv_kernels.backends()`. float64 logits go to
            "reference".

    Returns:
        The names replaced, such as "trl.experimental.gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss", sorted. A module
        that a version lacks, or that cannot be imported, is left out.

    Raises:
        ImportError: no TRL, or another version. ValueError: an unknown backend. RuntimeError: TRL is patched.
    """
    global _state
    if backend not in ("auto", *backend_names()):
        allowed = ", ".join(("auto", *backend_names()))
        raise ValueError(f"patch_trl: backend is {backend!r}; expected one of {allowed}")
    require("patch_trl")
    if _state is not None:
        raise RuntimeError("patch_trl: TRL is patched already; expected unpatch_trl() first")
    state, names = _State(), []
    for module_name, (class_name, method, make) in _METHODS.items():
        owner = getattr(_module(module_name), class_name, None)
        if owner is not None and method in vars(owner):
            state.methods.append((owner, method, vars(owner)[method]))
            setattr(owner, method, staticmethod(make(getattr(owner, method), backend)))
            names.append(f"{module_name}.{class_name}.{method}")
    for importer in _IMPORTERS:
        _module(importer)
    for module_name, functions in _FUNCTIONS.items():
        for function, make in functions.items():
            original = getattr(_module(module_name), function, None)
            if original is not None:
                state.functions.append((original, make(original, backend)))
    names += _replace(state.functions)
    _state = state
    return sorted(names)


def unpatch_trl() -> None:
    """Puts TRL's functions back, also in modules that were imported meanwhile. Without a patch it does nothing."""
    global _state
    if _state is None:
        return
    for owner, method, original in _state.methods:
        setattr(owner, method, original)
    _replace([(replacement, original) for original, replacement in _state.functions])
    _state = None


@contextmanager
def patched_trl(backend: Backend = "auto") -> Iterator[list[str]]:
    """`with patched_trl() as names:` is `patch_trl` before and `unpatch_trl` after the block."""
    names = patch_trl(backend)
    try:
        yield names
    finally:
        unpatch_trl()


def _module(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except (ImportError, NameError):
        # Not in this version, or in need of a package that is not installed (for want of peft, 1.14 has a NameError):
        # nothing there can be in use.
        return None


def _replace(pairs: list[tuple[Callable[..., Any], Callable[..., Any]]]) -> list[str]:
    """Puts the second of a pair where a module of TRL has the first, under any name; returns the names."""
    by_identity = {id(old): new for old, new in pairs}
    found = []
    for module_name, module in list(sys.modules.items()):
        if module is None or not (module_name == "trl" or module_name.startswith("trl.")):
            continue
        for name in [name for name, value in vars(module).items() if id(value) in by_identity]:
            setattr(module, name, by_identity[id(vars(module)[name])])
            found.append(f"{module_name}.{name}")
    return found
