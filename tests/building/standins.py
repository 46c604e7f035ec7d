"""Libraries with the names and symbols that a PyTorch for GPUs asks for, and nothing in them.

Its wheel needs gigabytes of CUDA's libraries only to be imported. On a machine without a GPU these do: every function
returns 100, which is "no device" to CUDA. For tests of what PyTorch does on CPUs, in the process that gets
LD_LIBRARY_PATH and nowhere else.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

OF_CUDA = re.compile("lib(cu|nv|nccl)")


def _readelf(option: str, path: Path) -> str:
    return subprocess.run(["readelf", "-W", option, str(path)], capture_output=True, text=True, check=True).stdout


def _versions(path: Path) -> dict[str, str]:
    """Version → library, of the versions that it asks for."""
    found, library = {}, ""
    for line in _readelf("-V", path).splitlines():
        if " File: " in line:
            library = line.split("File: ")[1].split()[0]
        elif " Name: " in line and " Flags: " in line:
            found[line.split("Name: ")[1].split()[0]] = library
    return found


def _symbols(path: Path) -> tuple[set[str], set[str]]:
    """Names that it defines, and names, with @VERSION where they have one, that it asks for."""
    defined, asked = set(), set()
    for line in _readelf("--dyn-syms", path).splitlines():
        fields = line.split()
        if len(fields) < 8 or not fields[0].rstrip(":").isdigit() or fields[4] == "LOCAL":
            continue
        if fields[6] != "UND":
            defined.add(fields[7].split("@")[0])
        elif fields[4] != "WEAK":
            asked.add(fields[7].replace("@@", "@"))
    return defined, asked


def make(libraries: Path, folder: Path) -> list[str]:
    """Stand-ins, in `folder`, for what the .so files in `libraries` need and nothing has. Needs gcc and binutils."""
    paths = sorted(libraries.glob("*.so*"))
    needed = {name for path in paths for name in re.findall(r"NEEDED.*\[(.*)\]", _readelf("-d", path))}
    missing = sorted(name for name in needed - {path.name for path in paths} if OF_CUDA.match(name))
    if not missing:
        return []
    folder.mkdir(parents=True)
    defined, asked, library_of = set(), set(), {}
    for path in paths:
        of_it = _symbols(path)
        defined |= of_it[0]
        asked |= of_it[1]
        library_of.update(_versions(path))
    by_library: dict[str, dict[str, list[str]]] = {name: defaultdict(list) for name in missing}
    for symbol in sorted(asked):
        name, _, version = symbol.partition("@")
        if library_of.get(version) in by_library:
            by_library[library_of[version]][version].append(name)
        elif not version and name not in defined:
            # Any library's: the first one gets it.
            by_library[missing[0]][""].append(name)
    for library, versions in by_library.items():
        _link(folder / library, versions)
    return missing


def _link(library: Path, versions: dict[str, list[str]]) -> None:
    names = [name for of_version in versions.values() for name in of_version]
    source, script = library.with_suffix(".c"), library.with_suffix(".map")
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in names))
    nodes = [f"{version} {{ global: {' '.join(f'{n};' for n in of)} }};" for version, of in versions.items() if version]
    script.write_text("\n".join(nodes))
    scripted = [f"-Wl,--version-script,{script}"] if nodes else []
    subprocess.run(
        [
            "gcc",
            "-w",
            "-shared",
            "-fPIC",
            "-nostdlib",
            f"-Wl,-soname,{library.name}",
            *scripted,
            "-o",
            str(library),
            str(source),
        ],
        check=True,
    )
