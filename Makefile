# `make demo` and `make test` need Python >= 3.11 and make, nothing else: they set up .venv by themselves.
# Another interpreter: `make PYTHON=/path/to/python3.12 test`.

IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	"$$p" -c '$(IS_NEW_ENOUGH)' 2>/dev/null && { echo "$$p"; break; }; done)
BIN := .venv/bin
READY := .venv/.ready
AZURITE := tests/servers/node_modules/.package-lock.json
# A process for every core, and one more because some tests wait; each computes with one thread.
# Files stay whole: their tests share fixtures. Bytecode is kept, as tests start many processes.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --dist loadfile \
	-n "$$($(BIN)/python -c 'import os; print(1 + os.cpu_count())')"

.DEFAULT_GOAL := help
.PHONY: help demo test test-heavy lint bench bench-ingest bench-store bench-train bench-model clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

# torch goes first and alone, so that the index which offers the CPU build decides about nothing else.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "cvae-dist needs Python >= 3.11; none of python3, python3.11, python3.12," \
		"python3.13 is. Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c '$(IS_NEW_ENOUGH)' || { echo "cvae-dist needs Python >= 3.11, but $(PYTHON) is" \
		"$$("$(PYTHON)" --version 2>&1). Name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Only npm has Azurite; where it cannot be installed, the tests against Azure are skipped and say so.
$(AZURITE): tests/servers/package-lock.json
	@npm ci --prefix tests/servers --ignore-scripts --no-audit --no-fund --loglevel=error || \
		echo "Azurite could not be installed by npm, so nothing is tested against Azure"

demo: $(READY) ## 1,797 real handwritten digits to latents and back, with pictures, in demo/
	$(BIN)/python pipelines/write_digits.py demo/digits
	$(BIN)/cvae-dist run pipelines/digits.yaml

test: lint $(AZURITE) ## lint, then every test but those marked heavy, faults included
	$(PYTEST) -m "not heavy" --durations 20

test-heavy: $(READY) $(AZURITE) ## the long tests and the rest of the matrices: MNIST from 60,000 files to latents
	$(PYTEST) -m heavy --durations 20

lint: $(READY) ## ruff, mypy (strict) and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## ratios against bare reads, copies and models, measured in one run
	$(BIN)/python -m tests.bench

# embedding-reader asks for an older pandas, of which it needs nothing here.
bench-ingest: $(READY) ## ingest beside copies, np.load, s3fs, embedding-reader and pyarrow (about 20 minutes)
	$(BIN)/python -m pip install --quiet --no-deps embedding-reader tqdm
	$(BIN)/python -m tests.bench moments ingest tables objects listing

bench-store: $(READY) $(AZURITE) ## the store on an object store and at 200,000 shards: requests, seconds, bytes (about 10 minutes)
	$(BIN)/python -m tests.bench store

bench-train: $(READY) ## training from a store and on several ranks: the loader beside its peers, speed, restart, quality (about 40 minutes)
	$(BIN)/python -m tests.bench loader train

bench-model: $(READY) ## what the model is worth: quality, likelihoods, speed, beside the reference (about 25 minutes)
	$(BIN)/python -m tests.bench.model

clean: ## remove what the demo, the tests and the set-up made
	rm -rf demo .venv .venv-reference tests/servers/node_modules build dist
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
