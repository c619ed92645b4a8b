# Two commands do everything: `make train` and `make test`. They create the environment .venv in this folder once, and
# update it only when a file that it depends on has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard $(addprefix csrc/,*.cpp */*.cpp */*.cu */*.h */*.cuh */*/*.h */*/*.cuh))
# Two processes with one thread each use two cores; more of either slows the suite down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: train test test-slow test-extended test-llama test-newest versions test-all lint types cuda-check triton-check \
	parity docs bench gpu gpu-check clean

train: $(VENV)/installed
	$(BIN)/fastgpt train $(if $(CONFIG),--config $(CONFIG)) $(if $(DATA),--data '$(DATA)',--check-baseline true) $(ARGS)

test: $(VENV)/tested
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/tested
	$(PYTEST) -m "slow and not extended and not llama_cpp" $(ARGS)

# Tests of many minutes
test-extended: $(VENV)/tested
	$(PYTEST) -m extended $(ARGS)

# Exported GGUF files in llama.cpp; it is built once, for this machine, in five to ten minutes on two cores
test-llama: $(VENV)/llama
	$(PYTEST) -m llama_cpp $(ARGS)

# Everything that can be tested without a GPU: some hours on two cores, then up to 12 runs of the numeric tests,
# some minutes each.
test-all: test test-slow test-extended test-llama
	$(BIN)/python -m fastgpt.checks.triton --all
	$(BIN)/python tests/numeric_cover.py

lint: $(VENV)/tested
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/tested
	$(BIN)/mypy

cuda-check: $(VENV)/tested
	$(BIN)/python -m fastgpt.checks.cuda

triton-check: $(VENV)/tested
	$(BIN)/python -m fastgpt.checks.triton

# Errors against fp64: CPU kernels, Triton in its interpreter, CUDA in the emulation
parity: $(VENV)/tested
	FASTGPT_EMULATED_CUDA=$$($(BIN)/python tests/cuda_on_cpu/emulator.py) $(BIN)/fastgpt parity $(ARGS)

# The documentation as a site, build/docs/html/index.html; a broken link is an error
docs: $(VENV)/documented
	$(BIN)/python docs/build.py

# Every benchmark that needs no GPU, and a report in bench-results/, in under 15 minutes on two cores
bench: $(VENV)/tested
	$(BIN)/fastgpt bench all $(ARGS)

# For a machine with a GPU; needs no network and no virtual environment, only the system's Python with torch, triton,
# numpy, pytest and setuptools
gpu:
	$(PYTHON) -m bench.gpu

# For a machine with a GPU: compute-sanitizer's memcheck and racecheck over the CUDA kernels
gpu-check:
	$(PYTHON) -m bench.gpu --check

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/packages: $(VENV)/created requirements.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed: $(VENV)/packages setup.py pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@$(BIN)/python -c "from fastgpt.core import native; print(*native.describe(), sep='\n')"  # report anything that was not built
	touch $@

$(VENV)/tested: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/llama: $(VENV)/tested requirements-llama.txt
	$(BIN)/python -m pip install --quiet -r requirements-llama.txt
	touch $@

$(VENV)/documented: $(VENV)/installed requirements-docs.txt
	$(BIN)/python -m pip install --quiet -r requirements-docs.txt
	touch $@

# A sample of the tests on the newest torch and Triton, in three minutes; installing them takes some minutes more
test-newest:
	$(PYTHON) tests/versions.py newest --sample $(if $(ENV),--env '$(ENV)')

# The whole suite on PAIR (oldest, pinned or newest), recorded in docs/versions.md; ENV=folder: an environment with that
# pair installed
versions:
	$(PYTHON) tests/versions.py $(PAIR) $(if $(ENV),--env '$(ENV)')

clean:
	rm -rf $(VENV) build dist *.egg-info fastgpt/*.so fastgpt/_build_info.py
