PYTHON ?= python3
# What compute-sanitizer runs, at a hundredth of the speed: the smallest tests that start every kernel.
SANITIZED ?= -m gpu -k "layouts or mission or subset" tests
COMPUTE_SANITIZER ?= $(firstword $(shell command -v compute-sanitizer) \
    $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/nvidia/cu13/bin/compute-sanitizer)
RESULTS = benchmarks/results

.PHONY: lint format test gpu-test sanitize record notebooks clean

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

test:
	$(PYTHON) -m pytest

gpu-test:
	$(PYTHON) -m pytest -m gpu

# Torch's caching allocator would hide what is out of bounds of a tensor but inside the allocator's block.
sanitize:
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --tool $$tool --error-exitcode 1 \
	        $(PYTHON) -m pytest -n 0 $(SANITIZED) || exit 1; \
	done

# The first run, on all cores, leaves the compiled kernels on disk: one process would compile them one after the other.
record:
	$(PYTHON) -m pytest -q -m gpu -n auto --maxprocesses 16
	$(PYTHON) -m pytest -q -m gpu -n 0 --record=$(RESULTS) tests

# The notebooks from the scripts beside them, run on the GPU if there is one, else in the emulator.
notebooks:
	for script in examples/[0-9]*.py; do \
	    $(PYTHON) -m jupytext --to ipynb --update $$script && jupyter-execute --inplace $${script%.py}.ipynb || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
