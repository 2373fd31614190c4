# make train: environment, build, the main job on real images.   make test: environment, build, the whole test suite.
# Both need Python 3.10+, g++ and make; a second run installs and builds only what has changed.
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
check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

$(STAMPS)/environment: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(STAMPS)/environment $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@mkdir -p $(STAMPS) && touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) torchtower/_C.*.so
