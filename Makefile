# Two commands: `make demo` runs the main job, `make test` runs the tests. Each installs first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check docs wheel harness browser versions lock newest clean

demo: $(VENV)/installed
	$(BIN)/vtc demo --out out

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# What CI runs before the tests: that they can be imported, style, types, README tables.
check: $(VENV)/installed
	$(BIN)/python .ci/step tests $(BIN)/python -m pytest --collect-only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/vtc list --check README.md

# The site, in site/, in about 15 s. Everything that is on it comes from the repository.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The web page in headless Chromium, which is installed when it is missing, and its picture.
browser: $(VENV)/installed
	bash .ci/browser $(BIN)/python $(if $(PICTURE),--screenshot $(PICTURE))

wheel: $(VENV)/installed
	bash .ci/wheel $(BIN)/python

# The plug-in inside lmms-eval, in an environment of its own: about a minute.
harness: $(VENV)/installed
	bash .ci/harness $(BIN)/python

# The canary and a sample of the tests with other versions of libraries, two sets of versions a run.
versions: $(VENV)/installed
	$(BIN)/python .ci/versions

# constraints.txt and .ci/harness.txt anew, with the newest releases that pyproject.toml allows.
lock:
	bash .ci/lock $(PYTHON)

# What the newest releases of everything would break. Nothing depends on it.
newest:
	bash .ci/newest $(PYTHON)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--build-constraint constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out dist build site
