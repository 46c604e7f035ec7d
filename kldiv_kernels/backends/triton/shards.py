"""Launches for rows whose columns are spread over processes (`parallel`), of which each launches for its own.

What a process says of its columns are the numbers that a slice leaves, and with a tail three more of its labels
(device/shard_kernels.py); of the sums, those of its slices.
"""

from __future__ import annotations

from torch import Tensor

from kldiv_kernels.backends.triton.launch import Launch, Parts, or_instead

_OF_LABELS = 3


class ShardLaunch(Launch):
    """One process's part of a call."""

    def state(self, first_column: int) -> Tensor:
        """[N, numbers], of the columns here. Rows that the mask leaves out have 0, here and below."""
        call, bound, shape = self.call, self.bound, self.shape
        width = bound.part_size + _OF_LABELS * bound.tail
        states = self.floats(self.rows, width, zeroed=call.mask is not None)
        with self._on_device():
            partial, duplicates = self.swept()
            self._run(
                bound.merge_states_kernel, self.rows, 1,
                {
                    "states_ptr": states, "partial_ptr": partial, "duplicates_ptr": duplicates,
                    "labels_ptr": or_instead(call.labels, call.logits), "label_count": call.labels_per_row,
                    "vocab": call.vocab_size, "slices": shape.slices, "first_column": first_column, "WIDTH": width,
                    "S_PAD": shape.padded_slices, **self.row_arguments,
                },
            )  # fmt: skip
        return states

    def sums(self, states: Tensor) -> Tensor | None:
        """[N, sums] over the columns here, from the states of all processes [processes, N, numbers]."""
        if not self.bound.sums:
            return None
        merged = self.floats(self.rows, self.bound.sums, zeroed=self.call.mask is not None)
        with self._on_device():
            sums = self.summed(self._of_shards(states))
            self._run(
                self.bound.merge_sums_kernel, self.rows, 1,
                {
                    "merged_ptr": merged, "sums_ptr": sums, "mask_ptr": self.row_arguments["mask_ptr"],
                    "slices": self.shape.slices, "MASK": self.row_arguments["MASK"], "S_PAD": self.shape.padded_slices,
                },
            )  # fmt: skip
        return merged

    def finish(self, states: Tensor, sums: Tensor | None, picked: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values [value_rows, N] and what the gradient needs, from those and the sums of all processes."""
        parts = self._of_shards(states)
        with self._on_device():
            return self.finished(parts, states if sums is None else sums, self.call.logits, True, picked)

    def _of_shards(self, states: Tensor) -> Parts:
        return Parts(states, len(states), 1, self.rows, shared=True)
