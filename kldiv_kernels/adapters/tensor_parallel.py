"""Logits of models that transformers has made tensor parallel: whole rows, or the columns that each rank has.

    plan of the head          what a call returns
    colwise_gather_output     whole rows on every rank (what models come with)
    colwise                   the columns of this rank, in a plain tensor
    of one's own              perhaps a DTensor

From columns a loss is computed where they are, without a gather; a teacher's are gathered only where they fall on other
places. All ranks of a tensor parallel group have the same tokens, and get the same loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from kldiv_kernels.dtensors import columns_of, is_distributed, layout_of
from kldiv_kernels.parallel import logits_or_shared
from kldiv_kernels.sources import Logits, Source

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from transformers import Trainer


def check(where: str, trainer: Trainer, teacher: Any) -> None:
    """Raises ValueError where a rank's tokens are not those that the loss, or the teacher, takes them to be."""
    for name, size in (("cp_size", trainer.get_cp_size()), ("sp_size", trainer.get_sp_size())):
        if size > 1:
            raise ValueError(
                f"{where}: parallelism_config has {name} = {size}; expected 1, since labels are shifted and the "
                f"teacher runs on whole sequences (use tp_size or dp_shard_size)"
            )
    if trainer.get_tp_size() > 1 and not trainer.args.average_tokens_across_devices:
        # The Trainer would divide what one rank has counted by the ranks.
        raise ValueError(
            f"{where}: average_tokens_across_devices is False with a model that is tensor parallel over "
            f"{trainer.get_tp_size()} ranks, for which target tokens are then counted wrongly; expected True"
        )
    check_teacher(where, trainer.model, teacher)


def check_teacher(where: str, model: Any, teacher: Any) -> None:
    """Raises ValueError where a tensor parallel teacher would be given other tokens on each of its ranks."""
    size, theirs = _ranks_of(model), _ranks_of(teacher)
    if theirs not in (1, size):
        raise ValueError(
            f"{where}: the teacher is tensor parallel over {theirs} ranks and the student over {size}, so that ranks "
            f"of one teacher have other tokens; expected the same tp_size for both, or a teacher without"
        )


def refuse(where: str, why: str, **models: Any) -> None:
    """Raises ValueError, saying `why`, where one of the models is tensor parallel."""
    for name, model in models.items():
        if _ranks_of(model) > 1:
            raise ValueError(
                f"{where}: {name} is tensor parallel over {_ranks_of(model)} ranks, {why}; load it without "
                f"distributed_config"
            )


def spread(where: str, model: Any, logits: Tensor) -> Tensor:
    """The `logits` of a call of `model`, as a DTensor of whole rows where this rank has some of their columns."""
    mesh = _mesh_of(model)
    if mesh is None or is_distributed(logits):
        return logits
    total = _width_of(model)
    if logits.shape[-1] == total:
        return logits
    from torch.distributed.tensor import DTensor, Shard

    columns = columns_of(where, total, mesh.size(), mesh.get_local_rank())
    if logits.shape[-1] != columns.width:
        raise ValueError(
            f"{where}: {type(model).__name__} has logits of shape {list(logits.shape)} here; expected {total} columns, "
            f"or of {mesh.size()} ranks' {columns.width} for this one (tp_plan of its head: colwise or "
            f"colwise_gather_output)"
        )
    whole_rows = logits.new_empty((*logits.shape[:-1], total), device="meta")
    return DTensor.from_local(
        logits, mesh, [Shard(logits.dim() - 1)], run_check=False, shape=whole_rows.shape, stride=whole_rows.stride()
    )


def whole(logits: Tensor) -> Tensor:
    """Whole rows on every rank."""
    return logits.full_tensor() if is_distributed(logits) else logits


def source(where: str, logits: Tensor, teacher_logits: Tensor | None, vocab_size: int) -> Source:
    """The student's logits and the teacher's without gradient, which are `spread` or not, each by itself.

    vocab_size: how many of the columns are no padding.
    """
    layout = layout_of(where, "logits", logits) if is_distributed(logits) else None
    if layout is not None and layout.rows:
        raise ValueError(
            f"{where}: logits are a DTensor with placements {layout.placements}; expected Replicate or Shard(-1), of "
            f"the tokens that this rank was given"
        )
    if layout is None or layout.vocab is None:
        return Logits(whole(logits), None if teacher_logits is None else whole(teacher_logits))
    mesh, dim = layout.mesh, layout.vocab
    columns = columns_of(where, logits.shape[-1], mesh.size(dim), mesh.get_local_rank(dim))
    theirs = teacher_logits
    if theirs is not None:
        if is_distributed(theirs) and _placed(theirs) == _placed(logits):
            theirs = theirs.to_local()
        else:
            theirs = whole(theirs)[..., columns.start : columns.start + columns.width]
    # The gradient of what is here is found here.
    here = cast("DTensor", logits).to_local()
    return logits_or_shared(where, here, theirs, mesh.get_group(dim), columns.start, vocab_size)


def gathered(trainer: Trainer, rows: Tensor) -> Tensor:
    """Of an evaluated batch, those of all ranks that have other sequences.

    As `Accelerator.gather_for_metrics`, which would have those of a tensor parallel group once a rank, and cut off the
    last batch's padding in the wrong place.
    """
    found: Tensor = trainer.accelerator.gather(rows)
    # Ranks of a group are neighbours.
    found = found.reshape(-1, trainer.get_tp_size(), *rows.shape)[:, 0].flatten(0, 1)
    state = trainer.accelerator.gradient_state
    return found[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else found


def _placed(logits: Any) -> tuple[Any, ...]:
    return logits.device_mesh, logits.placements, logits.shape[-1]


def _ranks_of(model: Any) -> int:
    return getattr(model, "tp_size", None) or 1


def _mesh_of(model: Any) -> DeviceMesh | None:
    """Over whose ranks the model is tensor parallel; None where it is not."""
    if _ranks_of(model) == 1:
        return None
    mesh: DeviceMesh = model._device_mesh
    return mesh if mesh.ndim == 1 else mesh["tp"]


def _width_of(model: Any) -> int:
    """How many columns the logits have."""
    head = model.get_output_embeddings()
    width = getattr(head, "out_features", None)
    return int(model.config.get_text_config().vocab_size if width is None else width)
