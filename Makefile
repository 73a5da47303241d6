# Every command sets up what it needs. Variables: OUT (where a project lives), PORT (of the UI), TRAIN_MINUTES, JOBS (of
# the tests), PYTHON.
PYTHON ?= python3
OUT ?= out/demo
PORT ?= 3000
TRAIN_MINUTES ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
SERVERS := .venv-s3/.stamp .venv-moto/.stamp
UV_COMPILE := $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-annotate --no-header --quiet

.PHONY: help setup servers demo ui test lint format types check bench chaos lock clean

help: ## these lines
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(STAMP) ## the environment in .venv
$(STAMP): requirements/all.txt requirements/bootstrap.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fourmill needs Python 3.11 or newer; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/bootstrap.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements/bootstrap.txt requirements/all.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

servers: $(SERVERS) ## the S3 servers that the tests use, each in an environment of its own
.venv-%/.stamp: requirements/%.txt | $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	$(BIN)/uv pip sync --quiet --python $(@D)/bin/python --require-hashes $<
	touch $@

demo: setup ## the whole chain on generated scenes, then a page to look at
	$(BIN)/fourmill demo --out $(OUT) $(if $(TRAIN_MINUTES),--train-minutes $(TRAIN_MINUTES))

ui: setup ## Dagster's UI over the demo's state, on http://127.0.0.1:$(PORT)
	$(BIN)/fourmill ui --out $(OUT) --port $(PORT)

test: setup servers ## all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: setup ## style and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: setup ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup ## pyright
	$(BIN)/pyright

check: setup ## Dagster's own check of the definitions
	$(BIN)/dg check defs

bench: setup ## the benchmarks that need no demo, quick
	for name in shards pixels labels tokenizers ingest; do $(BIN)/python -m bench.$$name --quick || exit 1; done

chaos: setup ## kill the demo at random moments; its digests must not change
	$(BIN)/python -m bench.chaos --profile smallest --kills 5
	$(BIN)/python -m bench.chaos_labels --kills 10
	$(BIN)/python -m bench.chaos_labels --kills 2 --together

lock: setup ## compile requirements/*.txt again
	$(UV_COMPILE) requirements/bootstrap.in -o requirements/bootstrap.txt
	$(UV_COMPILE) pyproject.toml --extra pipeline --extra ml --extra dev -o requirements/all.txt
	$(UV_COMPILE) requirements/s3.in -o requirements/s3.txt
	$(UV_COMPILE) requirements/moto.in -o requirements/moto.txt
	$(UV_COMPILE) infra/detectron2/requirements.in -o infra/detectron2/requirements.txt

clean: ## remove the environment and what the demo made
	rm -rf $(VENV) .venv-s3 .venv-moto $(OUT)
