"""The trained weights of SparsePO's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SparseMask(nn.Module):
    r"""ReLU(Σ_l u_l·ReLU(w_l·LN(h_l) + c_l)): a weight ≥ 0 of each token; paper 5 (SparsePO).

    h_l: the hidden state of the reference model's layer l, without gradient. One for the ratios and one for the KLs of
    `sparsepo_loss`, or one for both with halved penalties.

    Args: hidden_size, layers: of the reference model. dropout: of each layer's value and of their sum; 0.01 in the
        paper, 0.1 in the code's classes. The paper trains it with a weight decay of 0.01.

    >>> import torch, kldiv_kernels as kk
    >>> mask = kk.recipes.SparseMask(hidden_size=8, layers=2)
    >>> weights = mask([torch.randn(4, 5, 8), torch.randn(4, 5, 8)])
    >>> weights.shape, bool((weights >= 0).all())
    (torch.Size([4, 5]), True)
    """

    def __init__(self, hidden_size: int, layers: int, dropout: float = 0.01) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.of_layer = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in range(layers))
        self.mixer = nn.Linear(layers, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """[*, hidden_size] of each layer -> [*]. Raises ValueError for another number of layers."""
        if len(hidden_states) != len(self.of_layer):
            raise ValueError(
                f"SparseMask: hidden_states has {len(hidden_states)} layers; expected {len(self.of_layer)}"
            )
        values = [
            self.dropout(layer(self.norm(hidden.detach())).relu())
            for layer, hidden in zip(self.of_layer, hidden_states, strict=True)
        ]
        mixed: Tensor = self.dropout(self.mixer(torch.cat(values, dim=-1)).relu())
        return mixed.squeeze(-1)
