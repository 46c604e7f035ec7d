"""The package as a kernel of the Hugging Face Hub: `make hub` lays it out, `kernels` loads it, in several versions."""

from __future__ import annotations

import ast
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import kldiv_kernels as kk
from hub import sources
from hub.layout import COMPILED, TRITON, Kernel, build_constants, lay_out, version
from hub.sources import relative
from hub.variant import assemble

kernels = pytest.importorskip("kernels", reason="kernels is not installed")

pytestmark = pytest.mark.packaging


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and mask: a batch of two sequences, the second padded; columns that a sampler has cut off."""
    torch.manual_seed(seed)
    student, teacher = torch.randn(2, 3, 1001).mul_(3), torch.randn(2, 3, 1001).mul_(3)
    student[0, 1, 40:] = teacher[0, 1, 40:] = -torch.inf
    return student, teacher, torch.tensor([[True, True, True], [True, False, False]])


def expected() -> tuple[Tensor, Tensor]:
    """Forward KL and its gradient, in float64 from the definition."""
    student, teacher, mask = rows()
    wanted = student.double().requires_grad_()
    logq, logp = wanted[mask].log_softmax(-1), teacher[mask].double().log_softmax(-1)
    loss = torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp - logq)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, wanted)
    return loss.detach(), gradient


def check(loss_of: Any, **more: Any) -> None:
    student, teacher, mask = rows()
    student.requires_grad_()
    loss = loss_of(student, teacher, mask=mask, **more)
    loss.backward()
    value, gradient = expected()
    assert loss.item() == pytest.approx(value.item(), rel=1e-5)
    assert (student.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_kernel_builder_reads_the_layout(tmp_path: Path) -> None:
    from kernels._rust import Backend, Build

    for kernel in (COMPILED, TRITON):
        folder = lay_out(kernel, tmp_path, owner="somebody")
        lay_out(kernel, tmp_path)
        build = Build.open(folder)
        assert {str(one).lower() for one in build.general.backends} == set(kernel.backends)
        assert build.all_kernel_depends(Backend.CPU) == []
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        text = (folder / "build.toml").read_text()
        listed = {line.strip(" ',") for line in text.splitlines() if re.search(r"\.(cpp|h|cu|cuh)',$", line)}
        assert listed == {name for name in files if re.search(r"\.(cpp|h|cu|cuh)$", name)}
        assert f"torch-ext/{kernel.python_name}/__init__.py" in files
        # kernel-builder writes it.
        assert not any(name.endswith("/_ops.py") for name in files)
    toml = (tmp_path / COMPILED.name / "build.toml").read_text()
    assert all(f"    '{flag}',\n" in toml for name in ("CXX_FLAGS", "NVCC_FLAGS") for flag in build_constants()[name])
    assert "    '8.0',\n" in toml
    assert "    '12.0+PTX',\n" in toml
    assert version() == int(kk.__version__.split(".")[0])


def test_modules_of_a_kernel(tmp_path: Path) -> None:
    """Nothing in them says what the package or its namespace is called, but for prose."""
    folder = lay_out(TRITON, tmp_path) / "torch-ext" / TRITON.python_name
    trees = {path: ast.parse(path.read_text()) for path in folder.rglob("*.py")}
    assert len(trees) > 100
    named = {"define", "impl", "register_autograd", "register_fake", "triton_op"}
    found = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                # As many folders up as there are.
                assert node.level <= len(path.relative_to(folder).parts)
                assert (node.module or "").partition(".")[0] != "kldiv_kernels"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops":
                assert node.attr == "load_library", f"{path}:{node.lineno} names a namespace"
            if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.library.") in named:
                name = ast.unparse(node.args[0])
                found.add(ast.unparse(node.func))
                assert name == "_qualified" or name.startswith("add_op_namespace_prefix("), f"{path}:{node.lineno}"
    assert len(found) == len(named)


def test_imports_become_relative() -> None:
    text = '"""from kldiv_kernels import x"""\nif 1:\n    é = 1; from kldiv_kernels.a.b import (\n        c,\n    )\n'
    assert relative(text, 2) == text.replace("; from kldiv_kernels.a.b", "; from ...a.b")
    with pytest.raises(ValueError, match="line 1: `import kldiv_kernels` has no relative form"):
        relative("import kldiv_kernels as kk\n", 0)


def test_what_a_kernel_may_not_import_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LEFT_OUT", (*sources.LEFT_OUT, "choices.py"))
    with pytest.raises(ValueError, match=r"functions\.py imports kldiv_kernels\.choices, which a kernel does not have"):
        sources.modules.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(sources, "ALLOWED", {"torch", "typing_extensions"})
    with pytest.raises(ValueError, match="imports triton"):
        sources.modules.__wrapped__()


def load(kernel: Kernel, output: Path, unique: str, objects: Path) -> ModuleType:
    folder = lay_out(kernel, output)
    assemble(kernel, folder, unique=unique, objects=objects)
    return kernels.get_local_kernel(folder)


def test_two_versions_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = load(COMPILED, tmp_path / "one", "one", tmp_path / "objects")
    # What does not name the version is compiled once.
    objects = len(list((tmp_path / "objects").iterdir()))
    two = load(COMPILED, tmp_path / "two", "two", tmp_path / "objects")
    assert len(list((tmp_path / "objects").iterdir())) == objects + 4
    assert (one.__name__, two.__name__) == ("_kldiv_kernels_cpu_one", "_kldiv_kernels_cpu_two")
    for kernel in (one, two, kk):
        assert kernel.backends()["cpu"] == "available"
        assert kernel.__all__ == kk.__all__
        check(kernel.forward_kl, backend="cpu")
        check(torch.compile(kernel.forward_kl, fullgraph=True, backend="aot_eager"))
        stats = kernel.token_stats(*rows()[:2], stats=("reverse_kl",))
        assert type(stats).__module__ == f"{kernel.__name__}.stats"
        again = pickle.loads(pickle.dumps(stats))
        assert torch.equal(again.reverse_kl, stats.reverse_kl)
        assert kernel.plan(rows=4, vocab=1001, dtype=torch.float32, kind="forward_kl", device="cpu").backend == "cpu"
        assert kernel.recipes.find("vopd").family == "on_policy_distillation"
    # Each has its own operators, and they are what runs.
    names = (one.__name__, two.__name__, "kldiv_kernels")
    assert len({id(getattr(torch.ops, name).loss.default) for name in names}) == len(names)
    for name in names[:2]:
        namespace = getattr(torch.ops, name)
        torch.library.opcheck(namespace.largest.default, (torch.randn(2, 40), None, 4, 38))
        assert namespace.build_info()[2:] == ["torch_target", build_constants()["TORCH_TARGET"], "cuda_archs", ""]

    def refuse(*_: Any) -> Any:
        raise RuntimeError("asked")

    monkeypatch.setattr(getattr(torch.ops, one.__name__), "loss", refuse)
    with pytest.raises(RuntimeError, match="asked"):
        check(one.forward_kl)
    check(two.forward_kl)
    check(kk.forward_kl)
    # What is registered in one is not in the other.
    _register(one)
    with pytest.raises(ValueError, match="mine"):
        two.token_stats(*rows()[:2], stats=("mine",))
    assert one.token_stats(*rows()[:2], stats=("mine",)).mine.shape == (2, 3)


def _register(kernel: ModuleType) -> None:
    kernel.register_statistic(
        "mine",
        value=lambda logp, logq: logq.exp() * logq, grad_logq=lambda logp, logq: logq.exp() * (1 + logq),
        grad_logp=lambda logp, logq: torch.zeros_like(logp),
    )  # fmt: skip


def test_nothing_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = load(TRITON, tmp_path, "alone", tmp_path / "objects")
    assert not (tmp_path / "objects").exists()
    assert "Hub kernel of Triton alone" in kernel.backends()["cpu"]
    check(kernel.forward_kl)
    # As somebody else's code asks for it, while it is not on the Hub.
    monkeypatch.setenv("LOCAL_KERNELS", f"somebody/{TRITON.name}={tmp_path / TRITON.name}")
    assert kernels.get_kernel(f"somebody/{TRITON.name}", version=version()) is kernel
    # The kernels in Triton's interpreter, which has to be asked for before Triton is imported.
    program = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "from pathlib import Path\nimport kernels, test_hub\n"
        f"kernel = kernels.get_local_kernel(Path({str(tmp_path / TRITON.name)!r}))\n"
        "test_hub.check(kernel.forward_kl, backend='triton')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
