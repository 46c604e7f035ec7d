#!/usr/bin/env bash
# Builds the package under AddressSanitizer and UndefinedBehaviorSanitizer beside the normal build and runs the kernel
# tests against it. An access outside a tensor, a use of freed memory or undefined arithmetic ends the run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=build/sanitize
mkdir -p "$folder"
KLDIV_SANITIZE=1 "$python" setup.py -q build --build-base "$folder/base" --build-lib "$folder/lib" >"$folder/build.log" 2>&1 ||
    { cat "$folder/build.log"; exit 1; }
for isa in ${KLDIV_SANITIZE_ISAS:-avx512 baseline}; do
    # PyTorch leaks by design.
    LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0 KLDIV_CPU_ISA=$isa PYTHONPATH="$folder/lib" \
        "$python" -m pytest -q -p no:cacheprovider "$@" tests/test_sanitized.py
done
