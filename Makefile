# Everything runs in .venv, made on demand. Another interpreter that has the packages: make test PYTHON=python
ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
LINTERS := .venv/linters
endif
FASTTRAIN := $(PYTHON) -m fasttrain
# Two processes share two cores: more threads each would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest
BENCHMARKS := PYTHONPATH=".:kernels$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m
# Where measurements leave their JSON; nothing of it is committed by itself.
OUT ?= build/gpu
DEMO := demo
SCORE := $(FASTTRAIN) evaluate $(DEMO)/run --reference $(DEMO)/digits --count 1000 --sampler dpm_solver --steps 16 --guidance 1.5

.PHONY: help demo test lint bench static parity report gpu gpu-test gpu-kernels gpu-step gpu-full

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(INSTALLED)  ## digits -> shards -> a trained transformer -> a score and a picture, in minutes on a laptop
	$(FASTTRAIN) prepare digits $(DEMO)/digits
	$(FASTTRAIN) train configs/quickstart.yaml run_dir=$(DEMO)/run data.train=$(DEMO)/digits
	$(SCORE) --weights untrained ema --out $(DEMO)/scores
	$(FASTTRAIN) sample $(DEMO)/run --out $(DEMO)/samples --steps 18 --guidance 1.5
	@echo
	@for network in untrained ema; do \
	  sed -n "s/.*\"frechet_distance\": \([0-9]*[.][0-9]\{0,3\}\).*/Frechet distance of the $$network weights: \1/p" \
	    $(DEMO)/scores/step-*-$$network-pixels.json; \
	done
	@echo "samples drawn: $(DEMO)/samples/grid.png"

test: $(INSTALLED)  ## every test that needs no GPU and no network
	$(PYTEST) -n 2 --dist worksteal

lint: $(LINTERS)  ## ruff, its formatter's opinion, and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(INSTALLED)  ## the loader beside webdataset's own pipeline, and the small benchmarks of pytest
	$(BENCHMARKS) benchmarks.loader
	$(BENCHMARKS) pytest benchmarks -q -p no:xdist

parity: $(INSTALLED)  ## 50 steps on digits with every kernel on (interpreted without a GPU) and off
	$(BENCHMARKS) benchmarks.parity

static: $(INSTALLED)  ## what is known of every kernel without running it on a GPU: machine code, bytes, errors; many minutes
	$(BENCHMARKS) benchmarks.static_report
	$(BENCHMARKS) benchmarks.error_report

report: $(INSTALLED)  ## the README's tables and pictures from the committed results
	$(BENCHMARKS) benchmarks.report

gpu: $(INSTALLED)  ## ten minutes on a GPU: the most telling of the step, the kernels and the tests; JSON under OUT
	$(BENCHMARKS) benchmarks.gpu digest --out $(OUT)

gpu-test: $(INSTALLED)  ## the kernels' tests on a GPU, and determinism; at most nine minutes, as the next two
	$(BENCHMARKS) benchmarks.gpu tests --out $(OUT)

gpu-kernels: $(INSTALLED)  ## every operation against torch.compile of the same, on a GPU
	$(BENCHMARKS) benchmarks.gpu kernels --out $(OUT)

gpu-step: $(INSTALLED)  ## whole training steps against tuned torch.compile, on a GPU
	$(BENCHMARKS) benchmarks.gpu step --out $(OUT)

gpu-full: $(INSTALLED)  ## everything, on a GPU; hours
	$(BENCHMARKS) benchmarks.gpu full --out $(OUT)

.venv/installed: pyproject.toml constraints.txt
	test -d .venv || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

.venv/linters: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
