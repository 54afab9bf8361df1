# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-slow bench bench-page fuzz docs lint setup clean

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

# docs/benchmarks.md from the newest records; a test fails where it is stale.
bench-page: setup
	$(BIN)/python -m benchmarks.page

# A short form of what docs/benchmarks.md reports of CPUs, into bench-results/.
bench: export BENCH_RESULTS = bench-results
bench: setup
	$(BIN)/python -m benchmarks.start_time.run --rounds 2
	$(BIN)/python -m benchmarks.decode_speed.run --rounds 2 --shape "small 1" --parts peers loops
	$(BIN)/python -m benchmarks.exits.clock --texts 2 --rounds 5
	$(BIN)/python -m benchmarks.speculation.run --texts 2 --new 48 --rounds 1
	$(BIN)/python -m benchmarks.batches.run --new 24 --rounds 1 --skip-small
	$(BIN)/python -m benchmarks.kv_cache.run --texts 2 --context 4096
	$(BIN)/python -m benchmarks.train_speed.run --rounds 1

# Five minutes of spoilt inputs; the long form is --count 10000, a finding again --replay N.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reliability.fuzz --seed $$(date +%s)

# The site, into site/. It asks nothing from the network.
docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) dist build site *.egg-info
