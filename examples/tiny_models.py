"""Stand-ins for real models: a tiny student, a tiny teacher and their tokenizer, made in a second and without network.

The examples import this file only where no --student and --teacher are given. With your own models you do not need it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def make_tiny_models(teacher_padding: int = 0) -> tuple[str, str]:
    """Folders of a student and a teacher, as `from_pretrained` reads them, in a new temporary folder.

    The weights are random, the teacher's wide: its predictions are peaked, so that there is something to imitate.
    `teacher_padding` adds that many columns that belong to no token, as the models of one family often have.
    """
    folder = Path(tempfile.mkdtemp(prefix="tiny_models_"))
    special = ["<|pad|>", "<|end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())  # a token a byte
    bytes_alone = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, pad_token=special[0], eos_token=special[1])
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.chat_template = CHAT_TEMPLATE
    for name, hidden, width, padding in (("student", 32, 0.02, 0), ("teacher", 48, 0.5, teacher_padding)):
        set_seed(hidden)
        config = LlamaConfig(
            vocab_size=len(tokens) + padding, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, initializer_range=width,
            pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")
