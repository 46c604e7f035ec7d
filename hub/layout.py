"""The sources of a kernel, laid out as `kernel-builder` takes them: build.toml (edition 5), torch-ext/, csrc/.

kldiv-kernels/
  build.toml  flake.nix  CARD.md
  csrc/                          as it is, without the pybind11 module
  torch-ext/torch_binding.cpp    what `import` needs
  torch-ext/kldiv_kernels/       the package (hub/sources.py); kernel-builder adds _ops.py
"""

from __future__ import annotations

import ast
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.sources import PACKAGE, ROOT, modules

BINDING = "torch-ext/torch_binding.cpp"
# The namespace of the operators, which kernel-builder names (csrc/namespace.h).
NAMESPACE_FLAG = "-DKLDIV_NAMESPACE=TORCH_EXTENSION_NAME"
# The first toolkit that knows all of setup.py's CUDA_ARCHS.
CUDA_TOOLKIT = "12.8"
_FLAKE = """{
  description = "Losses over logits";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""


@dataclass(frozen=True)
class Kernel:
    name: str
    backends: tuple[str, ...]
    compiled: bool

    @property
    def python_name(self) -> str:
        return self.name.replace("-", "_")


COMPILED = Kernel("kldiv-kernels", ("cpu", "cuda"), compiled=True)
# "cpu" is for tests and for readers: PyTorch alone computes there.
TRITON = Kernel("kldiv-kernels-triton", ("cpu", "cuda", "rocm", "xpu"), compiled=False)


def lay_out(kernel: Kernel, output: Path, owner: str | None = None) -> Path:
    """Writes output/<name>, in the place of what was there, and returns that path."""
    folder = output.resolve() / kernel.name
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in modules().items():
        _write(folder / "torch-ext" / kernel.python_name / path, text)
    if kernel.compiled:
        shutil.copy2(ROOT / "hub" / "torch_binding.cpp", folder / BINDING)
        for name in [*sources("cpu"), *sources("cuda")]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    _write(folder / "build.toml", build_toml(kernel, owner))
    _write(folder / "flake.nix", _FLAKE)
    _write(folder / "CARD.md", _card(kernel, owner))
    shutil.copy2(ROOT / "LICENSE", folder / "LICENSE")
    return folder


def version() -> int:
    """A kernel's version is what users pin: the package's major one. 0: its functions may still change."""
    return int(str(_constants(ROOT / PACKAGE / "version.py")["__version__"]).partition(".")[0])


def build_constants() -> dict[str, Any]:
    """What setup.py says at its top: CXX_FLAGS, NVCC_FLAGS, CUDA_ARCHS, TORCH_TARGET."""
    return _constants(ROOT / "setup.py")


def torch_version() -> str:
    """ "2.10" of TORCH_TARGET, whose first two bytes are the major and the minor version."""
    target = int(build_constants()["TORCH_TARGET"], 16)
    return f"{target >> 56}.{target >> 48 & 0xFF}"


def sources(backend: str) -> list[str]:
    """What a variant is made of, the headers included: kernel-builder sees no other file."""
    found = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in found)
    # The pybind11 module is of one Python only.
    wanted = [name for name in names if name != "csrc/python.cpp"]
    return wanted if backend == "cuda" else [name for name in wanted if not name.startswith("csrc/cuda/")]


def build_toml(kernel: Kernel, owner: str | None) -> str:
    general: dict[str, Any] = {
        "name": kernel.name, "version": version(), "edition": 5, "license": "Apache-2.0",
        "backends": list(kernel.backends),
    }  # fmt: skip
    sections: dict[str, dict[str, Any]] = {"general": general}
    if owner:
        sections["general.hub"] = {"repo-id": f"{owner}/{kernel.name}"}
    if not kernel.compiled:
        return _toml({**sections, "torch-noarch": {}})
    constants = build_constants()
    archs = constants["CUDA_ARCHS"]
    cxx = [*constants["CXX_FLAGS"], NAMESPACE_FLAG]
    # CMake reads these quotation marks, and ";" parts lists there.
    named = '-DKLDIV_CUDA_ARCHS=\\"{}+PTX\\"'.format(",".join(map(str, archs)))
    last = len(archs) - 1
    sections["general.cuda"] = {"minver": CUDA_TOOLKIT}
    sections["torch"] = {"src": [BINDING]}
    sections["torch.stable-abi"] = dict.fromkeys(kernel.backends, torch_version())
    sections["kernel.cpu"] = {"backend": "cpu", "depends": ["torch"], "cxx-flags": cxx, "src": sources("cpu")}
    sections["kernel.cuda"] = {
        "backend": "cuda", "depends": ["torch"], "cxx-flags": [*cxx, named], "cuda-flags": constants["NVCC_FLAGS"],
        "cuda-capabilities": [f"{arch / 10}{'+PTX' if i == last else ''}" for i, arch in enumerate(archs)],
        "src": sources("cuda"),
    }  # fmt: skip
    return _toml(sections)


def _toml(sections: dict[str, dict[str, Any]]) -> str:
    def value(x: Any) -> str:
        if isinstance(x, list):
            return "[\n" + "".join(f"    {value(one)},\n" for one in x) + "]"
        # A literal string: a backslash is one.
        return str(x) if isinstance(x, int) else f"'{x}'"

    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {value(x)}\n" for key, x in section.items())
        for name, section in sections.items()
    )


def _card(kernel: Kernel, owner: str | None) -> str:
    what = "C++ for CPUs, CUDA C++ for NVIDIA GPUs, Triton" if kernel.compiled else "Triton and PyTorch"
    return f"""---
library_name: kernels
license: apache-2.0
---

# {kernel.name}

Exact divergences, entropy, log-probabilities and policy losses over the full vocabulary, from raw logits ({what}).

```python
from kernels import get_kernel

kk = get_kernel("{owner or "OWNER"}/{kernel.name}", version={version()})
loss = kk.forward_kl(student_logits, teacher_logits)
```
"""


def _constants(path: Path) -> dict[str, Any]:
    """The literal assignments at the top of a module, which is not run."""
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
