# make demo, make test: on a Linux machine with Python >= 3.10 and a C++ compiler, and nothing else. Where nvcc is found
# the CUDA kernels are compiled too, for the GPUs that PyTorch sees or for the targets of KLDIV_CUDA_ARCHS.
#
# PYTHON  the interpreter that .venv is made from.
# TORCH   what pip is asked for where .venv has no PyTorch. Pinned, because a range can resolve to a build with
#         gigabytes of CUDA packages; pip options may follow the name.
# PEERS   what tests compare with: Liger, and verl with what importing its losses needs. Without their dependencies:
#         verl's pin other versions of transformers and ask for Ray and its servers; not hydra-core, whose pytest plugin
#         needs packages of its own. verl 0.9.1 says Python < 3.13; its losses do not mind. Of torchtune and OpenRLHF only
#         the files of their losses are imported, which need PyTorch alone. And kernels, which loads what `make hub` makes.
# DEMO_OPTIONS  options of `kldiv demo`.
# GPU_CHECK_OPTIONS  options of benchmarks/gpu_check.py.
# HUB_OPTIONS  options of `python -m hub`.
# FUZZ_EXAMPLES, FUZZ_OPTIONS  how many rows each property of `make fuzz` gets, and options of its pytest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PEERS ?= liger-kernel==0.8.5 verl==0.9.1 tensordict==0.15.3 omegaconf==2.4.0 codetiming==1.4.0 pyvers==0.2.3 \
	cloudpickle==3.1.3 orjson==3.13.0 kernels==0.17.2 torchtune==0.6.1 \
	"openrlhf==0.11.2; python_version < '3.13' and platform_machine == 'x86_64'"
DEMO_OPTIONS ?= --output runs/demo
FUZZ_EXAMPLES ?= 40000

# Where a command in a pipe fails, so does its line.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

VENV := .venv
PY := $(VENV)/bin/python
SOURCES := $(shell find csrc -type f 2>/dev/null)
TEST_SOURCES := $(shell find tests/cuda_host tests/building -name '*.h' -o -name '*.cpp' 2>/dev/null)
CXX_SOURCES := $(filter %.h %.cpp %.cuh %.cu,$(SOURCES)) $(TEST_SOURCES) $(wildcard hub/*.cpp)
# What Triton's interpreter runs: the shared suite on the Triton backend (thinned, see tests/conftest.py), and its own.
INTERPRETED_TESTS := $(addprefix tests/,$(addsuffix .py,\
	$(addprefix core/test_,statistics contract contract_masks small_divergences autograd losses token_helpers golden user_rows beside_labels \
		in_place in_place_autograd no_waiting) \
	$(addprefix top_k/test_,topk topk_statistics topk_rounding) linear/test_linear_values linear/test_linear_forms linear/test_linear_user_rows \
	$(addprefix backends/test_,triton triton_capture triton_scale triton_topk triton_marks) parallel/test_shards_in_one_process \
	adapters/test_adapters_liger_parity recipes/test_recipes))
# The shared suite on the cuda backend, its kernels compiled for the host and run by a model of a GPU.
CUDA_HOST_TESTS := $(addprefix tests/,$(addsuffix .py,\
	$(addprefix core/test_,statistics contract contract_masks small_divergences autograd losses named_losses token_helpers golden \
		user_rows beside_labels determinism properties in_place in_place_autograd no_waiting) \
	$(addprefix policy/test_,policy_calls policy_one_read policy_one_read_autograd policy_extremes policy_parts) \
	$(addprefix top_k/test_,topk topk_statistics topk_rounding topk_one_read topk_one_read_autograd topk_cuda \
		topk_cuda_plans) linear/test_linear_values linear/test_linear_forms linear/test_linear_user_rows \
	$(addprefix backends/test_,labels_cuda cuda_one_read cuda_one_read_limits) parallel/test_shards_in_one_process recipes/test_recipes))
PYTHON_SOURCES := $(wildcard kldiv_kernels tests benchmarks docs examples hub setup.py)

.PHONY: demo test lint format docs fuzz sanitize bench hub gpu-check clean

demo: $(VENV)/.installed
	$(VENV)/bin/kldiv demo $(DEMO_OPTIONS)

test: $(VENV)/.installed
	$(PY) -m pytest -n 2 tests
	$(PY) -m pytest --doctest-modules kldiv_kernels
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 $(INTERPRETED_TESTS)
	KLDIV_CUDA_HOST=1 $(PY) -m pytest -n 2 $(CUDA_HOST_TESTS)

lint: $(VENV)/.installed
	$(PY) -m ruff check $(PYTHON_SOURCES)
	$(PY) -m ruff format --check $(PYTHON_SOURCES)
	$(PY) -m mypy --strict
	$(if $(CXX_SOURCES),$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES))

format: $(VENV)/.installed
	$(PY) -m ruff check --fix $(PYTHON_SOURCES)
	$(PY) -m ruff format $(PYTHON_SOURCES)
	$(if $(CXX_SOURCES),$(VENV)/bin/clang-format -i $(CXX_SOURCES))

# Without a warning, or not at all.
docs: $(VENV)/.installed
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Rows as users have them, others at every call, for about ten minutes: what `make test` has no time for.
fuzz: $(VENV)/.installed
	KLDIV_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PY) -m pytest -n 2 tests/core/test_user_rows.py $(FUZZ_OPTIONS)

# The library built with AddressSanitizer and UndefinedBehaviorSanitizer, under the kernel tests.
sanitize: $(VENV)/.installed
	PYTHON=$(PY) bash tests/building/run_sanitized.sh

# The package as a kernel of the Hugging Face Hub, into build/hub.
hub: $(VENV)/.installed
	$(PY) -m hub $(HUB_OPTIONS)

bench: $(VENV)/.installed
	$(VENV)/bin/kldiv bench --output runs/bench

# Into dist: for every Python, for this one, and without a library. CUDA's part is for all its targets where nvcc is.
.PHONY: wheel compat
wheel: $(VENV)/.installed
	$(PY) tests/building/wheels.py

# The wheel for every Python under each Python here and each PyTorch of the package index; docs/compat.json. Every pair
# downloads a PyTorch: hours. COMPAT_OPTIONS="--torch 2.14.1 --pythons python3.12" runs one.
compat: wheel
	$(PY) tests/building/compat.py $(COMPAT_OPTIONS)

# On a machine with a GPU: everything that only a GPU can show, in seven minutes, into runs/gpu-check (or
# $OUT). Installs nothing: PyTorch, Triton, pytest and NumPy have to be there.
gpu-check:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) benchmarks/gpu_check.py $(GPU_CHECK_OPTIONS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find kldiv_kernels -name '*.so' -delete
	rm -f $(VENV)/.installed

# CUDA for the GPUs here, and none without one, unless the caller says otherwise. `KLDIV_CUDA=1 make test`: all targets.
ifndef KLDIV_CUDA
$(VENV)/.installed: export KLDIV_CUDA_ARCHS ?= native
endif

# PyTorch and the build tools first: the package is compiled against the PyTorch that it will run with.
# The compiled part comes before pip, which would show nothing of it; sed leaves the number and the file of each line.
$(VENV)/.installed: pyproject.toml setup.py $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install "setuptools>=77" wheel ninja "pybind11>=2.12" numpy
	$(PY) setup.py -q build_ext --inplace | sed -uE 's|^(\[[0-9]+/[0-9]+\]) .* -c \S*/(\S+) .*|\1 c++ \2|'
	KLDIV_BUILD=0 $(PY) -m pip install --no-build-isolation -e ".[dev]"
	$(PY) -m pip install --no-deps --ignore-requires-python $(PEERS)
	touch $@
