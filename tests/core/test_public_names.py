"""What `import kldiv_kernels` shows, and what type checkers and editors are told of it."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

import kldiv_kernels as kk
from kldiv_kernels import choices
from kldiv_kernels.registry import STATISTICS, divergence_names

SOURCE = Path(kk.__file__).read_text()
# That of `make lint`, whose settings the test shares: reading PyTorch anew takes a minute.
CACHE = str(Path(__file__).parents[2] / ".mypy_cache")


def homes() -> dict[str, str]:
    """Name → module, as the block for type checkers has them."""
    (block,) = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    return {
        name.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }


def test_dir_is_the_public_names() -> None:
    assert dir(kk) == sorted(kk.__all__)
    assert dir(kk.nn) == sorted(kk.nn.__all__)
    assert homes().keys() | {"__version__"} == set(kk.__all__)
    for name, home in homes().items():
        value = getattr(kk, name)
        assert value is getattr(importlib.import_module(home), name) or value is sys.modules[f"{home}.{name}"]
    with pytest.raises(AttributeError, match="module 'kldiv_kernels' has no attribute 'foward_kl'"):
        _ = kk.foward_kl


def test_no_public_name_is_a_module_by_accident() -> None:
    """`kldiv_kernels.backends` is a folder, and `kk.backends` a function, whichever was imported first."""
    assert [name for name in kk.__all__ if isinstance(getattr(kk, name), ModuleType)] == ["advantages", "nn", "recipes"]
    program = "import kldiv_kernels.backends.native, kldiv_kernels.top_k, kldiv_kernels as kk\n"
    program += "print(kk.backends()['reference'], kk.topk.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "available topk\n"


def test_the_choices_are_those_of_the_registry() -> None:
    built_in = [name for name in divergence_names() if STATISTICS[name].builtin]
    assert set(get_args(choices.DivergenceKind)) <= set(built_in)
    assert set(get_args(choices.Backend)) == {"auto", *kk.backends()}


def test_signatures_are_explicit() -> None:
    """That of a named loss is `divergence_loss`'s, less the kind and the parameters that it has no use for."""
    general = set(inspect.signature(kk.divergence_loss).parameters)
    for function, without in (
        (kk.forward_kl, {"kind", "alpha", "beta"}),
        (kk.js_divergence, {"kind", "alpha"}),
        (kk.skew_kl, {"kind", "beta"}),
        (kk.alpha_beta_divergence, {"kind"}),
    ):
        assert set(inspect.signature(function).parameters) == general - without


_TYPED = """
import torch
import kldiv_kernels as kk

x, ids = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
kk.js_divergence(x, x, beta=0.9, labels=ids[0], reduction="sum")
kk.js_divergence(x, x, bta=0.9)  # error: bta
kk.forward_kl(x, x, beta=0.9)  # error: beta
kk.forward_kl(x, x, reduction="men")  # error: reduction
kk.divergence_loss(x, x, "of_my_own")
kk.divergence_loss(x, x, backend="gpu")  # error: backend
kk.topk_divergence_loss(x, ids, x, tail="buckets")  # error: tail
kk.policy_loss(x, ids[0], x[:, 0], loss_type="grop")  # error: loss_type
kk.nn.JSDivLoss(bta=0.9)  # error: bta
kk.nn.JSDivLoss(0.9, temperature=2.0)(x, x, mask=ids[0])
kk.nn.PolicyLoss(loss_type="grpo", clip_lo=0.1)  # error: clip_lo
kk.nn.TopKDivergenceLoss("js", tail="none", reference_temperature=2.0)  # error: reference_temperature
kk.topk(x, 2).foo  # error: foo
"""


def test_mypy_completes_and_refuses(tmp_path: Path) -> None:
    """From another folder: what it sees is the installed package."""
    program = tmp_path / "program.py"
    program.write_text(_TYPED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-version", "3.10", "--cache-dir", CACHE, program.name],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    found = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if ": error:" in line}
    wanted = {n: line.split("# error: ")[1] for n, line in enumerate(_TYPED.splitlines(), 1) if "# error" in line}
    assert found.keys() == wanted.keys(), done.stdout + done.stderr
    for number, name in wanted.items():
        # mypy names the parameter, or the type of its value.
        assert name in found[number] or "incompatible type" in found[number], found[number]
