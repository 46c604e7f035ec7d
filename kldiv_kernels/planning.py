"""What a call would do, without doing it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from kldiv_kernels import inputs, registry
from kldiv_kernels.kernel_plans import Plan, Wanted, plan_of_logits
from kldiv_kernels.linear import chunk_shape

POLICY_LOSS = "policy_loss"
TOPK_LOSS = "topk_loss"
# What the losses that are no divergence of two rows take of a row.
_K = 64
_STATISTICS = {POLICY_LOSS: ("logprob", "entropy"), TOPK_LOSS: ("logprob", "tail_logprob")}


def plan(
    *,
    rows: int,
    vocab: int,
    dtype: torch.dtype = torch.bfloat16,
    stats: Sequence[str] | None = None,
    kind: str | None = None,
    device: str | torch.device = "cpu",
    gradient: bool = True,
    hidden_size: int | None = None,
    reference_hidden_size: int | None = None,
    rows_per_chunk: int | None = None,
) -> Plan:
    """The plan for a loss of that `kind`, or for `token_stats` with these `stats`; the launcher uses the same code.

    Args:
        rows, vocab: N tokens and V columns.
        dtype: of the logits. stats or kind: one of them; default kind="forward_kl". kind="policy_loss" is a
            `policy_loss` whose gradient depends on each token alone, "topk_loss" a `topk_divergence_loss` on 64
            tokens.
        device: "cpu", a CUDA device of this machine such as "cuda:0", or an architecture such as "sm_90", which need
            not be here.
        gradient: count the gradient of the logits too.
        hidden_size: H, for the function that starts with `linear_`: dtype is then that of hidden states and weight, and
            logits are float32. reference_hidden_size: the teacher's, default hidden_size. rows_per_chunk: as there.

    Raises: ValueError naming the argument.

    >>> import kldiv_kernels as kk
    >>> kk.plan(rows=256, vocab=151_936, kind="forward_kl").bytes == 3 * 256 * 151_936 * 2
    True
    """
    if stats is not None and kind is not None:
        raise ValueError("plan: stats and kind are both given; expected one of them")
    sizes = {
        "hidden_size": hidden_size,
        "reference_hidden_size": reference_hidden_size,
        "rows_per_chunk": rows_per_chunk,
    }
    for name, value in {"rows": rows, "vocab": vocab, **{n: x for n, x in sizes.items() if x is not None}}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"plan: {name} is {value!r}; expected an integer of at least 1")
    if hidden_size is None and (reference_hidden_size is not None or rows_per_chunk is not None):
        given = "rows_per_chunk" if reference_hidden_size is None else "reference_hidden_size"
        raise ValueError(f"plan: {given} is given without hidden_size; expected both")
    target = _target(device)
    if kind in _STATISTICS:
        chosen = inputs.statistics(_STATISTICS[kind], "plan")
    elif stats is None:
        chosen = [registry.get(kind or "forward_kl", "plan: kind", [*registry.divergence_names(), *_STATISTICS])]
    else:
        chosen = inputs.statistics(stats, "plan")
    topk = kind == TOPK_LOSS
    labels = min(_K, vocab) if topk else 1
    wanted = Wanted(rows, vocab, dtype, tuple(chosen), gradient, stats is None and gradient, labels, topk)
    if hidden_size is not None:
        widths = [hidden_size, reference_hidden_size or hidden_size][: wanted.tensors]
        return _of_hidden_states(wanted, target, widths, rows_per_chunk)
    return plan_of_logits(wanted, target)


def _of_hidden_states(wanted: Wanted, target: str | torch.device, widths: list[int], given: int | None) -> Plan:
    """A loss of hidden states and weights that all want gradients, but for the teacher's."""
    cpu, low = target == "cpu", wanted.dtype.itemsize
    shape = chunk_shape(
        wanted.rows, wanted.vocab, [wanted.dtype] * len(widths), torch.float32, "cpu" if cpu else "gpu", given
    )
    # float32 logits do not wait for a loss scale; the gradients of float16 weights do.
    one = replace(wanted, rows=shape.rows, dtype=torch.float32, loss=wanted.one_read)
    plan = plan_of_logits(one, target)
    # Of each side the logits, again for a gradient that waits, and the student's two gradients.
    times = 1 if wanted.one_read or not wanted.gradient else 2
    products = times * len(widths) + 2 * wanted.gradient
    logits = 4 * wanted.rows * wanted.vocab
    weights = shape.count * wanted.vocab * low * (times * sum(widths) + wanted.gradient * widths[0])
    sums = shape.count * 2 * 4 * wanted.vocab * widths[0] * wanted.gradient
    moved = plan.bytes * shape.count + logits * (times * len(widths) + 2 * wanted.gradient) + weights + sums
    gradients = (4 * wanted.vocab + low * wanted.rows) * widths[0] * wanted.gradient
    return replace(
        plan, bytes=moved, rows_per_chunk=shape.rows, multiplications=products * shape.count,
        extra_memory=shape.bytes + gradients,
        reason=f"{plan.reason}; chunks: {shape.count} of up to {shape.rows} tokens, {products} multiplications each",
    )  # fmt: skip


def _target(device: str | torch.device) -> str | torch.device:
    """What `device` names: "cpu", "sm_90" and the like, or a CUDA device that is here."""
    if isinstance(device, str) and re.fullmatch(r"sm_\d+[af]?", device):
        return device.rstrip("af")
    expected = "expected 'cpu', a CUDA device or an architecture such as 'sm_90'"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"plan: device is {device!r}; {expected}") from None
    if found.type == "cpu":
        return "cpu"
    if found.type != "cuda":
        raise ValueError(f"plan: device is {str(device)!r}; {expected}")
    if not torch.cuda.is_available():
        raise ValueError(
            f"plan: device is {str(device)!r}, but there is no CUDA device here; "
            "name the architecture instead, such as 'sm_90'"
        )
    if (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"plan: device is {str(device)!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
