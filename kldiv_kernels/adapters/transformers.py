r"""Losses for `transformers`: cross-entropy with an entropy bonus, and distillation from a teacher.

Each is one callable with the two ways in that `transformers` has:

    Trainer(..., compute_loss_func=loss)   calls loss(outputs, labels, num_items_in_batch=n)
    model.loss_function = loss             is called loss(logits=, labels=, vocab_size=, num_items_in_batch=n, ...)

with logits [batch, tokens, vocab] that are not shifted. With target y_t = labels[t + 1]:

    cross-entropy   Σ_t [−log q_t(y_t) − entropy_coef·H(q_t)] / n
    distillation    Σ_t [(1 − w)·D(p_t, q_t) − w·log q_t(y_t)] / n

n is `num_items_in_batch`, which the Trainer counts over all ranks and accumulation steps, or else the number of targets
of the call: as in `ForCausalLMLoss` (transformers 5.24), of which entropy_coef = 0 is value and gradient.

Where n is 0 the loss is 0 and so is its gradient, so that a step goes on. Without gradients, as in `Trainer.evaluate`,
it is NaN, which `ForCausalLMLoss` is: `eval_loss` is the mean over the batches whose loss is finite
(`logging_nan_inf_filter`, on by default), and a 0 would count as a perfect batch.

The labels are shifted, not the logits: those are read where they are, without a copy in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kldiv_kernels import distillation
from kldiv_kernels.adapters import tensor_parallel
from kldiv_kernels.choices import Backend
from kldiv_kernels.distillation import IGNORED, LossOptions
from kldiv_kernels.stats import token_stats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the student is called with and its teacher is not: the loss is made here, and a cache is one model's own.
_STUDENT_ONLY = ("labels", "shift_labels", "num_items_in_batch", "past_key_values", "use_cache")


def cross_entropy_loss(*, entropy_coef: float = 0.0, backend: Backend = "auto") -> Callable[..., Tensor]:
    """Causal language-model loss with an entropy bonus, from one read of the logits.

    Args:
        entropy_coef: subtracts entropy_coef × the mean entropy (nats) of the target positions; below 0 it is a
            penalty. Default 0.
        backend: see `kldiv_kernels.token_stats`.

    Returns:
        loss(logits, labels, vocab_size=None, num_items_in_batch=None, ignore_index=-100, shift_labels=None), for
        `Trainer(compute_loss_func=loss)` and for `model.loss_function = loss`. `logits` [batch, tokens, vocab] is a
        tensor or a model output that has one; `labels` [batch, tokens] are shifted by the loss, `shift_labels` are
        already; logits from column `vocab_size` on are padding. float32 scalar; when there is no target, 0 with
        gradients and NaN without. Other keyword arguments, which models pass on, are ignored.

    Raises:
        TypeError: entropy_coef is no number; a call without logits. ValueError: a call without labels.

    >>> import torch
    >>> loss = cross_entropy_loss(entropy_coef=0.01)
    >>> logits, labels = torch.zeros(1, 3, 8), torch.tensor([[5, 1, -100]])
    >>> round(loss(logits, labels).item(), 4)  # log 8 − 0.01·log 8, of one target
    2.0586
    """
    if isinstance(entropy_coef, bool) or not isinstance(entropy_coef, (int, float)):
        raise TypeError(f"cross_entropy_loss: entropy_coef is {entropy_coef!r}; expected a number")

    def loss(
        logits: Any,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        logits = _logits("cross_entropy_loss", logits)
        targets = _targets("cross_entropy_loss", logits, labels, shift_labels, ignore_index)
        valid = targets != IGNORED
        names = ("logprob", "entropy") if entropy_coef else ("logprob",)
        stats = token_stats(logits, labels=targets, stats=names, mask=valid, vocab_size=vocab_size, backend=backend)
        total = -stats.logprob.sum()
        if entropy_coef:
            total = total - entropy_coef * stats.entropy.sum()
        count = _count(valid, num_items_in_batch)
        return _mean_of_none_is_nan(total / torch.where(count > 0, count, 1), count)

    return loss


class DistillationLoss:
    """What `distillation_loss` returns: the loss, called as the module says, and `remove()`.

    The teacher needs what the student was called with, which neither way in hands on. A forward pre-hook on the student
    keeps it from the call to the loss of that call, and no longer.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, options: LossOptions, vocab_size: int
    ) -> None:
        self.student = student
        self.teacher = teacher.eval()  # type: ignore[no-untyped-call]
        self.vocab_size = vocab_size
        self._options = options
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._hook = student.register_forward_pre_hook(self._remember, with_kwargs=True)

    def __call__(
        self,
        logits: Any,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        logits = _logits("distillation_loss", logits)
        targets = _targets("distillation_loss", logits, labels, shift_labels, ignore_index)
        count = _count(targets != IGNORED, num_items_in_batch)
        theirs = None if self._options.ce_weight == 1.0 else self._teacher_logits(logits.device)
        where = "distillation_loss"
        source = tensor_parallel.source(
            where, tensor_parallel.spread(where, self.student, logits), theirs, self.vocab_size
        )
        loss = distillation.distillation_of(
            source, targets, self._options, vocab_size=self.vocab_size, normalizer=torch.where(count > 0, count, 1)
        )
        return _mean_of_none_is_nan(loss, count)

    def remove(self) -> None:
        """Takes the hook off the student. The loss cannot be called any more."""
        self._hook.remove()
        self._inputs = None

    def _remember(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # With a cache of earlier tokens this is generation: no loss follows, and the teacher has not seen those tokens.
        if kwargs.get("past_key_values") is None:
            self._inputs = args, {name: x for name, x in kwargs.items() if name not in _STUDENT_ONLY}

    def _teacher_logits(self, device: torch.device) -> Tensor:
        if self._inputs is None:
            raise RuntimeError(
                "distillation_loss: the student was not called before the loss; expected as `student` the model that "
                "the Trainer is given (for PEFT, the PeftModel), and no remove()"
            )
        (args, kwargs), self._inputs = self._inputs, None
        home = next(self.teacher.parameters()).device
        args, kwargs = tuple(_on(home, x) for x in args), {name: _on(home, x) for name, x in kwargs.items()}
        with torch.no_grad():
            logits: Tensor = self.teacher(*args, **kwargs, use_cache=False).logits
        return tensor_parallel.spread("distillation_loss", self.teacher, logits.to(device))


def distillation_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    kind: str = "forward_kl",
    *,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    alpha: float | None = None,
    beta: float | None = None,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> DistillationLoss:
    """(1 − ce_weight)·divergence(teacher, student) + ce_weight·cross-entropy, for a Trainer of any class.

    `kldiv_kernels.trainer.DistillationTrainer` has the same loss and held-out metrics; this one leaves the Trainer to
    you. A call of the loss runs the teacher, on the inputs that the student had.

    Args:
        student: the model that the Trainer is given (for PEFT the PeftModel); it gets a forward pre-hook, which
            `remove()` takes off.
        teacher: run without gradient, in evaluation mode, in its own dtype and on its own device. Its vocabulary may
            be padded to another width than the student's.
            Both may be tensor parallel, each with whole rows of logits or a rank's columns ("colwise").
        kind: a divergence of `kldiv_kernels.divergence_loss`, which also says what temperature, temperature_squared,
            alpha, beta and backend are.
        ce_weight: 0 (default) to 1; 1 does not run the teacher.
        vocab_size: columns from here on are padding. Default: the narrower vocabulary of the two models.

    Returns:
        DistillationLoss, for `Trainer(compute_loss_func=loss)` and for `student.loss_function = loss`; its arguments
        are those of the loss of `cross_entropy_loss`. float32 scalar; when there is no target, 0 with gradients and NaN
        without.

    Raises:
        ValueError: an option outside of what is allowed, student and teacher the same model, a teacher that is tensor
            parallel where the student is not, a call without labels.
        RuntimeError: a call of the loss without a call of the student before it.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> student = LlamaForCausalLM(LlamaConfig(hidden_size=4, **sizes))
    >>> teacher = LlamaForCausalLM(LlamaConfig(hidden_size=8, **sizes))
    >>> loss = distillation_loss(student, teacher, "js", beta=0.9)
    >>> tokens = torch.tensor([[1, 5, 2]])
    >>> 0 < loss(student(input_ids=tokens), tokens).item() < 0.1
    True
    """
    where = "distillation_loss"
    if teacher is student:
        raise ValueError(f"{where}: teacher is the student; expected another model")
    options = LossOptions(kind, ce_weight, temperature, temperature_squared, alpha, beta, backend)
    options.check(where)
    tensor_parallel.check_teacher(where, student, teacher)
    return DistillationLoss(student, teacher, options, distillation.shared_vocab_size(student, teacher, vocab_size))


def _logits(where: str, given: Any) -> Tensor:
    logits = given if isinstance(given, Tensor) else getattr(given, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{where}: logits is {type(given).__name__}; expected a torch.Tensor or a model output with one"
        )
    return logits


def _targets(
    where: str, logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int
) -> Tensor:
    """[batch, tokens], the target of each position; -100 where there is none."""
    if shift_labels is None:
        if labels is None:
            raise ValueError(
                f"{where}: labels is None; expected {list(logits.shape[:-1])}, -100 where there is no target"
            )
        shift_labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    targets = shift_labels.to(logits.device).reshape(logits.shape[:-1])
    return targets if ignore_index == IGNORED else torch.where(targets == ignore_index, IGNORED, targets)


def _count(valid: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    """Scalar, how many targets the loss is the mean over."""
    if num_items_in_batch is None:
        return valid.sum()
    # One element a GPU under DataParallel, all equal.
    return torch.as_tensor(num_items_in_batch, device=valid.device).reshape(-1)[0]


def _mean_of_none_is_nan(loss: Tensor, count: Tensor) -> Tensor:
    """The loss, which is 0 without a target; NaN in evaluation, so that the Trainer leaves the batch out."""
    return loss if torch.is_grad_enabled() else torch.where(count > 0, loss, torch.nan)


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
