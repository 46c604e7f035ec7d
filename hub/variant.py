"""The build of a kernel that `kernels.get_local_kernel` loads on this machine, for CPUs; kernel-builder makes the rest.

<kernel>/build/torch-stable-abi210-cpu-x86_64-linux/   or build/torch-cpu/ where there is nothing to compile
  the package, metadata.json
  _ops.py            where the operators are
  <id>.abi3.so       the compiled part, whose name is that of the namespace too
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hub.layout import BINDING, NAMESPACE_FLAG, Kernel, build_constants, sources, torch_version, version

# As kernel-builder compiles: for every Python from 3.9 on; and no symbol that the dynamic linker takes for that of
# another version of this kernel.
_FLAGS = ["-DNDEBUG", "-DCPU_KERNEL", "-DPy_LIMITED_API=0x03090000", "-fPIC", "-fno-gnu-unique"]
_OPS = '''"""Where the operators of this build are."""

import torch
{imports}
ops = torch.ops.{identity}


def add_op_namespace_prefix(op_name):
    return f"{identity}::{{op_name}}"
'''


def assemble(kernel: Kernel, folder: Path, *, unique: str | None = None, objects: Path | None = None) -> Path:
    """Builds in folder/build what `lay_out` has written to `folder`, and returns the variant's path.

    `unique` tells this build from others of the kernel; by default it is a digest of what it is made from. What is
    compiled is kept in `objects` and taken from there again.
    """
    identity = f"_{kernel.python_name}_cpu_{unique or _digest(folder)}"
    machine = f"{platform.machine()}-{platform.system().lower()}"
    stable = f"torch-stable-abi{torch_version().replace('.', '')}"
    target = folder / "build" / (f"{stable}-cpu-{machine}" if kernel.compiled else "torch-cpu")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / "torch-ext" / kernel.python_name, target)
    if kernel.compiled:
        _compile(folder, identity, target / f"{identity}.abi3.so", objects or folder / "build" / "objects")
    imports = f"\nfrom . import {identity}  # noqa: F401\n" if kernel.compiled else ""
    (target / "_ops.py").write_text(_OPS.format(imports=imports, identity=identity))
    metadata = {
        "name": kernel.name, "id": identity, "version": version(), "license": "Apache-2.0", "python-depends": [],
        "kernel-depends": [], "backend": {"type": "cpu"},
    }  # fmt: skip
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return target


def _digest(folder: Path) -> str:
    sums = hashlib.sha256()
    for path in sorted(path for part in ("csrc", "torch-ext") for path in (folder / part).rglob("*") if path.is_file()):
        sums.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return sums.hexdigest()[:7]


def _compile(folder: Path, identity: str, library: Path, objects: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    constants = build_constants()
    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    common = [*_FLAGS, f"-DTORCH_TARGET_VERSION={constants['TORCH_TARGET']}", *(f"-isystem{path}" for path in includes)]
    flags = [*constants["CXX_FLAGS"], NAMESPACE_FLAG, *common]
    objects.mkdir(parents=True, exist_ok=True)
    headers = "".join(str((folder / name).read_bytes()) for name in sources("cpu") if name.endswith(".h"))

    def compiled(name: str) -> Path:
        text = (folder / name).read_text(encoding="utf-8")
        # The name of the build is in few files: the others serve every build.
        named = [f"-DTORCH_EXTENSION_NAME={identity}"] if "KLDIV_NAMESPACE" in text or name == BINDING else []
        key = hashlib.sha256(repr((headers, text, flags, named)).encode()).hexdigest()[:24]
        found = objects / f"{Path(name).stem}-{key}.o"
        if not found.exists():
            unfinished = found.with_suffix(f".{os.getpid()}.o")
            _cxx(*flags, *named, "-c", str(folder / name), "-o", str(unfinished))
            unfinished.rename(found)
        return found

    names = [BINDING, *(name for name in sources("cpu") if name.endswith(".cpp"))]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        linked = list(pool.map(compiled, names))
    paths = [f"-L{path}" for path in library_paths()]
    _cxx("-shared", *map(str, linked), *paths, "-ltorch_cpu", "-lc10", "-o", str(library))


def _cxx(*arguments: str) -> None:
    command = [*shlex.split(os.environ.get("CXX", "g++")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
