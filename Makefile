# Every verb a user has. It installs, and calls the command lines of data_prep, clm and run_clm.py: no logic lives here.
# `make` or `make help` lists the verbs. Each installs what it needs first; when that is done already it takes no time.

# PYTHON and TORCH_INDEX may come from the environment. The others count only when typed after `make`: a stray OUT or
# RUN in somebody's environment must not redirect a command.
PYTHON ?= python3
TORCH_INDEX ?=
DATASET =
RECIPE =
TOKENIZER =
BLOCK_SIZE =
PACKING =
OUT =
RUN =
PREP_ARGS =
ARGS =
TOKENS =
FROM =
DATA =
STEP =
BLOCK =
GREP =
TOKEN =
CHECKPOINT =
CONFIG =
LAUNCH_ARGS =

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo datasets prep inspect stat check train extend anneal sample explain verify export push lint test test-slow testable supported-python

PY := .venv/bin/python

# Empty files mark what is done, so that an interrupted step is done again. .venv/made-by-*: this interpreter made
# the .venv, in this folder (a moved .venv is broken). .venv/installed-*: these requirements are in it; with the extras
# too for the tests, which try every optimizer and launcher that runs on a CPU.
ID := $(shell "$(PYTHON)" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)-$(shell pwd | cksum | cut -d' ' -f1)
MADE := .venv/made-by-$(ID)
INSTALLED := .venv/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
TESTABLE := $(INSTALLED)-with-extras

# --- help ---

help: ## Show this text
	@echo "usage: make VERB [NAME=value ...]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2} /^## / {printf "\n%s\n", substr($$0, 4)}' Makefile
	@echo
	@echo "names:"
	@echo "  PYTHON=python3.12    the interpreter of .venv (3.11, 3.12 or 3.13); another one rebuilds it"
	@echo "  TORCH_INDEX=URL      where torch comes from; CPU-only: TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "  DATASET=NAME         a name that 'make datasets' lists, a file, a folder, or a Hub id with a slash"
	@echo "  TOKENIZER= BLOCK_SIZE= PACKING= OUT=    for prep: other than the dataset's YAML says"
	@echo "  RECIPE=FILE          recipes/*.yaml;  RUN=NAME: a folder under runs/"
	@echo "  ARGS=\"...\"           passed on: section.key=value for train and check RECIPE=, options for the others"
	@echo "  PREP_ARGS=\"...\"      passed on to prep, e.g. PREP_ARGS=\"--max-tokens 100M --num-proc 8\""
	@echo "  CONFIG=FILE          accelerate_configs/*.yaml for train (default: all GPUs of this machine, DDP)"
	@echo "  LAUNCH_ARGS=\"...\"    passed on to accelerate launch, e.g. LAUNCH_ARGS=\"--num_processes 4\""

## Begin here

# Waiting threads sleep instead of spinning: somewhat slower alone, many times faster when something else wants a core.
demo: export OMP_WAIT_POLICY := PASSIVE
demo: $(INSTALLED) ## Text to trained model on this machine, offline, in minutes: prepare, train, evaluate, sample
	$(PY) -m clm prep recipes/demo.yaml
	$(PY) run_clm.py recipes/demo.yaml
	$(PY) -m clm demo demo

install: $(INSTALLED) ## Make .venv and install the project into it
	@echo "ready: .venv has Python $$($(PY) -c 'import platform; print(platform.python_version())'); next: make demo"

## Text -> blocks

datasets: $(INSTALLED) ## List the datasets that are known by name, with sizes and licences
	@$(PY) -m data_prep datasets

prep: $(if $(RECIPE),prep-alone-RECIPE,need-DATASET) $(INSTALLED) ## Tokenize into data/<dataset>/: DATASET=stdlib, or RECIPE=recipes/demo.yaml for all it needs
ifneq ($(RECIPE),)
	$(PY) -m clm prep "$(RECIPE)" $(PREP_ARGS)
else
	$(PY) -m data_prep prep "$(DATASET)" $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)") $(if $(BLOCK_SIZE),--block-size "$(BLOCK_SIZE)") $(if $(PACKING),--packing "$(PACKING)") $(if $(OUT),--out "$(OUT)") $(PREP_ARGS)
endif

inspect: need-DATASET $(INSTALLED) ## Show documents, and open blocks with the borders of documents marked: DATASET=stdlib ARGS="--show 3"
	@$(PY) -m data_prep inspect "$(DATASET)" $(ARGS)

stat: need-DATASET $(INSTALLED) ## Count what is in a prepared dataset, and draw it as one HTML page: DATASET=stdlib
	@$(PY) -m data_prep stat "$(DATASET)" $(ARGS)

check: $(if $(RECIPE),need-RECIPE,need-DATASET) $(INSTALLED) ## Recount a prepared dataset from its files: DATASET=stdlib (or check a recipe: RECIPE=recipes/demo.yaml)
	@$(PY) -m $(if $(RECIPE),clm check "$(RECIPE)",data_prep check "$(DATASET)") $(ARGS)

## Blocks -> model

train: need-RECIPE $(INSTALLED) ## Check recipe and data, then train on all GPUs: RECIPE=recipes/llama_170m.yaml
	$(PY) -m clm check "$(RECIPE)" $(ARGS)
	.venv/bin/accelerate launch --quiet $(if $(CONFIG),--config_file "$(CONFIG)") $(LAUNCH_ARGS) run_clm.py "$(RECIPE)" $(ARGS)

extend: need-RUN need-TOKENS $(INSTALLED) ## Give a run another length, and say what its learning rate will do: RUN=llama_170m TOKENS=20B
	@$(PY) -m clm extend "$(RUN)" --tokens "$(TOKENS)" $(ARGS)

anneal: need-FROM need-TOKENS $(INSTALLED) ## Fork a finished model off a run: FROM=runs/llama_170m/checkpoint-30000 TOKENS=1B DATA=wikipedia-en
	@$(PY) -m clm anneal "$(FROM)" --tokens "$(TOKENS)" $(if $(DATA),--data "$(DATA)") $(ARGS)

sample: need-RUN $(INSTALLED) ## Write texts with a run's model: RUN=demo ARGS='--prompt "import os" --num 3'
	@$(PY) -m clm sample "$(RUN)" $(ARGS)

# A text to look for may hold quotes and dollar signs: it goes through the environment, untouched by make and the shell.
explain: export CLM_GREP = $(value GREP)
explain: export CLM_TOKEN = $(value TOKEN)
explain: need-RUN $(if $(value STEP)$(value BLOCK)$(value GREP)$(value TOKEN),,need-STEP) $(INSTALLED) ## What did a step train on, or which steps see a text: RUN=demo STEP=1200, or BLOCK=stdlib:7, GREP="import os", TOKEN=42
	@$(PY) -m clm explain "$(RUN)" $(if $(STEP),--step "$(STEP)") $(if $(BLOCK),--block "$(BLOCK)") $(if $(value GREP),--grep="$$CLM_GREP") $(if $(value TOKEN),--token="$$CLM_TOKEN") $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(ARGS)

verify: need-RECIPE $(INSTALLED) ## Is a killed and resumed run the uninterrupted one? With a certificate: RECIPE=recipes/demo.yaml
	@$(PY) -m clm verify "$(RECIPE)" $(ARGS)

export: need-RUN $(INSTALLED) ## Write the model with or without its head: RUN=demo ARGS="--what base"
	$(PY) -m clm export "$(RUN)" $(ARGS)

push: need-RUN $(INSTALLED) ## Upload the final model to the Hub: RUN=demo ARGS="--repo-id user/name --private"
	$(PY) -m clm push "$(RUN)" $(ARGS)

## Development

testable: $(TESTABLE)

test: $(TESTABLE) ## Run the fast test suite: ARGS="-k sizes"
	$(PY) -m pytest -n 2 $(ARGS)

test-slow: $(TESTABLE) ## Run the slow tests (the demo, kill and resume, launchers; some minutes)
	$(PY) -m pytest -n 2 -m slow --timeout 1500 $(ARGS)

lint: $(INSTALLED) ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# --- what a verb cannot do without ---

EXAMPLE_DATASET = stdlib
EXAMPLE_RECIPE = recipes/llama_170m.yaml
EXAMPLE_RUN = demo
EXAMPLE_STEP = 1200
EXAMPLE_TOKENS = 20B
EXAMPLE_FROM = runs/llama_170m/checkpoint-30000

need-%:
	@test -n "$($*)" || { echo "error: $* is not set. Example: make $(firstword $(MAKECMDGOALS)) $*=$(EXAMPLE_$*)" >&2; exit 2; }

prep-alone-RECIPE:
	@test -z "$(strip $(DATASET)$(TOKENIZER)$(BLOCK_SIZE)$(PACKING)$(OUT))" || { echo "error: RECIPE=$(RECIPE) names its datasets, tokenizer and block size itself. Leave out DATASET, TOKENIZER, BLOCK_SIZE, PACKING and OUT, or leave out RECIPE." >&2; exit 2; }

# --- installation ---

supported-python:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: PYTHON=$(PYTHON) is not a command. Example: make install PYTHON=/usr/bin/python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { echo "error: PYTHON=$(PYTHON) is $$("$(PYTHON)" --version 2>&1), but 3.11, 3.12 or 3.13 is needed. Example: make install PYTHON=/usr/bin/python3.12" >&2; exit 2; }

$(MADE): | supported-python
	"$(PYTHON)" -m venv --clear .venv
	@touch "$@"

# torch alone and first: the version in constraints.txt decides its build, and no other package's wish can replace it.
$(INSTALLED): $(MADE)
	@rm -f .venv/installed-*
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt torch $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch "$@"

$(TESTABLE): $(INSTALLED)
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,deepspeed,bnb,schedulefree,corpus,cluster,remote]'
	@touch "$@"
