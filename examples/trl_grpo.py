"""GRPO with TRL and a loss that TRL does not have: TRL samples and scores, `policy_loss` is the loss.

python examples/trl_grpo.py                         # a tiny model, some seconds on a CPU
python examples/trl_grpo.py --model Qwen/Qwen3-0.6B --loss-type gmpo --kl-coef 0.01 --bf16

The reward is a program's: the share of a completion's characters that are lower-case letters.
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from kldiv_kernels.adapters.trl import GRPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub id or folder; default: a tiny model, made on the spot")
parser.add_argument("--loss-type", default="gmpo", help="a loss of policy_loss: dapo, gspo, cispo, gmpo, topr, ...")
parser.add_argument("--kl-coef", type=float, default=0.0, help="of the exact KL to the first model (default: 0)")
parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: 40)")
parser.add_argument("--learning-rate", type=float, help="default: 1e-6; the tiny model: 1e-2")
parser.add_argument("--bf16", action="store_true", help="the model under autocast")
parser.add_argument("--output", default="runs/trl_grpo", help="where the model is saved")


def share_of_letters(completions: list[str], **_: object) -> list[float]:
    return [sum("a" <= x <= "z" for x in text) / max(1, len(text)) for text in completions]


def main() -> None:
    args = parser.parse_args()
    if args.model is None:
        from tiny_models import make_tiny_models

        args.model, _ = make_tiny_models()
        args.learning_rate = args.learning_rate or 1e-2
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        reward_funcs=share_of_letters,
        args=GRPOConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=16,
            learning_rate=args.learning_rate or 1e-6,
            beta=args.kl_coef,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=max(1, args.steps // 10),
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"Write {n} words about the sea: " for n in range(2, 100)]}),
        processing_class=tokenizer,
        # What GRPOConfig has no field for. The exact KL is over the whole vocabulary, not of the sampled token.
        policy_loss_options={"loss_type": args.loss_type, "kl_estimator": "reverse_kl"},
    )
    trainer.train()
    trainer.save_model()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward in the first and the last tenth of the steps: {rewards[0]:.4f} before, {rewards[-1]:.4f} after")


if __name__ == "__main__":
    main()
