"""The implementations that are compared on a GPU: our kernels, PyTorch eager and compiled, TRL, Liger.

Peers that are not installed take no part. What a user would have to do to call a peer is part of its time: Liger's
divergences take log-probabilities, so their log-softmaxes count.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import inputs as arguments
from kldiv_kernels import ops
from kldiv_kernels.benchmarking import eager, linear, peers
from kldiv_kernels.benchmarking.cases import ENTROPY_COEFFICIENT, GRPO, GRPO_CLIP, JS_BETA, TOPK, Inputs
from kldiv_kernels.benchmarking.gpu_cases import GpuCase
from kldiv_kernels.choices import Backend

# A scalar loss, or log-probabilities and entropies.
Function = Callable[[Inputs], tuple[Tensor, ...]]

LIGER_GRPO = "liger-grpo"
NOTES = {
    LIGER_GRPO: "no entropy, no metrics, one advantage for all rows, all rows but the last; not compared with ours"
}
_LIGER_BETA = {"reverse_kl": 1.0, "js": JS_BETA}
_LIGER_LINEAR_BETA = {"linear_forward_kl": 0.0, "linear_reverse_kl": 1.0, "linear_js": JS_BETA}
_PACKAGES = {"trl": "trl", "liger": "liger_kernel", LIGER_GRPO: "liger_kernel"}


def ours() -> list[str]:
    """Our backends with kernels for this device; the others would be measured only by mistake. KLDIV_GPU_BACKENDS, such
    as "cuda,triton", names those of them that take part."""
    found = [name for name, state in kk.backends().items() if state == "available" and name not in ("cpu", "reference")]
    chosen = os.environ.get("KLDIV_GPU_BACKENDS")
    return found if chosen is None else [name for name in found if name in chosen.split(",")]


def missing() -> list[str]:
    """Packages of peers that are not installed."""
    return [name for name in dict.fromkeys(_PACKAGES.values()) if importlib.util.find_spec(name) is None]


def names_for(case: GpuCase) -> list[str]:
    names = [*ours(), "eager"]
    if case.on_cpu.from_hidden:
        names += [peers.GEMMS, "trl"] + (["liger"] if case.kind in _LIGER_LINEAR_BETA else [])
        return [name for name in names if _PACKAGES.get(name) not in missing()]
    if case.compiled:
        names.append("compile")
    # TRL's divergences are PyTorch functions, like `eager`; its kernel is for one tensor.
    if "trl" in peers.names_for(case.on_cpu, ("trl",)) and (case.compiled or not case.two_tensors):
        names.append("trl")
    if case.two_tensors and case.gradient and (case.kind == "forward_kl" or case.kind in _LIGER_BETA):
        names.append("liger")
    if case.kind == GRPO:
        names.append(LIGER_GRPO)
    absent = missing()
    return [name for name in names if _PACKAGES.get(name) not in absent]


def value(case: GpuCase, outputs: tuple[Tensor, ...]) -> float:
    """One number by which implementations are compared."""
    if case.gradient or case.two_tensors:
        return float(outputs[0].mean())
    logprob, entropy = outputs
    return float(-logprob.mean() - ENTROPY_COEFFICIENT * entropy.mean())


def run(case: GpuCase, function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    """The work that is timed; the gradients are left at the inputs."""
    if not case.gradient:
        with torch.no_grad():
            return function(inputs)
    (loss,) = function(inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    return (loss.detach(),)


@contextmanager
def planned(plan: str) -> Iterator[None]:
    """Calls of the cuda backend run as KLDIV_CUDA_PLAN says; "" leaves it to them."""
    former = os.environ.get("KLDIV_CUDA_PLAN", "")
    os.environ["KLDIV_CUDA_PLAN"] = plan
    try:
        yield
    finally:
        os.environ["KLDIV_CUDA_PLAN"] = former


def build(name: str, case: GpuCase) -> Function:
    """The implementation of that name; "cuda cluster=8,stages=2" is that plan of the cuda backend.

    ImportError where its package, or a part of it, is missing.
    """
    backend, _, plan = name.partition(" ")
    if backend in ours():
        call = _ours(cast("Backend", backend), case)
        return _with_plan(call, plan) if plan else call
    if name == "liger" and case.on_cpu.from_hidden:
        return _liger_linear(case)
    if name in ("liger", LIGER_GRPO):
        return _liger(name, case)
    if name == "trl" and not case.two_tensors and not case.on_cpu.from_hidden:
        return _trl(case)
    if case.gradient or case.two_tensors:
        loss = peers.build(name, case.on_cpu)
        return lambda inputs: (loss(inputs),)
    function = _logprob_and_entropy
    if name == "compile":
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda inputs: function(inputs.logits, _labels(inputs))


def _labels(inputs: Inputs) -> Tensor:
    assert inputs.labels is not None
    return inputs.labels


def _loss_of(logprob: Tensor, entropy: Tensor) -> tuple[Tensor]:
    return (-logprob.mean() - ENTROPY_COEFFICIENT * entropy.mean(),)


def _logprob_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logq = F.log_softmax(logits.float(), -1)
    return logq.gather(-1, labels[:, None]).squeeze(-1), -(logq.exp() * logq).sum(-1)


def _with_plan(function: Function, plan: str) -> Function:
    def run_planned(inputs: Inputs) -> tuple[Tensor, ...]:
        with planned(plan):
            return function(inputs)

    return run_planned


def _ours(backend: Backend, case: GpuCase) -> Function:
    if case.on_cpu.from_hidden:
        from_hidden = linear.ours(case.on_cpu, backend)
        return lambda inputs: (from_hidden(inputs),)
    if case.kind == GRPO:
        return lambda inputs: (peers.grpo_loss(case.on_cpu, inputs, backend),)
    if case.kind == TOPK:
        return lambda inputs: (peers.topk_loss(inputs, backend),)
    if case.known:
        return lambda inputs: (known_loss(inputs.logits, _labels(inputs), backend),)
    if case.two_tensors:

        def divergence(inputs: Inputs) -> tuple[Tensor, ...]:
            student, teacher = inputs.logits, inputs.reference
            assert teacher is not None
            if case.gradient:
                beta = JS_BETA if case.kind == "js" else None
                return (kk.divergence_loss(student, teacher, case.kind, beta=beta, backend=backend),)
            return (kk.token_stats(student, teacher, stats=[case.kind], beta=JS_BETA, backend=backend)[case.kind],)

        return divergence

    def statistics(inputs: Inputs) -> tuple[Tensor, ...]:
        stats = kk.token_stats(inputs.logits, labels=inputs.labels, stats=("logprob", "entropy"), backend=backend)
        return _loss_of(stats.logprob, stats.entropy) if case.gradient else (stats.logprob, stats.entropy)

    return statistics


def known_loss(logits: Tensor, labels: Tensor, backend: Backend) -> Tensor:
    """The loss of one tensor with its coefficients given to the call, as a loss of advantages gives them."""
    call = arguments.prepare(
        "known_loss", logits, None, labels, stats=arguments.statistics(("logprob", "entropy"), "known_loss"),
        temperature=1.0, reference_temperature=None, alpha=0.5, beta=0.5, mask=None, ignore_index=-100,
        vocab_size=None, exclude=None,
    )  # fmt: skip
    coefficients = torch.full((2, call.rows), -1 / call.rows, device=logits.device)
    coefficients[1] *= ENTROPY_COEFFICIENT
    return ops.loss(call, backend, coefficients, True, False)[0]


def _trl(case: GpuCase) -> Function:
    kernel = _trl_kernel()

    def statistics(inputs: Inputs) -> tuple[Tensor, ...]:
        logprob, entropy = kernel(inputs.logits, _labels(inputs))
        if case.kind == GRPO:
            return (eager.clipped_surrogate(logprob, inputs),)
        return _loss_of(logprob, entropy) if case.gradient else (logprob, entropy)

    return statistics


def _trl_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """TRL's Triton kernel from its file, which needs Triton alone; `import trl.kernels` needs all that TRL needs."""
    package = importlib.util.find_spec("trl")
    folders = [] if package is None else list(package.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / "kernels" / "logprob_entropy.py"
        spec = importlib.util.spec_from_file_location("kldiv_kernels_trl_logprob_entropy", path)
        if path.exists() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            function: Callable[..., tuple[Tensor, Tensor]] = module.selective_log_softmax_and_entropy
            return function
    raise ImportError("this TRL has no kernels/logprob_entropy.py (TRL 1.16.0 has)")


def _liger_linear(case: GpuCase) -> Function:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    loss = module.LigerFusedLinearJSD(jsd_beta=_LIGER_LINEAR_BETA[case.kind])
    return lambda inputs: (loss(inputs.student, inputs.weight, inputs.reference, inputs.reference_weight),)


def _liger(name: str, case: GpuCase) -> Function:
    if name == LIGER_GRPO:
        grpo: Callable[..., Any] = importlib.import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss

        def policy(inputs: Inputs) -> tuple[Tensor, ...]:
            # It takes [batch, tokens + 1, vocab] and leaves out the last row; in place it would destroy the inputs.
            labels = _labels(inputs)[None, :-1].contiguous()
            assert inputs.advantages is not None
            assert inputs.old_logprobs is not None
            loss, _ = grpo(
                inputs.logits[None], inputs.old_logprobs[None, :-1].contiguous(), None, labels, inputs.advantages[:1],
                temperature=1.0, beta=0.0, eps_low=GRPO_CLIP, eps_high=GRPO_CLIP, inplace=False, loss_type="bnpo",
                reduce=True,
            )  # fmt: skip
            return (loss,)

        return policy
    functional = importlib.import_module("liger_kernel.transformers.functional")

    def divergence(inputs: Inputs) -> tuple[Tensor, ...]:
        assert inputs.reference is not None
        logq, logp = inputs.logits.float().log_softmax(-1), inputs.reference.float().log_softmax(-1)
        if case.kind == "forward_kl":
            return (functional.liger_kl_div(logq, logp, reduction="batchmean", log_target=True),)
        return (functional.liger_jsd(logq, logp, beta=_LIGER_BETA[case.kind]),)

    return divergence
