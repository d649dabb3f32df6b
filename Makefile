# Each target does all the set-up it needs: its own .venv, torch, the build.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
PY     := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc kernels quantops -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-integrations fuzz lint format bench bench-all tables gpu gpu-libraries info clean
.NOTPARALLEL:

# An installed torch >= 2.10 will do: PYTHON=... TORCH= VENV_FLAGS=--system-site-packages uses that of the system.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(TORCH),$(PY) -m pip install -q --disable-pip-version-check "$(TORCH)")
	@touch $@

# Without a network, where the system has all of it: PIP_FLAGS="--no-deps --no-build-isolation".
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PY) -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -e ".[test]"
	@touch $@

info: $(VENV)/.installed
	$(PY) -m quantops

demo: $(VENV)/.installed
	$(PY) -m quantops demo

# Two processes, a file of tests at a time; the folders that compile most come early in the alphabet. Without pytest-xdist:
# TEST_FLAGS= runs one.
TEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Those that run once more, in Triton's interpreter: of each family all that depends on its kernels.
INTERPRETED := uniform own_scale truncate truncate_gradients packing categorical categorical_draw activation activation_front categorical_activation

# Once with the compiled kernels, once with the Triton kernels in Triton's interpreter; fails if either does.
test: $(VENV)/.installed
	$(PY) -m quantops
	@echo "The compiled kernels:"; status=0; \
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q $(TEST_FLAGS) || status=$$?; \
	echo "The Triton kernels, interpreted:"; \
	QUANTOPS_BACKEND=triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q $(TEST_FLAGS) \
		$(INTERPRETED:%=tests/ops/test_%.py) \
		tests/ops/test_errors.py tests/ops/test_limits.py \
		|| status=$$?; \
	echo "Two minutes of make fuzz:"; \
	OMP_NUM_THREADS=1 $(PY) tests/fuzz --minutes 2 --seed 1 || status=$$?; \
	exit $$status

# quantops within transformers, peft, Lightning and accelerate: small random models, nothing is downloaded. What the extra
# [integration] names is installed by itself: with -e the library would be compiled again.
NAMED := from importlib.metadata import requires; \
	print(*(r.split(";")[0] for r in requires("quantops") if "integration" in r and "quantops" not in r))
$(VENV)/.integration: $(VENV)/.installed
	$(PY) -m pip install -q --disable-pip-version-check $(PIP_FLAGS) $$($(PY) -c '$(NAMED)') $(TORCH)
	@touch $@

test-integrations: $(VENV)/.integration
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q $(TEST_FLAGS) tests/integrations

LINTERS ?= ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1
$(VENV)/.lint: $(VENV)/.installed
	$(PY) -m pip install -q --disable-pip-version-check $(LINTERS)
	@touch $@

NATIVE = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h')

# What .ci/run calls before the tests; `make format` mends what can be mended by a program.
lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)
	$(VENV)/bin/mypy

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE)

# One thread of torch each: a sum of several threads' parts is another one in its last place where their number is.
# Random tests: oracles, sanitizers, damaged files, threads; see tests/fuzz/__main__.py. MINUTES=10 SEED=7 TARGETS=oracle,
# or REPLAY=build/fuzz/FILE.json: what a failure has left, again.
fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) tests/fuzz $(if $(REPLAY),--replay $(REPLAY),--minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) \
		$(if $(TARGETS),--targets $(TARGETS)))

# On a CPU, within 10 minutes; the JSON, report.md and plots go to bench/results/<device>/.
bench: $(VENV)/.installed
	$(PY) -m bench run --workloads 1M,16M
	$(PY) -m bench run --workloads resnet50 --dtypes float32 --resume --compile-seconds 50
	$(PY) -m bench steps --networks resnet20
	$(PY) -m bench report

# Other libraries' quantizers, to compare with; torch stays what it is. PEERS= leaves them out.
PEERS ?= torchao==0.18.0 brevitas==0.13.4
$(VENV)/.peers: $(VENV)/.installed
	$(if $(PEERS),$(PY) -m pip install -q --disable-pip-version-check $(PEERS) $(TORCH))
	@touch $@

# Every workload, peer and network, in an hour or more. What is there already is kept: interrupt and go on as you like.
bench-all: $(VENV)/.peers
	$(PY) -m bench run --resume
	$(PY) -m bench steps --resume
	$(PY) -m bench report

# What a training step of ResNet-20 costs by each method. DATA=FILE [INIT=STATE_DICT]: trains by each method too, a few
# steps that show no accuracy, into build/tables. The full version, in pieces: bench/README.md.
tables: $(VENV)/.installed
	$(PY) -m bench costs
	$(if $(DATA),$(PY) -m bench train --method all --epochs 1 --subset 1280 --amp --data $(DATA) $(if $(INIT),--init $(INIT)) \
		--folder build/tables/train --cache build/tables --resume)
	$(PY) -m bench tables
	$(if $(DATA),$(PY) -m bench tables build/tables)

# Both libraries, for GPUs of ARCH, on any machine with nvcc: what `make gpu` wants to find. VARIANTS=1: and those of
# bench/machine_code/variants.py, which it then compares.
ARCH ?= 9.0
gpu-libraries: $(VENV)/.torch
	QUANTOPS_CUDA=1 TORCH_CUDA_ARCH_LIST="$(ARCH)" $(PY) -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -e .
	$(if $(VARIANTS),$(PY) -m bench variants --arch $(subst .,,$(ARCH)))

# On a machine with a GPU, without a network, by the Python that has torch there (PYTHON): see bench/gpu/. MINUTES=8: the
# most telling within them; without, all. ONLY=first,ops: stages. OUT=folder of the results. DRY=1: on a CPU, in small.
gpu: $(if $(DRY),$(VENV)/.installed)
	$(if $(DRY),$(PY),$(PYTHON)) -m bench.gpu $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(OUT),--out $(OUT)) $(if $(DRY),--dry)

clean:
	rm -rf $(VENV) build dist *.egg-info quantops/*.so
