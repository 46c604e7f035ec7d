"""Where a teacher's weights go: on one device a rank, on several of them, or on those of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kldiv_kernels.trainer.ranks import Ranks


def load_options(ranks: Ranks, device_map: str | None, tensor_parallel: bool) -> dict[str, Any]:
    """Options of `from_pretrained`. Raises typer.BadParameter where there are fewer devices than ranks."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        mine = devices_of(ranks, torch.accelerator.device_count(), tensor_parallel=tensor_parallel)
        if ranks.count > 1:
            torch.accelerator.set_device_index(mine[0])
    if tensor_parallel:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=ranks.count)}
    if device_map is not None:
        memory = {} if accelerator is None else _memory_of(ranks, accelerator, mine)
        return {"device_map": device_map, **memory}
    if accelerator is None:
        return {}
    # Straight there: the ranks of a machine would each hold the model in its memory first.
    return {"device_map": torch.device(accelerator.type, mine[0])}


def devices_of(ranks: Ranks, devices: int, *, tensor_parallel: bool = False) -> range:
    """The indices of the devices that this rank has of the machine's: neighbours, as many as every other rank has.

    >>> from kldiv_kernels.trainer.ranks import Ranks
    >>> devices_of(Ranks(1, 3, local=1, local_count=3), 8)
    range(2, 4)
    """
    each = devices // ranks.local_count
    if each == 0:
        raise typer.BadParameter(
            f"{ranks.local_count} processes were started on a machine with {devices} devices; expected at most one a "
            f"device (torchrun --nproc-per-node {devices})"
        )
    # transformers gives rank i the device i for its share of a model.
    first = ranks.local if tensor_parallel else ranks.local * each
    return range(first, first + each)


def check_placed(model: PreTrainedModel, ranks: Ranks, tensor_parallel: bool) -> None:
    """Raises ValueError where a part of it is on no device, or where its heads cannot be spread evenly."""
    import torch

    if tensor_parallel:
        config = model.config.get_text_config()
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, name, None) or ranks.count
            if heads % ranks.count:
                raise ValueError(
                    f"{ranks.count} processes; expected a number that divides the teacher's {name} = {heads}"
                )
    left_out = {str(place) for place in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if torch.accelerator.is_available() and left_out:
        raise ValueError(
            f"the teacher does not fit on the devices of a process, and a part of it would be on "
            f"{' and '.join(sorted(left_out))}; expected more devices, or fewer processes a machine"
        )


def _memory_of(ranks: Ranks, accelerator: torch.device, mine: range) -> dict[str, Any]:
    """The memory of this rank's devices alone, where others have the rest of the machine's."""
    if ranks.local_count == 1:
        return {}
    import torch

    module = torch.get_device_module(accelerator)
    # accelerate would ask all devices, and take memory on each of them.
    return {"max_memory": {device: module.mem_get_info(device)[0] for device in mine}}
