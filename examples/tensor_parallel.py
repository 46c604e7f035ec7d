"""Distillation under FSDP2 and tensor parallelism: every rank has some columns of the logits, and none has whole rows.

torchrun --nproc-per-node 2 examples/tensor_parallel.py    # tiny models, some seconds on a CPU
torchrun --nproc-per-node 8 examples/tensor_parallel.py --student models/student --teacher models/teacher --data my.txt
"""

import argparse
import itertools
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, AutoTokenizer

import kldiv_kernels as kk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", help="folder of a Llama or Qwen with a head of its own; default: a tiny model")
parser.add_argument("--teacher", help="another, with the student's tokens; default: a tiny model")
parser.add_argument("--data", type=Path, default=argparse.__file__, help="a text; each line is a sequence")
parser.add_argument("--tensor-parallel", type=int, default=2, help="ranks that share a row of logits (default: 2)")
parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: 40)")
parser.add_argument("--learning-rate", type=float, default=1e-2, help="default: 1e-2, for tiny models")
BATCH, LENGTH = 16, 128  # sequences a step, over all ranks; tokens a sequence
PLAN = {f"model.layers.*.*.{name}_proj": ColwiseParallel() for name in ("[qkv]", "gate", "up")}
PLAN |= {f"model.layers.*.*.{name}_proj": RowwiseParallel() for name in ("o", "down")}
PLAN["lm_head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)


def main() -> None:
    args = parser.parse_args()
    if (args.student is None) != (args.teacher is None):
        parser.error("give both --student and --teacher, or neither")
    if args.student is None:
        from tiny_models import make_tiny_models

        args.student, args.teacher = make_tiny_models()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    replicas = int(os.environ["WORLD_SIZE"]) // args.tensor_parallel
    mesh = init_device_mesh(device.type, (replicas, args.tensor_parallel), mesh_dim_names=("data", "tensor"))
    tokenizer = AutoTokenizer.from_pretrained(args.student, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    student, teacher = (AutoModelForCausalLM.from_pretrained(name).to(device) for name in (args.student, args.teacher))
    for model in (student, teacher):
        if model.config.tie_word_embeddings or model.config.vocab_size % args.tensor_parallel:
            parser.error("expected a head that is not the embedding, and that the ranks share evenly")
        parallelize_module(model, mesh["tensor"], PLAN)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh["data"])

    def loss_of(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt").to(device)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        dist.all_reduce(tokens := (labels[:, 1:] != -100).sum(), group=mesh["data"].get_group())
        with torch.no_grad():
            target = teacher(**inputs).logits
        # DTensors, each rank with its columns. The mean over the tokens of all replicas is the sum of what each adds to
        # it; FSDP takes the mean of these.
        return kk.forward_kl(student(**inputs).logits, target, labels=labels, shift=True, normalizer=tokens) * replicas

    lines = [line for line in args.data.read_text().splitlines() if line.strip()]
    held_out, texts = lines[:BATCH], itertools.cycle(lines[BATCH:])
    before = loss_of(held_out).item()
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, foreach=False)
    for _ in range(args.steps):
        loss_of(list(itertools.islice(texts, BATCH))[mesh["data"].get_local_rank() :: replicas]).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = loss_of(held_out).item()
    if dist.get_rank() == 0:
        print(f"held-out forward_kl, nats a token: {before:.4f} before, {after:.4f} after")


if __name__ == "__main__":
    main()
