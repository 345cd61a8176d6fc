# Everything a contributor runs. `make` alone lists the targets.
#
# Needs python3 (3.11 or newer) with pip, and make; neither python3-venv nor a compiler. Nothing is
# installed outside $(VENV).

PYTHON ?= python3
VENV ?= .venv
# One word or several: TORCH="torch==2.13.0 --index-url URL" takes a CUDA build from another index.
TORCH ?= torch==2.13.0
# Processes that run tests; a module's tests stay in one. One more than cores: over a third of the
# time a test waits (for a server, a deadline, a killed process).
JOBS ?= 3
# Passed on: make demo ARGS="--help", make test ARGS="tests/config -x".
ARGS ?=

PIP_VERSION := 26.3
UV_VERSION := 0.13.8
CYCLONEDX_VERSION := 7.5.0
# What torch itself needs and nobody else here does. torch is not in the lock (its wheel depends on
# the accelerator); these are.
TORCH_NEEDS := sympy networkx setuptools

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip
# pyright runs on the node of its own wheel and asks no registry whether there is a newer one.
PYRIGHT := PYRIGHT_PYTHON_GLOBAL_NODE=0 PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
# The stamp's name holds a checksum of all that decides what is installed, so a second call of any
# target costs nothing and a change of the lock reinstalls.
KEY := $(shell printf '%s\n' '$(TORCH)' '$(PIP_VERSION)' \
	| cat - pyproject.toml requirements.lock | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(KEY)

.PHONY: help install demo test checks sites flower tasks benches soak lint types imports budgets docs dist lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' \
		| while IFS=$$'\t' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

install: $(STAMP) ## create the virtual environment from requirements.lock

demo: $(STAMP) ## four silos train one model on real text; ends with a report (minutes)
	@$(BIN)/photon demo $(ARGS)

# Every process that a test starts, and every next run, takes the bytecode that the first one wrote.
test: export PYTHONDONTWRITEBYTECODE :=

# Types take over a minute of one core, and tests leave some idle, so they run side by side. What
# the checks said comes last, and either failing fails the whole.
test: lint ## all checks and all tests
	@mkdir -p build
	@nice -n 5 $(MAKE) checks > build/checks.log 2>&1 & checks=$$!; \
	trap 'kill $$checks 2>/dev/null || true' EXIT; \
	failed=0; checked=0; \
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS) \
		|| failed=$$?; \
	wait $$checks || checked=$$?; \
	cat build/checks.log; \
	exit $$(( failed ? failed : checked ))

checks: types imports budgets ## what runs beside the tests: types, imports, budgets

sites: $(STAMP) ## a federation across network namespaces: kills, an attacker (root, minutes)
	$(BIN)/python -m pytest tests/sites -m sites $(ARGS)

# Oldest and newest. What Photon has besides comes from $(VENV), whose packages are found in second place.
FLOWERS := 1.41.0 1.42.0
flower: $(STAMP) ## two sites over a real Flower federation, oldest and newest release (minutes)
	@for flower in $(FLOWERS); do \
		new=build/flower-$$flower; \
		$(PYTHON) -m venv --without-pip $$new; \
		$(BIN)/python -c 'import site, sys; print("src", *site.getsitepackages(), sep="\n")' \
			| xargs realpath > $$($$new/bin/python -c 'import site; print(*site.getsitepackages())')/photon.pth; \
		$(BIN)/python -m pip --python $$new/bin/python install --quiet "flwr==$$flower"; \
		PHOTON_FLOWER=$$PWD/$$new/bin $(BIN)/python -m pytest tests/deploy -m flower $(ARGS); \
	done

tasks: $(STAMP) ## models on tasks of lm-evaluation-harness, which is installed beside .venv (minutes)
	$(PYTHON) -m venv --without-pip build/tasks
	$(BIN)/python -c 'import site; print("src", *site.getsitepackages(), sep="\n")' \
		| xargs realpath > $$(build/tasks/bin/python -c 'import site; print(*site.getsitepackages())')/photon.pth
	$(BIN)/python -m pip --python build/tasks/bin/python install --quiet "lm-eval[hf]==0.4.13"
	build/tasks/bin/python -m pytest tests/evaluation -m tasks $(ARGS)

benches: $(STAMP) ## every benchmark in its quick form: does it run? (minutes)
	$(BIN)/python -m pytest tests/house/test_benchmarks.py -m benches $(ARGS)

soak: $(STAMP) ## four hours of a small federation under churn; ARGS="--hours 1"
	$(BIN)/python benchmarks/soak.py $(ARGS)

lint: $(STAMP) ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## pyright: types
	$(PYRIGHT)

imports: $(STAMP) ## import-linter: imports go one way
	$(BIN)/lint-imports --no-cache

budgets: $(STAMP) ## print what outgrew its size budget (a warning to think, never a failure)
	@$(BIN)/python tests/house/budgets.py

docs: $(STAMP) ## rewrite docs/configuration.md from the code
	$(BIN)/python docs/reference.py --write docs/configuration.md

# Tried where nothing of this checkout is: what the SBOM lists is what was installed there.
dist: SITE := build/dist/site
dist: TOOL := build/dist/tool
dist: INSTALL := install --quiet --disable-pip-version-check
dist: INTO := $(BIN)/python -m pip --python build/dist/site/bin/python $(INSTALL)
dist: $(STAMP) ## the wheel, its versions and its SBOM in dist/, tried in an empty environment
	rm -rf dist build/dist
	mkdir -p dist build/dist
	$(BIN)/python -m hatchling build --target wheel
	cp deploy/requirements.lock dist/
	{ printf '%s\n' '$(firstword $(TORCH))'; grep -oE '^[a-z0-9-]+==[^\]+' dist/requirements.lock; } \
		> dist/constraints.txt
	$(PYTHON) -m venv --without-pip $(SITE)
	$(INTO) $(TORCH) --constraint dist/constraints.txt
	$(INTO) --constraint dist/constraints.txt dist/*.whl
	deploy/try-wheel.sh $(SITE)
	$(INTO) --constraint dist/constraints.txt "$$(echo dist/*.whl)[serve]"
	deploy/try-wheel.sh $(SITE) serve
	$(PYTHON) -m venv --without-pip $(TOOL)
	$(BIN)/python -m pip --python $(TOOL)/bin/python $(INSTALL) cyclonedx-bom==$(CYCLONEDX_VERSION)
	$(TOOL)/bin/cyclonedx-py environment $(SITE)/bin/python \
		--pyproject pyproject.toml --short-PURLs --output-reproducible \
		--output-file "$$(echo dist/*.whl | sed 's/-py3.*//').cdx.json"
	cd dist && sha256sum * > SHA256SUMS
	@ls -l dist

lock: ## resolve requirements.lock again; ARGS=--upgrade takes the newest versions
	$(PYTHON) -m pip install --quiet --upgrade --target build/lock uv==$(UV_VERSION)
	echo torch > build/lock/excluded.txt
	printf '%s\n' $(TORCH_NEEDS) | build/lock/bin/uv pip compile pyproject.toml - --extra dev \
		--extra serve --extra cards --excludes build/lock/excluded.txt --universal --python-version 3.11 \
		--generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
		--no-python-downloads --quiet --output-file requirements.lock $(ARGS)
	printf '%s\n' $(TORCH_NEEDS) | build/lock/bin/uv pip compile pyproject.toml - --extra serve \
		--constraints requirements.lock --excludes build/lock/excluded.txt --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-header --no-emit-index-url --no-emit-find-links \
		--no-python-downloads --quiet --output-file deploy/requirements.lock $(ARGS)

clean: ## remove the virtual environment, builds and caches (runs/ and data/ stay)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Photon needs Python 3.11 or newer: make PYTHON=python3.12, for example" >&2; exit 1; }
	$(PYTHON) -m venv --without-pip $(VENV)

# pip comes into the environment from outside, as Debian's python3 has no ensurepip; where the
# outer python has no pip (or one older than 22.3), ensurepip it is.
$(STAMP): | $(BIN)/python
	$(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check install \
		--ignore-installed pip==$(PIP_VERSION) \
		|| { $(BIN)/python -m ensurepip --upgrade && $(PIP) install pip==$(PIP_VERSION); }
	$(PIP) install $(TORCH)
	$(PIP) install --no-deps --require-hashes -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.installed-*
	touch $@
