#!/usr/bin/env bash
# Builds the package under AddressSanitizer and UndefinedBehaviorSanitizer beside the normal build and runs the kernel
# tests against it. An access outside a tensor, a use of freed memory or undefined arithmetic ends the run.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
python=$(realpath -s "${PYTHON:-$(command -v python3)}")
folder=build/sanitize
mkdir -p "$folder"
KLDIV_SANITIZE=1 "$python" setup.py -q build --build-base "$folder/base" --build-lib "$folder/lib" >"$folder/build.log" 2>&1 ||
    { cat "$folder/build.log"; exit 1; }
# python -m takes packages from the current folder first: the sanitized one, not the checkout's.
cd "$folder/lib"
runtime=$(for name in libasan.so libubsan.so libstdc++.so; do ${CXX:-g++} -print-file-name=$name; done | tr '\n' ' ')
export LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 # PyTorch leaks by design
for isa in ${KLDIV_SANITIZE_ISAS:-avx512 avx2 baseline}; do
    KLDIV_CPU_ISA=$isa KLDIV_EXPECT_UNDER="$root/$folder" \
        "$python" -m pytest -q -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" \
        "$root/tests/building/test_sanitized.py" "$@"
done
