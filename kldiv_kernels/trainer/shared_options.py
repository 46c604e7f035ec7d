"""Options that several commands have, with the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option(help="Folder of the run; must be new or empty unless --resume.")]
VocabSize = Annotated[
    int | None, typer.Option(help="Columns from here on are padding. Default: the narrower model's width.")
]
BackendName = Annotated[str, typer.Option(help="Backend of kldiv_kernels; see kldiv doctor.")]
Accumulation = Annotated[int, typer.Option(min=1, help="Micro-batches a step.")]
PeakLearningRate = Annotated[float, typer.Option(help="Peak learning rate (linear warm-up over 5 %, then cosine).")]
MixedPrecision = Annotated[bool, typer.Option("--bf16", help="Mixed precision: autocast to bfloat16.")]
DataConfig = Annotated[str | None, typer.Option(help="Configuration of a hub data set.")]
TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]
BlockSize = Annotated[int, typer.Option(min=2, help="Tokens a block.")]
LogEvery = Annotated[int, typer.Option(min=1, help="Steps between lines of metrics.jsonl.")]
EvalEvery = Annotated[int, typer.Option(min=1, help="Steps between held-out evaluations.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue the run in --output, exactly. Options stay the same; --steps may grow."),
]
