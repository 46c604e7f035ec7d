"""The package's modules import one way: from the top of the list below towards its end, and without a circle."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kldiv_kernels

ROOT = Path(kldiv_kernels.__file__).parent
FACE = "kldiv_kernels"
# From the top down. A module imports what stands in a later line, or what is of its own folder.
ORDER = (
    ("cli",),
    ("trainer",),
    ("benchmarking",),
    ("adapters", "teacher_cache"),
    (FACE,),
    ("recipes",),
    ("nn", "distillation", "planning", "signatures"),
    ("fixed_options",),
    ("linear", "kernel_plans"),
    ("policy", "top_k", "weighted"),
    ("losses",),
    ("stats",),
    ("parallel",),
    ("sources",),
    ("ops",),
    ("inputs",),
    ("backends",),
    ("registry",),
    ("divergences",),
    ("autograd", "dtensors", "groups", "machine"),
    ("_ops", "choices", "extras", "keywords", "tracing", "version"),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# Folders that show others nothing but their face, of which these modules are a part.
FAMILIES = ("inputs", "parallel", "policy", "top_k", "linear", "recipes")
SHOWN = {"kldiv_kernels.policy.advantages"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def folder_of(module: str) -> str:
    return module.split(".")[1] if "." in module else FACE


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(source: str) -> set[str]:
    """The package's modules that a module imports, at its head or within a function."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if _for_types_only(node):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == FACE}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            module = node.module or ""
            if module.split(".")[0] == FACE:
                of_names = {f"{module}.{name.name}" for name in node.names}
                found |= of_names & MODULES.keys()
                if of_names - MODULES.keys():
                    found.add(module)
    return found


IMPORTS = {module: imports_of(path.read_text()) for module, path in MODULES.items()}


def upward(imports: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in sorted(others)
        if folder_of(module) != folder_of(other) and LEVEL[folder_of(module)] >= LEVEL[folder_of(other)]
    ]


def behind_a_face(imports: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in sorted(others)
        if folder_of(other) in FAMILIES and folder_of(module) != folder_of(other)
        if other.count(".") > 1 and other not in SHOWN
    ]


def check_no_circle(imports: dict[str, set[str]]) -> None:
    # A folder's face imports its modules, and they do not import it.
    TopologicalSorter(imports).prepare()


def test_every_module_has_a_level() -> None:
    assert {folder_of(module) for module in MODULES} == LEVEL.keys()


def test_imports_go_one_way() -> None:
    check_no_circle(IMPORTS)
    assert not upward(IMPORTS)
    assert not behind_a_face(IMPORTS)


def test_a_circle_and_an_upward_import_are_seen() -> None:
    """Also where an import waits inside a function, or is one of several names."""
    lazily = imports_of("def f():\n    from kldiv_kernels import ops, losses\n    import kldiv_kernels.stats as s\n")
    assert lazily == {"kldiv_kernels.ops", "kldiv_kernels.losses", "kldiv_kernels.stats"}
    assert imports_of("if TYPE_CHECKING:\n    from kldiv_kernels.trainer import run\n") == set()
    assert imports_of("from kldiv_kernels.policy import policy_loss, terms") == {
        "kldiv_kernels.policy", "kldiv_kernels.policy.terms",
    }  # fmt: skip
    with pytest.raises(CycleError):
        check_no_circle({**IMPORTS, "kldiv_kernels.backends.interface": {"kldiv_kernels.backends.cuda"}})
    assert upward({"kldiv_kernels.autograd": {"kldiv_kernels.backends"}})
    assert upward({"kldiv_kernels.policy.loss": {"kldiv_kernels.top_k"}})
    assert behind_a_face({"kldiv_kernels.nn": {"kldiv_kernels.policy.options"}})


_PROGRAM = """
import sys, torch
before = set(sys.modules)
import kldiv_kernels as kk
x, ids = torch.randn(4, 100, requires_grad=True), torch.arange(4).expand(4, 4)
kk.divergence_loss(x, torch.randn(4, 100), labels=ids[0]).backward()
kk.topk_divergence_loss(x, ids, kk.selective_log_softmax(torch.randn(4, 100), ids)).backward()
kk.policy_loss(x[None], ids[:1], torch.ones(1)).loss.backward()
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(*sorted(name for name in set(sys.modules) - before if name.startswith("torch.")))
"""


def test_importing_and_calling_it_on_a_cpu_imports_nothing_else() -> None:
    """Not torch._dynamo (with sympy and triton) nor torch.distributed.tensor, which take longer than PyTorch itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    packages, of_torch = done.stdout.splitlines()
    assert set(packages.split()) <= {"kldiv_kernels", "torch", "difflib"}
    assert len(of_torch.split()) < 10, of_torch


# Where each may be asked for: the folders of an extra, and the Triton backend's own code.
_ASKED_IN = {
    "numpy": ("teacher_cache", "trainer"),
    "triton": ("backends.triton.",),
    **dict.fromkeys(("typer", "rich"), ("cli.", "trainer.", "benchmarking.report")),
    "matplotlib": ("trainer.plots", "benchmarking.plot", "benchmarking.gpu_plot"),
    "safetensors": ("teacher_cache", "trainer."),
    "trl": ("adapters.trl.", "trainer."),
    **dict.fromkeys(("transformers", "accelerate", "datasets", "tokenizers"), ("trainer.", "adapters.headless")),
    **dict.fromkeys(("_C", "liger_kernel", "verl", "nemo_rl", "torchtitan", "megatron"), ()),
}
_WITHOUT = """
import importlib, json, sys
blocked, modules = json.loads(sys.stdin.read())
sys.modules.update(dict.fromkeys(blocked))
import torch, kldiv_kernels as kk
said = {}
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        said[name] = error.name
x, ids = torch.randn(4, 100, requires_grad=True), torch.arange(4).expand(4, 4)
kk.token_stats(x, torch.randn(4, 100), ids, stats=("logprob", "js")).js.sum().backward()
kk.linear_divergence_loss(x, torch.randn(50, 100), torch.randn(4, 8), torch.randn(50, 8)).backward()
kk.plan(rows=8, vocab=100, kind="js", device="sm_90")
assert kk.backends()["triton"] != "available" == kk.backends()["reference"]
print(json.dumps(said))
"""


def test_pytorch_is_all_that_the_core_needs() -> None:
    blocked = [f"{FACE}._C" if name == "_C" else name for name in _ASKED_IN]
    modules = [name for name in MODULES if not name.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WITHOUT], input=json.dumps([blocked, modules]), capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT.parent)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked = {module.removeprefix(f"{FACE}."): name for module, name in json.loads(done.stdout).items()}
    wrong = {module: name for module, name in asked.items() if not module.startswith(_ASKED_IN[name.partition(".")[0]])}
    assert not wrong
    assert {"teacher_cache", "backends.triton.launch"} <= asked.keys(), "nothing was kept out"
