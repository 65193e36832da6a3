# Every target builds the environment in .venv first, and builds it again when pyproject.toml, constraints.txt or the
# sources of the native kernel changed.
PYTHON ?= python3
EXTRAS := torchao,brevitas,lightning,export,c,plot,docs,dev
ENVIRONMENT := .venv/environment.stamp

# The tests whose results depend on the path of the kernel, and all paths, best first.
KERNEL_TESTS := $(addprefix tests/pibinn_plugin/test_,kernel_values.py kernel_convolutions.py kernel_threads.py kernel_arguments.py int8_activations.py)
OTHER_PATHS := from pibinn_plugin.functional import kernel; \
	paths = ["avx512", "avx2", "portable", "torch"]; print(*paths[paths.index(kernel()) + 1 :])

.PHONY: demo test test-paths test-triton lint types docs wheel clean

demo: $(ENVIRONMENT)
	.venv/bin/python -m lightning_modules.demo

test: $(ENVIRONMENT)
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses=auto --dist=loadfile

# On each path that the machine has, but the best one, which `make test` runs.
test-paths: $(ENVIRONMENT)
	@set -e; paths=$$(.venv/bin/python -c '$(OTHER_PATHS)'); for path in $$paths; do \
		echo "PIBINN_KERNEL=$$path"; PIBINN_KERNEL=$$path .venv/bin/python -m pytest $(KERNEL_TESTS); \
	done

# The kernels for CUDA devices, in Triton's interpreter. Triton lies apart: beside torch, torch would use it.
test-triton: .venv/triton/triton
	PYTHONPATH=.venv/triton .venv/bin/python -m pytest tests/pibinn_plugin/test_kernel_cuda.py

.venv/triton/triton: $(ENVIRONMENT)
	.venv/bin/pip install --quiet --no-deps --target .venv/triton triton==3.6.0
	@touch $@

lint: $(ENVIRONMENT)
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: $(ENVIRONMENT)
	.venv/bin/mypy

# In docs/_build/html; a warning is an error.
docs: $(ENVIRONMENT)
	.venv/bin/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html

# For every Python 3 and every torch from 2.11 on; needs a C++ compiler and no torch. The tag is a promise about the
# symbols of the shared object, which tests/pibinn_plugin/test_wheel.py holds it to.
wheel: $(ENVIRONMENT)
	.venv/bin/pip wheel --no-deps -w dist --config-settings=--build-option=--plat-name=manylinux_2_28_$(shell uname -m) .

# torch comes first, by exact version: asked for as a range, pip would look for the newest build, which on Linux brings
# several gigabytes of CUDA libraries. The project is built without isolation for the same reason.
$(ENVIRONMENT): pyproject.toml constraints.txt setup.py $(wildcard pibinn_plugin/kernel/csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) lacks the venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt torch==2.13.0 "setuptools<81"
	.venv/bin/pip install --quiet -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf docs/_build docs/_gallery docs/sg_execution_times.rst
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find pibinn_plugin lightning_modules tests -name __pycache__ -prune -exec rm -rf {} +
	find pibinn_plugin -name '*.so' -delete
