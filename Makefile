PYTHON ?= python3
# What compute-sanitizer runs, at a hundredth of the speed: the smallest tests that start every kernel, in 6 processes.
SANITIZED ?= -m gpu -k "even or one_unit or test_wgmma or layouts or eval_leaves or wider" -n 6 tests
COMPUTE_SANITIZER ?= $(firstword $(shell command -v compute-sanitizer) \
    $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/nvidia/cu13/bin/compute-sanitizer)
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
	@command -v $(firstword $(COMPUTE_SANITIZER)) >/dev/null || \
	    { echo "no compute-sanitizer: $(PYTHON) -m pip install '.[dev]', or COMPUTE_SANITIZER=<its path>"; exit 1; }
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --target-processes all --tool $$tool \
	        --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED) || exit 1; \
	done

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
