"""Policy-gradient losses of the GRPO family: the logits by kernels, the rest on [batch, tokens]."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.backends import OneReadPolicy, get
from kldiv_kernels.choices import (
    Aggregation,
    Backend,
    CovSelection,
    EntropyAggregation,
    ImportanceLevel,
    KLEstimator,
    LossType,
    OffPolicy,
    Preset,
)
from kldiv_kernels.dtensors import with_spread_rows
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.losses import in_place_checked
from kldiv_kernels.parallel import Group, logits_or_shared, together
from kldiv_kernels.policy import inputs as policy_inputs
from kldiv_kernels.policy import one_read
from kldiv_kernels.policy.assembly import PolicyLoss, assemble, outcome
from kldiv_kernels.policy.options import EXACT_KL, PolicyOptions, resolve
from kldiv_kernels.policy.sequences import Sequences, SequenceSums, in_sequences, sequences_of
from kldiv_kernels.policy.spread import of_spread_rows
from kldiv_kernels.sources import Attach, Source
from kldiv_kernels.tracing import constant

# Given for ignored tokens, which are masked: no token has this number.
_NO_TOKEN = -(2**63)


@with_spread_rows(of_spread_rows)
@together
def policy_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    loss_type: LossType | None = None,
    preset: Preset | None = None,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    reference_logits: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    anchor_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    mask: Tensor | None = None,
    importance_level: ImportanceLevel | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    clip_absolute: bool | None = None,
    dual_clip: float | None = None,
    delta: float | None = None,
    log_ratio_clamp: float | tuple[float, float] | None = None,
    sapo_temperatures: tuple[float, float] | None = None,
    vespo_positive: tuple[float, float] | None = None,
    vespo_negative: tuple[float, float] | None = None,
    cov_selection: CovSelection | None = None,
    cov_fraction: float | None = None,
    cov_bounds: tuple[float, float] | None = None,
    cov_kl_coef: float | None = None,
    off_policy: OffPolicy | None = None,
    off_policy_min: float | None = None,
    off_policy_max: float | None = None,
    off_policy_threshold: float | None = None,
    kl_coef: float | None = None,
    kl_estimator: KLEstimator | None = None,
    kl_bias_correction: bool | None = None,
    kl_log_ratio_clamp: float | None = None,
    kl_clamp: float | None = None,
    entropy_coef: float | None = None,
    entropy_quantile: float | None = None,
    entropy_aggregation: EntropyAggregation | None = None,
    aggregation: Aggregation | None = None,
    normalizer: float | Tensor | None = None,
    count_empty_sequences: bool | None = None,
    per_token_gradient: bool = False,
    temperature: Parameter = 1.0,
    reference_temperature: Parameter | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    in_place: bool = False,
    group: Group | None = None,
    vocab_start: int | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    sequence_group: Group | None = None,
    batch_group: Group | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""Loss of a policy π = softmax(logits/τ) on sampled tokens, with its KL penalty and entropy bonus.

    loss = aggregate(term·selection·token_weights + kl_coef·kl_weights·KL) − entropy_coef·aggregate(entropy);
    `policy/terms.py` has the formula of each term. Log-probabilities are in nats at temperature τ.
    Values and the gradient of the logits come out of one pass over them where a token's gradient depends on that token
    alone (grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo, reinforce and dppo without options that look at sequences or
    the batch; bfloat16 and float32 on the `cpu` and `cuda` backends); else they are read again for the gradient.
    An option left at None takes the preset's default, which is the one given here without a preset; `math.inf` turns
    a bound off.

    Args:
        logits: [B, T, V], position t predicting token t of the completion; or [N, V] for packed tokens, with [N] in
            place of [B, T] below. What looks at sequences then needs `cu_seqlens` or `sequence_ids`.
        token_ids: [B, T] integers. A token equal to `ignore_index` (default -100) is masked.
        advantages: [B], or [B, T] for one a token; of packed sequences [S] or [N] ([S] where `sequence_ids` are places
            in it). What has the shape of the tokens is one a token.
        loss_type: grpo (default), bnpo, dr_grpo, dapo, luspo: the clipped surrogate, which differ in `aggregation`
            only; gspo: the same on the sequence's ratio; cispo, sapo, vespo, gmpo, reinforce, topr, dppo_tv, dppo_kl.
        preset: "trl" (1.16), "verl" or "nemo_rl": that framework's defaults for the loss type (`policy/options.py`);
            what is given beside it counts. Their default loss_type is dapo, the token mean.
        old_logprobs: [B, T], the policy that the advantages belong to. Default: this one, so that the ratio is 1; topr
            and dppo need them.
        reference_logprobs, reference_logits: [B, T] or [B, T, V], for the KL: one of them. With kl_coef 0 the KL is a
            metric only.
        kl_weights: [B, T], multiplies the KL of each token, without gradient; the metric is without it.
        reference_temperature: of reference_logits, a float or [B, T]. Default: temperature.
        sampling_logprobs: [B, T], from the engine that sampled the tokens; a NaN there counts as old_logprobs.
        anchor_logprobs: [B, T], the denominator of the ratio in place of old_logprobs (a mixture with a teacher, say).
        token_weights: [B, T], multiplies the policy term, without gradient.
        mask: [B, T] bool or integers; where it is 0 no argument is looked at, NaN or not.
        importance_level: "token"; "sequence": the mean log-ratio of the sequence, as in GSPO and all frameworks (for
            topr in verl); "sequence_sum": its sum (topr, as in the paper). Default: the loss type's own.
        clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high], for cispo too, as in verl, NeMo-RL
            and SkyRL; gmpo clips the log-ratio to [−clip_low, clip_high]; for dppo they bound the probability's move.
            0.2 each. `clip_absolute=True`: [clip_low, clip_high] itself, TRL's cispo (with clip_low=0; its
            documentation recommends clip_high=5, its default is 0.2 too).
        dual_clip: 1 or more; bounds the clipped loss by −dual_clip·A where A < 0. Default off (verl: 3).
        delta: upper bound of the unclipped ratio (two-sided GRPO, TRL); for dppo of the weight, there 20. Default off.
        log_ratio_clamp: the log-ratio at its level is clamped to ±this, or (low, high). Default 20, as in verl; off in
            TRL and NeMo-RL, where a loss that no other bound holds may then overflow.
        sapo_temperatures: for A > 0 and otherwise; (1, 1.05).
        vespo_positive, vespo_negative: (k, λ) for A ≥ 0, (2, 3), and for A < 0, (3, 2).
        cov_selection: "clip" drops `cov_fraction` (2e-4) of the tokens, drawn from torch's random numbers, among those
            whose covariance of log-probability and advantage is inside `cov_bounds` (1, 5); "kl" adds
            cov_kl_coef·|log-ratio| (1) to the cov_fraction with the highest; KL-Cov as published has clip_low=1,
            clip_high=inf beside it. Default "none".
        off_policy: what the weight π_old/π_sampling does when sampling_logprobs are given: "token_truncate" (default,
            verl's) or "token_mask" (IcePop) by off_policy_min (0) and off_policy_max (2; TRL 3), "sequence_truncate" or
            "sequence_mask" (TRL) by the product over the sequence, "none". A mask is 0 outside the bounds.
        off_policy_threshold: drops sequences with A < 0 whose mean log π_sampling − log π (without sampling_logprobs:
            π_old) is above it. Default off.
        kl_coef, kl_estimator: 0 and "k3". k1, k2, k3, abs, k3_plus estimate KL(π‖π_ref) from the sampled tokens;
            forward_kl KL(π_ref‖π), reverse_kl KL(π‖π_ref), js (β = ½) and hellinger are exact, from reference_logits.
            Which way each one's gradient points is in `policy/weights.py`. k3_plus is verl's "k3+" and NeMo-RL's k3.
        kl_bias_correction: multiplies a sampled estimator by the ratio, with gradient. Default False; True in TRL.
        kl_log_ratio_clamp, kl_clamp: bounds of |log π_ref − log π| and of the estimate. Default off, as in TRL; 20 and
            10 in verl (k3) and NeMo-RL.
        entropy_coef: of the exact entropy, which has a gradient. 0.
        entropy_quantile: the fraction of tokens, those with the highest entropy, that keep policy term and bonus. 1.
        entropy_aggregation: "loss" (default, verl): as the loss; "token-mean" (TRL): over this call's tokens.
        aggregation: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum". Default, as in
            TRL: seq-mean-token-mean for grpo, sapo, gspo and gmpo, -token-sum for luspo, token-sum for dr_grpo,
            token-mean for the others.
        normalizer: number or scalar tensor by which the sum over tokens or sequences is divided in place of the number
            here: give the number over all ranks and accumulation steps. dr_grpo needs it: sequences × longest length.
        count_empty_sequences: whether a sequence without tokens counts as one in a mean over sequences. True, as in
            TRL; False in verl and NeMo-RL.
        per_token_gradient: whether per_token_loss has a gradient as well, for a reduction of your own. The logits are
            then read a second time for the gradient.
        in_place: True: the gradient of the logits is written over them; see `divergence_loss`. An error where the
            gradient does not come out of the pass that finds the values.
        group, vocab_start: see `token_stats`. Loss and metrics are the same on all ranks of the group: they are of
            whole rows, and not to be summed over it. The logits are read a second time for the gradient.
        cu_seqlens: [S + 1] int32 or int64, for packed tokens [N] or [1, N]: sequence i has the tokens from
            cu_seqlens[i] to cu_seqlens[i + 1], as in FlashAttention; it may have none. Tokens behind the last bound are
            padding. The result is that of the padded [S, T].
        sequence_ids: [N] (or [1, N]) integers in place of cu_seqlens: equal ones are a sequence, wherever they stand;
            −1 is padding. A number that no token has is no sequence.
        sequence_group: the ranks that hold parts of the same sequences (context parallelism): the same B or S each, in
            the same order; T and N may differ. Sums and counts of a sequence, of the tokens and of the sequences are
            then over its ranks, and the loss is this rank's share: the sum over the ranks is the loss of the whole
            sequences, and each gradient is that of this sum. metrics are of this rank's tokens. Forward: one all_reduce
            of [sums, B] numbers, with one to five sums; sequence_ids are gathered too, 8 bytes a token, for which the
            host waits, and count as so many sequences. Backward: one all_reduce of the same size where a gradient flows
            through a sum (importance_level other than "token", gmpo), else none. Every rank has to call, and to run
            backward.
        batch_group: the ranks that have the tokens of one batch, for entropy_quantile and cov_selection; the normalizer
            stays this rank's. Each token is on one of them, so ranks of one `group` are in batch_groups of their own,
            and "clip" wants the same random numbers on them. Counting 2,048 bins takes 3 all_reduces of 32 kB
            (float32), whatever the number of tokens.
        temperature, vocab_size, backend: see `token_stats`.

    Returns:
        PolicyLoss, float32 (float64 for float64 logits); without a valid token loss and gradient are 0. metrics:
        tokens (their number), ratio_max, and as means over the valid tokens entropy, ratio_mean, approx_kl (k3 of
        KL(π_old‖π)) and, where they apply, clip_fraction_low, clip_fraction_high, clip_fraction_dual,
        clip_fraction_cov, kl (the estimate), exact_kl, sampling_kl (log π_sampling − log π_old), off_policy_weight.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed; on all ranks of a group where one
        raises, or has other options or another number of sequences (on CPUs; elsewhere with KLDIV_CHECK_VALUES=1).
        RuntimeError from a double backward.

    >>> import torch, kldiv_kernels as kk
    >>> logits = torch.tensor([[[2.0, 0.5, -1.0], [0.0, 1.0, 0.0]]], requires_grad=True)
    >>> tokens, old = torch.tensor([[0, 1]]), torch.tensor([[-0.5, -0.5]])
    >>> out = kk.policy_loss(logits, tokens, torch.tensor([1.0]), old_logprobs=old, entropy_coef=0.01)
    >>> out.loss.backward()
    >>> round(out.loss.item(), 4), round(out.metrics["clip_fraction_high"].item(), 2)
    (-1.0829, 0.5)
    >>> bounds = torch.tensor([0, 1, 2])  # the same tokens, packed: two sequences of one
    >>> packed = kk.policy_loss(logits[0], tokens[0], torch.tensor([1.0, -1.0]), loss_type="gspo", cu_seqlens=bounds)
    >>> packed.loss.item(), packed.per_token_loss.tolist()
    (0.0, [-1.0, 1.0])
    """
    where = "policy_loss"
    options = resolve(
        where, preset,
        {
            "loss_type": loss_type, "importance_level": importance_level, "clip_low": clip_low,
            "clip_high": clip_high, "clip_absolute": clip_absolute, "dual_clip": dual_clip, "delta": delta,
            "log_ratio_clamp": log_ratio_clamp, "sapo_temperatures": sapo_temperatures,
            "vespo_positive": vespo_positive, "vespo_negative": vespo_negative, "cov_selection": cov_selection,
            "cov_fraction": cov_fraction, "cov_bounds": cov_bounds, "cov_kl_coef": cov_kl_coef,
            "off_policy": off_policy, "off_policy_min": off_policy_min, "off_policy_max": off_policy_max,
            "off_policy_threshold": off_policy_threshold, "kl_coef": kl_coef, "kl_estimator": kl_estimator,
            "kl_bias_correction": kl_bias_correction, "kl_log_ratio_clamp": kl_log_ratio_clamp, "kl_clamp": kl_clamp,
            "entropy_coef": entropy_coef, "entropy_quantile": entropy_quantile,
            "entropy_aggregation": entropy_aggregation, "aggregation": aggregation,
            "count_empty_sequences": count_empty_sequences,
        },
    )  # fmt: skip
    tensors = policy_inputs.Tensors(
        token_ids, advantages, mask, old_logprobs, reference_logprobs, reference_logits, sampling_logprobs,
        anchor_logprobs, token_weights, kl_weights, normalizer, cu_seqlens, sequence_ids,
    )  # fmt: skip
    corrects = any(option is not None for option in (off_policy, off_policy_min, off_policy_max))
    frozen = reference_logits.detach() if isinstance(reference_logits, Tensor) else reference_logits
    source = logits_or_shared(where, logits, frozen, group, vocab_start, vocab_size, in_place_checked(where, in_place))
    return policy_loss_of(
        where, source, tensors, options, policy_inputs.Groups(sequence_group, batch_group), corrects=corrects,
        per_token_gradient=per_token_gradient, temperature=temperature, reference_temperature=reference_temperature,
        ignore_index=ignore_index, vocab_size=vocab_size, backend=backend,
    )  # fmt: skip


def policy_loss_of(
    where: str,
    source: Source,
    tensors: policy_inputs.Tensors,
    options: PolicyOptions,
    groups: policy_inputs.Groups,
    *,
    corrects: bool,
    per_token_gradient: bool,
    temperature: Parameter,
    reference_temperature: Parameter | None,
    ignore_index: int,
    vocab_size: int | None,
    backend: str,
) -> PolicyLoss:
    """`policy_loss` of logits wherever they come from. `corrects`: an option of the off-policy correction was given."""
    logits, token_ids = source.logits, tensors.token_ids
    policy_inputs.check(where, logits, tensors, options, corrects)
    groups = policy_inputs.groups_checked(where, groups, options)
    valid = policy_inputs.valid_tokens(tensors, ignore_index)
    valid = in_sequences(valid, tensors.cu_seqlens, tensors.sequence_ids)
    if reference_temperature is not None and source.reference is None:
        raise ValueError(f"{where}: reference_temperature is given; it divides reference_logits, which are None")
    stats = ["logprob", "entropy"]
    if source.reference is not None:
        stats.append(options.kl_estimator if options.kl_estimator in EXACT_KL else "reference_logprob")
    try:
        call = inputs.prepare(
            where, logits, source.reference, torch.where(valid, token_ids, 0),
            stats=inputs.statistics(stats, where), temperature=temperature, reference_temperature=reference_temperature,
            alpha=0.5, beta=0.5, mask=valid, ignore_index=_NO_TOKEN, vocab_size=vocab_size, exclude=None,
        )  # fmt: skip
    except IndexError as error:
        # A token outside the vocabulary: it is called a label there, and IndexError is for labels.
        found = str(error).replace(f"{where}: labels", f"{where}: token_ids").replace(str(_NO_TOKEN), str(ignore_index))
        raise ValueError(found) from None
    chosen = inputs.select(call, backend, where)
    waits = "per_token_gradient is True" if per_token_gradient else one_read.waits(options, tensors)
    if waits is None and not _has_one_read(chosen):
        waits = f"the {chosen} backend has no policy loss of one read"
    attach: Attach | None = None
    sums: SequenceSums | None = None

    def shared() -> Sequences:
        policy_inputs.groups_agree(where, groups, tensors, options, logits)
        return sequences_of(valid.shape, tensors.cu_seqlens, tensors.sequence_ids, groups.sequence)

    if source.known_beforehand(where, waits, call, chosen):
        sequences = shared()
        known = one_read.known(tensors, valid, options, call.stats, sequences)
        sums = known.sums
        values, attach = source.policy(call, chosen, known.tokens)
        # Of a KL that is a metric only the reference's log-probabilities come with the values.
        if "reference_logprob" not in call.stats:
            out = outcome(known, values, call.stats, chosen, options, token_ids.shape)
            return replace(out, loss=attach(out.loss))
    else:
        values = source.statistics(call, chosen)
        # Behind what may fail: a process that does tells the others instead.
        sequences = shared()
    named = dict(zip(call.stats, values, strict=True))
    batch = policy_inputs.prepare(tensors, valid, named, sequences, groups.batch)
    out = assemble(batch, options, token_ids.shape, sums)
    loss = out.loss if attach is None else attach(out.loss)
    per_token = out.per_token_loss if per_token_gradient else out.per_token_loss.detach()
    return PolicyLoss(loss, per_token, out.metrics, out.logprob, out.entropy)


def _serves_policy(backend: str) -> bool:
    return isinstance(get(backend), OneReadPolicy)


# torch.compile takes the answer as it is instead of tracing it.
_has_one_read = constant(_serves_policy)
