"""What the registry says of a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LogitPart = Literal["R0", "R1", "R0+f", "f", "torch", "none"]
Confidence = Literal["code", "paper", "restated", "derived"]


@dataclass(frozen=True)
class Recipe:
    """One method of a paper.

    paper: its number in the list that the package serves. method: the name that it goes by. title, year, link: of the
    paper; link is an arXiv number or a repository, "" where neither is known. functions: of `kk.recipes`; where there
    is none, `differs` says which call of the package it is.

    logit_part: how often the [N, V] logits are read. R0: value and gradient in one read. R0+f: that, after a read
    without gradient. f: one read without gradient. R1: one read, and one more for the gradient. torch: tensors of
    [N, V] in PyTorch. none: no logits.

    confidence: where the formula was seen. code: in the authors' code. paper: in the paper's text. restated: in
    somebody else's words or code. derived: nowhere; it follows from the abstract and what is known.

    differs: what paper and code disagree on and which of them this is, and what was not found.
    """

    paper: int
    method: str
    title: str
    year: int
    functions: tuple[str, ...]
    logit_part: LogitPart
    confidence: Confidence
    link: str = ""
    differs: str = ""
    family: str = ""
