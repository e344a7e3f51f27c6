# Every target works as the first command on a fresh clone: Python >= 3.11, pip and make suffice.
# Another interpreter: `make test PYTHON=python3.13`.

PYTHON ?= python3
STAMP := .venv/.installed
# scripts/ and benchmarks/ are checked as soon as they hold a Python file.
SOURCES := gradpipe tests $(sort $(patsubst %/,%,$(dir $(wildcard scripts/*.py benchmarks/*.py))))

.PHONY: demo test models site bench lint clean

demo: $(STAMP)
	rm -rf demo-out
	.venv/bin/pipe demo demo-out

test: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 tests

# Every model type of transformers, on two cores; prints what is no longer as tests/models/verdicts.json says.
models: $(STAMP)
	TMPDIR=$${TMPDIR:-$$(test -d /dev/shm && echo /dev/shm || echo /tmp)} .venv/bin/python scripts/models.py

# The goals of time, measured again: under 15 minutes on two cores; a dated file, and a table.
bench: $(STAMP)
	.venv/bin/python benchmarks/bench.py benchmarks/results/$$(date -u +%Y-%m-%d)-cpu.json

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy $(SOURCES)
	.venv/bin/lint-imports --no-cache

# The documentation as a site, in site/; a link or an anchor that leads nowhere fails.
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

# Back to a fresh clone: the environment, the caches and the demo's output go.
clean:
	rm -rf .venv build dist demo-out site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find gradpipe tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is touched last: an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
