"""A teacher on disk: write its k most probable tokens after each position, then train from them without the teacher.

python examples/cached_teacher.py                   # tiny models, some seconds on a CPU
python examples/cached_teacher.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --data my.txt --cache my_cache
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import kldiv_kernels as kk
from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache, TeacherCacheWriter
from kldiv_kernels.trainer import CachedSequences, DistillationArguments, DistillationTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", help="hub id or folder; default: a tiny model, made on the spot")
parser.add_argument("--teacher", help="hub id or folder, with the student's tokens; default: a tiny model")
parser.add_argument("--data", type=Path, default=argparse.__file__, help="a text; each line is a sequence")
parser.add_argument("--cache", type=Path, help="folder, only read where it has a cache; default: a temporary one")
parser.add_argument("--k", type=int, default=16, help="log-probs a token (default: 16)")
parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: 40)")
parser.add_argument("--learning-rate", type=float, help="default: 1e-5; tiny models: 1e-2")
parser.add_argument("--bf16", action="store_true", help="teacher in bfloat16, student under autocast")
parser.add_argument("--output", default="runs/cached_teacher", help="where the student is saved")


@torch.no_grad()
def write_cache(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    info = CacheInfo(teacher=args.teacher, vocab_size=len(tokenizer), k=args.k)
    lines = tokenizer(args.data.read_text().splitlines(), truncation=True, max_length=128)["input_ids"]
    with TeacherCacheWriter(args.cache, info) as writer:
        for ids in tqdm([torch.tensor([line]) for line in lines if len(line) > 1], desc="teacher"):
            # Exact log-probs over the whole vocabulary. The last token's row is of no use: no token follows.
            top = kk.topk(teacher(ids.to(device)).logits[:, :-1], args.k, vocab_size=info.vocab_size)
            writer.append(ids, top.ids, top.values)


def main() -> None:
    args = parser.parse_args()
    cached = args.cache is not None and (args.cache / "cache.json").exists()
    if (args.student is None) != (args.teacher is None) and not cached:
        parser.error("give both --student and --teacher, or neither")
    if args.student is None:
        from tiny_models import make_tiny_models

        args.student, args.teacher = make_tiny_models()
        args.learning_rate = args.learning_rate or 1e-2
    args.cache = args.cache or Path(tempfile.mkdtemp(prefix="teacher_cache_"))
    if not cached:
        write_cache(args)
    cache = TeacherCache(args.cache)
    print(f"{cache.totals}, {cache.bytes:,} bytes, {cache.captured_mass.mean:.1%} of the teacher's mass")
    data = CachedSequences(cache).split(held_out=0.1, seed=0)
    arguments = DistillationArguments(
        output_dir=args.output,
        max_steps=args.steps,
        gradient_accumulation_steps=2,
        learning_rate=args.learning_rate or 1e-5,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
    )
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    trainer = DistillationTrainer(student, None, arguments, train_dataset=data.train, eval_dataset=data.held_out)
    before = trainer.evaluate()["eval_topk_kl"]
    trainer.train()
    trainer.save_model()
    print(f"held-out KL, nats a token: {before:.4f} before, {trainer.evaluate()['eval_topk_kl']:.4f} after")


if __name__ == "__main__":
    main()
