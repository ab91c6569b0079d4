# make demo: set up, then shards -> training -> evaluation -> a timm folder on real digits.
# make test: the same environment, then the tests, but for those that take long.
# make test-distributed: tests of several processes, hosts, launchers, and a Slurm; those that take long, too.
# make docs: the pages of docs/ as a site in site/.
# make bench: every benchmark beside its peers, half an hour of an idle machine; figures and pictures in benchmarks/results.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Python's compiled files are kept: without them torch alone takes ten seconds to import
export PYTHONDONTWRITEBYTECODE :=

PHOTOGRAPHS ?= $(PSN_SHARED_DATA)/imagenet_originals
# folder with cifar-10-batches-py; without it, bench leaves out the rows of CIFAR
CIFAR ?=
RESULTS ?= benchmarks/results

.PHONY: demo test test-distributed docs bench lint format lock schema clean

demo: $(STAMP)
	$(BIN)/psn demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long"

# one after another: each has a machine's processes of its own
test-distributed: $(STAMP)
	$(BIN)/python -m pytest -m "distributed or long"

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean

bench: $(STAMP)
	$(BIN)/python benchmarks/neuron.py --out $(RESULTS)
	$(BIN)/python benchmarks/step.py --out $(RESULTS)
	$(BIN)/python benchmarks/memory.py --out $(RESULTS)
	$(BIN)/python benchmarks/inference.py --out $(RESULTS)
	$(BIN)/python benchmarks/loader.py $(PHOTOGRAPHS) $(if $(CIFAR),--cifar $(CIFAR)) --out $(RESULTS)

# renewed when a requirement changes; the package itself is installed editable
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "psn_train needs Python 3.10 or newer; $(PYTHON) is older. Use: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "no venv: install it (Debian, Ubuntu: apt install python3-venv) and run make again"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# after a change of pyproject.toml's requirements
lock: $(STAMP)
	$(BIN)/uv pip compile --quiet --no-header --no-emit-index-url --universal --python-version 3.10 --extra test \
	  pyproject.toml -o requirements.lock

# after a change of psn_train/recipe/schema.py
schema: $(STAMP)
	$(BIN)/psn recipe --schema > recipes/schema.json

clean:
	rm -rf $(VENV) runs site
