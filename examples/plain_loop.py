"""Distillation in a plain PyTorch loop: padded batches, gradient accumulation, vocabularies of different widths.

python examples/plain_loop.py                       # tiny models, some seconds on a CPU
python examples/plain_loop.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --data my.txt --bf16
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import kldiv_kernels as kk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", help="hub id or folder; default: a tiny model, made on the spot")
parser.add_argument("--teacher", help="hub id or folder, with the student's tokens; default: a tiny model")
parser.add_argument("--data", type=Path, default=argparse.__file__, help="a text; each line is a sequence")
parser.add_argument("--kind", default="forward_kl", help="the divergence: forward_kl, reverse_kl, js, ...")
parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: 40)")
parser.add_argument("--learning-rate", type=float, help="default: 1e-5; tiny models: 1e-2")
parser.add_argument("--bf16", action="store_true", help="teacher in bfloat16, student under autocast")
BATCH, ACCUMULATION, LENGTH = 8, 2, 128  # sequences a forward pass, forward passes a step, tokens a sequence


def main() -> None:
    args = parser.parse_args()
    if (args.student is None) != (args.teacher is None):
        parser.error("give both --student and --teacher, or neither")
    if args.student is None:
        from tiny_models import make_tiny_models

        args.student, args.teacher = make_tiny_models(teacher_padding=62)
        args.learning_rate = args.learning_rate or 1e-2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.student, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32).to(device)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=dtype).to(device).eval()
    # The columns that both models have. What pads the wider vocabulary belongs to no token, and is never read.
    vocab_size = min(student.config.vocab_size, teacher.config.vocab_size)

    def batch(texts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt").to(device)
        return inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def loss_of(inputs: dict[str, Tensor], labels: Tensor, tokens: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            target = teacher(**inputs).logits
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            logits = student(**inputs).logits
        # shift: the logits at a position predict the next token. Without a slice of them, which would cost memory.
        options = {"labels": labels, "shift": True, "vocab_size": vocab_size, "normalizer": tokens}
        return kk.divergence_loss(logits, target, args.kind, **options)

    lines = [line for line in args.data.read_text().splitlines() if line.strip()]
    held_out, texts = batch(lines[:BATCH]), itertools.cycle(lines[BATCH:])
    with torch.no_grad():
        before = loss_of(*held_out)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate or 1e-5)
    for _ in tqdm(range(args.steps)):
        batches = [batch(list(itertools.islice(texts, BATCH))) for _ in range(ACCUMULATION)]
        # The loss is one mean over all tokens of the step, however they are spread over its batches.
        tokens = sum((labels[:, 1:] != -100).sum() for _, labels in batches)
        for inputs, labels in batches:
            loss_of(inputs, labels, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        print(f"held-out {args.kind}, nats a token: {before:.4f} before, {loss_of(*held_out):.4f} after")


if __name__ == "__main__":
    main()
