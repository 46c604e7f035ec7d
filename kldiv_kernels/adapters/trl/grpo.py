"""TRL's GRPOTrainer with the loss of `kldiv_kernels.policy_loss`, from logits instead of TRL's fused LM head."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import use_adapter

from kldiv_kernels.adapters import tensor_parallel
from kldiv_kernels.adapters.trl import grpo_entropy, grpo_metrics
from kldiv_kernels.adapters.trl.grpo_options import is_windowed, policy_arguments, resolved
from kldiv_kernels.adapters.trl.grpo_recipes import GRPORecipe
from kldiv_kernels.adapters.trl.scoring import LogitsOfCompletion, Score, run_outside_autocast
from kldiv_kernels.policy import DPPO, EXACT_KL, looks_at_the_batch, policy_loss
from kldiv_kernels.stats import selective_log_softmax, token_stats

_SCORING_INPUTS = inspect.signature(grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies).parameters


class GRPOTrainer(grpo_trainer.GRPOTrainer):
    """`trl.GRPOTrainer` whose log-probabilities, entropy and loss come from this library. TRL 1.15 or 1.16.

    Arguments, GRPOConfig, data, generation, rewards and logged metrics are TRL's and, with TRL's loss types, so are the
    loss and its gradient. What differs:

    - Current, old and reference log-probabilities are read from the logits of the completion, [batch, completion,
      vocab], which TRL's fused head does not keep in memory. Under autocast accelerate returns them in float32.
    - `policy_loss_options` reaches the loss types, clips, KL estimators, off-policy corrections and aggregations that
      GRPOConfig has no field for.
    - The quantile of `top_entropy_quantile`, and the selections of `cov_selection`, are over the tokens of all
      processes.
    - Where vLLM's log-probability is NaN, off_policy_mask_threshold takes the old policy's; TRL takes the current one.

    Args:
        policy_loss_options: keyword arguments of `policy_loss` that go over what the GRPOConfig comes to, such as
            `{"loss_type": "gmpo"}`, `{"loss_type": "topr"}`, `{"kl_estimator": "reverse_kl"}` or `{"dual_clip": 3.0}`;
            also `backend` and `vocab_size`. An exact `kl_estimator` runs the reference model beside the policy; beta
            is its coefficient. A loss type that TRL does not have takes the defaults of `policy_loss(preset="trl")`
            in place of the GRPOConfig's epsilon, delta and importance_sampling_level.
        recipe: a method of `kk.recipes`, from `recipe_of("kl_cov", {})`: clip_cov, kl_cov, dgpo or kdrl. Its options go
            over the GRPOConfig's, and policy_loss_options over its own.
        recipe_model: what the recipe's `other` names, a causal language model: the reference of dgpo, the teacher of
            kdrl. It is frozen, and reads the completions beside the policy.
        args, kwargs: those of `trl.GRPOTrainer`.

    Raises:
        ValueError: at construction, for what `policy_loss` or this trainer does not allow, and for a model that is
            tensor parallel: TRL samples on each rank by itself.
    """

    # TRL's types are those of any transformers.Trainer, without GRPOConfig's fields.
    args: Any
    model: Any
    max_completion_length: int

    def __init__(
        self,
        *args: Any,
        policy_loss_options: Mapping[str, Any] | None = None,
        recipe: GRPORecipe | None = None,
        recipe_model: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        tensor_parallel.refuse(
            "GRPOTrainer", "and TRL samples on each rank by itself", model=self.model, recipe_model=recipe_model
        )
        self._recipe, self._recipe_model = recipe, self._other_model(recipe, recipe_model)
        own = {} if recipe is None else recipe.options
        self._policy_arguments = policy_arguments(self.args, {**own, **(policy_loss_options or {})})
        self._policy_options = resolved(self._policy_arguments)
        self._how = {"temperature": self.temperature} | {
            name: self._policy_arguments[name] for name in ("backend", "vocab_size") if name in self._policy_arguments
        }
        # As TRL gathers over all processes for its quantile.
        several = self.accelerator.num_processes > 1 and looks_at_the_batch(self._policy_options)
        self._batch_group = distributed.group.WORLD if several else None
        if self.args.cast_lm_head_to_fp32:
            for model in (self.model, self.ref_model):
                if model is not None:
                    run_outside_autocast(self.accelerator.unwrap_model(model).get_output_embeddings())

    def _other_model(self, recipe: GRPORecipe | None, model: Any) -> Any:
        wants = "" if recipe is None else recipe.other
        if bool(wants) != (model is not None):
            state = "given" if model is not None else "None"
            needs = (
                f"the {wants} of {recipe.name}" if recipe is not None and wants else "None: no recipe here reads one"
            )
            raise ValueError(f"GRPOTrainer: recipe_model is {state}; expected {needs}")
        if recipe is not None and recipe.name == "kdrl" and self.beta != 0:
            raise ValueError(f"GRPOTrainer: beta is {self.beta}; expected 0 with kdrl, whose KL is to the teacher")
        if model is None:
            return None
        model.requires_grad_(False)
        return self.accelerator.prepare_model(model, evaluation_mode=True).eval()

    def _of_recipe(self, logits: Tensor, inputs: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
        """What the recipe adds to this call of policy_loss."""
        if self._recipe is None or self._recipe.tensors is None:
            return {}
        with torch.no_grad():
            other, _ = self._completion_logits(self._recipe_model, inputs, with_aux_loss=False)
            return self._recipe.tensors(logits, other, inputs["completion_ids"], mask, self._how)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
            stats = token_stats(logits, labels=token_ids, **self._how)
            return stats.logprob, stats.entropy

        return super()._get_per_token_logps_and_entropies(
            self._scorer(model, logits_to_keep, score), input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _scorer(self, model: Any, completion: int, score: Score) -> LogitsOfCompletion:
        return LogitsOfCompletion(model, self.accelerator.unwrap_model(model), completion, score)

    def _completion_logits(self, model: Any, inputs: Mapping[str, Any], with_aux_loss: bool) -> tuple[Tensor, Any]:
        """Logits of the completion, [batch, completion, vocab], and the auxiliary loss of a mixture of experts."""
        kept: list[Tensor] = []

        def keep(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
            kept.append(logits)
            return token_ids, token_ids

        completion = inputs["completion_ids"].size(1)
        _, _, aux_loss = super()._get_per_token_logps_and_entropies(
            self._scorer(model, completion, keep),
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion,
            compute_aux_loss=with_aux_loss,
            **{name: inputs[name] for name in _SCORING_INPUTS if name in inputs},
        )
        return kept[0], aux_loss

    def _reference_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is not None:
                return self._completion_logits(self.ref_model, inputs, with_aux_loss=False)[0]
            # The policy is an adapter: the model without it, or with the copy that TRL made of it, is the reference.
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                return self._completion_logits(self.model, inputs, with_aux_loss=False)[0]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        logits, aux_loss = self._completion_logits(model, inputs, self.aux_loss_enabled)
        coefficient = grpo_entropy.coefficient(self) / accumulation
        out = policy_loss(
            logits, inputs["completion_ids"], inputs["advantages"],
            preset="trl", mask=mask, temperature=self.temperature, entropy_coef=coefficient,
            normalizer=self._normalizer(inputs, mask, accumulation), batch_group=self._batch_group,
            **self._tensors(logits, inputs, mask) | self._policy_arguments | self._of_recipe(logits, inputs, mask),
        )  # fmt: skip

        metrics = self._metrics["train" if training else "eval"]
        batch = grpo_metrics.Batch(out, self._policy_options, inputs, mask, self._batch_group)
        if self._entropy_bonus_enabled:
            plain = grpo_entropy.loss_without_bonus(batch, coefficient)
            plain = plain if is_windowed(self._policy_options) else plain * accumulation
            metrics["policy_loss"].append(self.accelerator.gather(plain).nanmean().item())
            if training:
                grpo_entropy.update(self, batch, metrics)
        grpo_metrics.log(self, batch, metrics)
        if not self.aux_loss_enabled:
            return out.loss
        metrics["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        loss: Tensor = out.loss + self.router_aux_loss_coef * aux_loss / accumulation
        return loss

    def _tensors(self, logits: Tensor, inputs: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
        """What policy_loss compares the policy with."""
        tensors = {"old_logprobs": inputs.get("old_per_token_logps")}
        if tensors["old_logprobs"] is None and self._policy_options.loss_type in ("topr", *DPPO):
            # These want the old policy named, which on-policy is the current one.
            with torch.no_grad():
                tensors["old_logprobs"] = selective_log_softmax(
                    logits, inputs["completion_ids"], mask=mask, **self._how
                )
        if self.beta != 0 and self._policy_options.kl_estimator in EXACT_KL:
            tensors["reference_logits"] = self._reference_logits(inputs)
        elif self.beta != 0:
            tensors["reference_logprobs"] = inputs["ref_per_token_logps"]
        if "sampling_per_token_logps" in inputs:
            tensors["sampling_logprobs"] = inputs["sampling_per_token_logps"]
            if "off_policy" not in self._policy_arguments:
                tensors["off_policy"] = "none"
        return tensors

    def _normalizer(self, inputs: Mapping[str, Any], mask: Tensor, accumulation: int) -> Any:
        """What the sum over this call's tokens or sequences is divided by, so that an optimiser step is one mean."""
        options = self._policy_options
        if is_windowed(options):
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            # These are the tokens of all that was generated; a step may take a part of it, or several.
            return tokens * accumulation / self.args.steps_per_generation if self.model.training else tokens
        if options.aggregation == "token-mean":
            return mask.sum().clamp(min=1) * accumulation
        longest = self.max_completion_length if options.aggregation == "token-sum" else 1
        return len(mask) * longest * accumulation
