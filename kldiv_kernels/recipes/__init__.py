"""Methods of papers by name, each a few lines of PyTorch over `token_stats`, `policy_loss` and the top-k losses.

`kk.recipes.find("tsd_kd")` and `kk.recipes.listing()` say which there are and what paper and code disagree on; a module
is a family. `cross_tokenizer` has losses for a teacher of another vocabulary. `schedules` has numbers that change with
the step. `reductions`, `selection`, `lists`, `f_divergences`, `mixtures`, `token_spans`, `vocabularies` and `composed`
are what the methods are built of.
"""

from __future__ import annotations

from kldiv_kernels.recipes import f_divergences, lists, mixtures, reductions, schedules, selection
from kldiv_kernels.recipes.action_policies import (
    categorical_ppo_loss,
    centred_log_ratio,
    gaussian_grpo_loss,
    grpo_guard_loss,
    hinge_discriminator_loss,
)
from kldiv_kernels.recipes.batch_coupling import (
    dro_loss,
    frequency_sharpened_targets,
    marginal_kl,
    repri_loss,
    sinkd_loss,
    soft_cross_entropy,
)
from kldiv_kernels.recipes.class_margins import (
    dkd_loss,
    kdpp_loss,
    klom,
    logit_matching_loss,
    norm_direction_loss,
    target_margin,
)
from kldiv_kernels.recipes.classifier import (
    nkd_loss,
    ofa_loss,
    uskd_loss,
)
from kldiv_kernels.recipes.clipped_kl import (
    clipped_divergence_rows,
)
from kldiv_kernels.recipes.consistency import (
    legogcd_loss,
    local_entropy,
    mean_entropy_maximisation,
    mutual_kl,
    semixup_loss,
    softmax_mse,
)
from kldiv_kernels.recipes.continuous import (
    conditional_cs_divergence,
    cs_bottleneck_loss,
    cs_mutual_information,
    factor_consistency_loss,
    grqo_loss,
    moment_kl,
    posterior_kl,
    vsae_loss,
)
from kldiv_kernels.recipes.cross_tokenizer import (
    gold_loss,
    mapped_divergence_loss,
    uld_loss,
)
from kldiv_kernels.recipes.diagnostics import (
    intervention_divergence,
    logit_range_and_variance,
    step_radius,
    topk_turn_divergence,
    turn_divergence,
)
from kldiv_kernels.recipes.diffusion import (
    controlled_diffusion_loss,
    f_distill_loss,
    identity_reward_loss,
    path_kl,
    score_divergence_loss,
)
from kldiv_kernels.recipes.distillation import (
    activation_threshold_loss,
    bidirectional_kl,
    entropy_aware_kl,
    gere_kd_loss,
    kd_loss,
    memorization_metrics,
    paced_loss,
)
from kldiv_kernels.recipes.divergence_penalties import (
    chi2_estimate,
    chi2_penalty,
    dph_loss,
    occupancy_reward_penalty,
    rapo_loss,
    sqrt_chi2_penalty,
)
from kldiv_kernels.recipes.entropy_control import (
    entropy_band,
    safe_loss,
    safe_value_loss,
    soft_min,
    spine_loss,
)
from kldiv_kernels.recipes.fine_tuning import (
    asft_loss,
    demonstration_regularized_loss,
    dft_loss,
    two_vocabulary_cross_entropy,
)
from kldiv_kernels.recipes.hints_and_experts import (
    calibrl_loss,
    leaky_hinge,
    trace_loss,
)
from kldiv_kernels.recipes.inference import (
    ck_plug_logits,
    fused_logits,
    guided_logits,
    knowledge_gain,
)
from kldiv_kernels.recipes.listwise import (
    adaptive_tau,
    adpo_loss,
    centered_reward_loss,
    pld_loss,
    reward_targets,
    velocity_anchor,
)
from kldiv_kernels.recipes.on_policy_distillation import (
    gopd_advantages,
    gopd_loss,
    tcod_loss,
    vopd_advantages,
    vopd_loss,
)
from kldiv_kernels.recipes.policy_gradient import (
    clip_cov_loss,
    entropy_change,
    kl_cov_loss,
    oreal_loss,
    token_reward_loss,
    topr_loss,
)
from kldiv_kernels.recipes.preference import (
    hypo_loss,
    mapo_weights,
    rrpo_loss,
    sparsepo_loss,
    tdpo_loss,
)
from kldiv_kernels.recipes.preference_games import (
    extragradient_step,
    inpo_loss,
    mirror_prox_loss,
    online_ipo_loss,
)
from kldiv_kernels.recipes.prompt_groups import (
    answer_entropy,
    copo_global_advantages,
    copo_loss,
    drpo_loss,
)
from kldiv_kernels.recipes.rare_tokens import (
    lp_reg_full_loss,
    lp_reg_loss,
    min_p_proxy,
)
from kldiv_kernels.recipes.recipe import (
    Recipe,
)
from kldiv_kernels.recipes.registry import (
    FAMILIES,
    RECIPES,
    find,
    listing,
)
from kldiv_kernels.recipes.regularized_policy import (
    apo_loss,
    dads_weights,
    difficulty_sampling_weights,
    fg_expo_loss,
    prorl_loss,
    stcr_advantages,
)
from kldiv_kernels.recipes.reward_shaping import (
    bundle_advantages,
    calibrated_rewards,
    difficulty_mask,
    ensemble_rewards,
    kl_shaped_rewards,
    mvar_advantages,
    win_transform,
)
from kldiv_kernels.recipes.selective_distillation import (
    scope_advantages,
    scope_loss,
    tsd_kd_loss,
)
from kldiv_kernels.recipes.sequence_divergences import (
    acceptance_kl,
    f_dpg_loss,
    f_dpg_rewards,
    implicit_reward_loss,
    posterior_logits,
    running_log_z,
)
from kldiv_kernels.recipes.sequence_preference import (
    diffusion_dpo_loss,
    f_dpo_loss,
    genarm_loss,
    reward_weighted_loss,
    xpo_loss,
)
from kldiv_kernels.recipes.sparse_masks import (
    SparseMask,
)
from kldiv_kernels.recipes.teacher_and_reward import (
    kdrl_loss,
    kdrl_mask,
    skill_sd_loss,
    trrd_loss,
)
from kldiv_kernels.recipes.token_credit import (
    conflict_weights,
    dgpo_weights,
    gtpo_loss,
    process_advantages,
    steer_weights,
)
from kldiv_kernels.recipes.token_spans import (
    Spans,
    align_spans,
)
from kldiv_kernels.recipes.vocabularies import (
    VocabularyMap,
    vocabulary_map,
)

__all__ = [
    "FAMILIES",
    "RECIPES",
    "Recipe",
    "Spans",
    "SparseMask",
    "VocabularyMap",
    "acceptance_kl",
    "activation_threshold_loss",
    "adaptive_tau",
    "adpo_loss",
    "align_spans",
    "answer_entropy",
    "apo_loss",
    "asft_loss",
    "bidirectional_kl",
    "bundle_advantages",
    "calibrated_rewards",
    "calibrl_loss",
    "categorical_ppo_loss",
    "centered_reward_loss",
    "centred_log_ratio",
    "chi2_estimate",
    "chi2_penalty",
    "ck_plug_logits",
    "clip_cov_loss",
    "clipped_divergence_rows",
    "conditional_cs_divergence",
    "conflict_weights",
    "controlled_diffusion_loss",
    "copo_global_advantages",
    "copo_loss",
    "cs_bottleneck_loss",
    "cs_mutual_information",
    "dads_weights",
    "demonstration_regularized_loss",
    "dft_loss",
    "dgpo_weights",
    "difficulty_mask",
    "difficulty_sampling_weights",
    "diffusion_dpo_loss",
    "dkd_loss",
    "dph_loss",
    "dro_loss",
    "drpo_loss",
    "ensemble_rewards",
    "entropy_aware_kl",
    "entropy_band",
    "entropy_change",
    "extragradient_step",
    "f_distill_loss",
    "f_divergences",
    "f_dpg_loss",
    "f_dpg_rewards",
    "f_dpo_loss",
    "factor_consistency_loss",
    "fg_expo_loss",
    "find",
    "frequency_sharpened_targets",
    "fused_logits",
    "gaussian_grpo_loss",
    "genarm_loss",
    "gere_kd_loss",
    "gold_loss",
    "gopd_advantages",
    "gopd_loss",
    "grpo_guard_loss",
    "grqo_loss",
    "gtpo_loss",
    "guided_logits",
    "hinge_discriminator_loss",
    "hypo_loss",
    "identity_reward_loss",
    "implicit_reward_loss",
    "inpo_loss",
    "intervention_divergence",
    "kd_loss",
    "kdpp_loss",
    "kdrl_loss",
    "kdrl_mask",
    "kl_cov_loss",
    "kl_shaped_rewards",
    "klom",
    "knowledge_gain",
    "leaky_hinge",
    "legogcd_loss",
    "listing",
    "lists",
    "local_entropy",
    "logit_matching_loss",
    "logit_range_and_variance",
    "lp_reg_full_loss",
    "lp_reg_loss",
    "mapo_weights",
    "mapped_divergence_loss",
    "marginal_kl",
    "mean_entropy_maximisation",
    "memorization_metrics",
    "min_p_proxy",
    "mirror_prox_loss",
    "mixtures",
    "moment_kl",
    "mutual_kl",
    "mvar_advantages",
    "nkd_loss",
    "norm_direction_loss",
    "occupancy_reward_penalty",
    "ofa_loss",
    "online_ipo_loss",
    "oreal_loss",
    "paced_loss",
    "path_kl",
    "pld_loss",
    "posterior_kl",
    "posterior_logits",
    "process_advantages",
    "prorl_loss",
    "rapo_loss",
    "reductions",
    "repri_loss",
    "reward_targets",
    "reward_weighted_loss",
    "rrpo_loss",
    "running_log_z",
    "safe_loss",
    "safe_value_loss",
    "schedules",
    "scope_advantages",
    "scope_loss",
    "score_divergence_loss",
    "selection",
    "semixup_loss",
    "sinkd_loss",
    "skill_sd_loss",
    "soft_cross_entropy",
    "soft_min",
    "softmax_mse",
    "sparsepo_loss",
    "spine_loss",
    "sqrt_chi2_penalty",
    "stcr_advantages",
    "steer_weights",
    "step_radius",
    "target_margin",
    "tcod_loss",
    "tdpo_loss",
    "token_reward_loss",
    "topk_turn_divergence",
    "topr_loss",
    "trace_loss",
    "trrd_loss",
    "tsd_kd_loss",
    "turn_divergence",
    "two_vocabulary_cross_entropy",
    "uld_loss",
    "uskd_loss",
    "velocity_anchor",
    "vocabulary_map",
    "vopd_advantages",
    "vopd_loss",
    "vsae_loss",
    "win_transform",
    "xpo_loss",
]
