# Two commands: `make serve` answers requests with a real model, `make test` passes. Both do all the set-up.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
NATIVE := $(wildcard tokenrelay/model/transformer/kernels/cpp/*)

.PHONY: serve test test-long long lint types bench bench-kernels clean

serve: $(VENV)/.installed ## start everything on this machine; SERVE="--port 9000" passes options
	$(BIN)/tokenrelay serve $(SERVE)

test: lint types ## lint, types and the default suite, two tests at a time
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-long: ## chaos and fuzz runs of many minutes, and heavy clients: their pins want an environment of their own
	$(MAKE) VENV=$(VENV)-long long

long: $(VENV)/.installed-clients
	$(BIN)/python -m pytest -m long --timeout 3600

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

bench-kernels: $(VENV)/.installed ## speed of each kernel and its share of the machine's limit
	$(BIN)/python -m benchmarks.kernels

bench: $(VENV)/.installed-dev ## measures running servers: BENCH="http://127.0.0.1:8000 --clients 1,4,16 --plot clients.png"
	$(BIN)/tokenrelay bench $(BENCH)

$(VENV)/.installed: pyproject.toml setup.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.installed-clients: $(VENV)/.installed-dev
	$(BIN)/pip install --disable-pip-version-check -e '.[clients]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-long build *.egg-info
