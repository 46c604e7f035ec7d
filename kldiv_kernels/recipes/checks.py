"""Shapes of what recipes take beside logits: broadcasting would accept many that mean something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def _checked(given: Mapping[str, Tensor | None], shape: Sequence[int], of: str = "", where: str = "") -> None:
    for name, x in given.items():
        if x is not None and list(x.shape) != list(shape):
            raise ValueError(f"{where}{name} has shape {list(x.shape)}; expected {list(shape)}{of}")


def of_tokens_checked(tokens: Tensor, **given: Tensor | None) -> None:
    """ValueError for one that has another shape than the tokens, which broadcasting would take.

    >>> import torch
    >>> of_tokens_checked(torch.zeros(2, 2), mask=torch.ones(2))
    Traceback (most recent call last):
        ...
    ValueError: mask has shape [2]; expected [2, 2], one a token
    """
    _checked(given, tokens.shape, ", one a token")


def of_sequences_checked(tokens: Tensor, **given: Tensor | None) -> None:
    """ValueError for one that is not [B], of tokens [B, T]; and where the tokens are packed, [N]."""
    if tokens.dim() != 2:
        raise ValueError(
            f"the tokens have shape {list(tokens.shape)}; expected [batch, tokens]: sequences are asked for"
        )
    _checked(given, tokens.shape[:1], ", one a sequence")


def like_checked(name: str, tensor: Tensor, **given: Tensor | None) -> None:
    """ValueError for one that has another shape than the tensor of that name.

    >>> import torch
    >>> like_checked("values", torch.zeros(2), returns=torch.ones(1))
    Traceback (most recent call last):
        ...
    ValueError: returns has shape [1]; expected [2] like values
    """
    _checked(given, tensor.shape, f" like {name}")


def alike_checked(where: str, first: Tensor, **others: Tensor) -> None:
    """ValueError, which begins with `where`, for one that has another shape than the first.

    >>> import torch
    >>> alike_checked("f", torch.zeros(2, 3), other=torch.zeros(3))
    Traceback (most recent call last):
        ...
    ValueError: f: other has shape [3]; expected [2, 3]
    """
    _checked(others, first.shape, where=f"{where}: ")


def of_rows_checked(where: str, rows: Tensor, **given: Tensor) -> None:
    """ValueError for one that is not [*], of rows [*, V]."""
    _checked(given, rows.shape[:-1], ", one a row", f"{where}: ")
