# The project's commands. `make setup` is the first of each; call it alone to get the environment without running anything.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc kernels sparsekit tests/data examples/data -type f -not -name '*.so' -not -path '*/__pycache__/*')

.PHONY: setup demo test test-triton gpu-evidence lint format clean

setup: $(VENV)/installed

# A torch that sees a GPU is used as it is. Else torch comes first and by itself: a range in a later command could take another build.
$(VENV)/torch:
	$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	if ! $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then \
	    $(PYTHON) -m venv --clear $(VENV) && $(BIN)/pip install --quiet "$(TORCH)" numpy; \
	fi
	touch $@

# What an earlier build left would be installed again: build/lib* goes, ninja's objects stay.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	rm -rf build/lib* build/bdist*
	$(BIN)/pip install --quiet ".[gguf]"
	@cd / && $(CURDIR)/$(BIN)/python -c "from sparsekit import _C; print('sparsekit: CPU kernels, and CUDA kernels for', \
	    ', '.join(_C.cuda_archs()) or 'no architecture, since nvcc was not found')"
	touch $@

# The main job: SmolLM2-135M-Instruct to 2:4 and back, in one table. DEMO_MODEL=tiny takes the shipped model instead.
DEMO_MODEL ?= smollm2
demo: setup
	$(BIN)/sparsekit demo --model $(DEMO_MODEL)

$(VENV)/test: Makefile pyproject.toml | $(VENV)/installed
	$(BIN)/pip install --quiet pytest pytest-xdist pytest-benchmark hypothesis accelerate triton matplotlib ruff clang-format pybind11 ninja setuptools playwright
	@# A test looks at the report page in a browser, and fails where there is none.
	@command -v chromium || command -v google-chrome || ! command -v apt-get || [ "$$(id -u)" != 0 ] || \
	    { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium fonts-liberation; }
	touch $@

# A process for each core, up to eight; one alone where there is a GPU, which what is timed there has to itself. Torch then has a
# thread in each, and the CPU kernels two, so that what threads share is tested everywhere; one that waits sleeps, since a core on
# which it span would be another process's.
WORKERS ?= $(if $(shell command -v nvidia-smi),0,$(shell cores=$$(env -u OMP_NUM_THREADS nproc); echo $$((cores < 8 ? cores : 8))))
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive SPARSEKIT_THREADS=2 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/installed $(VENV)/test
	$(PYTEST) $(PYTEST_ARGS)

# The Triton kernels with another Triton than the environment's, by default that of torch 2.11. A numpy comes with it, since the
# interpreter of Triton 3.6 does not run on numpy 2.4.
TRITON ?= triton==3.6.0
OTHER_TRITON = $(VENV)/$(subst ==,-,$(TRITON))
$(OTHER_TRITON): | $(VENV)/test
	rm -rf $@.part
	$(BIN)/pip install --quiet --no-deps --target $@.part "$(TRITON)" "numpy<2.4"
	mv $@.part $@

test-triton: $(VENV)/installed $(VENV)/test $(OTHER_TRITON)
	PYTHONPATH=$(CURDIR)/$(OTHER_TRITON) $(PYTEST) tests/test_kernels_triton.py tests/test_prune_triton.py tests/test_kernels_aot.py $(PYTEST_ARGS)

# All that only a GPU can show, into benchmarks/results/ (OUT=FOLDER: elsewhere), within MINUTES. By the caller's Python, which has
# torch, Triton and what the tests import; the package is built for the card that is there.
gpu-evidence:
	rm -rf build/lib* build/bdist*
	$(PYTHON) -m benchmarks.gpu_evidence --build $(if $(QUICK),--quick) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT))

CSRC := $(shell find csrc tests/emulator benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	$(BIN)/ruff format --check .

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf $(VENV) build dist *.egg-info sparsekit/_C*.so
