"""Builds the compiled part: one shared library on PyTorch's stable ABI, for every Python, and the small module `_C`.

KLDIV_BUILD=0 installs without it: the wheel is py3-none-any. KLDIV_MODULE=0 leaves out `_C`, which only tests and tools
ask: nothing of the wheel is then of one Python, and it is py3-none for this platform. Everything else about the package
is in pyproject.toml.

Where nvcc is found (CUDA_HOME, PATH) the library gets its CUDA part too; KLDIV_CUDA=0 leaves it out, KLDIV_CUDA=1
insists on it. KLDIV_CUDA_ARCHS="90" or "90;100" narrows what it is compiled for; "native" takes the GPUs that PyTorch
sees, and leaves the CUDA part out where it sees none. Objects are kept in build/cuda by the content of what they are
made from; ptxas.txt there is what ptxas said of the kernels.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# PyTorch 2.10: the oldest with torch::stable::parallel_for.
TORCH_TARGET = "0x020a000000000000"
# Binaries run on later members of their generation as well (sm_80 on sm_87); newer generations get the last one's PTX.
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
# -ffp-contract=off: products are fused into sums only where the source says so. Fusing p = e * scale into p - q would
# leave a rounding error where p and q are the same. -Wno-*: what GCC 12 says of AVX-512 intrinsics that take an
# undefined source operand on purpose. (hub/layout.py reads these constants too, for the Hub kernel.)
CXX_FLAGS = [
    "-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall",
    "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi",
]  # fmt: skip
# --fmad=false: as -ffp-contract=off above. The rest trades the last bit of a division and numbers below 1e-38 for
# speed; exponentials do not depend on it.
NVCC_FLAGS = [
    "-std=c++17", "-O3", "--fmad=false", "-ftz=true", "-prec-div=false", "-prec-sqrt=false",
    "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v",
]  # fmt: skip


def relative(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def description() -> str:
    """README.md for a package index, where its relative links lead nowhere: their text alone. Code stays as it is."""
    code, link = r"^```.*?^```|`[^`\n]*`", r"!?\[([^\]]*)\]\((?!\w+:)[^)]*\)"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(f"({code})|{link}", lambda found: found[1] or found[2], text, flags=re.MULTILINE | re.DOTALL)


def stop(message: str) -> None:
    sys.exit(f"kldiv_kernels: {message}\nKLDIV_BUILD=0 installs without the compiled part (slow: PyTorch only).")


def require_tools(module: bool) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        stop(f"no C++ compiler: {compiler!r} was not found. Install one (Debian, Ubuntu: apt-get install g++).")
    try:
        import torch

        if module:
            import pybind11  # noqa: F401
    except ImportError as error:
        stop(f"building needs {error.name}: pip install torch pybind11 ninja, then pip install --no-build-isolation .")
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        stop(f"PyTorch {torch.__version__} is too old; the stable ABI that the library uses needs 2.10 or newer.")


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        stop(f"{' '.join(command)} fails:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def gpus() -> list[int]:
    """90 for sm_90. A PyTorch without CUDA sees none, and could not use the kernels either."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    capabilities = [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]
    return [10 * major + minor for major, minor in capabilities]


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str
    archs: tuple[int, ...]

    @staticmethod
    def find() -> Nvcc | None:
        asked = os.environ.get("KLDIV_CUDA", "")
        if asked not in ("", "0", "1"):
            stop(f"KLDIV_CUDA is {asked!r}; expected 0 (no CUDA part) or 1 (stop where it cannot be built)")
        if asked == "0":
            return None
        home = os.environ.get("CUDA_HOME")
        path = (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None) or shutil.which("nvcc")
        if path is None:
            if asked == "1":
                stop("KLDIV_CUDA=1, but nvcc was found neither in CUDA_HOME nor in PATH. Install the CUDA toolkit.")
            return None
        archs = Nvcc._archs(path)
        if not archs and asked == "1":
            stop(
                "KLDIV_CUDA=1, but there is nothing to compile for: KLDIV_CUDA_ARCHS is native and PyTorch sees no GPU "
                "of sm_80 or later, or this nvcc knows none of them."
            )
        return Nvcc(path, output_of(path, "--version"), archs) if archs else None

    @staticmethod
    def _archs(path: str) -> tuple[int, ...]:
        known = sorted(int(arch) for arch in re.findall(r"compute_(\d+)\b", output_of(path, "--list-gpu-arch")))
        known = [arch for arch in known if arch >= CUDA_ARCHS[0]]
        text = os.environ.get("KLDIV_CUDA_ARCHS", "")
        default = [arch for arch in CUDA_ARCHS if arch in known]
        if not text:
            return tuple(default)
        if text == "native":
            # What each GPU would take from a build for all targets.
            return tuple(sorted({max((arch for arch in default if arch <= gpu), default=0) for gpu in gpus()} - {0}))
        asked = sorted({int(part) for part in text.split(";")}) if re.fullmatch(r"\d+(;\d+)*", text) else []
        if not asked or not set(asked) <= set(known):
            stop(
                f'KLDIV_CUDA_ARCHS is {text!r}; expected native, or numbers such as "90" or "90;100", of those '
                f"that this nvcc compiles for: {', '.join(map(str, known))}"
            )
        return tuple(asked)

    @property
    def arch_text(self) -> str:
        return ";".join(map(str, self.archs)) + "+PTX"

    def flags(self) -> list[str]:
        targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        targets.append(f"arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
        release = re.search(r"release (\d+)", self.version)
        # A quarter of the default's size. Drivers before those of CUDA 13 may not unpack it.
        packed = ["--compress-mode=size"] if release and int(release[1]) >= 13 else []
        return [*NVCC_FLAGS, *packed, *(part for target in targets for part in ("-gencode", target))]

    def link_flags(self) -> list[str]:
        """The static runtime, its symbols hidden: PyTorch's own runtime stays apart from it."""
        folders = re.search(r"^#\$ LIBRARIES=(.*)$", output_of(self.path, "--dryrun", "-c", "x.cu"), re.MULTILINE)
        return [
            *re.findall(r'"(-L[^"]+)"', folders[1] if folders else ""),
            "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,libcudart_static.a",
        ]  # fmt: skip


def with_includes(source: Path) -> list[Path]:
    """A file, and what it includes of the repository."""
    found: list[Path] = []
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        names = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE)
        # One that is not there belongs to a branch that nvcc does not take.
        waiting += [near for name in names if (near := (path.parent / name).resolve()).is_file()]
    return sorted(found)


def compile_cuda(nvcc: Nvcc) -> list[str]:
    """The objects of csrc/cuda/**/*.cu; those whose sources have not changed are not compiled again."""
    folder = ROOT / "build" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    flags = nvcc.flags()

    def compiled(source: Path) -> Path:
        made_from = hashlib.sha256(repr((nvcc.version, flags)).encode())
        for path in with_includes(source):
            made_from.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
        target = folder / f"{source.stem}-{made_from.hexdigest()[:16]}.o"
        if not target.exists():
            print(f"nvcc {source.name} for sm_{nvcc.arch_text}", flush=True)
            start = time.monotonic()
            # Under another name until it is whole: a build may be interrupted.
            unfinished = target.with_suffix(f".{os.getpid()}.o")
            said = output_of(nvcc.path, *flags, "-c", str(source), "-o", str(unfinished))
            target.with_suffix(".ptxas").write_text(said)
            unfinished.rename(target)
            print(f"nvcc {source.name}: {time.monotonic() - start:.0f} s", flush=True)
        return target

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or cores)) as pool:
        running = [pool.submit(compiled, source) for source in sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))]
        try:
            objects = [one.result() for one in running]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    said = (f"# {path.name}\n{path.with_suffix('.ptxas').read_text()}" for path in objects)
    (folder / "ptxas.txt").write_text("\n".join(said))
    return [str(path.relative_to(ROOT)) for path in objects]


class BuildPy(build_py):
    def run(self) -> None:
        # What an earlier build left in build/lib would go into this wheel: modules since deleted, libraries.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "kldiv_kernels"), ignore_errors=True)
        super().run()


class AnyPython(bdist_wheel):
    """A wheel with a library in it, and no module of one Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[-1]


def extensions() -> dict[str, object]:
    module = os.environ.get("KLDIV_MODULE", "1") != "0"
    require_tools(module)
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sanitize = os.environ.get("KLDIV_SANITIZE") == "1"
    nvcc = None if sanitize else Nvcc.find()

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            if nvcc is not None:
                library.extra_objects = compile_cuda(nvcc)
            super().build_extensions()

        def get_ext_filename(self, name: str) -> str:
            # No Python in it, so no Python version in its name.
            if name.split(".")[-1] == "libkldiv_kernels":
                return str(Path(*name.split("."))) + ".so"
            return super().get_ext_filename(name)

        def get_export_symbols(self, extension: object) -> list[str]:
            return []

    flags = list(CXX_FLAGS)
    link = [] if nvcc is None else nvcc.link_flags()
    if sanitize:
        flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        link += ["-fsanitize=address,undefined"]
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    told = [f'-DKLDIV_CUDA_ARCHS="{nvcc.arch_text if nvcc else ""}"', f'-DKLDIV_TORCH_TARGET="{TORCH_TARGET}"']
    library = CppExtension(
        "kldiv_kernels.libkldiv_kernels",
        relative(
            "csrc/ops.cpp",
            "csrc/shard_ops.cpp",
            "csrc/plan_ops.cpp",
            "csrc/plan.cpp",
            "csrc/cpu/*.cpp",
            *(["csrc/cuda/*.cpp"] if nvcc else []),
        ),
        extra_compile_args=[*flags, target, *told],
        extra_link_args=link,
        py_limited_api=True,
    )
    commands = {"build_ext": Build, "build_py": BuildPy}
    if not module:
        return {"ext_modules": [library], "cmdclass": {**commands, "bdist_wheel": AnyPython}}
    return {"ext_modules": [library, plans_module()], "cmdclass": commands}


def plans_module() -> Extension:
    """Not PyTorch's: it links none of its libraries, and loads before them."""
    import pybind11

    return Extension(
        "kldiv_kernels._C",
        ["csrc/python.cpp", "csrc/plan.cpp"],
        include_dirs=[pybind11.get_include()],
        language="c++",
        extra_compile_args=["-std=c++17", "-O2", "-g0"],
    )


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    **(extensions() if os.environ.get("KLDIV_BUILD", "1") != "0" else {"cmdclass": {"build_py": BuildPy}}),
)
