# make demo | make test | make setup | make lint | make bench | make clean
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.dcdit-installed

.PHONY: demo setup test lint bench evidence smoke clean help
.DEFAULT_GOAL := help

help:            ## this list
	@grep -E '^[a-z]+: .*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 10

setup: $(STAMP)  ## .venv, dependencies, the package in editable mode, the extension built

$(STAMP): setup.py pyproject.toml constraints.txt launch/setup.sh $(wildcard csrc/*.cpp csrc/*/*)
	PYTHON=$(PYTHON) VENV=$(VENV) bash launch/setup.sh
	@touch $(STAMP)

demo: $(STAMP)   ## train, stop, resume, sample and report on real photographs (under 12 minutes on two cores)
	$(PY) trainer/demo.py

test: $(STAMP)   ## the whole test suite, on the CPU
	OMP_NUM_THREADS=1 $(PY) -m pytest

lint: $(STAMP)   ## ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

smoke: $(STAMP)  ## the demo's path in about a minute: two processes, a kill, a resume, samples, the report
	$(PY) trainer/demo.py --quick

bench: $(STAMP)  ## side-by-side measurements: the ops against the dense form, a training step against DiT
	OMP_NUM_THREADS=2 $(PY) benchmarks/chunking.py
	OMP_NUM_THREADS=2 $(PY) benchmarks/step.py --parts

evidence: $(STAMP) ## DC-DiT and its ablations against DiT at equal training FLOPs; hours on a CPU, resumable
	OMP_NUM_THREADS=1 $(PY) benchmarks/evidence.py --json runs/evidence/evidence.json \
		--markdown docs/results.md --svg docs/images/evidence.svg
	OMP_NUM_THREADS=1 $(PY) benchmarks/evidence.py --photos --only dcdit,dit2,one-budget,dit4 \
		--markdown docs/results.md --svg docs/images/evidence-photos.svg
	$(PY) benchmarks/router_texture.py runs/evidence/dcdit-0 --every 2 \
		--markdown docs/results.md --name router-scenes --svg docs/images/router-learned.svg

clean:           ## remove what was built (not runs/)
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	find model -name '*.so' -delete
	rm -f $(STAMP)
