"""Distillation with `transformers.Trainer` as it is: the loss goes in as `compute_loss_func`.

python examples/transformers_trainer.py             # tiny models, some seconds on a CPU
python examples/transformers_trainer.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --data my.txt --bf16
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from kldiv_kernels.adapters.transformers import distillation_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", help="hub id or folder; default: a tiny model, made on the spot")
parser.add_argument("--teacher", help="hub id or folder, with the student's tokens; default: a tiny model")
parser.add_argument("--data", type=Path, default=argparse.__file__, help="a text; each line is a sequence")
parser.add_argument("--kind", default="js", help="the divergence: forward_kl, reverse_kl, js, ... (default: js)")
parser.add_argument("--ce-weight", type=float, default=0.1, help="share of cross-entropy in the loss (default: 0.1)")
parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: 40)")
parser.add_argument("--learning-rate", type=float, help="default: 1e-5; tiny models: 1e-2")
parser.add_argument("--bf16", action="store_true", help="teacher in bfloat16, student under autocast")
parser.add_argument("--output", default="runs/transformers_trainer", help="where the student is saved")


def main() -> None:
    args = parser.parse_args()
    if (args.student is None) != (args.teacher is None):
        parser.error("give both --student and --teacher, or neither")
    if args.student is None:
        from tiny_models import make_tiny_models

        args.student, args.teacher = make_tiny_models(teacher_padding=62)
        args.learning_rate = args.learning_rate or 1e-2
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16 if args.bf16 else torch.float32)

    lines = [line for line in args.data.read_text().splitlines() if line.strip()]
    tokens = tokenizer(lines, truncation=True, max_length=128)
    data = Dataset.from_dict(dict(tokens)).train_test_split(test_size=16, seed=0)
    arguments = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=args.learning_rate or 1e-5,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
    )
    trainer = Trainer(
        student,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        # Pads, and makes labels of the tokens, -100 on padding. The loss shifts them.
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        # Runs the teacher on each batch that the student had. The mean is over the tokens of the whole step.
        compute_loss_func=distillation_loss(student, teacher.to(arguments.device), args.kind, ce_weight=args.ce_weight),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model()
    print(f"held-out loss, nats a token: {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after")


if __name__ == "__main__":
    main()
