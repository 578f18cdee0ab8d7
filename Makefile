PYTHON ?= python3
# What compute-sanitizer runs: small, and one test file for each kind of synchronisation.
SANITIZED ?= -m gpu -k "not gradcheck" tests/test_tanh.py tests/test_group_norm.py tests/test_max_pool.py
RESULTS = benchmarks/results

.PHONY: lint format test gpu-test sanitize record clean

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

# CuPy's pool is not used, so every out-of-bounds access of a torch allocation is one of the allocator's blocks: switch its caching off.
sanitize:
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED) || exit 1; \
	done

record:
	$(PYTHON) -m pytest -m gpu --record $(RESULTS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
