"""A divergence of your own: three functions in PyTorch run everywhere, the same three in Triton run fused on a GPU.

python examples/own_divergence.py                   # tiny models, some seconds on a CPU
TRITON_INTERPRET=1 python examples/own_divergence.py --steps 3 --block-size 16  # Triton without a GPU, slowly
"""

import argparse
from pathlib import Path

import torch
import triton
import triton.language as tl
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import kldiv_kernels as kk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", help="hub id or folder; default: a tiny model, made on the spot")
parser.add_argument("--teacher", help="hub id or folder, with the student's tokens; default: a tiny model")
parser.add_argument("--data", type=Path, default=argparse.__file__, help="a text, read in blocks")
parser.add_argument("--block-size", type=int, default=128, help="tokens a step (default: 128)")
parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: 40)")
parser.add_argument("--learning-rate", type=float, help="default: 1e-5; tiny models: 1e-2")


@triton.jit
def value(logp, logq):  # Brier: Σ (p − q)², p the teacher and q the student, a term a token of the vocabulary
    return (tl.exp(logp) - tl.exp(logq)) * (tl.exp(logp) - tl.exp(logq))


@triton.jit
def grad_logq(logp, logq):  # the derivative of q by log q is q
    return 2 * (tl.exp(logq) - tl.exp(logp)) * tl.exp(logq)


@triton.jit
def grad_logp(logp, logq):
    return 2 * (tl.exp(logp) - tl.exp(logq)) * tl.exp(logp)


def main() -> None:
    args = parser.parse_args()
    if (args.student is None) != (args.teacher is None):
        parser.error("give both --student and --teacher, or neither")
    if args.student is None:
        from tiny_models import make_tiny_models

        args.student, args.teacher = make_tiny_models()
        args.learning_rate = args.learning_rate or 1e-2
    kk.register_statistic(
        "brier",
        value=lambda logp, logq: (logp.exp() - logq.exp()) ** 2,
        grad_logq=lambda logp, logq: 2 * (logq.exp() - logp.exp()) * logq.exp(),
        grad_logp=lambda logp, logq: 2 * (logp.exp() - logq.exp()) * logp.exp(),
        triton=(value, grad_logq, grad_logp),
    )
    torch.autograd.gradcheck(lambda x: kk.divergence_loss(*x, "brier"), torch.randn(2, 3, 7).double().requires_grad_())
    backend = "triton" if kk.backends()["triton"] == "available" else "reference"
    print(f"backend {backend}; Triton: {kk.backends()['triton']}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32).to(device)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).to(device).requires_grad_(False)
    tokens = AutoTokenizer.from_pretrained(args.student)(args.data.read_text(), return_tensors="pt").input_ids
    held_out, *blocks = tokens.to(device).split(args.block_size, dim=1)

    def loss_of(block: torch.Tensor) -> torch.Tensor:
        return kk.divergence_loss(student(block).logits, teacher(block).logits, "brier", backend=backend)

    before = loss_of(held_out)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate or 1e-5)
    for step in tqdm(range(args.steps)):
        loss_of(blocks[step % len(blocks)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"held-out Brier divergence: {before:.4f} before, {loss_of(held_out):.4f} after")


if __name__ == "__main__":
    main()
