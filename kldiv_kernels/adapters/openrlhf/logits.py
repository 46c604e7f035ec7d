"""OpenRLHF's functions of raw logits: log-probabilities, entropy, and the distillation loss."""

from __future__ import annotations

from torch import Tensor, nn

from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.stats import entropy, selective_log_softmax


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the labels, differentiable.

    Args:
        logits: [*, V].
        labels: [*] integers that stand at their tokens; −100 gives 0 without gradient.
        temperature: default 1.

    Returns:
        [*] float32 (float64 for float64 logits), in nats. Errors: see `kldiv_kernels.selective_log_softmax`.

    >>> import torch
    >>> log_probs_from_logits(torch.zeros(1, 2, 4), torch.tensor([[0, 3]]), temperature=0.7).exp()
    tensor([[0.2500, 0.2500]])
    """
    return selective_log_softmax(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) [*, V], differentiable: [*] float32, in nats.

    >>> import torch
    >>> round(compute_entropy(torch.tensor([[0.0, 0.0, float("-inf")]])).exp().item(), 4)
    2.0
    """
    return entropy(logits)


class KDLoss(nn.Module):
    """KL(teacher ‖ student), the mean over the tokens whose label is not −100; loss and gradient from one read.

    As in OpenRLHF, the labels stand at the logits' own positions: nothing is shifted.

    >>> import torch
    >>> teacher = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 2]).log()
    >>> round(KDLoss()(torch.zeros(1, 2, 4), teacher, torch.tensor([[1, -100]])).item(), 4)  # log 2
    0.6931
    """

    def __init__(self) -> None:
        super().__init__()
        self.IGNORE_INDEX = -100

    def forward(self, logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Tensor:
        """A float32 scalar, in nats, of logits [*, V] and labels [*]. Errors: see `kldiv_kernels.divergence_loss`."""
        return divergence_loss(logits, teacher_logits, "forward_kl", labels=label, ignore_index=self.IGNORE_INDEX)
