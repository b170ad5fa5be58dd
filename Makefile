# Holdfast: every target builds .venv first, once, from pyproject.toml and constraints.txt.
#
#   make train [ARGS="--plain"]       train the first run: kills one of its own workers, recovers, publishes
#   make serve                        Prefect server and deployments, for the UI and the schedules
#   make check                        format, lint, types, import contracts, fast tests: two and a half minutes
#   make test [TESTS=tests/unit]      the whole suite, as continuous integration runs it
#   make soak                         the hours-long tests
#   make bench [NAME=...] [QUICK=1]   benchmarks; bench-peers builds the peers' environment first
#                                     (ONLY=blocked,codec: some figures of checkpoint; killed,node: of elastic)
#   make deepspeed                    build .venv-deepspeed: some tests then ask DeepSpeed itself
#   make ratchets                     record the public names anew, after changing them on purpose
#   make clean                        remove .venv and caches; runs/ stays

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS_READY := .venv-peers/.ready
DEEPSPEED_READY := .venv-deepspeed/.ready
TESTS ?= tests
PYTEST := $(BIN)/python -m pytest --hypothesis-profile=ci
# Two files at a time: real clusters wait for half of their time. In order, so that the long ones begin early.
BOTH_CORES := -n 2 --dist loadfile --no-loadscope-reorder

# Telemetry off; Prefect keeps its database here unless told otherwise.
export PREFECT_HOME ?= $(CURDIR)/.prefect
export DO_NOT_TRACK ?= 1
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help venv train serve check test soak bench bench-peers deepspeed ratchets system-packages clean

help:
	@sed -n 's/^#   //p' Makefile

venv: $(READY)

$(READY): pyproject.toml constraints.txt checkpoint/format/_fingerprint.c checkpoint/engine/_reading.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Holdfast needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Installing the pinned dependencies into $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

train: $(READY)
	@$(BIN)/holdfast train examples/first_run.toml $(ARGS)

serve: $(READY)
	@$(BIN)/holdfast serve $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(PYTEST) $(BOTH_CORES) -q -m "not slow and not browser and not soak" $(TESTS)

test: $(READY) system-packages
	$(PYTEST) $(BOTH_CORES) -m "not soak" $(TESTS)

soak: $(READY)
	$(PYTEST) -m soak --timeout=0 $(TESTS) || [ $$? -eq 5 ]

bench: $(READY)
	@$(BIN)/python -m tests.bench $(NAME) $(if $(QUICK),--quick)

bench-peers: $(PEERS_READY) bench

$(PEERS_READY): tests/bench/peers.txt
	@echo "Installing the peers into .venv-peers (a few minutes, once) ..."
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -qq --disable-pip-version-check -r tests/bench/peers.txt
	@touch $@

# Tests on DeepSpeed's own checkpoints ask DeepSpeed itself where this environment is; elsewhere they read fixtures that it made.
deepspeed: $(DEEPSPEED_READY)

$(DEEPSPEED_READY): tests/interop/deepspeed.txt
	@echo "Installing DeepSpeed into .venv-deepspeed (a few minutes, once) ..."
	@$(PYTHON) -m venv .venv-deepspeed
	@DS_BUILD_OPS=0 .venv-deepspeed/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools wheel
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-deepspeed/bin/python -m pip install -qq --disable-pip-version-check \
	  --no-build-isolation -r tests/interop/deepspeed.txt
	@touch $@

ratchets: $(READY)
	@$(BIN)/python -m tests.test_ratchets

# The browser test and the tests on a real S3 server need system packages; without them the rest of the suite runs.
system-packages:
	@missing=""; \
	for package in $$(sed 's/#.*//' deploy/apt.txt); do \
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing for some tests:$$missing"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; } >/dev/null \
	    || echo "apt-get failed: the tests that need them will not run"; \
	else \
	  echo "Not installed:$$missing. The tests that need them will not run; as root: apt-get install$$missing"; \
	fi

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find checkpoint elastic tasks flows tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
