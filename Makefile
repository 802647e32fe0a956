# `make demo` and `make test` set everything up on a fresh machine: they make .venv, install and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv links the files of one cache into every environment: three of them with torch take the room of two.
INSTALL := VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench

.PHONY: demo test test-slow coverage lowest lint types docs examples bench dashboard gate soak screenshots power wheel clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'uv>=0.8'
	$(INSTALL) --editable '.[dev]'
	touch $@

$(BENCH_INSTALLED): $(INSTALLED)
	$(INSTALL) --editable '.[bench]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/bias-audit demo --out demo

# One process a core, each on one thread: twice as fast as one process on all of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: $(INSTALLED)
	$(PYTEST)

# Lines and branches that `make test` runs, in processes of their own too; fails under 90 %.
coverage: $(INSTALLED)
	$(PYTEST) --cov --cov-report=term-missing

# What `make test` leaves out.
test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# The oldest versions that pyproject.toml allows, of all that it names.
lowest: $(INSTALLED)
	$(BIN)/uv venv --quiet --clear .venv-lowest
	VIRTUAL_ENV=.venv-lowest $(BIN)/uv pip install --quiet --resolution lowest-direct --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto --dist worksteal -m "not slow and not newest"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy on the code; pyright on a program that uses each public name, as a user's editor would; how much has types.
types: $(INSTALLED)
	$(BIN)/mypy
	$(BIN)/pyright
	PYTHONPATH=. $(BIN)/pyright --pythonpath $(BIN)/python --verifytypes bias_audit --ignoreexternal | grep completeness

# The site of docs/ into build/site; warnings are errors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Not live.py: the tests run it.
examples: $(INSTALLED)
	$(BIN)/python examples/quickstart.py
	$(BIN)/python examples/coco_people.py
	$(BIN)/python examples/waterbirds.py
	$(BIN)/python examples/celeba.py
	$(BIN)/python examples/captioning.py
	$(BIN)/python examples/vqa.py
	$(BIN)/python examples/attack.py
	$(BIN)/python examples/video.py
	$(BIN)/python examples/vit_timm.py
	$(BIN)/python examples/doctor_nurse.py
	$(BIN)/python examples/right_reasons.py
	$(BIN)/python examples/lightning_cli/train.py fit --config examples/lightning_cli/config.yaml

# Time and memory beside other packages, into benchmarks/results/. It wants an idle machine.
bench: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks $(ARGS)

# How long an audit's pictures and page hold up a training, and how large the page gets.
dashboard: $(INSTALLED)
	$(BIN)/python -m benchmarks.dashboard

# How long the gate takes on a large run.
gate: $(INSTALLED)
	$(BIN)/python -m benchmarks.gate

# The long forms of the tests: an hour on two cores, into benchmarks/results/.
soak: $(INSTALLED)
	$(BIN)/python -m benchmarks.soak $(ARGS)

# Pictures for the README: train, then look at the page.
screenshots: demo
	$(BIN)/python docs/screenshot.py demo/biased

# Whether the audit finds the cues that are used, and only those: 400 networks, an hour on two cores.
power: $(INSTALLED)
	$(BIN)/python -m benchmarks.power --jobs 2 --cache build/power $(ARGS)

# The built wheel in a clean environment: it must hold everything, and no top-level `callbacks`.
wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . > dist.log 2>&1 || (cat dist.log; exit 1)
	rm -f dist.log
	$(BIN)/uv venv --quiet --clear .venv-wheel
	VIRTUAL_ENV=.venv-wheel $(BIN)/uv pip install --quiet dist/*.whl
	cd / && $(CURDIR)/.venv-wheel/bin/python -c "import importlib.util as u, bias_audit.callbacks; assert u.find_spec('callbacks') is None"
	cd / && $(CURDIR)/.venv-wheel/bin/python $(CURDIR)/tests/synthetic.py $(CURDIR)/build/wheel-run
	cd / && $(CURDIR)/.venv-wheel/bin/bias-audit report $(CURDIR)/build/wheel-run
	cd / && $(CURDIR)/.venv-wheel/bin/bias-audit gate $(CURDIR)/build/wheel-run > /dev/null; test $$? -eq 1

clean:
	rm -rf $(VENV) .venv-lowest .venv-wheel build dist demo runs *.egg-info
