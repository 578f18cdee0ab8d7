PYTHON ?= python3
RESULTS = benchmarks/results
DOCS ?= build/docs
# Every module but the command line; "!" takes out those that pdoc would add by itself, unless a package has __all__.
MODULES = modelnew cupy_kernels '!.+[.]' $(subst /,.,$(patsubst %/__init__,%,$(basename \
    $(filter-out %__main__.py,$(wildcard modelnew/[a-z]*.py cupy_kernels/[a-z]*.py)) \
    modelnew/functional/__init__.py cupy_kernels/emulator/__init__.py)))

.PHONY: lint format test gpu-test bench sanitize record training docs generated notebooks clean

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror cupy_kernels/cu/* cupy_kernels/emulator/*.cpp
	mypy
	basedpyright

format:
	ruff check --fix .
	ruff format .
	clang-format -i cupy_kernels/cu/* cupy_kernels/emulator/*.cpp

test:
	$(PYTHON) -m pytest

gpu-test:
	$(PYTHON) -m pytest -m gpu

# Times and peak memory beside PyTorch's: a record in benchmarks/results, which `make generated` puts into the README.
bench:
	$(PYTHON) -m modelnew bench

# Torch's caching allocator would hide what is out of bounds of a tensor but inside the allocator's block.
sanitize:
	$(PYTHON) -m pytest -rs -m gpu tests/test_sanitizer.py

# On many cores: one process would compile the kernels one after the other. Idle processes take over what waits behind slow tests.
record:
	$(PYTHON) -m pytest -q -m gpu -n auto --maxprocesses 16 --dist worksteal --record=$(RESULTS) tests

# ModelNew and Model trained side by side: a record in benchmarks/results and loss curves; on a CPU neither.
training:
	$(PYTHON) -m modelnew training

# The guide, and the API reference from docstrings. A warning about one of them is an error.
docs:
	$(PYTHON) -W error::UserWarning -m pdoc --template-directory docs --no-show-source --mermaid -o $(DOCS) \
	    docs/guide.py $(MODULES)

# Everything in the repository that a command writes.
generated:
	$(PYTHON) -m tools.submission
	$(PYTHON) -m tools.readme

# The notebooks from the scripts beside them, run on a GPU; an error without one.
notebooks:
	$(PYTHON) -m tools.notebooks

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
