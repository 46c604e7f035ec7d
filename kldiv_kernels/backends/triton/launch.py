"""From a `Call` to kernel launches: sizes, strides, and which of the two forms runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kldiv_kernels.backends.interface import Call, value_rows
from kldiv_kernels.backends.strides import leading
from kldiv_kernels.backends.triton.bind import bound_for, unspecialised
from kldiv_kernels.backends.triton.device import kernels
from kldiv_kernels.backends.triton.sizes import Shape, padded


@dataclass(frozen=True)
class Parts:
    """What a row is merged from: states of its slices, or with `shared` of its shards.

    `row` of them are from row to row, and `step` from part to part.
    """

    states: Tensor
    count: int
    row: int
    step: int
    shared: bool = False

    def arguments(self) -> dict[str, Any]:
        return {
            "partial_ptr": self.states, "parts": self.count, "part_row": self.row, "part_step": self.step,
            "WIDTH": self.states.shape[-1], "S_PAD": padded(self.count),
        }  # fmt: skip


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors (compute units, Xe cores)."""
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64)


class Launch:
    """One call's launches. `wrap` makes them visible to torch.compile: while it traces, tensors have no addresses."""

    def __init__(self, call: Call, interpreted: bool, wrap: Callable[[Any], Any] | None = None) -> None:
        self.call, self.interpreted, self.wrap = call, interpreted, wrap
        logits, reference = call.logits, call.reference
        self.device = logits.device
        self.bound = bound_for(call.stats, self.device.type == "cuda" and torch.version.hip is None)
        tensors = [logits] if reference is None else [logits, reference]
        element = max(t.element_size() for t in tensors)
        self.shape = Shape.of(call.vocab_size, element, interpreted)
        self.rows = call.rows
        self.value_rows = value_rows(call.stats, call.labels_per_row)
        self.aligned = all(self._is_aligned(t) for t in tensors)
        second = logits if reference is None else reference
        s, t = leading(logits), leading(second)
        assert s is not None
        assert t is not None
        self.row_arguments: dict[str, Any] = {
            "s_ptr": logits, "t_ptr": second, "mask_ptr": or_instead(call.mask, logits),
            "exclude_ptr": or_instead(call.exclude, logits),
            "token_ptr": or_instead(call.token_parameters, logits),
            "s_inner": s[0], "s_outer": s[1], "s_stride": s[2], "t_inner": t[0], "t_outer": t[1], "t_stride": t[2],
            "n": self.rows,
            "temperature": call.parameters[0], "reference_temperature": call.parameters[1],
            "alpha": call.parameters[2], "beta": call.parameters[3],
            "FIRST": self.bound.first, "MASK": call.mask is not None, "EXCLUDE": call.exclude is not None,
            "PER_TOKEN": call.token_parameters is not None, "ALIGNED": self.aligned,
        }  # fmt: skip
        self.block_arguments: dict[str, Any] = {
            "vocab": call.vocab_size, "slices": self.shape.slices, "SLICE": self.shape.slice_columns,
            "EVEN": call.vocab_size % self.shape.columns == 0, "R": self.shape.lanes, "C": self.shape.columns,
        }  # fmt: skip
        self.many = call.labels_per_row > 1
        # Whether a kernel of their own writes the gradient's columns of labels.
        self.apart = call.reads_labels_again

    @property
    def fills_the_device(self) -> bool:
        """Whether a program a row keeps all processors busy: four programs fit into each at a time."""
        return self.rows >= (4 if self.interpreted else 4 * _processors(self.device))

    def _run(self, kernel: Any, programs: int, warps: int, arguments: dict[str, Any]) -> None:
        if programs == 0:
            return
        kernel = kernel if self.wrap is None else self.wrap(kernel)
        # No contraction: every kernel gives a row the same bits, and the sums that want it are written as one.
        kernel[(programs,)](**arguments, num_warps=warps, **_options(self.interpreted))

    def _run_for_labels(self, kernel: Any, warps: int, arguments: dict[str, Any]) -> None:
        """A program a row, which takes some of the arguments that the other kernels take."""
        self._run(kernel, self.rows, warps, {name: arguments[name] for name in kernel.arg_names})

    def statistics(self, with_state: bool) -> tuple[Tensor, Tensor]:
        with self._on_device():
            states, duplicates = self.swept()
            parts = Parts(states, self.shape.slices, self.shape.slices, 1)
            return self.finished(parts, self.summed(parts), duplicates, with_state)

    def swept(self) -> tuple[Tensor, Tensor]:
        """The states of slices [N, slices, part_size], and for a tail how many labels occur twice [N]."""
        call, shape = self.call, self.shape
        partial = self.floats(self.rows, shape.slices, self.bound.part_size)
        marks, duplicates = call.logits, call.logits
        if self.bound.tail:
            marks = torch.zeros((self.rows, shape.mark_words), dtype=torch.int32, device=self.device)
            duplicates = torch.empty(self.rows, dtype=torch.int32, device=self.device)
            self._run_for_labels(
                self.bound.mark_kernel, shape.warps,
                {
                    "marks_ptr": marks, "duplicates_ptr": duplicates, "labels_ptr": call.labels,
                    "label_count": call.labels_per_row, **self.row_arguments, **self.block_arguments,
                },
            )  # fmt: skip
        self._run(
            self.bound.sweep_kernel, self.rows * shape.slices, shape.warps,
            {"partial_ptr": partial, "marks_ptr": marks, **self.row_arguments, **self.block_arguments},
        )  # fmt: skip
        return partial, duplicates

    def summed(self, parts: Parts) -> Tensor:
        """The sums of slices [N, slices, sums], of the terms that need the row's softmaxes; `parts` are its state."""
        shape = self.shape
        if not self.bound.sums:
            return parts.states
        sums = self.floats(self.rows, shape.slices, self.bound.sums)
        self._run(
            self.bound.sums_kernel, self.rows * shape.slices, shape.warps,
            {"sums_ptr": sums, **parts.arguments(), **self.row_arguments, **self.block_arguments},
        )  # fmt: skip
        return sums

    def finished(
        self, parts: Parts, sums: Tensor, duplicates: Tensor, with_state: bool, picked: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Values [value_rows, N], and what the gradient needs [state_rows, N]; `sums` has as many parts."""
        call = self.call
        values = self.floats(self.value_rows, self.rows)
        # Nothing is saved for a masked row, and no output holds what happened to be in memory.
        saved = self.floats(self.bound.state_rows if with_state else 0, self.rows, zeroed=call.mask is not None)
        self._run(
            self.bound.finish_kernel, self.rows, 1,
            {
                "values_ptr": values, "state_ptr": saved, "sums_ptr": sums,
                "labels_ptr": or_instead(call.labels, call.logits), "label_count": call.labels_per_row,
                "duplicates_ptr": duplicates, "picked_ptr": or_instead(picked, call.logits), "SHARED": parts.shared,
                "value_rows": self.value_rows, "SAVE": with_state, "vocab": call.vocab_size,
                **parts.arguments(), **self.row_arguments,
            },
        )  # fmt: skip
        return values, saved

    def floats(self, *shape: int, zeroed: bool = False) -> Tensor:
        make = torch.zeros if zeroed else torch.empty
        return make(shape, dtype=torch.float32, device=self.device)

    def gradients(
        self, state: Tensor, coefficients: Tensor, student: bool, reference: bool, in_place: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        ds, dt, arguments = self._gradient_arguments(coefficients, student, reference, in_place)
        with self._on_device():
            self._run(
                self.bound.gradient_kernel, self.rows * self.shape.slices, self.shape.warps,
                {"state_ptr": state, **arguments},
            )  # fmt: skip
            of_s = ds is not None and (self.bound.tail or self.bound.label_s or self.bound.untempered)
            of_t = dt is not None and self.bound.label_t
            if self.apart and (of_s or of_t):
                labelled = {"LABEL_S": self.bound.label_s, "LABEL_T": self.bound.label_t, "OF_S": of_s, "OF_T": of_t}
                self._run_for_labels(self.bound.label_gradient_kernel, 1, {"state_ptr": state, **arguments, **labelled})
        return self._rounded(ds, dt, in_place)

    def loss(
        self, coefficients: Tensor, student: bool, reference: bool, in_place: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self.fills_the_device or self.apart:
            values, state = self.statistics(with_state=True)
            return values, *self.gradients(state, coefficients, student, reference, in_place)
        values = torch.empty((self.value_rows, self.rows), dtype=torch.float32, device=self.device)
        ds, dt, arguments = self._gradient_arguments(coefficients, student, reference, in_place)
        with self._on_device():
            self._run(
                self.bound.loss_kernel, self.rows, self.shape.warps,
                {
                    "values_ptr": values, "value_rows": self.value_rows,
                    "S_PAD": self.shape.padded_slices, **arguments,
                },
            )  # fmt: skip
        return values, *self._rounded(ds, dt, in_place)

    def _rounded(self, ds: Tensor | None, dt: Tensor | None, in_place: bool) -> tuple[Tensor | None, Tensor | None]:
        if self.interpreted:
            if ds is not None:
                logits = self.call.logits
                ds = logits.detach().copy_(ds) if in_place else ds.to(logits.dtype)
            dt = None if dt is None or self.call.reference is None else dt.to(self.call.reference.dtype)
        return ds, dt

    def _gradient_arguments(
        self, coefficients: Tensor, student: bool, reference: bool, in_place: bool
    ) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
        call = self.call
        reference = reference and call.reference is not None
        # contiguous_format: a strided view's gradient has the view's shape and no holes.
        # The interpreter rounds to bfloat16 towards zero: there PyTorch rounds.
        options: dict[str, Any] = {"memory_format": torch.contiguous_format}
        if self.interpreted:
            options["dtype"] = torch.float32
        taken = in_place and not self.interpreted
        ds = (call.logits.detach() if taken else torch.empty_like(call.logits, **options)) if student else None
        dt = torch.empty_like(call.reference, **options) if reference and call.reference is not None else None
        second = call.logits if call.reference is None else call.reference
        row = {**self.row_arguments, **self.block_arguments}
        row["ALIGNED"] = self.aligned and all(g is None or self._is_aligned(g) for g in (ds, dt))
        return ds, dt, {
            "ds_ptr": or_instead(ds, call.logits), "dt_ptr": or_instead(dt, second),
            "s_width": call.logits.shape[-1], "t_width": second.shape[-1],
            "coefficients_ptr": coefficients, "labels_ptr": or_instead(call.labels, call.logits),
            "label_count": call.labels_per_row, "STUDENT": student, "REFERENCE": reference,
            "LABEL_S": self.bound.label_s and not self.apart, "LABEL_T": self.bound.label_t and not self.apart,
            "MANY": self.many, **row,
        }  # fmt: skip

    def _is_aligned(self, tensor: Tensor) -> bool:
        """Whether every row starts at a multiple of 16 bytes. Inductor keeps what it traced with: it allocates aligned
        memory, and copies an input that turns out not to be."""
        size = tensor.element_size()
        first = tensor.data_ptr() if self.wrap is None else tensor.storage_offset() * size
        return first % 16 == 0 and all(
            stride * size % 16 == 0
            for length, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
            if length > 1
        )

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.wrap is not None else on_device(self.device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu":
        return contextlib.nullcontext()
    manager: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return manager


# Reads and writes the gradient once, or nothing where the factor is 1.
_scale = unspecialised(kernels.scale_kernel.fn)
_SCALED_AT_ONCE, _SCALING_PROGRAMS = 4096, 8  # elements; programs a processor


def scale_in_place(gradient: Tensor, factor: Tensor, interpreted: bool) -> None:
    """gradient *= factor for a contiguous gradient, where only the device reads the factor."""
    blocks = triton.cdiv(gradient.numel(), _SCALED_AT_ONCE)
    if blocks == 0:
        return
    programs = min(blocks, _SCALING_PROGRAMS * (1 if interpreted else _processors(gradient.device)))
    with on_device(gradient.device):
        _scale[(programs,)](
            gradient, factor, gradient.numel(), BLOCK=_SCALED_AT_ONCE, num_warps=4, **_options(interpreted)
        )


def _options(interpreted: bool) -> dict[str, Any]:
    return {} if interpreted else {"enable_fp_fusion": False}


def or_instead(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """A pointer for an argument that the kernel does not read."""
    return instead if tensor is None else tensor
