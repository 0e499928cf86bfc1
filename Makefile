# The two commands, `make demo` and `make test`, and short names for `python -m course VERB`.
# Each target does all the set-up it needs, in .venv. Another Python: make PYTHON=python3.12 demo

SHELL := /bin/sh
.DEFAULT_GOAL := help
.SUFFIXES:
# Another project's modules must not be found before ours.
unexport PYTHONPATH PYTHONHOME

PY := .venv/bin/python
ARGS ?=
WEEK ?=
# Up to four processes with one torch thread each, a whole file to one, for the sake of what its tests
# share. For pdb, one process: make test PYTEST_WORKERS=0
PYTEST_WORKERS ?= logical
PYTEST := $(PY) -m pytest -n $(PYTEST_WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test lab build check verify slides lint format clean bench constraints

help: ## this list
	@echo "usage: make TARGET [PYTHON=python3.12] [WEEK=3] [ARGS='...']"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

setup: ## .venv with everything in the tested versions; nothing to do when it is ready
	@if [ -n "$(PYTHON)" ]; then \
	    if "$(PYTHON)" -I -c 'assert __import__("sys").version_info > (3, 6)' 2>/dev/null; \
	    then exec "$(PYTHON)" -I course/setup_env.py --python-was-named; fi; \
	    echo "setup: PYTHON=$(PYTHON) does not run as Python 3: name one of 3.11 to 3.14, or leave PYTHON out." >&2; exit 2; \
	fi; \
	for python in python3 python3.13 python3.12 python3.11 python3.14 $(PY); do \
	    if "$$python" -I -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; \
	    then exec "$$python" -I course/setup_env.py; fi; \
	done; \
	echo "setup: no Python 3.11 to 3.14 was found ($$(python3 --version 2>&1 | tail -n 1)): install one" \
	    "(Debian 12: apt-get install python3 python3-venv) or name it, make PYTHON=/path/to/python3.12 setup." >&2; exit 2

demo: setup ## the main job: build, run the weeks, grade a small class, show the gradebook
	@$(PY) -m course demo $(ARGS)

test: setup ## all tests; some of them: make test ARGS="tests/test_clip.py -k loss"
	@$(PYTEST) $(ARGS)

lab: setup ## open JupyterLab; at one week: make lab WEEK=3
	@$(PY) -m course lab $(WEEK) $(ARGS)

build: setup ## write notebooks/ and solutions/ from course/weeks/
	@$(PY) -m course build $(ARGS)

check: setup ## run the solved weeks with papermill; on a GPU: make check ARGS="--device cuda"
	@$(PY) -m course check $(WEEK) $(ARGS)

verify: setup ## prove the grading: solutions pass, stubs fail, every wrong answer is caught
	@$(PY) -m course verify $(WEEK) $(ARGS)

slides: setup ## slides with the weeks' figures; as pages: make slides ARGS=--html
	@$(PY) -m course slides $(WEEK) $(ARGS)

lint: setup ## what .ci/run asks of the code: ruff, and its format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: setup ## mend what lint complains of, where that is mechanical
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: setup ## every benchmark, into build/bench/; on a GPU: make bench ARGS="--device cuda"
	@for bench in tests/bench/[a-z]*.py; do echo "== $$bench"; $(PY) "$$bench" $(ARGS) || exit 1; done

# A matched set, and what Colab ships: the plain index's torchvision and torchaudio load beside no other torch.
TORCH := torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0
# The oldest Python that must be able to install them all; Debian 12 has 3.11.2.
OLDEST_PYTHON := 3.11.0

constraints: setup ## resolve pyproject.toml into constraints.txt; all anew: make constraints ARGS=--upgrade
	@mkdir -p build && cp constraints.txt build/constraints.txt
	@printf '%s\n' $(TORCH) uv | $(PY) -m uv pip compile -q - pyproject.toml --extra course --extra dev \
	    --python-version $(OLDEST_PYTHON) --no-header --no-annotate $(ARGS) -o build/constraints.txt
	@{ echo "# Exact versions that the tests ran with: names and versions only. Made by make constraints."; \
	    cat build/constraints.txt; } > constraints.txt
	@git diff --stat -- constraints.txt

clean: ## remove .venv and all that can be made again; a learner's work/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
