# Every target sets itself up: it needs Python >= 3.11 and make, nothing else. `make help` lists the targets.
#
#   make test                       # with the first python3.11 ... python3 that is new enough, in .venv
#   make test PYTHON=python3.13     # with another interpreter, in .venv-3.13

.DEFAULT_GOAL := help
.SUFFIXES:
.DELETE_ON_ERROR:

ifeq ($(origin PYTHON), undefined)
  PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
  CHOSEN := no
else
  CHOSEN := yes
endif

# Major.minor of the interpreter, empty when it does not run.
VERSION := $(if $(PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
VENV := $(if $(filter yes,$(CHOSEN)),.venv-$(VERSION),.venv)
BIN := $(VENV)/bin
CONSTRAINTS := constraints/$(if $(filter 3.11,$(VERSION)),py311,py313).txt
STAMP := $(VENV)/.installed-$(VERSION)

# Two workers fill two cores: LLVM's own threads, for which XLA splits every program, cost a sixth more and gain nothing.
# XLA's older emitters compile in three quarters to half of the time; jax 0.10 (Python 3.11's newest) still has them. With
# the newer ones the second column of .ci/run tests the mathematics.
COMPILE := --xla_cpu_parallel_codegen_split_count=1 $(if $(filter 3.11,$(VERSION)),--xla_cpu_use_fusion_emitters=false)
# Bytecode is kept even where the environment says otherwise: the tests start over a hundred processes.
PYTEST := PYTHONDONTWRITEBYTECODE= XLA_FLAGS="$(COMPILE) $$XLA_FLAGS" $(BIN)/python -m pytest --durations=20 --durations-min=5
WORKERS := 2
# Neighbouring tests go to one worker: they share compiled programs, and no two workers compile the same one at once.
SPREAD := -n $(WORKERS) --dist worksteal
# The mathematics, with the emitters that users have, and what changes most between versions of JAX: .ci/run's second column.
SHORT := linalg evaluate rounding codebooks hessian/test_collect.py models/test_cached.py models/test_linear.py \
  pallas_kernels/test_mosaic_gpu.py pallas_kernels/test_gram.py incoherence

# What rests on how a processor adds up, and the part of it that .ci/run does under every instruction set.
SUMS := hessian linalg rounding properties pipeline
SUMS_SHORT := hessian/test_symmetry.py hessian/test_collect.py linalg/test_symmetric.py linalg/test_cholesky.py \
  linalg/test_ldl.py linalg/test_damping.py rounding/test_correction.py rounding/test_gptq_groups.py
# What .ci/run's machine does not do of itself: AVX2 where it has AVX-512, and SSE4.2.
OTHER_ISAS := $(if $(shell grep -m1 -o avx512f /proc/cpuinfo 2>/dev/null),AVX2) SSE4_2
# XLA's flag limits the programs alone: their matrix products are oneDNN's, factorisations and NumPy's products OpenBLAS'.
ISA_AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell
ISA_SSE4_2 := ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem

.PHONY: help demo test test-short test-isa test-isa-short test-isa-AVX2 test-isa-SSE4_2 test-gpu-aot test-tpu-aot \
  lint typecheck format config-reference bench clean venv

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

venv: $(STAMP) ## make the virtual environment

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@case '$(VERSION)' in \
	  '') echo 'make: $(if $(PYTHON),PYTHON=$(PYTHON) does not run,no Python >= 3.11 found on PATH);' \
	        'install Python 3.11 or newer, or say which to use: make PYTHON=/path/to/python3' >&2; exit 1 ;; \
	  2.*|3.?|3.10) echo 'make: $(PYTHON) is Python $(VERSION), qjax needs 3.11 or newer:' \
	        'make PYTHON=/path/to/python3' >&2; exit 1 ;; \
	esac
	@$(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null \
	  || { echo 'make: creating $(VENV) (Python $(VERSION))'; $(PYTHON) -m venv --clear $(VENV); } \
	  || { echo 'make: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'make: installing into $(VENV), pinned by $(CONSTRAINTS)'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,plots]'
	@touch $@

demo: $(STAMP) ## quantise SmolLM2-135M at 2 bits with three rounding algorithms and compare them
	$(BIN)/python -m experiments.quantize -m experiment=demo rounding=nearest,gptq,ldlq
	$(BIN)/python -m experiments.quantize experiment=demo preset=ldlq out=runs/demo/ldlq-corrected
	$(BIN)/python -m experiments.report runs=runs/demo out=runs/demo/report

test: lint typecheck ## lint, format check, type check and all tests
	$(PYTEST) $(SPREAD) $(ARGS)

test-short: $(STAMP) ## the tests of the mathematics only, without the slow ones
	$(PYTEST) $(SPREAD) -m 'not slow' $(wildcard $(SHORT:%=tests/%)) $(ARGS)

test-isa: test-isa-AVX2 test-isa-SSE4_2 ## the mathematics with the instructions of other x86 processors

test-isa-short: SUMS := $(SUMS_SHORT)
test-isa-short: $(OTHER_ISAS:%=test-isa-%) ## a short part of that, for .ci/run

# Without F16C, which came after AVX, XLA compiles no float16 (jaxlib 0.10.2: "Symbols not found: __extendhfsf2"), in which
# scales are stored.
test-isa-SSE4_2: LEFT_OUT := rounding% properties% pipeline%
# Compiled programs in a folder of their own: one instruction set must never be handed those of another.
test-isa-AVX2 test-isa-SSE4_2: test-isa-%: $(STAMP)
	export XLA_FLAGS="--xla_cpu_max_isa=$* $$XLA_FLAGS" JAX_COMPILATION_CACHE_DIR='$(CURDIR)/.jax_cache/$*' $(ISA_$*); \
	$(PYTEST) $(SPREAD) $(patsubst %,tests/%,$(filter-out $(LEFT_OUT),$(SUMS))) $(ARGS)

test-tpu-aot: $(STAMP) ## compile the TPU kernels for v5e and v6e with libtpu, without a TPU
	@$(BIN)/python -c 'import libtpu' 2>/dev/null || { echo 'make: needs libtpu (a wheel of 0.7 GB):' \
	  "$(BIN)/python -m pip install -e '.[tpu]' -c $(CONSTRAINTS)" >&2; exit 1; }
	TPU_SKIP_MDS_QUERY=1 $(PYTEST) -n 0 -m tpu_aot tests/pallas_kernels $(ARGS)

test-gpu-aot: $(STAMP) ## compile the GPU kernels to machine code for an H100, without a GPU
	@$(BIN)/python -c 'import jax_plugins.xla_cuda13' 2>/dev/null || { echo 'make: needs the CUDA plugin (about 5 GB):' \
	  "$(BIN)/python -m pip install -e '.[cuda]' -c $(CONSTRAINTS)" >&2; exit 1; }
	JAX_PLATFORMS=cpu $(PYTEST) -n 0 -m gpu_aot tests/pallas_kernels $(ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

config-reference: $(STAMP) ## build docs/config-reference.md from what is registered
	$(BIN)/python scripts/make_config_reference.py

bench: $(STAMP) ## seconds and GFLOP/s of the steps for one matrix
	$(BIN)/python -m experiments.bench matrix

clean: ## remove virtual environments and caches (runs/ stays)
	rm -rf .venv .venv-* .jax_cache .pytest_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
