# One line per target: `make help`. Needs python3 (3.10 or newer), a package index and, for `cuda`, none of them.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLD_TRITON := 3.6.0
NEW_TRITON := 3.9.0
OVERLAY := .build/triton-$(OLD_TRITON)
NEW_OVERLAY := .build/triton-$(NEW_TRITON)
LENS := .build/tilelens-3.1.1
SUMMARY := .build/summary.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt
# The script, not `python -m pytest`: that puts the root on the path, where `import kernels` would find ours.
PYTEST := $(BIN)/pytest

# $(call step,title,command): says what runs, runs it, and keeps its last line for the summary.
define step
	@printf '\n== %s\n' '$(1)'
	@mkdir -p .build
	$(2) | tee '.build/$(1).txt'
	@printf '%-44s %s\n' '$(1)' "$$(tail -n 1 '.build/$(1).txt' | sed 's/^[= ]*//; s/[= ]*$$//')" >> $(SUMMARY)
endef

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 20

# --- set-up ------------------------------------------------------------------------------------------------

$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	@echo 'installing into $(VENV) (a minute or two)'
	@$(PYTHON) -m venv $(VENV)
	@# torch first, alone: nothing that comes later may choose another build of it.
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@touch $@

# Another triton, laid over the one in the environment: 3.6.0 is what torch 2.11 ships on CUDA. Its interpreter needs the
# numpy of its time.
.build/triton-%/.ready: $(READY)
	@rm -rf $(@D)
	@$(BIN)/python -m pip install -qq --no-deps --target $(@D) triton==$* 'numpy<2.4'
	@touch $@

# Without what it draws with, and beside the environment: it wants one exact solver.
$(LENS)/.ready: $(READY)
	@rm -rf $(@D)
	@$(BIN)/python -m pip install -qq --no-deps --target $(@D) tilelens==3.1.1 z3-solver==4.15.3.0 anytree ml_dtypes
	@touch $@

.PHONY: test-setup
test-setup: $(READY) ## create .venv with everything that the other targets need

# --- what people run ---------------------------------------------------------------------------------------

.PHONY: run
run: $(READY) ## train the XOR lesson, draw xor.png, say what this machine can do
	$(BIN)/perceptriton lesson xor --plot xor.png
	$(BIN)/perceptriton doctor

.PHONY: bench
bench: $(READY) ## time layers, networks, KernelBench and training loops against torch; JSON and tables into benches/results
	OMP_PROC_BIND=true $(BIN)/python benches/run.py
	OMP_PROC_BIND=true $(BIN)/python benches/run.py --suite mlp
	OMP_PROC_BIND=true $(BIN)/python benches/run.py --suite kernelbench
	OMP_PROC_BIND=true $(BIN)/python benches/run.py --suite training

.PHONY: cuda
cuda: ## on a machine with a CUDA device: correctness, then benchmarks (PARTS=, OUT=); installs nothing
	@bash .ci/cuda

.PHONY: lint
lint: $(READY) ## ruff, formatting, types of kernels and mlp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

.PHONY: clean
clean: ## remove everything that make made
	rm -rf $(VENV) .build build dist *.egg-info .benchmarks .pytest_cache .ruff_cache xor.png
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- tests -------------------------------------------------------------------------------------------------

# On a GPU `make cuda` runs them.
SANITIZED := $(addprefix tests/kernels/,test_kernels.py test_mlp_kernels.py test_training_kernels.py test_wide.py test_memory.py)
NETWORK_TESTS := $(addprefix tests/mlp/,test_networks.py test_fit.py::test_kernels_train_alike test_fuzz.py::test_kernels)
KERNEL_TESTS := $(SANITIZED) $(NETWORK_TESTS)
TILES := $(addprefix tests/kernels/,test_compile.py test_wide_compile.py test_mlp_compile.py test_training_compile.py)
# What tests/compiled has no row for, and a part of the rest: tests/compiling.py says how.
COMPILE_TESTS := tests/kernels/test_compiled.py $(TILES)

# $(call parts,targets): two at a time, each on a core of its own, then what came of each. The longest come first.
define parts
	@mkdir -p .build
	@: > $(SUMMARY)
	@echo 'two parts at a time; each is printed when it has ended: $(1)'
	@$(MAKE) --no-print-directory -j 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(1)
	@printf '\n== all passed\n'
	@cat $(SUMMARY)
endef

.PHONY: test test-more
test: $(READY) ## everything that needs no GPU
	$(call parts,test-all test-kernels test-networks test-deterministic test-benches test-old-triton test-compile)

test-more: $(READY) ## what CI runs besides: lint, sanitize, test-long and test-matrix (many minutes)
	$(call parts,sanitize test-long test-matrix-old test-matrix-new test-matrix-compile lint)

.PHONY: test-all test-compile test-kernels test-networks test-old-triton test-deterministic test-benches
test-all: $(READY)
	$(call step,everything on the CPU,$(PYTEST) $(COMPILE_TESTS:%=--ignore %))

test-compile: $(READY)
	$(call step,compile-only,$(PYTEST) $(COMPILE_TESTS))

test-kernels: $(READY)
	$(call step,kernels under the interpreter,TRITON_INTERPRET=1 $(PYTEST) $(SANITIZED))

test-networks: $(READY)
	$(call step,networks under the interpreter,TRITON_INTERPRET=1 $(PYTEST) $(NETWORK_TESTS))

test-old-triton: $(READY)
	@# A package index without this version must not hide the other tests, but nobody may overlook it either.
	@if $(MAKE) --no-print-directory $(OVERLAY)/.ready; then \
		$(MAKE) --no-print-directory test-old-triton-compile; \
	else \
		echo 'NOT RUN: pip cannot install triton $(OLD_TRITON)' | tee -a $(SUMMARY); \
	fi

.PHONY: test-old-triton-compile
test-old-triton-compile: $(OVERLAY)/.ready
	$(call step,compile-only on triton $(OLD_TRITON),PYTHONPATH=$(OVERLAY) $(PYTEST) $(COMPILE_TESTS))

# The interpreter of the oldest and of the newest triton, and the newest compiler. No tile was picked with that: one that
# spills there is an expected failure, and any other failure is one.
.PHONY: test-matrix test-matrix-old test-matrix-new test-matrix-compile
test-matrix: test-matrix-old test-matrix-new test-matrix-compile ## all kernels under the interpreter of the oldest and the newest triton, the tiles by the newest compiler (minutes; -j 2 helps)

test-matrix-old: $(OVERLAY)/.ready
	$(call step,kernels interpreted by triton $(OLD_TRITON),TRITON_INTERPRET=1 PYTHONPATH=$(<D) $(PYTEST) $(KERNEL_TESTS))

test-matrix-new: $(NEW_OVERLAY)/.ready
	$(call step,kernels interpreted by triton $(NEW_TRITON),TRITON_INTERPRET=1 PYTHONPATH=$(<D) $(PYTEST) $(KERNEL_TESTS))

test-matrix-compile: $(NEW_OVERLAY)/.ready
	$(call step,compile-only on triton $(NEW_TRITON),PYTHONPATH=$(<D) $(PYTEST) $(COMPILE_TESTS))

.PHONY: test-tiles
test-tiles: $(OVERLAY)/.ready $(NEW_OVERLAY)/.ready ## compile every tile on each triton and write tests/compiled (many minutes)
	$(PYTEST) -q --write-tiles $(TILES)
	PYTHONPATH=$(OVERLAY) $(PYTEST) -q --write-tiles $(TILES)
	PYTHONPATH=$(NEW_OVERLAY) $(PYTEST) -q --write-tiles $(TILES)

.PHONY: sanitize
sanitize: $(READY) $(LENS)/.ready ## every kernel under the interpreter, watched for stray addresses and races (minutes)
	$(call step,kernels watched,TRITON_INTERPRET=1 $(PYTEST) --watch-memory $(SANITIZED))
	$(call step,kernels followed by tilelens,TRITON_INTERPRET=1 PYTHONPATH=$(LENS) $(PYTEST) tests/kernels/test_tilelens.py)

.PHONY: test-long
test-long: $(READY) ## 10,001 steps of the training kernels under the interpreter, against torch (minutes)
	$(call step,10001 steps under the interpreter,TRITON_INTERPRET=1 $(PYTEST) --long tests/kernels/test_training_kernels.py -k long)

test-deterministic: $(READY)
	$(call step,deterministic: kernels interpreted,TRITON_INTERPRET=1 $(PYTEST) --deterministic tests/kernels/test_kernels.py)
	$(call step,deterministic: layers and networks,$(PYTEST) --deterministic tests/mlp/test_functional.py tests/mlp/test_networks.py)

test-benches: $(READY)
	$(call step,benchmarks run once: layers,$(PYTEST) benches/bench_stacks.py --benchmark-disable)
	$(call step,benchmarks run once: networks,$(PYTEST) --suite mlp benches/bench_stacks.py --benchmark-disable -k 'xor or digits or 1024')
	$(call step,benchmarks run once: KernelBench,$(PYTEST) --suite kernelbench benches/bench_stacks.py --benchmark-disable)
	$(call step,benchmarks run once: training,$(PYTEST) --suite training benches/bench_training.py --benchmark-disable)
