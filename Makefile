# make demo: set up, then generate text with the model that ships. make test: set up, then the tests.

PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
PIP    := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
          $(RUN) -m pip install -qq

.PHONY: demo test clean

demo: $(VENV)/.ready
	@$(RUN) -m dlm generate "Once upon a time" --delay 0.03

test: $(VENV)/.ready-dev
	@$(RUN) -m ruff check .
	@$(RUN) -m pytest

# Stamps: set-up is done again only when what it depends on has changed.
$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing dlm into $(VENV) (a few minutes the first time) ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing dlm and its test tools into $(VENV) (a few minutes the first time) ..."
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.ready

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "dlm needs Python 3.11 \
	or later, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install \
	its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
