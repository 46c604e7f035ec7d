"""NeMo-RL's log-probabilities and its distillation, with the signatures of its main branch of August 2026.

    from kldiv_kernels.adapters import nemo_rl
    nemo_rl.register()

`register` puts them in the place of NeMo-RL's own, in the process that calls it: `DistillationLossFn`, and of
`nemo_rl.distributed.model_utils` the functions from logits to log-probabilities. Only `register` needs NeMo-RL, and the
two attributes that tell it the type of the loss.

How they compose. Tensor parallel: logits are this rank's columns, of Megatron's group or of a DTensor whose mesh has a
dimension "tp"; every rank gets the same values and the gradient of its own columns. Context parallel: a rank has its
tokens, in balanced order, and the results are those of whole sequences. Packed sequences: by `cu_seqlens_padded`.

What differs from NeMo-RL:

- Logits in bfloat16 or float16 are read as they are. No float32 copy is made, and `chunk_size` has no effect.
- One exchange of a few numbers a row for log-probabilities, where NeMo-RL has two or three.
- Columns need not be shared evenly (`vocab_size`), and ranks without columns are allowed.
- The last token of a sequence has no label: nothing is read for it.
- `sampling_params` with top-k or top-p is refused.
- In `DistillationLossFn` a token without mass adds 0, not NaN, and tokens that are masked are not looked at.
"""

from __future__ import annotations

from kldiv_kernels.adapters.nemo_rl.distillation import (
    DistillationLossFn,
    get_distillation_topk_logprobs_from_logits,
)
from kldiv_kernels.adapters.nemo_rl.logprobs import (
    dtensor_from_parallel_logits_to_logprobs,
    from_parallel_logits_to_logprobs,
    from_parallel_logits_to_logprobs_packed_sequences,
    get_logprobs_from_vocab_parallel_logits,
    get_next_token_logprobs_from_logits,
)
from kldiv_kernels.adapters.nemo_rl.registration import register

__all__ = [
    "DistillationLossFn",
    "dtensor_from_parallel_logits_to_logprobs",
    "from_parallel_logits_to_logprobs",
    "from_parallel_logits_to_logprobs_packed_sequences",
    "get_distillation_topk_logprobs_from_logits",
    "get_logprobs_from_vocab_parallel_logits",
    "get_next_token_logprobs_from_logits",
    "register",
]
