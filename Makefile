# make build | demo | test | lint | bench | docs | aot | asan | gpu | wheel | clean
# PYTHON=python3.12 make test   uses that interpreter as it is, installing nothing (machines without a network).
SHELL := /bin/bash -euo pipefail
PYTHON ?=
# Dozens of processes import torch: its bytecode is kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

ifeq ($(strip $(PYTHON)),)
PY := .venv/bin/python
ENVIRONMENT := .venv/.installed
else
PY := $(PYTHON)
ENVIRONMENT :=
endif

BUILT := build/.built-$(subst /,_,$(PY))
SOURCES := setup.py build_backend.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: build demo test lint bench docs aot aot-check check-triton read-kernels race-check isa-check asan cuda-report gpu wheel check-wheel clean
.DELETE_ON_ERROR:

build: $(BUILT)

.venv/.installed: requirements-dev.txt
	python3 -m venv .venv
# torch has thousands of modules: those that are used are compiled when they are, which saves a minute
	$(PY) -m pip install --disable-pip-version-check --quiet --no-compile --requirement requirements-dev.txt
	touch $@

$(BUILT): $(ENVIRONMENT) $(SOURCES)
	METATTN_BUILD_EXT=$${METATTN_BUILD_EXT:-1} METATTN_EMULATION=$${METATTN_EMULATION:-1} \
		$(PY) setup.py build_ext --inplace
	mkdir -p build
	touch $@

demo: build
	$(PY) -m metattn demo --out metattn-demo

# With pytest-xdist (an interpreter of your own may lack it) files are spread over the processors, a thread each;
# in their own order, for the slowest are not those with the most tests.
test: build
	if $(PY) -c 'import xdist' 2>/dev/null; \
	then OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder; \
	else $(PY) -m pytest; fi

lint: $(ENVIRONMENT)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run --Werror \
		$(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(PY) -m mypy

bench: build
	$(PY) -m metattn bench --out benchmarks/results/cpu --page docs/benchmark.md
	$(PY) -m benchmarks.training_steps --out benchmarks/results/training-steps --page README.md

# The site, in build/site; a warning is an error. Pages are laid out as in the sources, so that their links hold.
# Notebooks are run, which takes half a minute more.
docs: build
	$(PY) -c 'import furo, ipykernel, myst_nb, sphinx_copybutton' 2>/dev/null || \
		$(PY) -m pip install --disable-pip-version-check --quiet --requirement requirements-docs.txt
	rm -rf build/pages build/site build/jupyter_execute
	mkdir -p build/pages/benchmarks build/pages/examples/scenarios
	cp -r README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs docs/site/index.md build/pages
	cp -r benchmarks/results build/pages/benchmarks
	cp examples/*.py build/pages/examples
	cp -r examples/scenarios/*.py examples/scenarios/results build/pages/examples/scenarios
	PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} \
		$(PY) -m sphinx -q -W --keep-going -c docs/site build/pages build/site

# Compiles the Triton kernels for GPUs that need not be there, and reads what came out.
aot: $(ENVIRONMENT)
	$(PY) -m benchmarks.aot --out benchmarks/results

# Some of it, for continuous integration: a few minutes.
aot-check: $(ENVIRONMENT)
	$(PY) -m benchmarks.aot --targets sm_80 sm_90 gfx942 --dtypes bfloat16 --features 64 128 --variants plain

# Reads and compiles the kernels with other versions of Triton: as an H100's machine would, without one.
TRITONS ?= 3.6.0
check-triton: read-kernels
	for version in $(TRITONS); do \
		PYTHONPATH=build/triton-$$version:. $(PY) -m benchmarks.aot --targets sm_90 --variants plain few-shot; \
	done

# The reading alone: for continuous integration.
read-kernels: $(ENVIRONMENT)
	for version in $(TRITONS); do \
		folder=build/triton-$$version; \
		test -d $$folder/triton || $(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
			--target $$folder triton==$$version; \
		PYTHONPATH=$$folder:. $(PY) tests/front_end.py; \
	done

# On a machine with a GPU: tests, sanitizer, benchmark against torch; ends inside nine minutes. The CUDA library is
# built for that GPU alone, and not emulated.
gpu: export METATTN_EMULATION := 0
gpu: export TORCH_CUDA_ARCH_LIST ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
gpu: build
	$(PY) -m benchmarks.gpu

# Races between the warps of the CUDA kernels, which the emulation runs as threads: what compute-sanitizer's racecheck
# looks for on a GPU.
race-check: build
	METATTN_BUILD_EXT=1 METATTN_EMULATION=thread $(PY) setup.py build_ext --inplace
	LD_PRELOAD=$$($${CXX:-g++} -print-file-name=libtsan.so) $(PY) tests/race_check.py

# Errors and faults of the CPU's kernels on each instruction set that runs here.
isa-check: build
	for isa in $$($(PY) -c 'from metattn import host; print(*host.usable_isas())'); do \
		echo "METATTN_ISA=$$isa"; \
		METATTN_ISA=$$isa OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto -k cpu tests/test_precision.py \
			tests/test_faults_*.py; \
	done

# Reads and writes out of bounds, and undefined behaviour, in the CPU's kernels, on every instruction set that runs here.
# torch's and Python's own memory is theirs: leaks are not looked for.
SANITIZED := -fsanitize=address,undefined -fno-sanitize-recover=undefined
asan: $(ENVIRONMENT)
	METATTN_BUILD_EXT=1 METATTN_CUDA=0 CXXFLAGS="-O1 -g $(SANITIZED) -fno-omit-frame-pointer" LDFLAGS="$(SANITIZED)" \
		$(PY) setup.py -q build --build-base build/asan --build-lib build/asan/lib
	PYTHONPATH=build/asan/lib ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
		$(dir $(PY))pytest -p no:cacheprovider --numprocesses auto tests/test_cpu*.py tests/test_faults_*.py \
		-k "not triton and not cuda"

# The CUDA library, whatever torch is installed, and what nvcc made of it.
cuda-report: $(ENVIRONMENT)
	METATTN_BUILD_EXT=1 METATTN_CUDA=1 $(PY) setup.py build_ext --inplace
	$(PY) -m benchmarks.cuda_build --out benchmarks/results

# make wheel: dist/metattn-X.Y.Z+cpu-…, one for every Python; make wheel CUDA=13.0: +cu130, on any machine with that nvcc.
# torch's libraries and the driver's are not grafted in: they come with torch and with the GPU.
CUDA :=
LABEL := $(if $(CUDA),cu$(subst .,,$(CUDA)),cpu)
wheel: export SOURCE_DATE_EPOCH := $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
wheel: $(ENVIRONMENT)
	rm -rf build/wheel-$(LABEL) dist/metattn-*+$(LABEL)-*.whl
	mkdir -p build
	METATTN_BUILD_EXT=1 METATTN_CUDA=$(if $(CUDA),1,0) METATTN_CUDA_VERSION=$(CUDA) \
		$(PY) setup.py -q egg_info --egg-base build --tag-build=+$(LABEL) build --build-base build/wheel-$(LABEL) \
		bdist_wheel --dist-dir build/wheel-$(LABEL)/dist
	PATH="$(dir $(PY)):$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
		--exclude 'libcuda.so.*' --wheel-dir dist build/wheel-$(LABEL)/dist/*.whl

# Installs each wheel in dist/ beside several torch versions, and under each Python of pyproject.toml's classifiers that
# is here, and takes second-order steps. PYTHONS names others: PYTHONS="python3.12 /opt/python3.13/bin/python".
TORCHES ?= 2.10 2.11 2.13 2.14
PYTHONS ?=
check-wheel: $(ENVIRONMENT)
	$(PY) tests/check_wheel.py --torch $(TORCHES) $(if $(PYTHONS),--python $(PYTHONS))

clean:
	rm -rf build dist *.egg-info metattn-demo metattn-bench .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find metattn -name '*.so' -delete
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
