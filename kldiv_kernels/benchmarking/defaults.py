"""What `kldiv bench` measures when nothing else is said. Without PyTorch, for the command line's help."""

from __future__ import annotations

# A policy-gradient-like loss of one tensor: -mean(logprob) - 0.01 mean(entropy).
LOGPROB_ENTROPY = "logprob_entropy"
DEFAULT_KINDS = ("forward_kl", "reverse_kl", "hellinger", "js", LOGPROB_ENTROPY)
# The vocabulary of Qwen2.5 and Qwen3, and a micro-batch of tokens large enough to fall out of every cache.
DEFAULT_ROWS, DEFAULT_VOCAB = 256, 151_936
# The width of hidden states: a small model's, so that the loss is a visible part of its multiplications.
DEFAULT_HIDDEN = 512
