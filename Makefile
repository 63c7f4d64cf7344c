# `make demo` and `make test` set themselves up: Python 3.11+, make and pip are all they need.
# PYTHON=... names the interpreter of the environments; PYTEST_ARGS=... goes to pytest.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-wire test-wheel test-containers check coverage bench gpu soak chaos fuzz exact proto lock clean distclean

SETUP = @$(or $(PYTHON),python3) tools/setup.py $(if $(PYTHON),--python $(PYTHON))
BOTH = .venv-both/bin

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Create or update .venv-jax, .venv-torch, .venv-wire, .venv-both and .venv-jax-next
	$(SETUP)

demo: ## Train a PyTorch model through a JAX layer, in two environments
	$(SETUP) jax torch
	.venv-torch/bin/python examples/digits.py

# In two processes: the tests wait for workers half of the time. A file's tests stay together, with its fixtures.
test: setup ## Run the tests; PYTEST_ARGS="-k lease -x"
	$(BOTH)/python -m pytest tests -n 2 --dist loadfile $(PYTEST_ARGS)

test-wire: ## Run the tests of bridge_wire where neither framework is installed
	$(SETUP) wire
	.venv-wire/bin/python -m pytest tests/wire $(PYTEST_ARGS)

# FRESH=1 installs the frameworks too, instead of lending those of the environments.
test-wheel: setup ## Build the wheel, install it elsewhere, run the README's programs with it; FRESH=1
	$(BOTH)/python -m tools.test_wheel $(if $(FRESH),--fresh)

# Neither engine nor base changes the machine: podman's storage is in the user's cache.
test-containers: setup ## Build the images, test containers, Compose files and a pod; ENGINE=podman BASE=IMAGE
	$(BOTH)/python -m tools.containers $(if $(ENGINE),--engine $(ENGINE)) $(if $(BASE),--base $(BASE))
	ENGINE=$(ENGINE) BASE=$(BASE) $(BOTH)/python -m pytest tests/containers --containers -o faulthandler_timeout=900 $(PYTEST_ARGS)

check: setup ## Check format, lint, types, the import rule, the generated code and the public names
	$(BOTH)/ruff format --check .
	$(BOTH)/ruff check .
	$(BOTH)/mypy
	$(BOTH)/lint-imports
	$(BOTH)/python tools/generate_proto.py --check
	$(BOTH)/python tools/api.py --check

coverage: ## Measure the lines of bridge_wire that its tests run, against a floor
	$(SETUP) wire
	.venv-wire/bin/python -m pytest tests/wire --cov $(PYTEST_ARGS)

# On a GPU, PYTHON=... names an interpreter that has both frameworks for CUDA already.
bench: $(if $(and $(GPU),$(PYTHON)),,setup) ## Measure against the performance budget; GPU=1: calls on a GPU
	$(if $(GPU),$(or $(PYTHON),$(BOTH)/python) -m bench.gpu,$(BOTH)/python -m bench)

# On a bare machine with python3 only: python3 tools/gpu.py --limit 480 --wheels FOLDER. See docs/gpu.md.
gpu: $(if $(PYTHON),,setup) ## Ask a GPU every question in LIMIT=480 seconds; WHEELS=FOLDER OUT=FOLDER PYTHON=python3
	$(or $(PYTHON),$(BOTH)/python) tools/gpu.py --limit $(or $(LIMIT),480) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(OUT),--out $(OUT)) $(GPU_ARGS)

soak: setup ## Check every value while a worker is killed and replaced; SECONDS=600
	.venv-torch/bin/python -m tools.soak --seconds $(or $(SECONDS),600)

chaos: setup ## Let each event happen in each phase of a call, over each lane
	$(BOTH)/python -m pytest tests/chaos --chaos $(PYTEST_ARGS)

fuzz: setup ## Feed the decoders and the worker random input
	$(BOTH)/python -m tests.fuzz

# WAYS=inproc,worker,traced,torch-client LIMIT=50 ONLY=linalg SHARE=0.1; `make exact EXACT_ARGS=--write-docs` for the page.
exact: setup ## Compare with the frameworks' operator databases; WAYS=inproc LIMIT=50 ONLY=linalg
	$(BOTH)/python -m exact $(if $(WAYS),--ways $(WAYS)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(ONLY),--only '$(ONLY)') \
	  $(if $(SHARE),--share $(SHARE)) $(EXACT_ARGS)

proto: setup ## Generate bridge_wire/pb from proto/bridge/v1/bridge.proto
	$(BOTH)/python tools/generate_proto.py

lock: setup ## Pin the images' packages with hashes in docker/*.lock
	$(BOTH)/python -m tools.lock

clean: ## Remove caches, build outputs and artefacts
	rm -rf build dist out .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the environments too
	rm -rf .venv-jax .venv-torch .venv-wire .venv-both .venv-jax-next
