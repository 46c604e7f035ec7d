"""The table of bad calls of policy_loss: (call, error, message)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import kldiv_kernels as kk

ROWS = torch.zeros(2, 3, 8)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
OUT_OF_RANGE = torch.tensor([[0, 0, 0], [0, 0, 8]])
ADVANTAGES = torch.zeros(2)


def _policy(**options: object) -> Callable[[], object]:
    """A good call but for the options; a name of a tensor replaces it."""
    call = {"logits": ROWS, "token_ids": LABELS, "advantages": ADVANTAGES, **options}
    return lambda: kk.policy_loss(**call)


TOKENS = torch.zeros(2, 3)
PACKED = {"logits": ROWS[0], "token_ids": LABELS[0], "advantages": TOKENS[0]}
BOUNDS = torch.tensor([0, 2, 3])
POLICY: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "logits": (
        _policy(logits=torch.zeros(8)), ValueError,
        "policy_loss: logits has shape [8]; expected [batch, tokens, vocab] or [tokens, vocab]",
    ),
    "token_ids": (
        _policy(token_ids=LABELS[:, :2]), ValueError,
        "policy_loss: token_ids has shape [2, 2]; expected [2, 3], one value a token",
    ),
    "token_ids dtype": (
        _policy(token_ids=TOKENS), TypeError, "policy_loss: token_ids has dtype torch.float32; expected int64 or int32",
    ),
    "token id out of range": (
        _policy(token_ids=OUT_OF_RANGE), ValueError,
        "policy_loss: token_ids[1, 2] is 8; expected 0 to 7",
    ),
    "an id that another ignore_index would hide": (
        _policy(token_ids=torch.full((2, 3), -100), ignore_index=-1), ValueError,
        "policy_loss: token_ids[0, 0] is -100; expected 0 to 7 or ignore_index = -1",
    ),
    "advantages": (
        _policy(advantages=torch.zeros(3)), ValueError,
        "policy_loss: advantages has shape [3]; expected [2], one a sequence, or [2, 3]",
    ),
    "advantages per token": (
        _policy(advantages=torch.zeros(3, 2)), ValueError, "advantages has shape [3, 2]; expected [2, 3], one value a",
    ),
    "advantages list": (_policy(advantages=[1.0]), TypeError, "advantages is list; expected a torch.Tensor"),
    "advantages device": (
        _policy(advantages=ADVANTAGES.to("meta")), ValueError, "advantages is on meta; expected cpu like logits",
    ),
    "old_logprobs": (
        _policy(old_logprobs=torch.zeros(2, 4)), ValueError,
        "policy_loss: old_logprobs has shape [2, 4]; expected [2, 3], one value a token",
    ),
    "reference_logprobs": (
        _policy(reference_logprobs=torch.zeros(2)), ValueError, "reference_logprobs has shape [2]; expected [2, 3]",
    ),
    "sampling_logprobs": (
        _policy(sampling_logprobs=torch.zeros(2)), ValueError, "sampling_logprobs has shape [2]; expected [2, 3]",
    ),
    "token_weights": (
        _policy(token_weights=torch.zeros(2, 1)), ValueError, "token_weights has shape [2, 1]; expected [2, 3]",
    ),
    "kl_weights": (
        _policy(kl_weights=torch.zeros(2), kl_coef=0.1), ValueError, "kl_weights has shape [2]; expected [2, 3]",
    ),
    "kl_weights alone": (
        _policy(kl_weights=torch.ones(2, 3)), ValueError, "kl_weights is given, but kl_coef is 0; it multiplies the KL",
    ),
    "reference_logits": (
        _policy(reference_logits=ROWS[:, :2]), ValueError, "reference_logits has shape [2, 2, 8]; expected [2, 3, 8]",
    ),
    "mask": (_policy(mask=torch.ones(2, 4).bool()), ValueError, "policy_loss: mask has shape [2, 4]; expected [2, 3]"),
    "mask dtype": (_policy(mask=TOKENS), TypeError, "mask has dtype torch.float32; expected bool or integers"),
    "loss_type": (
        _policy(loss_type="ppo"), ValueError, "policy_loss: loss_type is 'ppo'; expected grpo, bnpo, dr_grpo, dapo,",
    ),
    "preset": (_policy(preset="TRL"), ValueError, "preset is 'TRL'; expected None, trl, verl or nemo_rl"),
    "importance_level": (
        _policy(importance_level="batch"), ValueError,
        "importance_level is 'batch'; expected token, sequence or sequence_sum",
    ),
    "level of gspo": (
        _policy(loss_type="gspo", importance_level="token"), ValueError,
        "importance_level is 'token'; expected sequence or sequence_sum for loss_type 'gspo'",
    ),
    "level of reinforce": (
        _policy(loss_type="reinforce", importance_level="sequence"), ValueError,
        "importance_level is 'sequence'; expected token for loss_type 'reinforce'",
    ),
    "no old_logprobs": (
        _policy(loss_type="dppo_tv"), ValueError,
        "old_logprobs is None; loss_type 'dppo_tv' bounds the distance from them, pass [2, 3]",
    ),
    "delta with cispo": (
        _policy(loss_type="cispo", delta=2.0), ValueError,
        "policy_loss: delta is 2.0, which loss_type 'cispo' has no use for; it is for grpo, bnpo, dr_grpo, dapo,",
    ),
    "clip with sapo": (
        _policy(loss_type="sapo", clip_low=0.2), ValueError, "clip_low is 0.2, which loss_type 'sapo' has no use for",
    ),
    "delta and dual_clip": (
        _policy(delta=4.0, dual_clip=3.0), ValueError,
        "dual_clip and delta both bound the loss where the advantage is negative; pass one",
    ),
    "dual_clip": (_policy(dual_clip=0.9), ValueError, "policy_loss: dual_clip is 0.9; expected 1 or more"),
    "delta": (_policy(delta=0.0), ValueError, "delta is 0.0; expected above 0"),
    "clip_low": (_policy(clip_low=-0.1), ValueError, "clip_low is -0.1; expected 0 or more"),
    "clip_high NaN": (_policy(clip_high=math.nan), ValueError, "clip_high is nan; expected 0 or more"),
    "clip_high string": (_policy(clip_high="0.2"), TypeError, "clip_high is '0.2'; expected a number"),
    "absolute clip": (
        _policy(clip_absolute=True, clip_low=1.2, clip_high=0.8), ValueError,
        "clip_low is 1.2; expected below clip_high = 0.8",
    ),
    "log_ratio_clamp": (
        _policy(log_ratio_clamp=0.0), ValueError, "log_ratio_clamp is 0.0; expected a number above 0 or (low, high)",
    ),
    "sapo_temperatures": (
        _policy(loss_type="sapo", sapo_temperatures=1.0), TypeError, "sapo_temperatures is 1.0; expected a pair",
    ),
    "entropy_quantile": (
        _policy(entropy_quantile=0.0), ValueError, "entropy_quantile is 0.0; expected above 0 and at most 1",
    ),
    "kl_coef": (_policy(kl_coef=math.inf), ValueError, "kl_coef is inf; expected finite"),
    "no reference": (
        _policy(kl_coef=0.1), ValueError,
        "reference_logprobs is None; kl_coef = 0.1 needs them, shape [2, 3], or reference_logits",
    ),
    "no reference_logits": (
        _policy(kl_coef=0.1, kl_estimator="reverse_kl"), ValueError,
        "reference_logits is None; kl_estimator 'reverse_kl' is over the vocabulary and needs them, shape [2, 3, 'V']",
    ),
    "logprobs for an exact KL": (
        _policy(reference_logprobs=TOKENS, kl_estimator="js"), ValueError,
        "reference_logits is None; kl_estimator 'js' is over the vocabulary",
    ),
    "two references": (
        _policy(reference_logprobs=TOKENS, reference_logits=ROWS), ValueError,
        "reference_logprobs and reference_logits are both given; pass one",
    ),
    "exact and corrected": (
        _policy(reference_logits=ROWS, kl_estimator="js", kl_bias_correction=True), ValueError,
        "kl_bias_correction is given, but kl_estimator 'js' is exact and needs none",
    ),
    "corrected twice": (
        _policy(reference_logprobs=TOKENS, kl_estimator="k3_plus", kl_bias_correction=True), ValueError,
        "kl_bias_correction is True, but kl_estimator 'k3_plus' is corrected; pass 'k3'",
    ),
    "off_policy without sampling": (
        _policy(off_policy="token_mask"), ValueError,
        "sampling_logprobs is None; off_policy corrects for them, pass [2, 3]",
    ),
    "off_policy bounds": (
        _policy(sampling_logprobs=TOKENS, off_policy_min=3.0), ValueError,
        "off_policy_min is 3.0; expected at most off_policy_max = 2.0",
    ),
    "vespo of a sequence": (
        _policy(loss_type="vespo", sampling_logprobs=TOKENS, off_policy="sequence_mask"), ValueError,
        "off_policy is 'sequence_mask'; expected a token level for loss_type 'vespo'",
    ),
    "cov_bounds": (
        _policy(cov_bounds=(1.0, 5.0)), ValueError,
        "cov_bounds is given, but cov_selection is 'none'; expected clip",
    ),
    "cov of sequences": (
        _policy(cov_selection="clip", importance_level="sequence"), ValueError,
        "cov_selection is 'clip'; it needs importance_level 'token'",
    ),
    "aggregation": (_policy(aggregation="mean"), ValueError, "aggregation is 'mean'; expected token-mean, token-sum,"),
    "normalizer of dr_grpo": (
        _policy(loss_type="dr_grpo"), ValueError,
        "normalizer is None; loss_type 'dr_grpo' divides by a constant, pass sequences × longest length",
    ),
    "normalizer": (_policy(normalizer=0), ValueError, "policy_loss: normalizer is 0; expected a number above 0"),
    "normalizers": (
        _policy(normalizer=torch.ones(2)), ValueError, "normalizer has shape [2]; expected a number or one element",
    ),
    "packed aggregation": (
        _policy(**PACKED), ValueError,
        "policy_loss: aggregation is 'seq-mean-token-mean', which needs sequences: logits [batch, tokens, vocab]",
    ),
    "packed level": (
        _policy(**PACKED, loss_type="gspo", aggregation="token-mean"), ValueError,
        "importance_level is 'sequence', which needs sequences",
    ),
    "packed loss type": (
        _policy(**PACKED, loss_type="vespo"), ValueError, "loss_type is 'vespo', which needs sequences",
    ),
    "packed off_policy": (
        _policy(**PACKED, loss_type="dapo", sampling_logprobs=TOKENS[0], off_policy="sequence_mask"), ValueError,
        "off_policy is 'sequence_mask', which needs sequences",
    ),
    "both forms of packing": (
        _policy(**PACKED, cu_seqlens=BOUNDS, sequence_ids=LABELS[0]), ValueError,
        "policy_loss: cu_seqlens and sequence_ids are both given; pass one",
    ),
    "packing of rows": (
        _policy(cu_seqlens=BOUNDS), ValueError,
        "policy_loss: cu_seqlens is given beside logits of shape [2, 3, 8], whose rows are sequences; expected",
    ),
    "sequence_ids": (
        _policy(**PACKED, sequence_ids=LABELS), ValueError, "policy_loss: sequence_ids has shape [2, 3]; expected [3]",
    ),
    "sequence_ids dtype": (
        _policy(**PACKED, sequence_ids=TOKENS[0]), TypeError, "sequence_ids has dtype torch.float32; expected int64",
    ),
    "cu_seqlens list": (_policy(**PACKED, cu_seqlens=[0, 3]), TypeError, "cu_seqlens is list; expected a torch.Tensor"),
    "cu_seqlens dtype": (
        _policy(**PACKED, cu_seqlens=torch.zeros(2)), TypeError,
        "cu_seqlens has dtype torch.float32; expected int32 or int64",
    ),
    "cu_seqlens shape": (
        _policy(**PACKED, cu_seqlens=BOUNDS[:0]), ValueError, "cu_seqlens has shape [0]; expected [sequences + 1]",
    ),
    "cu_seqlens device": (
        _policy(**PACKED, cu_seqlens=BOUNDS.to("meta")), ValueError, "cu_seqlens is on meta; expected cpu like logits",
    ),
    **{
        f"cu_seqlens {wrong}": (
            _policy(**PACKED, cu_seqlens=torch.tensor(wrong)), ValueError,
            f"cu_seqlens is {wrong}; expected numbers from 0 on that do not fall, to 3 at most, the number of tokens",
        )
        for wrong in ([1, 3], [0, 4], [0, 2, 1])
    },
    "advantages of bounds": (
        _policy(**{**PACKED, "advantages": torch.zeros(1)}, cu_seqlens=BOUNDS), ValueError,
        "advantages has shape [1]; expected [2], one a sequence of cu_seqlens, or [3]",
    ),
    "advantages of numbers": (
        _policy(**{**PACKED, "advantages": torch.zeros(2)}, sequence_ids=torch.tensor([0, 1, 2])), ValueError,
        "sequence_ids has 2; with advantages of shape [2] expected their places, 0 to 1, or -1 for padding",
    ),
    "sequence_group": (
        _policy(sequence_group="world"), TypeError,
        "policy_loss: sequence_group is str; expected None or a torch.distributed.ProcessGroup",
    ),
    "batch_group of a module": (
        lambda: kk.nn.PolicyLoss(batch_group=3.0, entropy_quantile=0.5), TypeError,
        "PolicyLoss: batch_group is float; expected None or a torch.distributed.ProcessGroup",
    ),
    "packed advantages": (
        _policy(**{**PACKED, "advantages": torch.zeros(2)}), ValueError, "advantages has shape [2]; expected [3], one",
    ),
    "tensor of a module": (
        lambda: kk.nn.PolicyLoss(mask=LABELS), TypeError, "PolicyLoss: mask belongs to a batch; give it to forward()",
    ),
    "option of a module": (
        lambda: kk.nn.PolicyLoss(clip=0.2), TypeError, "PolicyLoss: clip is no option of policy_loss; did you mean",
    ),
    "value of a module": (
        lambda: kk.nn.PolicyLoss(dual_clip=0.5), ValueError, "PolicyLoss: dual_clip is 0.5; expected 1 or more",
    ),
}  # fmt: skip
