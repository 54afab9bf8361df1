# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-slow bench lint setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/looptx train
	$(BIN)/looptx generate "Call me" --show-iterations --max-new-tokens 60
	$(BIN)/looptx generate "map bf da ee fe cd hh gh aa:" --show-iterations --temperature 0 --max-new-tokens 12

# Two at a time with a thread each are faster than one with two.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The core ideas, in less than a minute.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fast

# Swapping to a disk: compiles DeepSpeed's async_io at first, some minutes; needs libaio-dev.
test-slow: setup
	$(BIN)/python -m pytest -m slow -o timeout=3000

# A short form of docs/speed.md's measurements, into bench-results/.
bench: export BENCH_RESULTS = bench-results
bench: setup
	$(BIN)/python benchmarks/start.py --rounds 2
	$(BIN)/python benchmarks/decode_speed.py --rounds 2 --shape "small 1" --parts peers loops
	$(BIN)/python benchmarks/exit_clock.py --texts 2 --rounds 5
	$(BIN)/python benchmarks/speculation.py --texts 2 --new 48 --rounds 1
	$(BIN)/python benchmarks/batches.py --new 24 --rounds 1 --skip-small
	$(BIN)/python benchmarks/cache.py --texts 2 --context 4096
	$(BIN)/python benchmarks/train_speed.py --rounds 1

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) dist build *.egg-info
