"""TRL's log-probabilities and entropy, patched, against TRL's own: value, gradient, dtype, masks, rows with −inf."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl.experimental.sdft import sdft_trainer
from trl.trainer import utils
from trl_parity import BATCH, TOKENS, TOLERANCE, VOCAB, compare, ragged_labels, rows, value_and_gradient

from kldiv_kernels.adapters.trl import patched_trl


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("k", "masked"), [(None, False), (None, True), (3, False)])
def test_selective_log_softmax(masked: bool, k: int | None, temperature: float, dtype: torch.dtype) -> None:
    index = torch.randint(VOCAB, (BATCH, TOKENS, k) if k else (BATCH, TOKENS))
    mask = ragged_labels() != -100 if masked else None
    compare("selective_log_softmax", utils, rows(dtype)[0], index, temperature, row_mask=mask)
    compare("selective_log_softmax", sdft_trainer, rows(dtype)[0], index, row_mask=mask, temperature=temperature)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_entropy(dtype: torch.dtype) -> None:
    compare("entropy_from_logits", utils, rows(dtype)[0], 3)


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
    mask = (ragged_labels() != -100).int() if masked else None
    compare("both", Sum(), rows(dtype)[0], index, requires_grad, 0.6, row_mask=mask)
    entropies = utils.selective_log_softmax_and_entropy(rows(dtype)[0].clone().requires_grad_(), index, requires_grad)
    with patched_trl():
        ours = utils.selective_log_softmax_and_entropy(rows(dtype)[0].clone().requires_grad_(), index, requires_grad)
    assert ours[1].requires_grad == entropies[1].requires_grad == requires_grad


def test_bfloat16_log_probabilities_are_trls_dtype_and_nearer() -> None:
    logits, index = rows(torch.bfloat16)[0] * 4, torch.randint(VOCAB, (BATCH, TOKENS))
    exact = utils.selective_log_softmax_and_entropy(logits.double(), index)
    theirs = utils.selective_log_softmax_and_entropy(logits, index)
    with patched_trl():
        ours = utils.selective_log_softmax_and_entropy(logits, index)
    for x, y, z in zip(ours, theirs, exact, strict=True):
        assert x.dtype == y.dtype == torch.bfloat16
        assert ((x - z).abs() <= 2**-8 * z.abs() + 1e-6).all()
        assert (x - z).abs().max() <= (y - z).abs().max()


def test_entropy_with_columns_at_minus_infinity() -> None:
    logits = rows(torch.float32)[0].contiguous()
    logits[..., 3:] = -torch.inf
    p = logits.double().softmax(-1)
    assert utils.entropy_from_logits(logits).isnan().all()
    with patched_trl():
        ours, gradient = value_and_gradient(utils.entropy_from_logits, logits)
        both = utils.selective_log_softmax_and_entropy(logits, torch.zeros(BATCH, TOKENS, dtype=torch.int64))
    exact = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    assert torch.allclose(ours.double(), exact, atol=1e-6)
    assert torch.allclose(both[1].double(), exact, atol=1e-6)
    assert gradient.isfinite().all()
    assert gradient[..., :3].abs().max() > 1e-3


def test_masked_rows_are_not_read() -> None:
    logits, index, mask = rows(torch.float32)[0].contiguous(), torch.zeros(BATCH, TOKENS, dtype=torch.int64), None
    mask = ragged_labels() != -100
    logits[~mask] = torch.nan
    with patched_trl():
        ours, gradient = value_and_gradient(utils.selective_log_softmax, logits, index, row_mask=mask)
    assert not ours[~mask].any()
    assert not gradient[~mask].any()
    assert ours[mask].isfinite().all()
    with pytest.raises(ValueError, match="temperature"), patched_trl():
        utils.selective_log_softmax(logits, index, temperature=0.0)
