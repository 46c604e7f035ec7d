"""What `patch_trl` puts in place of TRL's functions, against TRL's own: value, gradient, dtype, and rows with −inf."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

import kldiv_kernels as kk

pytest.importorskip("trl")

from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.sdft import loss_utils, sdft_trainer
from trl.trainer import utils

from kldiv_kernels.adapters.trl import patch_trl, patched_trl, unpatch_trl

BATCH, TOKENS, VOCAB = 2, 7, 37
BETAS = [0, 0.1, 0.5, 0.9, 1]
TRAINERS = {trainer.__name__: trainer for trainer in (GKDTrainer, GOLDTrainer, IWOPDTrainer)}
# For values of a few nats and gradients relative to the largest: what each dtype's arithmetic leaves.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "batchmean": {}, "sum": {"reduction": "sum"}, "mean": {"reduction": "mean"}, "items": {"num_items_in_batch": 23},
    "items tensor": {"num_items_in_batch": torch.tensor(23), "reduction": "none"},
}  # fmt: skip
SHARED_WITH_TRL = (
    "trl.trainer.utils.selective_log_softmax",
    "trl.trainer.utils.entropy_from_logits",
    "trl.trainer.utils.selective_log_softmax_and_entropy",
    "trl.experimental.sdft.sdft_trainer.selective_log_softmax",
    "trl.experimental.sdpo.loss_utils.selective_log_softmax",
    "trl.experimental.gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss",
    "trl.experimental.gold.gold_trainer.GOLDTrainer.generalized_jsd_loss",
    "trl.experimental.iw_opd.iw_opd_trainer.IWOPDTrainer.generalized_jsd_loss",
    "trl.experimental.sdft.sdft_trainer.compute_topk_self_distillation_loss",
    "trl.experimental.sdft.loss_utils.compute_full_logit_self_distillation_loss",
    "trl.experimental.sdpo.sdpo_trainer.compute_sampled_token_self_distillation_loss",
)


@pytest.fixture(autouse=True)
def _unpatched() -> Any:
    yield
    unpatch_trl()


def _rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Student and teacher as GKD passes them: a view without the last position."""
    student, teacher = 2 * torch.randn(2, BATCH, TOKENS + 1, VOCAB, dtype=torch.float64).to(dtype)
    return student[:, :-1].detach(), teacher[:, :-1].detach()


def _labels() -> Tensor:
    labels = torch.randint(VOCAB, (BATCH, TOKENS))
    labels[0, :3], labels[1, 5:] = -100, -100
    return labels


def _value_and_gradient(
    loss: Callable[..., Any], student: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student, *others, **options)
    # Not all the same weight, so that a gradient of another token's loss is seen.
    (value.double() * torch.linspace(1, 2, value.numel()).reshape(value.shape)).sum().backward()
    return value.detach(), student.grad


def _compare(name: str, owner: Any, student: Tensor, *others: Any, backend: str = "auto", **options: Any) -> None:
    """Patched against TRL's own; `name` is what `owner` calls it."""
    expected, gradient = _value_and_gradient(getattr(owner, name), student, *others, **options)
    original = getattr(owner, name)
    with patched_trl(backend):
        assert getattr(owner, name) is not original
        value, ours = _value_and_gradient(getattr(owner, name), student, *others, **options)
    tolerance = TOLERANCE[student.dtype]
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    assert gradient.abs().max() > 1e-4
    assert torch.allclose(value, expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(ours, gradient, rtol=0, atol=tolerance * gradient.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd(beta: float, reduction: str, with_labels: bool, dtype: torch.dtype) -> None:
    student, teacher = _rows(dtype)
    _compare(
        "generalized_jsd_loss", GKDTrainer, student, teacher, _labels() if with_labels else None,
        beta=beta, temperature=0.7, **REDUCTIONS[reduction],
    )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("trainer", ["GOLDTrainer", "IWOPDTrainer"])
def test_generalized_jsd_of_other_trainers(trainer: str, beta: float, reduction: str) -> None:
    student, teacher = _rows(torch.float32)
    options = {"beta": beta, "temperature": 0.7, **REDUCTIONS[reduction]}
    _compare("generalized_jsd_loss", TRAINERS[trainer], student, teacher, _labels(), **options)


@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd_of_rows_without_a_batch(beta: float) -> None:
    student, teacher = (x.reshape(-1, VOCAB) for x in _rows(torch.float32))
    _compare("generalized_jsd_loss", GOLDTrainer, student, teacher, beta=beta)


def test_generalized_jsd_gives_the_teacher_a_gradient() -> None:
    student, teacher = _rows()
    _compare("generalized_jsd_loss", GKDTrainer, teacher.clone(), student.clone().requires_grad_(), beta=0.3)
    first = student.clone().requires_grad_()
    with patched_trl():
        GKDTrainer.generalized_jsd_loss(teacher, first, beta=0.3).backward()
    second = student.clone().requires_grad_()
    GKDTrainer.generalized_jsd_loss(teacher, second, beta=0.3).backward()
    assert first.grad.abs().max() > 1e-4
    assert torch.allclose(first.grad, second.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("GKDTrainer", {"reduction": "none"}),
        ("GOLDTrainer", {"logits_are_probs": True}),
        ("IWOPDTrainer", {"top_k": 4}),
        ("IWOPDTrainer", {"top_k": 4, "add_tail": False}),
    ],
)
def test_what_trl_serves_itself(trainer: str, options: dict[str, Any]) -> None:
    student, teacher = (x.softmax(-1) for x in _rows(torch.float32))
    loss = TRAINERS[trainer].generalized_jsd_loss
    expected = loss(student, teacher, _labels(), **options)
    assert not torch.equal(expected, loss(student, teacher, _labels()))
    with patched_trl():
        torch.testing.assert_close(
            TRAINERS[trainer].generalized_jsd_loss(student, teacher, _labels(), **options), expected, rtol=0, atol=0
        )


def test_rows_without_unit_stride_go_to_trl() -> None:
    student, teacher = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in _rows(torch.float32))
    _compare("generalized_jsd_loss", GKDTrainer, student, teacher)
    _compare("entropy_from_logits", utils, student)


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_is_rounded_once(beta: float) -> None:
    student, teacher = _rows(torch.bfloat16)
    options = {"labels": _labels(), "beta": beta, "reduction": "sum"}
    exact, exact_gradient = _value_and_gradient(
        GKDTrainer.generalized_jsd_loss, student.double(), teacher.double(), **options
    )
    theirs, their_gradient = _value_and_gradient(GKDTrainer.generalized_jsd_loss, student, teacher, **options)
    with patched_trl():
        ours, gradient = _value_and_gradient(GKDTrainer.generalized_jsd_loss, student, teacher, **options)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert abs(ours - exact) <= 2**-8 * exact
    largest = exact_gradient.abs().max()
    assert (gradient - exact_gradient).abs().max() <= 2**-8 * largest
    assert (their_gradient - exact_gradient).abs().max() > (gradient - exact_gradient).abs().max()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("columns", ["teacher", "both"])
def test_generalized_jsd_with_columns_at_minus_infinity(columns: str, beta: float) -> None:
    student, teacher = (x.contiguous() for x in _rows(torch.float32))
    teacher[..., 5:9] = -torch.inf
    if columns == "both":
        student[..., 5:9] = -torch.inf
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = {0: _kl(p, q), 1: _kl(q, p)}.get(beta, beta * _kl(p, m) + (1 - beta) * _kl(q, m)).sum()
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
    assert not theirs.isfinite()
    with patched_trl():
        ours, gradient = _value_and_gradient(
            GKDTrainer.generalized_jsd_loss, student, teacher, beta=beta, reduction="sum"
        )
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours.isinf() == (columns == "teacher" and beta == 1)
    if ours.isfinite():
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"k": 5, "tail": True}, {"k": 5, "tail": False}])
def test_self_distillation(options: dict[str, Any], alpha: float, dtype: torch.dtype) -> None:
    student, teacher = _rows(dtype)
    name = "compute_full_logit_self_distillation_loss"
    arguments: dict[str, Any] = {"distillation_alpha": alpha}
    if options:
        name = "compute_topk_self_distillation_loss"
        arguments |= {"distillation_topk": options["k"], "distillation_add_tail": options["tail"]}
    for owner in (sdft_trainer, loss_utils):
        _compare(name, owner, student, teacher, **arguments)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_self_distillation_on_the_sampled_token(dtype: torch.dtype) -> None:
    student, teacher = _rows(dtype)
    name = "compute_sampled_token_self_distillation_loss"
    _compare(name, sdft_trainer, student, teacher, _labels().clamp_min(0), distillation_alpha=1.0)
    with patched_trl(), pytest.raises(ValueError, match="alpha"):
        sdft_trainer.compute_sampled_token_self_distillation_loss(
            student, teacher, _labels().clamp_min(0), distillation_alpha=0.5
        )


def _topk(student: Tensor, teacher: Tensor, k: int, alpha: float) -> tuple[Tensor, Tensor]:
    return _value_and_gradient(
        loss_utils.compute_topk_self_distillation_loss, student, teacher,
        distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=True,
    )  # fmt: skip


def test_a_sure_student_learns_of_the_tail() -> None:
    """1e-11 of the student is outside its top 2, 0.3 of the teacher: TRL's bound leaves that without a gradient."""
    student, teacher = torch.zeros(1, VOCAB), torch.zeros(1, VOCAB)
    student[0, :2] = torch.tensor([29.0, 28.0])
    student[0, 2:] += torch.linspace(0, 1, VOCAB - 2)
    teacher[0, :2] = torch.tensor([5.0, 3.5])
    q, p = student.double().softmax(-1)[0], teacher.double().softmax(-1)[0]
    p_tail, q_tail = p[2:].sum(), q[2:].sum()
    assert q_tail < 1e-10
    assert p_tail > 0.1
    expected = p[:2] @ (p[:2] / q[:2]).log() + p_tail * (p_tail / q_tail).log()
    value, gradient = _topk(student, teacher, 2, 0.0)
    assert abs(value.item() - expected) > 1
    assert gradient[0, 2:].abs().max() < 1e-9
    with patched_trl():
        value, gradient = _topk(student, teacher, 2, 0.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    exact = torch.cat([q[:2] - p[:2], q[2:] - q[2:] * p_tail / q_tail])
    assert torch.allclose(gradient[0].double(), exact, rtol=0, atol=1e-6 * exact.abs().max())


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_top_k_with_columns_at_minus_infinity(alpha: float) -> None:
    """All but four columns are gone, in both; of the top 6, two are at −inf, and no tail is left."""
    student, teacher = (x[:1, :1].contiguous() for x in _rows(torch.float32))
    student[..., 4:] = teacher[..., 4:] = -torch.inf
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    m = alpha * p + (1 - alpha) * q
    expected = {0: _kl(p, q), 1: _kl(q, p)}.get(alpha, alpha * _kl(p, m) + (1 - alpha) * _kl(q, m))
    assert _topk(student, teacher, 6, alpha)[0].isnan()
    with patched_trl():
        value, gradient = _topk(student, teacher, 6, alpha)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient[..., :4].abs().max() > 1e-4
    assert not gradient[..., 4:].any()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_top_k_of_the_whole_vocabulary(alpha: float) -> None:
    student, teacher = (x.contiguous() for x in _rows())
    with patched_trl():
        value, gradient = _topk(student, teacher, VOCAB, alpha)
        expected, full = _value_and_gradient(
            loss_utils.compute_full_logit_self_distillation_loss, student, teacher, distillation_alpha=alpha
        )
    assert torch.allclose(value, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(gradient, full, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("k", "masked"), [(None, False), (None, True), (3, False)])
def test_selective_log_softmax(masked: bool, k: int | None, temperature: float, dtype: torch.dtype) -> None:
    index = torch.randint(VOCAB, (BATCH, TOKENS, k) if k else (BATCH, TOKENS))
    mask = _labels() != -100 if masked else None
    _compare("selective_log_softmax", utils, _rows(dtype)[0], index, temperature, row_mask=mask)
    _compare("selective_log_softmax", sdft_trainer, _rows(dtype)[0], index, row_mask=mask, temperature=temperature)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_entropy(dtype: torch.dtype) -> None:
    _compare("entropy_from_logits", utils, _rows(dtype)[0], 3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_both_at_once(masked: bool, requires_grad: bool, dtype: torch.dtype) -> None:
    class Sum:
        """One number of both, so that a gradient missing from either is seen."""

        @property
        def both(self) -> Callable[..., Tensor]:
            function = utils.selective_log_softmax_and_entropy
            return lambda *args, **options: torch.stack(function(*args, **options))

    index = torch.randint(VOCAB, (BATCH, TOKENS))
    mask = (_labels() != -100).int() if masked else None
    _compare("both", Sum(), _rows(dtype)[0], index, requires_grad, 0.6, row_mask=mask)
    entropies = utils.selective_log_softmax_and_entropy(_rows(dtype)[0].clone().requires_grad_(), index, requires_grad)
    with patched_trl():
        ours = utils.selective_log_softmax_and_entropy(_rows(dtype)[0].clone().requires_grad_(), index, requires_grad)
    assert ours[1].requires_grad == entropies[1].requires_grad == requires_grad


def test_bfloat16_log_probabilities_are_trls_dtype_and_nearer() -> None:
    logits, index = _rows(torch.bfloat16)[0] * 4, torch.randint(VOCAB, (BATCH, TOKENS))
    exact = utils.selective_log_softmax_and_entropy(logits.double(), index)
    theirs = utils.selective_log_softmax_and_entropy(logits, index)
    with patched_trl():
        ours = utils.selective_log_softmax_and_entropy(logits, index)
    for x, y, z in zip(ours, theirs, exact, strict=True):
        assert x.dtype == y.dtype == torch.bfloat16
        assert ((x - z).abs() <= 2**-8 * z.abs() + 1e-6).all()
        assert (x - z).abs().max() <= (y - z).abs().max()


def test_entropy_with_columns_at_minus_infinity() -> None:
    logits = _rows(torch.float32)[0].contiguous()
    logits[..., 3:] = -torch.inf
    p = logits.double().softmax(-1)
    assert utils.entropy_from_logits(logits).isnan().all()
    with patched_trl():
        ours, gradient = _value_and_gradient(utils.entropy_from_logits, logits)
        both = utils.selective_log_softmax_and_entropy(logits, torch.zeros(BATCH, TOKENS, dtype=torch.int64))
    exact = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    assert torch.allclose(ours.double(), exact, atol=1e-6)
    assert torch.allclose(both[1].double(), exact, atol=1e-6)
    assert gradient.isfinite().all()
    assert gradient[..., :3].abs().max() > 1e-3


def test_masked_rows_are_not_read() -> None:
    logits, index, mask = _rows(torch.float32)[0].contiguous(), torch.zeros(BATCH, TOKENS, dtype=torch.int64), None
    mask = _labels() != -100
    logits[~mask] = torch.nan
    with patched_trl():
        ours, gradient = _value_and_gradient(utils.selective_log_softmax, logits, index, row_mask=mask)
    assert not ours[~mask].any()
    assert not gradient[~mask].any()
    assert ours[mask].isfinite().all()
    with pytest.raises(ValueError, match="temperature"), patched_trl():
        utils.selective_log_softmax(logits, index, temperature=0.0)


def _names_in_trl() -> dict[str, Any]:
    """Every attribute of every module of TRL, and of the three trainers."""
    modules = {name: vars(module) for name, module in sys.modules.items() if name.split(".")[0] == "trl"}
    modules |= {name: vars(trainer) for name, trainer in TRAINERS.items()}
    return {f"{name}.{key}": value for name, attributes in modules.items() for key, value in attributes.items()}


def test_patch_and_unpatch() -> None:
    patch_trl()
    unpatch_trl()
    before = _names_in_trl()
    names = patch_trl()
    assert names == sorted(set(names))
    assert set(SHARED_WITH_TRL) <= set(names)
    after = _names_in_trl()
    changed = {name for name in before if after[name] is not before[name]}
    assert changed == {name.replace(".".join(name.split(".")[:-2]) + ".", "") if "Trainer." in name else name
                       for name in names}  # fmt: skip
    unpatch_trl()
    again = _names_in_trl()
    assert all(again[name] is value for name, value in before.items())
    unpatch_trl()


def test_a_module_imported_while_patched_is_put_back_too() -> None:
    original, later = utils.entropy_from_logits, types.ModuleType("trl.imported_later")
    sys.modules[later.__name__] = later
    try:
        patch_trl()
        later.entropy_of = utils.entropy_from_logits
        assert later.entropy_of is not original
        unpatch_trl()
        assert later.entropy_of is original
    finally:
        del sys.modules[later.__name__]


@pytest.mark.parametrize("error", [ModuleNotFoundError, NameError])
def test_a_module_that_cannot_be_imported_is_left_out(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = patch_trl()
    unpatch_trl()

    def import_module(name: str) -> Any:
        if "gold" in name:
            raise error
        return importlib.import_module(name)

    monkeypatch.setattr("kldiv_kernels.adapters.trl.patch.import_module", import_module)
    assert set(everything) - set(patch_trl()) == {"trl.experimental.gold.gold_trainer.GOLDTrainer.generalized_jsd_loss"}


def test_twice_is_an_error_and_leaves_the_patch() -> None:
    original = utils.entropy_from_logits
    patch_trl()
    with pytest.raises(RuntimeError, match="patched already"):
        patch_trl()
    with pytest.raises(RuntimeError, match="patched already"), patched_trl():
        pass
    assert utils.entropy_from_logits is not original
    unpatch_trl()
    assert utils.entropy_from_logits is original


def test_unpatched_after_an_error() -> None:
    original = utils.entropy_from_logits
    with pytest.raises(KeyError), patched_trl():
        raise KeyError
    assert utils.entropy_from_logits is original


def test_the_backend_is_the_one_asked_for() -> None:
    with pytest.raises(ValueError, match="patch_trl: backend is 'gpu'; expected one of auto"):
        patch_trl("gpu")
    logits = _rows(torch.float32)[0]
    with patched_trl("cuda"), pytest.raises(Exception, match="cuda"):
        utils.entropy_from_logits(logits)
    with patched_trl("reference"):
        reference = utils.entropy_from_logits(logits)
    assert torch.equal(reference, kk.entropy(logits, backend="reference"))


@pytest.mark.parametrize("version", ["1.13.0", "1.17.0", "2.0.0", "1.16.0.dev0", None])
def test_other_versions_are_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> str:
        assert name == "trl"
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", found)
    with pytest.raises(ImportError, match=f"{version or 'not installed'}; expected TRL 1.14 to 1.16"):
        patch_trl()


def test_trainers_want_one_version_more(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kldiv_kernels.adapters.trl")
    monkeypatch.setattr(metadata, "version", lambda name: "1.14.0")
    for name in ("GRPOTrainer", "DistillationTrainer"):
        with pytest.raises(ImportError, match=f"{name}: TRL is 1.14.0; expected TRL 1.15 to 1.16"):
            getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = module.Trainer
    assert patch_trl()


def test_trl_is_imported_when_used() -> None:
    code = "import sys, kldiv_kernels.adapters.trl; assert 'trl' not in sys.modules; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_tail_does_not_depend_on_how_small_it_is() -> None:
    from kldiv_kernels.adapters.trl.topk import with_tail

    logits = torch.tensor([[60.0, 1.0, 0.0], [math.log(0.5), math.log(0.3), math.log(0.2)]])
    tail = with_tail(logits, torch.tensor([[0], [2]]))[:, -1]
    assert tail.tolist() == pytest.approx([math.log(math.e + 1) - 60, math.log(0.8)], rel=1e-6)
