# Every target needs only Python >= 3.11 and, for the native CPU kernels, a C++ compiler.

VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
QUICK ?=
TRACE ?=

BIN := $(abspath $(VENV))/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-fast bench bench-gate report aot sanitize lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  VENV=$(VENV)  the environment that is built and used"
	@echo "  PYTHON=$(PYTHON)  the Python that builds it"
	@echo "  TORCH_INDEX=$(TORCH_INDEX)  where torch for CPUs comes from if pip does not find it by itself, instead of PyTorch's index"
	@echo "  ARGS=$(ARGS)  more arguments for demo, test, test-fast, bench, bench-gate, report, aot and sanitize"
	@echo "  QUICK=$(QUICK)  anything: make bench takes ten minutes"
	@echo "  TRACE=$(TRACE)  CSV file of arrival times and lengths that make bench replays"

setup: ## build the environment when it is missing or out of date
	@TORCH_INDEX='$(TORCH_INDEX)' $(PYTHON) tools/setup_env.py --venv '$(VENV)'

demo: setup ## serve a real model at switching precision and show what happens
	$(BIN)/python -m demo.run $(ARGS)

test: setup ## all tests
	$(BIN)/python -m pytest $(ARGS)

test-fast: setup ## the tests that start no vLLM engine
	$(BIN)/python -m pytest -m 'not engine' $(ARGS)

bench: setup ## all measurements and their report: 60 to 90 minutes on 2 cores, and calibration before it; QUICK=1 ten minutes
	$(BIN)/python -m benchmarks.bench $(if $(QUICK),--quick) $(if $(TRACE),--trace '$(TRACE)') $(ARGS)

bench-gate: setup ## the cheap ratios that CI watches: KL by width, time at 4 bits over 8, machinery
	$(BIN)/python -m benchmarks.regression $(ARGS)

report: setup ## make the report and the README's tables anew, of results that are there
	$(BIN)/python -m benchmarks.report --readme $(ARGS)

aot: setup ## compile the Triton kernels for GPUs that are not here, under each Triton
	$(BIN)/python tools/check_triton.py $(ARGS)

sanitize: setup ## the kernel tests under AddressSanitizer and UBSan
	$(BIN)/python tools/sanitize_kernels.py $(ARGS)

lint: setup ## format, lint, types, spelling, rules of the repository
	PATH='$(BIN)':"$$PATH" PRE_COMMIT_HOME=.cache/pre-commit pre-commit run --all-files

format: setup ## repair what can be repaired
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove build outputs and tool caches; the environment and the models stay
	rm -rf build dist ./*.egg-info .hypothesis .cache/mypy .cache/ruff .cache/pytest .cache/pre-commit .cache/sanitize
	rm -rf demo/out benchmarks/out
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
