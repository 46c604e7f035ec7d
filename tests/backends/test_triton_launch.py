"""How often kernels are compiled, what a captured stream must not see, and the scaling of a gradient in place.

A driver that is not there takes the launches: Triton's own hook tells under which key it would compile, nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

import kldiv_kernels as kk
from kldiv_kernels import inputs, ops
from kldiv_kernels.backends import Call, scale_in_place
from kldiv_kernels.backends import triton as backend
from kldiv_kernels.backends.triton import bind, launch

compiled_only = pytest.mark.skipif(INTERPRETED, reason="under TRITON_INTERPRET=1 nothing is compiled")
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


class NoDriver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Keys:
    """kernel → the keys under which it was to be compiled."""

    def __init__(self) -> None:
        self.of: dict[str, set[str]] = {}

    def __call__(self, *, key: str, fn: Any, **_: Any) -> bool:
        self.of.setdefault(fn.name.rpartition(".")[2], set()).add(key)
        return True  # neither compile nor launch

    def counts(self) -> dict[str, int]:
        return {kernel: len(keys) for kernel, keys in self.of.items()}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keys]:
    """Triton's backend taking CPU tensors, and the keys of what it would compile."""
    found = Keys()
    monkeypatch.setattr(backend.TritonBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(backend.TritonBackend, "unsupported", lambda self, call: None)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDriver())
    monkeypatch.setattr(launch, "_processors", lambda device: 1)  # 4 rows fill it
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", found)
    yield found
    bind.bind.cache_clear()


def _logits(rows: int = 7, vocab: int = 32_000, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(rows, vocab, dtype=dtype)


def _loss(student: Tensor, teacher: Tensor, alpha: float | None = None, **options: Any) -> None:
    """js, which has beta alone."""
    kk.divergence_loss(
        student.detach().requires_grad_(), teacher.detach(), "js", backend="triton", **options
    ).backward()


def _stats(student: Tensor, teacher: Tensor, **options: Any) -> None:
    names = ("logprob", "entropy", "alpha_beta")
    labels = torch.zeros(student.shape[:-1], dtype=torch.int64)
    stats = kk.token_stats(
        student.detach().requires_grad_(), teacher.detach(), labels, stats=names, backend="triton", **options
    )
    (stats.logprob + stats.entropy + stats.alpha_beta).sum().backward()


def _many_calls(call: Callable[..., None]) -> None:
    for rows in (1, 7, 16, 4096):
        call(_logits(rows), _logits(rows))
    for temperature, alpha, beta in ((1.0, 1.0, 1.0), (0.7, 0.3, 0.9), (1, 0.5, 1)):
        call(_logits(), _logits(), temperature=temperature, alpha=alpha, beta=beta)
    call(_logits(), _logits(), temperature=1.3, reference_temperature=2.0)
    for tokens in (2, 33):
        batch = torch.empty(3, tokens, 32_000, dtype=torch.bfloat16)
        call(batch[:, :-1], batch[:, 1:])
        call(batch[:, :1], batch[:, -1:])
        call(batch, batch[:1].expand(3, -1, -1))
    wide = torch.empty(5, 32_064, dtype=torch.bfloat16)
    call(wide, wide.clone(), vocab_size=32_000)


@compiled_only
@pytest.mark.parametrize("call", [_loss, _stats], ids=["loss", "statistics"])
def test_one_compilation_for_all_sizes_strides_and_parameters(keys: Keys, call: Callable[..., None]) -> None:
    _many_calls(call)
    expected = {"sweep_kernel", "sums_kernel", "finish_kernel", "gradient_kernel"}
    expected |= {"loss_kernel"} if call is _loss else set()
    assert keys.counts() == dict.fromkeys(expected, 1)


@compiled_only
def test_that_test_sees_a_specialised_argument(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind, "unspecialised", triton.jit)
    bind.bind.cache_clear()
    _many_calls(_loss)
    assert min(keys.counts().values()) > 1


@compiled_only
def test_vocabularies_share_what_is_compiled(keys: Keys) -> None:
    """All but the number of slices, rounded up to a power of two, in the kernels that merge them."""
    for vocab in (151_936, 200_064, 256_000):  # 10, 13 and 16 slices of 16,384 columns
        _loss(_logits(vocab=vocab), _logits(vocab=vocab))
        _loss(_logits(1, vocab), _logits(1, vocab))
    assert set(keys.counts().values()) == {1}
    for rows in (1, 7):
        _loss(_logits(rows, 32_000), _logits(rows, 32_000))  # 2 slices
    counts = keys.counts()
    assert {kernel for kernel, count in counts.items() if count == 1} == {"sweep_kernel", "gradient_kernel"}
    assert max(counts.values()) == 2
    _loss(_logits(1, 32_001), _logits(1, 32_001))  # neither aligned nor whole vectors
    assert keys.counts()["sweep_kernel"] == 2


@compiled_only
def test_labels_and_their_number_compile_nothing(keys: Keys) -> None:
    student = _logits()

    def run(*labels: Tensor) -> dict[str, int]:
        for one in labels:
            kk.selective_log_softmax(student.requires_grad_(), one, backend="triton").sum().backward()
        return keys.counts()

    once = {"sweep_kernel": 1, "finish_kernel": 1, "gradient_kernel": 1}
    assert run(torch.zeros(7, dtype=torch.int64), torch.zeros(7, 1, dtype=torch.int32)) == once
    # The only label of a row is one of its columns; several have a kernel of their own.
    many = {**once, "gradient_kernel": 2, "label_gradient_kernel": 1}
    assert run(*(torch.zeros(7, count).long() for count in (2, 5, 300))) == many


@compiled_only
def test_scaling_is_compiled_once(keys: Keys) -> None:
    for gradient in (_logits(1, 1), _logits(16, 4096), _logits(3, 1001), _logits(3, 1001)[1:]):
        launch.scale_in_place(gradient, torch.ones(()), interpreted=False)
    assert keys.counts() == {"scale_kernel": 1}


@compiled_only
def test_eager_calls_launch_kernels_as_they_are(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """wrap_triton, which torch.compile needs, would cost a tenth of a millisecond a launch."""
    seen = []
    launched = launch.Launch._run

    def run(self: launch.Launch, *arguments: Any) -> None:
        seen.append(self.wrap)
        launched(self, *arguments)

    monkeypatch.setattr(launch.Launch, "_run", run)
    for call in (_loss, _stats):
        call(_logits(), _logits())
    assert len(seen) == 5
    assert not any(seen)


# --- CUDA graphs: a stream that is captured cannot be waited for, nor fed from pageable memory.
class NothingFromTheDevice(TorchDispatchMode):
    """Fails where a value comes to the host, or a tensor changes its device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        waits = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        assert name.partition("::")[2].partition(".")[0] not in waits, f"{name} waits for the device"
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            moved = [a for a in args if isinstance(a, Tensor) and a.dim() and a.device != out.device]
            assert not moved, f"{name} moves a tensor to {out.device}"
        return out


def _everything(device: str) -> tuple[Tensor, dict[str, Any]]:
    """A teacher, and all that a loss takes, on a device."""
    rows = (3, 5)
    options = {
        "weight": torch.rand(rows, device=device),
        "labels": torch.zeros(rows, dtype=torch.int32, device=device),
        "mask": torch.ones(rows, dtype=torch.int64, device=device),
        "exclude": torch.zeros(rows, dtype=torch.int64, device=device),
        "temperature": torch.rand(rows, device=device),
        "beta": torch.rand(rows, device=device),
        "temperature_squared": True,
    }
    return torch.empty(*rows, 320, device=device), options


def _no_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launched: list[str] = []
    monkeypatch.setattr(launch.Launch, "_run", lambda self, kernel, *_: launched.append(kernel.fn.__name__))
    monkeypatch.setattr(launch.Launch, "_is_aligned", lambda self, tensor: True)
    return launched


@compiled_only
@pytest.mark.parametrize("normalizer", [None, 15.0, "tensor"])
def test_losses_and_backward_never_wait_for_the_device(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, normalizer: float | str | None
) -> None:
    """On CPU tensors, which autograd has here."""
    launched = _no_launches(monkeypatch)
    monkeypatch.setattr(inputs, "may_look_at", lambda tensor: False)
    teacher, options = _everything("cpu")
    student = torch.empty_like(teacher, requires_grad=True)
    given = torch.tensor(15.0) if normalizer == "tensor" else normalizer
    labels = torch.zeros(3, 5, 2, dtype=torch.int64)
    with NothingFromTheDevice():
        kk.divergence_loss(student, teacher, "js", backend="triton", normalizer=given, **options).backward()
        per_token = kk.divergence_loss(student, teacher, "js", backend="triton", reduction="none", **options)
        per_token.sum().backward()
        stats = kk.token_stats(
            student, teacher, labels, stats=("logprob", "argmax", "js"), backend="triton",
            exclude=options["exclude"], temperature=options["temperature"],
        )  # fmt: skip
        stats.js.sum().backward()
        ids, logprobs = torch.zeros(3, 5, 4, dtype=torch.int64), torch.full((3, 5, 4), -3.0)
        kk.topk_divergence_loss(
            student, ids, logprobs, "js", backend="triton", normalizer=given, check=False
        ).backward()
    assert launched.count("loss_kernel") == 1
    assert launched.count("gradient_kernel") == 3
    assert (launched.count("mark_kernel"), launched.count("label_gradient_kernel")) == (1, 2)


@compiled_only
def test_the_other_test_sees_a_wait(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_launches(monkeypatch)
    teacher, options = _everything("cpu")
    with NothingFromTheDevice(), pytest.raises(AssertionError, match="waits for the device"):
        kk.divergence_loss(torch.empty_like(teacher), teacher, "js", backend="triton", **options)


@compiled_only
def test_nothing_moves_between_devices(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors of a GPU that is not there: without memory, and without autograd, which wants a real one."""
    launched = _no_launches(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(launch, "on_device", lambda device: torch.no_grad())

    class DoneError(Exception):
        """Python's indexing, which comes next, wants a real GPU too."""

    def statistics(call: Call, name: str, with_state: bool) -> Tensor:
        arguments = inputs.operator_arguments(call, name)
        values, state = ops._statistics(*arguments, True)
        ops._statistics_backward(*arguments, state, torch.ones_like(values), True, True)
        ops._loss(*arguments, torch.ones_like(values), True, True)
        raise DoneError

    monkeypatch.setattr(ops, "statistics", statistics)
    with FakeTensorMode(), NothingFromTheDevice():
        teacher, options = _everything("cuda")
        with pytest.raises(DoneError):
            kk.divergence_loss(torch.empty_like(teacher), teacher, "js", backend="triton", **options)
        with pytest.raises(DoneError):
            kk.token_stats(
                teacher, labels=options["labels"], exclude=options["exclude"], backend="triton", temperature=0.5
            )  # fmt: skip
    assert launched.count("loss_kernel") == 2
    assert launched.count("gradient_kernel") == 2


def test_checks_look_at_values_but_not_while_a_stream_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a tensor on a GPU, what is asked about. A fake one has no values to look at.
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert inputs.may_look_at(torch.ones(3))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert inputs.may_look_at(torch.ones(3))
        assert inputs.may_look_at(on_gpu) is not capturing


# --- the gradient scaled in place
@interpreted_only
@pytest.mark.parametrize("shape", [(1, 1), (3, 1001), (2, 4096), (0, 7)])
def test_triton_scales_a_gradient_in_place(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape)
    expected = gradient * 0.3
    launch.scale_in_place(gradient, torch.tensor(0.3), interpreted=True)
    assert torch.equal(gradient, expected)


@interpreted_only
def test_triton_leaves_a_gradient_alone_for_a_factor_of_one() -> None:
    """NaN payloads and read-only memory would tell; here a store is what must not happen."""
    gradient = torch.randn(5000)
    before = gradient.clone()
    stored = []
    original = triton.runtime.interpreter.InterpreterBuilder.create_masked_store

    def store(self: Any, *arguments: Any) -> None:
        stored.append(arguments)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.interpreter.InterpreterBuilder, "create_masked_store", store)
        launch.scale_in_place(gradient, torch.ones(()), interpreted=True)
        assert not stored
        launch.scale_in_place(gradient, torch.tensor(-1.0), interpreted=True)
        assert len(stored) == 2
    assert torch.equal(gradient, -before)


@compiled_only
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_gpus_scale_by_the_kernel(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(backend.TritonBackend, "unavailable", lambda self: None)
    scaled: list[Tensor] = []
    monkeypatch.setattr(launch, "scale_in_place", lambda gradient, factor, interpreted: scaled.append(gradient))
    with FakeTensorMode():
        factor = torch.ones((), device=device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            gradient = torch.empty(3, 5, dtype=dtype, device=device)
            assert scale_in_place(gradient, factor) is gradient
            assert scaled.pop() is gradient
        for other in (torch.empty(3, 5, dtype=torch.float64, device=device), torch.empty(3, 5, device=device).T):
            scale_in_place(other, factor)
            assert not scaled
