# make demo: set up, then generate text with the model that ships. make test: set up, then linters and tests.
# make test leaves out the tests that are marked slow (kills, most hostile inputs, several processes); make test-all runs
# them too, and make test-fast only the parts that everything else is built on.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
RUN    := $(VENV)/bin/python
PIP    := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
          $(RUN) -m pip install --progress-bar off
# What pip does, on one line that moves in a terminal, every tenth package elsewhere; pip's errors come through whole.
SHOW   := awk -v live="$$(test -t 1 && echo 1)" '/^ *(Collecting|Downloading|Installing|Building)/ { n += /Collecting/; \
          text = sprintf("  %d packages: %.60s", n, $$1 " " $$2); \
          if (live) printf "\r\033[K%s", text; else if (n % 10 == 1 && n != last) print text; last = n; fflush() } \
          END { if (live) printf "\r\033[K" }'

.PHONY: demo test test-all test-fast lint clean

demo: $(VENV)/.ready
	@printf '%s\n\n' '$$ dlm generate --chat "Tell me a story about a girl who paints." --seed 1'
	@$(RUN) -m dlm generate --chat "Tell me a story about a girl who paints." --seed 1 --delay 0.02
	@printf '\nNext:\n%s\n%s\n%s\n%s\n' '  $(VENV)/bin/dlm generate "The old house" --seed 3' \
	  '  $(VENV)/bin/dlm infill "The fox was ___{2}, so he went ___{6}."' '  $(VENV)/bin/dlm generate --chat "Tell me a story about a lost kitten."' \
	  '  $(VENV)/bin/dlm --help        (source $(VENV)/bin/activate makes it: dlm)'

test: lint
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-all: lint
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal

test-fast: lint
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow" tests/utils tests/models tests/data tests/objectives

lint: $(VENV)/.ready-dev
	@$(RUN) -m ruff check .
	@$(VENV)/bin/lint-imports

# Stamps: set-up is done again only when what it depends on has changed.
$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing dlm into $(VENV) (a few minutes the first time) ..."
	@$(call install,-e .)
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing dlm and its test tools into $(VENV) (a few minutes the first time) ..."
	@$(call install,-e ".[dev]")
	@touch $@ $(VENV)/.ready

# The shell of make has no pipefail: a file says that pip failed.
install = rm -f $(VENV)/.failed; { $(PIP) $(1) || touch $(VENV)/.failed; } | $(SHOW); \
          if [ -e $(VENV)/.failed ]; then rm -f $(VENV)/.failed; exit 1; fi

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "dlm needs Python 3.11 \
	or later, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install \
	its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache .schemathesis
