# `make demo` and `make test` set up all that they need in .venv on a machine that has Python (3.10 or newer) and make.

PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test test-long notebooks speedrun

demo: $(VENV)/ready
	$(VENV)/bin/python inference.py

test: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

test-long: $(VENV)/ready-dev
	$(VENV)/bin/python -m pytest -m long -s

notebooks: $(VENV)/ready
	$(VENV)/bin/python -m docs.notebooks

speedrun: RUN := runs/speedrun-$(shell date +%Y%m%d-%H%M%S)
speedrun: $(VENV)/ready
	start=$$(date +%s) && $(VENV)/bin/python train.py --dataset mnist --out-dir $(RUN) && \
	echo "trained in $$(($$(date +%s) - start)) s, from the start of the process to its end" && \
	$(VENV)/bin/python evaluate.py --checkpoint $(RUN)/model.pth --seeds 3

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@
