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
	@printf '%-48s %s\n' '$(1)' "$$(tail -n 1 '.build/$(1).txt' | sed 's/^[= ]*//; s/[= ]*$$//')" >> $(SUMMARY)
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
	@# For editors and type checkers, which setuptools' import hook tells nothing.
	@bash .ci/link .build/links
	@echo '$(CURDIR)/.build/links' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/perceptriton.pth"
	@$(BIN)/perceptriton build
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
	$(BIN)/perceptriton lesson xor --timing --plot xor.png
	$(BIN)/perceptriton doctor

.PHONY: bench
bench: $(READY) ## time layers, networks, KernelBench and training loops against torch; JSON and tables into benches/results
	OMP_PROC_BIND=true $(BIN)/python benches/run.py
	OMP_PROC_BIND=true $(BIN)/python benches/run.py --suite mlp
	OMP_PROC_BIND=true $(BIN)/python benches/run.py --suite kernelbench
	OMP_PROC_BIND=true $(BIN)/python benches/run.py --suite training

.PHONY: cuda
cuda: ## on a machine with a CUDA device: correctness, then speed (HALF=, PARTS=, OUT=); installs nothing
	@# make makes 2 of every exit status; that of the script tells a failure (1) from no device (3) and no torch (4).
	@bash .ci/cuda $(HALF)

# What a rented GPU's machine has: the key by which triton finds a kernel counts every file of its own wheel. torch brings
# libraries of some GB, of which nothing is used.
CUDA_PYTHON ?= python3.12
CUDA_ENV := .build/cuda-env

$(CUDA_ENV)/.ready:
	@command -v $(CUDA_PYTHON) > /dev/null || { echo 'no $(CUDA_PYTHON) here: CUDA_PYTHON names one, which must be 3.12'; exit 1; }
	$(CUDA_PYTHON) -m venv --clear $(CUDA_ENV)
	$(CUDA_ENV)/bin/python -m pip install -qq torch==2.11.0 triton==$(OLD_TRITON) numpy pytest pytest-benchmark
	@touch $@

.PHONY: cuda-cache
cuda-cache: $(CUDA_ENV)/.ready ## compile for an H100 or H200, ahead, what `make cuda` compiles there (minutes; an install of GBs)
	OMP_NUM_THREADS=1 $(CUDA_ENV)/bin/python .ci/cache/cache.py fill .build/cuda-cache.tar.xz

.PHONY: lint
lint: $(READY) ## ruff, formatting, types of kernels and mlp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# Sphinx writes into .build alone, but for the pages of lessons, which it makes anew. A warning is an error.
DOCS := .build/docs.ready

$(DOCS): $(READY)
	@mkdir -p .build
	@$(PIP) --editable '.[docs]'
	@touch $@

.PHONY: docs
docs: $(DOCS) ## build the pages of docs/ as a site into .build/docs
	@$(BIN)/python -m sphinx -E -W --keep-going -q -b html -d .build/doctrees docs .build/docs
	@! grep -rE '<(script|img|link)[^>]* (src|href)="(https?:)?//' --include='*.html' .build/docs # nothing is fetched
	@echo 'open .build/docs/index.html'

.PHONY: clean
clean: ## remove everything that make made
	rm -rf $(VENV) .build build dist docs/lessons *.egg-info .benchmarks .pytest_cache .ruff_cache xor.png
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- tests -------------------------------------------------------------------------------------------------

# Markers say which tests are which (pyproject.toml has them), and tests/house/test_tiers.py that a target of CI runs each.
TILES := tests/kernels/test_*compile.py

# $(call parts,targets): two at a time, each on a core of its own, then what came of each. The longest come first. Two
# threads in each would wait for each other.
define parts
	@mkdir -p .build
	@: > $(SUMMARY)
	@echo 'two parts at a time; each is printed when it has ended: $(1)'
	@began=$$SECONDS; \
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(1); \
	printf '\n== all passed in %s s\n' $$((SECONDS - began))
	@cat $(SUMMARY)
endef

.PHONY: check test test-more
check: $(READY) ## while you work: lint, types, the fast tests and the core of the interpreter's (under two minutes)
	$(call parts,check-mlp check-core check-others lint check-compiled)

test: $(READY) ## everything that needs no GPU, but for what takes long
	$(call parts,test-mlp test-kernels test-compile test-traced test-others)

test-more: $(READY) ## what CI runs besides: what takes long, sanitize, test-long and test-matrix (many minutes)
	$(call parts,sanitize test-long test-matrix-old test-matrix-new test-matrix-compile test-old-triton test-networks test-benches test-slowest test-fuzz test-ampere test-ada test-hopper test-blackwell test-emulator test-changed-ampere test-changed-hopper test-changed-tiles)

.PHONY: check-mlp check-others check-core check-compiled
check-mlp: $(READY)
	$(call step,fast tests of mlp,FUZZ_BUDGET=0.02 $(PYTEST) -m 'not (slow or more or compiles)' tests/mlp)

check-others: $(READY)
	$(call step,other fast tests,$(PYTEST) -m 'not (slow or more or compiles)' tests/kernels tests/benches tests/house)

check-core: $(READY)
	$(call step,core of the kernels interpreted,TRITON_INTERPRET=1 $(PYTEST) -m 'core and not slow' tests/kernels tests/mlp)

check-compiled: $(READY)
	$(call step,a kernel of each family compiled and run,$(PYTEST) -m 'emulated and core' tests/ptx)

.PHONY: test-mlp test-traced test-others test-compile test-kernels test-networks test-old-triton test-benches test-slowest test-fuzz
test-mlp: $(READY)
	$(call step,layers and networks and training on the CPU,$(PYTEST) -m 'not (more or compiles or traced)' tests/mlp)

test-traced: $(READY)
	$(call step,traced and compiled modules on the CPU,$(PYTEST) -m 'traced and not more' tests/mlp)

test-others: $(READY)
	$(call step,plans and benches and packaging on the CPU,$(PYTEST) -m 'not (more or compiles)' tests/kernels tests/benches tests/house)

test-slowest: $(READY)
	$(call step,the slowest on the CPU,$(PYTEST) -m 'more and not emulated')

test-fuzz: $(READY)
	$(call step,random arguments,FUZZ_BUDGET=1 $(PYTEST) -m fuzz)

test-compile: $(READY)
	$(call step,compile-only,$(PYTEST) -m 'compiles and not more')

test-kernels: $(READY)
	$(call step,kernels under the interpreter,TRITON_INTERPRET=1 $(PYTEST) -m 'interpreter and not long and not more' tests/kernels)

test-networks: $(READY)
	$(call step,networks under the interpreter,FUZZ_BUDGET=1 TRITON_INTERPRET=1 $(PYTEST) -m interpreter tests/mlp)

test-old-triton: $(READY)
	@# A package index without this version must not hide the other tests, but nobody may overlook it either.
	@if $(MAKE) --no-print-directory $(OVERLAY)/.ready; then \
		$(MAKE) --no-print-directory test-old-triton-compile; \
	else \
		echo 'NOT RUN: pip cannot install triton $(OLD_TRITON)' | tee -a $(SUMMARY); \
	fi

.PHONY: test-old-triton-compile
test-old-triton-compile: $(OVERLAY)/.ready
	$(call step,compile-only on triton $(OLD_TRITON),PYTHONPATH=$(OVERLAY) $(PYTEST) -m compiles)

# The interpreter of the oldest and of the newest triton, and the newest compiler. No tile was picked with that: one that
# spills there is an expected failure, and any other failure is one.
.PHONY: test-matrix test-matrix-old test-matrix-new test-matrix-compile
test-matrix: test-matrix-old test-matrix-new test-matrix-compile ## all kernels under the interpreter of the oldest and the newest triton, the tiles by the newest compiler (minutes; -j 2 helps)

test-matrix-old: $(OVERLAY)/.ready
	$(call step,kernels interpreted by triton $(OLD_TRITON),TRITON_INTERPRET=1 PYTHONPATH=$(<D) $(PYTEST) -m 'interpreter and not long')

test-matrix-new: $(NEW_OVERLAY)/.ready
	$(call step,kernels interpreted by triton $(NEW_TRITON),TRITON_INTERPRET=1 PYTHONPATH=$(<D) $(PYTEST) -m 'interpreter and not long')

test-matrix-compile: $(NEW_OVERLAY)/.ready
	$(call step,compile-only on triton $(NEW_TRITON),PYTHONPATH=$(<D) $(PYTEST) -m compiles)

.PHONY: test-old-torch
test-old-torch: $(CUDA_ENV)/.ready ## fast tests, and those of torch.compile, on the oldest torch (minutes; an install of GBs)
	@bash .ci/link .build/links
	$(call step,on torch 2.11,PYTHONPATH=$(CURDIR)/.build/links OMP_NUM_THREADS=1 $(CUDA_ENV)/bin/pytest -m '(traced or not slow) and not (more or compiles)' tests/mlp tests/kernels)

.PHONY: test-tiles
test-tiles: $(OVERLAY)/.ready $(NEW_OVERLAY)/.ready ## compile what tests/compiled has no row for, on each triton, and write it (minutes; PYTEST_ADDOPTS=--all-tiles: everything)
	$(PYTEST) -q --write-tiles $(TILES)
	PYTHONPATH=$(OVERLAY) $(PYTEST) -q --write-tiles $(TILES)
	PYTHONPATH=$(NEW_OVERLAY) $(PYTEST) -q --write-tiles $(TILES)

# What triton compiles for a chip that is not here, run by tests/ptx: sm_80 is Ampere's, sm_89 Ada's, sm_90 Hopper's, sm_120
# that of GeForce cards with Blackwell.

.PHONY: test-compiled test-compiled-all test-ampere test-ada test-hopper test-blackwell test-emulator
test-compiled: $(READY) ## run compiled kernels for four chips on the CPU: the core, and controls of the emulator (minutes)
	$(call parts,test-ampere test-ada test-hopper test-blackwell test-emulator)

test-ampere: $(READY)
	$(call step,core of the kernels compiled for sm_80,$(PYTEST) --compiled-for sm_80 -m core)

test-ada: $(READY)
	$(call step,core of the kernels compiled for sm_89,$(PYTEST) --compiled-for sm_89 -m core)

test-hopper: $(READY)
	$(call step,core of the kernels compiled for sm_90,$(PYTEST) --compiled-for sm_90 -m core)

test-blackwell: $(READY)
	$(call step,core of the kernels compiled for sm_120,$(PYTEST) --compiled-for sm_120 -m core)

test-emulator: $(READY)
	$(call step,emulator of compiled kernels,$(PYTEST) -m 'emulated and not more' tests/ptx)

test-compiled-all: $(READY) ## all of it, with every tile that plans pick, on two tritons; says so in tests/ptx/passed.json (an hour)
	$(call parts,test-all-ampere test-all-hopper test-all-tiles test-old-ampere test-old-hopper test-old-tiles)
	$(BIN)/python tests/ptx/changes.py
	PYTHONPATH=$(OVERLAY) $(BIN)/python tests/ptx/changes.py

.PHONY: test-all-ampere test-all-hopper test-all-tiles test-old-ampere test-old-hopper test-old-tiles
test-all-ampere: $(READY)
	$(call step,all kernels compiled for sm_80,$(PYTEST) --compiled-for sm_80 -m 'interpreter and not long')

test-all-hopper: $(READY)
	$(call step,all kernels compiled for sm_90,$(PYTEST) --compiled-for sm_90 -m 'interpreter and not long')

test-all-tiles: $(READY)
	$(call step,every tile compiled and run,$(PYTEST) -m emulated tests/ptx)

test-old-ampere: $(OVERLAY)/.ready
	$(call step,all kernels compiled for sm_80 by triton $(OLD_TRITON),PYTHONPATH=$(<D) $(PYTEST) --compiled-for sm_80 -m 'interpreter and not long')

test-old-hopper: $(OVERLAY)/.ready
	$(call step,all kernels compiled for sm_90 by triton $(OLD_TRITON),PYTHONPATH=$(<D) $(PYTEST) --compiled-for sm_90 -m 'interpreter and not long')

test-old-tiles: $(OVERLAY)/.ready
	$(call step,every tile compiled by triton $(OLD_TRITON) and run,PYTHONPATH=$(<D) $(PYTEST) -m emulated tests/ptx)

# The same of those kernels alone that have changed since it passed, as far as five minutes of a core go: to run all of it
# is up to whoever changes them.
.PHONY: test-changed-ampere test-changed-hopper test-changed-tiles
test-changed-ampere: $(READY)
	$(call step,changed kernels compiled for sm_80,$(PYTEST) --changed --deadline 300 --compiled-for sm_80 -m 'interpreter and not long')

test-changed-hopper: $(READY)
	$(call step,changed kernels compiled for sm_90,$(PYTEST) --changed --deadline 300 --compiled-for sm_90 -m 'interpreter and not long')

test-changed-tiles: $(READY)
	$(call step,every tile of changed kernels,$(PYTEST) --changed --deadline 300 -m 'emulated and more' tests/ptx)

.PHONY: sanitize
sanitize: $(READY) $(LENS)/.ready ## every kernel under the interpreter, watched for stray addresses and races (minutes)
	$(call step,kernels watched,TRITON_INTERPRET=1 $(PYTEST) --watch-memory -m 'interpreter and not long' tests/kernels)
	$(call step,kernels followed by tilelens,TRITON_INTERPRET=1 PYTHONPATH=$(LENS) $(PYTEST) -m tilelens)

.PHONY: test-long
test-long: $(READY) ## 10,001 steps of the training kernels under the interpreter, against torch (minutes)
	$(call step,10001 steps under the interpreter,TRITON_INTERPRET=1 $(PYTEST) -m long)

test-benches: $(READY)
	$(call step,benchmarks run once: layers,$(PYTEST) benches/bench_stacks.py --benchmark-disable)
	$(call step,benchmarks run once: networks,$(PYTEST) --suite mlp benches/bench_stacks.py --benchmark-disable -k 'xor or digits or 1024')
	$(call step,benchmarks run once: KernelBench,$(PYTEST) --suite kernelbench benches/bench_stacks.py --benchmark-disable)
	$(call step,benchmarks run once: training,$(PYTEST) --suite training benches/bench_training.py --benchmark-disable)
