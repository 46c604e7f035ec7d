"""PyTorch, C++ and Triton have the same divergences in the same files, in the same order, under the same headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kldiv_kernels.divergences import DIVERGENCES
from kldiv_kernels.registry import STATISTICS

ROOT = Path(__file__).resolve().parents[2]
TWINS = {
    "Python": "kldiv_kernels/divergences/{}.py",
    "C++": "csrc/divergences/{}.h",
    "Triton": "kldiv_kernels/backends/triton/formulas/{}.py",
}
FILES = ("kl", "mixtures", "distances", "powers", "quadratic")


def headings(language: str, file: str) -> list[str]:
    """What stands before the colon of a line "--- Jeffreys: its formula"."""
    text = (ROOT / TWINS[language].format(file)).read_text()
    return re.findall(r"^(?:#|//) --- ([^:\n]+):", text, re.MULTILINE)


def listed(macro: str, text: str) -> list[str]:
    """The names in a list of csrc, #define MACRO(X) X(name, ...) ..."""
    (body,) = re.findall(rf"#define {macro}\(X\)((?:.*\\\n)*.*)", text)
    return re.findall(r"X\((\w+)", body)


@pytest.mark.parametrize("file", FILES)
def test_the_same_headings(file: str) -> None:
    found = {language: headings(language, file) for language in TWINS}
    assert len(found["Python"]) >= 2
    assert found["Python"] == found["C++"] == found["Triton"]


def test_the_same_divergences() -> None:
    from kldiv_kernels.backends.triton.formulas.table import TABLE

    texts = "".join((ROOT / TWINS["C++"].format(file)).read_text() for file in FILES)
    macros = re.findall(r"#define (\w+)\(X\)", texts)
    compiled = [name for macro in macros for name in listed(macro, texts)]
    names = [statistic.name for statistic in DIVERGENCES]
    assert [name for name in compiled if name != "alpha_below_half"] == names
    assert [name for name in TABLE if name in names] == names


def test_the_same_statistics_finish_in_the_first_sweep() -> None:
    from kldiv_kernels.backends.triton.formulas.statistic import FIRST_SWEEP

    text = (ROOT / "csrc/first_sweep.h").read_text()
    assert listed("KLDIV_FIRST_SWEEP", text) == list(FIRST_SWEEP)
    assert {*listed("KLDIV_OF_ONE_COLUMN", text), *(s.name for s in DIVERGENCES)} == {
        name for name, statistic in STATISTICS.items() if statistic.builtin
    }
