# Two commands are all a newcomer needs: `make demo` and `make test`. Each sets up `.venv` when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo-out
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo test check bench format clean

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Python cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing pinned packages into $(VENV): once, a few minutes, about 2 GB."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## Three hospitals on this machine: slides in, audited and signed releases out (OUT=DIR, ARGS=...).
	@$(BIN)/pixcell demo --out $(OUT) $(ARGS)

test: $(STAMP)  ## Every test (ARGS=... for pytest).
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(STAMP)  ## Style, types, and the rules of the house.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP)  ## Paired measurements, printed as ratios.
	@for script in bench/bench_*.py; do $(BIN)/python $$script || exit 1; done

format: $(STAMP)  ## Bring the code into the house's style.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## Remove the environment and the demo's output.
	rm -rf $(VENV) demo-out
