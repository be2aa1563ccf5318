# make up    a server with two tenants and four adapters on a real small model
# make test  lint, types, import contracts and all tests that take less than ten minutes
# make clients  asks with other people's clients, each installed beside Manylora

PYTHON ?= python3
# First and by itself: whatever depends on torch must find the build that is wanted here.
TORCH ?= torch==2.13.0
PORT ?= 8000
HOST ?= 127.0.0.1

VENV := .venv
BIN := $(VENV)/bin
# Their dependencies contradict ours.
CLIENTS := .venv-clients
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on
MODEL := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/manylora/models/SmolLM2-135M-Instruct

.PHONY: up test clients thorough lint types contracts tests clean

up: $(VENV)/.installed $(MODEL)/config.json
	@exec $(BIN)/manylora demo --model $(MODEL) --host $(HOST) --port $(PORT)

test: lint types contracts tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

# Two processes share the tests, each with one thread: small models gain nothing from more.
tests: $(VENV)/.installed-dev $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not clients" -n 2 --dist loadfile $(PYTEST_FLAGS)

# The longer forms of what takes minutes: kills, soaks, schemas, every request of the OpenAPI document.
thorough: $(VENV)/.installed-dev $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n 2 --dist loadfile $(PYTEST_FLAGS) tests/crash \
	  tests/hostile/test_drains.py tests/end_to_end/test_drains.py tests/end_to_end/test_structured.py \
	  tests/engine/test_gpu_compiler.py tests/gateway/test_contract.py

clients: $(VENV)/.installed-dev $(CLIENTS)/.installed $(MODEL)/config.json
	$(BIN)/pytest -m clients tests/clients $(PYTEST_FLAGS)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@echo "manylora  installing torch"
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "manylora  installing what Manylora needs"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(PIP) --editable ".[dev]"
	@touch $@

# uv, because pip looks for hours for versions that go together. Node comes from PyPI as well.
$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/node/package-lock.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check "uv>=0.9,<1"
	$(CLIENTS)/bin/uv pip install --python $(CLIENTS)/bin/python -r tests/clients/requirements.txt
	PATH="$(CURDIR)/$(CLIENTS)/bin:$$PATH" npm --prefix tests/clients/node ci --no-audit --no-fund
	@touch $@

$(MODEL)/config.json: | $(VENV)/.installed
	$(BIN)/python -m adapters.demo.base_model $(MODEL)

clean:
	rm -rf $(VENV) $(CLIENTS) tests/clients/node/node_modules .manylora build *.egg-info
