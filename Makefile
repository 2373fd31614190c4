# make train: environment, build, the main job on real images.   make test: environment, build, the whole test suite.
# Both need Python 3.11+, g++ and make; a second run installs and builds only what has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := build/stamps
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: train test build check clean

train: build
	$(BIN)/torchtower train --dataset digits --towers 2

test: build
	$(BIN)/python -m pytest

build: $(STAMPS)/build

# Static checks and the compile gate of the CUDA kernels, which needs nvcc but neither a GPU nor a CUDA build of torch.
# The gate shares its folder with tests/test_cuda_compile.py, so that it compiles once.
GATE := build/cuda-gate
check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	@if command -v "$${CUDACXX:-nvcc}" >/dev/null || [ -x "$$CUDA_HOME/bin/nvcc" ]; then \
	    PATH="$(CURDIR)/$(BIN):$$PATH" && \
	    cmake -S . -B $(GATE) -G Ninja -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" && \
	    cmake --build $(GATE) --target cuda_gate; \
	else echo "CUDA compile gate: skipped, expected nvcc on PATH, in CUDACXX or in CUDA_HOME, but found none"; fi

$(STAMPS)/environment: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(STAMPS)/environment $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@mkdir -p $(STAMPS) && touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) torchtower/_C.*.so
