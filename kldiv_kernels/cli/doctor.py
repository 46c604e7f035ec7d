"""The checks behind `kldiv doctor`: what works here, why something does not, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from typing import Literal

import torch

from kldiv_kernels import machine
from kldiv_kernels.backends import backends, cuda, native
from kldiv_kernels.extras import OPTIONAL, Package
from kldiv_kernels.version import __version__

Status = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Check:
    """One line of the report; `hint` says how to mend what is missing."""

    name: str
    status: Status
    detail: str
    hint: str = ""


def checks() -> list[Check]:
    """Every check, in the order in which they are shown."""
    return [
        Check("kldiv_kernels", "ok", __version__),
        Check("Python", "ok", platform.python_version()),
        Check("PyTorch", "ok", torch.__version__),
        Check("CPU", "ok", f"{machine.cpu_model()}, PyTorch uses {torch.backends.cpu.get_cpu_capability()}"),
        _threads(),
        *_backends(),
        *_build(),
        _compiler(),
        *(_package(name, package) for name, package in OPTIONAL.items()),
    ]


def as_text(found: list[Check]) -> str:
    """A line each, for a terminal without `rich`."""
    width = max(len(check.name) for check in found)
    return "\n".join(
        f"{check.status:8}{check.name:{width + 2}}{check.detail}{f'  ({check.hint})' if check.hint else ''}"
        for check in found
    )


def _threads() -> Check:
    threads, cores = torch.get_num_threads(), machine.usable_cores()
    detail = f"{threads} on {cores} usable cores"
    if threads == cores:
        return Check("threads", "ok", detail)
    return Check(
        "threads", "note", detail, f"OMP_NUM_THREADS={cores} or torch.set_num_threads({cores}) uses each core once"
    )


def _backends() -> list[Check]:
    found = []
    for name, reason in backends().items():
        if reason == "available":
            found.append(Check(f"backend {name}", "ok", f"{reason}{_built_for(name)}"))
        else:
            # The reason ends in what to run, after the last semicolon, where there is something to run.
            why, _, hint = reason.rpartition("; ")
            found.append(Check(f"backend {name}", "missing", why or reason, hint if why else ""))
    forced = os.environ.get("KLDIV_BACKEND")
    if forced:
        found.append(
            Check("KLDIV_BACKEND", "note", f"{forced!r} overrides backend='auto'", "unset it to let the package choose")
        )
    return found


def _built_for(backend: str) -> str:
    if backend == "cpu":
        return f", {native.instruction_set()} code"
    return f", built for sm_{cuda.architectures().replace(';', ', sm_')}" if backend == "cuda" else ""


def _build() -> list[Check]:
    refusal = native.load()
    if refusal is not None:
        why, _, hint = refusal.rpartition("; ")
        return [Check("compiled part", "missing", why or refusal, hint if why else "")]
    return [Check(f"build: {key}", "ok", value or "none") for key, value in native.build_info().items()]


def _compiler() -> Check:
    wanted = os.environ.get("CXX", "")
    # CXX may carry a launcher or options ("ccache g++"); the last word that is a program decides.
    for candidate in (*reversed(wanted.split()), "g++", "clang++"):
        path = shutil.which(candidate)
        if path:
            return Check("C++ compiler", "ok", path)
    return Check(
        "C++ compiler", "missing", "needed to build the cpu backend and by torch.compile",
        "install g++ (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++)",
    )  # fmt: skip


def _package(name: str, package: Package) -> Check:
    if util.find_spec(name) is None:
        return Check(name, "missing", f"needed by {package.needed_by}", f"pip install kldiv_kernels[{package.extra}]")
    return Check(name, "ok", metadata.version(name))
