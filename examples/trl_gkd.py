"""TRL's GKDTrainer as it is, its divergences computed by kldiv_kernels: everything stands inside `patched_trl()`.

python examples/trl_gkd.py                          # tiny models, some seconds on a CPU
python examples/trl_gkd.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-1.7B --data chats.jsonl --bf16

GKD wants models of one vocabulary size. A line of the data is {"messages": [{"role": ..., "content": ...}, ...]}.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kldiv_kernels.adapters.trl import patched_trl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", help="hub id or folder; default: a tiny model, made on the spot")
parser.add_argument("--teacher", help="hub id or folder, with the student's tokens; default: a tiny model")
parser.add_argument("--data", type=Path, help="JSON lines of chats; default: sums, one a chat")
parser.add_argument("--beta", type=float, default=0.5, help="0: forward KL, 1: reverse KL (default: 0.5)")
parser.add_argument("--lmbda", type=float, default=0.5, help="share of batches that the student writes (default: 0.5)")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
parser.add_argument("--learning-rate", type=float, help="default: 1e-5; tiny models: 1e-2")
parser.add_argument("--bf16", action="store_true", help="teacher in bfloat16, student under autocast")
parser.add_argument("--output", default="runs/trl_gkd", help="where the student is saved")


def main() -> None:
    args = parser.parse_args()
    if (args.student is None) != (args.teacher is None):
        parser.error("give both --student and --teacher, or neither")
    if args.student is None:
        from tiny_models import make_tiny_models

        args.student, args.teacher = make_tiny_models()
        args.learning_rate = args.learning_rate or 1e-2
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16 if args.bf16 else torch.float32)

    if args.data is None:
        sums = [(f"{a} + {b}", f"= {a + b}") for a in range(20) for b in range(20)]
        chats = [[{"role": "user", "content": x}, {"role": "assistant", "content": y}] for x, y in sums]
    else:
        chats = [json.loads(line)["messages"] for line in args.data.read_text().splitlines()]
    data = Dataset.from_dict({"messages": chats}).train_test_split(test_size=16, seed=0)
    arguments = GKDConfig(
        output_dir=args.output,
        beta=args.beta,
        lmbda=args.lmbda,
        max_new_tokens=16,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=args.learning_rate or 1e-5,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=5,
    )
    with patched_trl():
        trainer = GKDTrainer(student, teacher, arguments, None, data["train"], data["test"], processing_class=tokenizer)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"held-out divergence: {before:.4f} before, {after:.4f} after")


if __name__ == "__main__":
    main()
