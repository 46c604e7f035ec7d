"""What the scripts of this folder share: options, progress, results as JSON and plot, and the printed comparison."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from kldiv_kernels.trainer.plots import save
from kldiv_kernels.version import __version__

RESULTS = Path(__file__).parents[1] / "results" / "claims"
_BEGAN = time.monotonic()


@dataclass
class Claim:
    """name: of the files. published: the paper's direction in a sentence. rows: (what, seen here), for the table.

    shown: "yes", "in part" or "no".
    """

    name: str
    paper: str
    published: str
    shown: str = ""
    verdict: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def options(doc: str, name: str, *, seeds: int, example: str) -> argparse.Namespace:
    """--seeds, --threads and --output; sets the threads."""
    parser = argparse.ArgumentParser(
        description=doc, epilog=f"example:\n  python benchmarks/claims/{name}.py {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=seeds, help="runs with seeds 0, 1, … (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        help="folder of JSON and plot (default: benchmarks/results/claims)",
    )
    given = parser.parse_args()
    for option in ("seeds", "threads"):
        if getattr(given, option) < 1:
            parser.error(f"--{option}: {getattr(given, option)} is below 1")
    torch.set_num_threads(given.threads)
    return given


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"{time.monotonic() - _BEGAN:6.0f} s  {text}", file=sys.stderr, flush=True)


def over_seeds(count: int) -> Iterator[int]:
    for seed in range(count):
        say(f"seed {seed} of {count}")
        torch.manual_seed(seed)
        yield seed


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def finish(claim: Claim, given: argparse.Namespace, figure: Figure) -> None:
    """Write NAME.json and NAME.png, print the comparison."""
    given.output.mkdir(parents=True, exist_ok=True)
    record = {
        "paper": claim.paper, "published": claim.published, "shown": claim.shown, "verdict": claim.verdict,
        "seen": dict(claim.rows), "numbers": claim.numbers, "seeds": given.seeds, "threads": given.threads,
        "seconds": round(time.monotonic() - _BEGAN), "date": date.today().isoformat(),
        "versions": {"kldiv_kernels": __version__, "torch": str(torch.__version__)},
    }  # fmt: skip
    path = given.output / f"{claim.name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    save(figure, path.with_suffix(".png"))
    print(f"{claim.paper}\npublished: {claim.published}")
    print(f"seen here, mean ± standard deviation of {given.seeds} seed{'s' if given.seeds > 1 else ''}:")
    width = max(len(what) for what, _ in claim.rows)
    for what, seen in claim.rows:
        print(f"  {what:{width}}  {seen}")
    said = {"yes": "SHOWN", "in part": "SHOWN IN PART", "no": "NOT SHOWN"}[claim.shown]
    print(f"{said} at this size: {claim.verdict}")
    say(f"wrote {path} and {path.with_suffix('.png').name}")
