.PHONY: install test parity fuzz lint demo proto \
	bench bench-joins bench-wan bench-attacks bench-rounds bench-codecs bench-quality bench-solo bench-learning \
	bench-memory bench-watch bench-coordinator bench-crashes bench-simulate bench-sweep bench-serve bench-gpu
.DEFAULT_GOAL := install

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := cli coordinator peer protocol

install: $(INSTALLED)  ## a virtual environment with the pinned set and hivegrpo, editable

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "hivegrpo needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

test: install  ## every test: those without processes of their own on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"
	$(BIN)/python -m pytest -m slow

parity: install  ## the tests against TRL alone
	$(BIN)/python -m pytest -m parity

lint: install .typing  ## style, formatting, strict types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=.typing $(BIN)/mypy -p hivegrpo

# Type checkers need a folder named hivegrpo, which the tree does not have.
.typing: Makefile
	mkdir -p $@/hivegrpo
	for package in $(PACKAGES); do ln -sfn ../../$$package $@/hivegrpo/$$package; done
	touch $@

demo: install  ## a coordinator and three peers on this machine train a small model
	$(BIN)/hivegrpo demo

bench: install  ## averaging, against hivemind's
	$(BIN)/python benchmarks/allreduce.py

bench-wan: install  ## rounds over 20 Mbit/s uplinks, in network namespaces; needs root
	$(BIN)/python benchmarks/wan.py

bench-joins: install  ## thirty late joins at once onto three holders, honest and not
	$(BIN)/python benchmarks/joins.py

bench-codecs: install  ## what encodings of a gradient cost: error, size, speed
	$(BIN)/python benchmarks/codecs.py

bench-solo: install  ## a step that one machine makes alone, against TRL's
	$(BIN)/python benchmarks/solo.py

bench-learning: install  ## how fast a swarm of three learns, against TRL
	$(BIN)/python benchmarks/learning.py

bench-quality: install  ## what the codecs cost in accuracy, on the demo's task
	$(BIN)/python benchmarks/quality.py --json quality.json

bench-memory: install  ## peak memory of log-probabilities, against torch's
	$(BIN)/python benchmarks/memory.py

bench-rounds: install  ## a thousand random rounds of the exchange, against an independent reference
	PYTHONPATH=tests $(BIN)/python benchmarks/rounds.py

bench-attacks: install  ## attacks on the averaging layer; writes their table into docs/security.md
	PYTHONPATH=tests $(BIN)/python benchmarks/attacks.py

bench-watch: install  ## how fast the light client verifies a chain of a thousand versions
	PYTHONPATH=tests $(BIN)/python benchmarks/watch.py

bench-coordinator: install  ## the coordinator's start from a million events, and how many heartbeats it takes
	$(BIN)/python benchmarks/coordinator.py

bench-crashes: install  ## the coordinator, killed at fifty random writes over loopback
	PYTHONPATH=tests $(BIN)/python benchmarks/crashes.py

bench-simulate: install  ## how long large swarms take to simulate, and a sweep of 500 random seeds
	$(BIN)/python benchmarks/simulate.py

bench-gpu: install  ## canonical bits, gradients and speed on a GPU, at real models' shapes
	$(BIN)/python benchmarks/gpu.py

fuzz: install  ## every decoder and handler, for longer than the tests do
	HIVEGRPO_FUZZ_EXAMPLES=5000 $(BIN)/python -m pytest --timeout=3600 tests/test_fuzz_decoders.py tests/test_fuzz_handlers.py

proto: install  ## protocol/hivegrpo_pb2.py and .pyi, which are committed, from hivegrpo.proto
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotocol --python_out=protocol --mypy_out=protocol hivegrpo.proto

bench-sweep: install  ## what beta and temperature do, by a sweep that is killed half-way
	$(BIN)/python benchmarks/sweep.py

bench-serve: install  ## what the proxy of `hivegrpo serve` costs
	$(BIN)/python benchmarks/serve.py
