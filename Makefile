# make demo   fine-tune a real encoder with ID3, full AdamW and frozen, and compare
# make test   the tests
# make gpu-report   on a CUDA machine: the GPU tests and measurements; REPORT="--only PHASE" for some
# make wheel   the wheel and the sdist for users, checked, in dist/
# make docs   the documentation site, in site/; with SERVE=1 shown at localhost:8000 as you write
# make soak   endurance tests, for half an hour
# make lock   renew requirements/lock.txt: the newest versions that pyproject.toml allows
#
# demo and test set up .venv first (requirements/set_up.py): pinned packages, torch (its CPU build
# where there is no GPU), and this package, compiled. A python that has torch lends it to the venv;
# nothing is installed outside the venv.
#
# PYTHON=python3.12   another python       VENV=folder   another venv
# UNLOCKED=1          the newest of everything in .venv-unlocked, to see what drifts

PYTHON ?= python3
UNLOCKED ?=
VENV ?= .venv$(if $(UNLOCKED),-unlocked)
STEPS ?= 150
OUT ?= demo-output
DIST ?= dist
PYTEST ?=
REPORT ?=
SERVE ?=

PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps/
SET_UP := $(PYTHON) requirements/set_up.py --venv $(VENV) $(if $(UNLOCKED),--unlocked)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.NOTPARALLEL: # one pip at a time in a venv
.PHONY: demo test docs soak gpu-report wheel setup test-setup lock which-python clean

demo: setup
	@$(PY) -m sparse_optim.cli.demo --steps $(STEPS) --output "$(OUT)"

test: test-setup
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST)

# The variable silences an announcement of mkdocs-material about a later mkdocs.
docs: $(STAMPS)packages
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs $(if $(SERVE),serve,build --strict)

# The report builds the package for the card at hand: only packages are set up first. Without a
# network, pip gives up at once, and what is installed must do.
gpu-report: $(STAMPS)environment
	@PIP_RETRIES=0 $(MAKE) -s $(STAMPS)gpu-report || echo "going on with the packages that are there"
	@$(PY) -c 'import torch' || { echo "make gpu-report needs a python with a CUDA torch"; exit 1; }
	@$(PY) -m bench.gpu $(REPORT)

# Minutes of what `make test` does for seconds; the figures go to bench/results.
soak: test-setup
	@$(PY) -m bench.fuzz --seconds 600 --write
	@$(PY) -m bench.replicas --steps 300 --write
	@$(PY) -m bench.followers --write

# Of the CPU kernels; those for CUDA are compiled on the machine with the GPU.
wheel: $(STAMPS)$(if $(UNLOCKED),build,packages)
	@$(PY) requirements/build_wheel.py "$(DIST)"

setup: $(STAMPS)build $(STAMPS)demo-data

test-setup: setup $(STAMPS)test-data

$(STAMPS)environment:
	@$(SET_UP) environment
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)packages: requirements/lock.txt requirements/set_up.py | $(STAMPS)environment
	@$(SET_UP) packages
	@touch $@

$(STAMPS)build: $(STAMPS)packages $(SOURCES)
	@$(SET_UP) build
	@touch $@

$(STAMPS)demo-data $(STAMPS)test-data $(STAMPS)gpu-report: $(STAMPS)%: requirements/%.txt | $(STAMPS)environment
	@$(SET_UP) files $*.txt
	@touch $@

# One file for CPython 3.10 to 3.14, by markers. torch, Triton and nvidia-* are left out.
lock: $(STAMPS)environment
	$(PY) -m pip install -q uv
	$(PY) -m uv pip compile --quiet --upgrade --universal --python-version 3.10 --only-binary :all: \
		--generate-hashes --custom-compile-command "make lock" --annotation-style line \
		--overrides requirements/not-locked.txt --no-emit-package torch --no-emit-package triton \
		--all-extras pyproject.toml requirements/setup.in \
		--output-file requirements/lock.txt

# For .ci/run.
which-python:
	@echo $(PY)

clean:
	rm -rf "$(VENV)" .venv-unlocked build site "$(DIST)" "$(OUT)" *.egg-info
