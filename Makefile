# Two commands suffice: `make quickstart` and `make test`. Both make .venv first if it does not exist.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Where this is set, as in many containers, each of the hundred processes of the tests would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# Everything they install is in the lock, requirements/*.txt: exact versions, each with its hashes.
# Where there is no NVIDIA GPU, torch's CPU build: the usual one brings gigabytes of CUDA with it.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH_BUILD ?= cpu
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
else
TORCH_BUILD ?= cuda
endif
TORCH_LOCK := requirements/torch-$(TORCH_BUILD).txt
OLDEST_TORCH := torch==2.11.*
OLDEST_INDEX := $(TORCH_INDEX:--extra-index-url=--index-url)

# --no-compile: Python compiles the imported modules, a small part of all, in less time than pip compiles all of them.
INSTALL := python -m pip install --quiet --no-compile
# --no-deps and --no-build-isolation: nothing comes from outside the lock, the build backend neither.
LOCKED := $(INSTALL) --require-hashes --no-deps
EDITABLE := $(INSTALL) --no-deps --no-build-isolation --editable .
# One retry of an index that does not answer: the installation fails early without a network.
LOCKED_TORCH := $(LOCKED) --retries 1 $(TORCH_INDEX) --requirement $(TORCH_LOCK)
# uv downloads packages side by side, in a quarter of pip's time; where it cannot, pip installs the same files.
WITH_UV = $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps
INSTALL_LOCK = $(WITH_UV) --requirement $(1) || $(BIN)/$(LOCKED) --requirement $(1)
# One process a processor, one thread a process: the tensors of tests are small.
PROCESSES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PROCESSES) --dist worksteal
# Imports the libraries of the tests, so that Python compiles them once, and not once in each process of the tests.
FETCH := import peft, transformers.trainer; from zotune.llm.models.builtin import fetch; fetch("smollm2-135m")
CHECK_PYTHON := $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "The lock holds for Python 3.11 to 3.14; set PYTHON=python3.11")'

.PHONY: quickstart reward test test-slow docs test-newest test-oldest test-distributed test-faults test-gpu test-lm-eval bench-speed bench-peers bench-check bench-gpu bench-quickstart bench-reward bench-zero-shot bench-families bench lock clean

quickstart: $(VENV)/llm
	$(BIN)/python examples/quickstart.py

reward: $(VENV)/llm
	$(BIN)/python examples/reward.py

test: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# While the types are checked, the built-in model is fetched and the libraries are compiled, once for all processes of
	@# the tests. A failure of the types or of the tests is a failure of `make test`.
	$(BIN)/mypy & types=$$!; $(BIN)/python -c '$(FETCH)'; $(TEST) -m "not slow"; tests=$$?; wait $$types && exit $$tests

# The same properties at full size and in all combinations; CONTRIBUTING.md lists them.
test-slow: $(VENV)/dev
	$(TEST) -m slow

# The documentation site, in build/docs. Sphinx checks links between pages, an extension those of the built pages.
docs: $(VENV)/dev
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs build/docs

# The suite on the newest of everything that the ranges of pyproject.toml allow but torch, which stays as locked.
# Before each release, and before a change of a range; warnings are not errors here, those of others come and go.
test-newest:
	$(CHECK_PYTHON)
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/$(LOCKED_TORCH)
	.venv-newest/bin/$(INSTALL) --editable '.[llm,dev]' "$$(grep -o '^torch==[^ ]*' $(TORCH_LOCK))"
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest -n $(PROCESSES) --dist worksteal -W default -m "not slow" $(TESTS)

# The suite on the lower end of every range, once a release. Where PyTorch's index cannot be reached, torch is as locked.
test-oldest:
	$(CHECK_PYTHON)
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/$(INSTALL) --no-deps --requirement requirements/oldest.txt
	.venv-oldest/bin/$(INSTALL) --retries 1 $(OLDEST_INDEX) '$(OLDEST_TORCH)' \
		|| { echo "$(OLDEST_TORCH) cannot be installed here; the torch of $(TORCH_LOCK) takes its place."; .venv-oldest/bin/$(LOCKED_TORCH); }
	.venv-oldest/bin/$(EDITABLE)
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n $(PROCESSES) --dist worksteal -W default -m "not slow" $(TESTS)

# Runs of several processes in full: every method at every split, random kills under torchrun, signals.
test-distributed: $(VENV)/dev
	$(TEST) -n 1 tests/llm/distributed

# The faults of `make test` in full number: 600 kills, 100 pairs of commands at once, 100 full disks, 100,000 damaged files.
# Half an hour on one core. ONLY="kills disks" runs some kinds, which keep the others' counts in the file.
# `python -m faults --again` repeats the failed trials after a change, and lists those that pass as mended.
ONLY ?= kills pairs disks accidents fuzz
test-faults: $(VENV)/dev
	PYTHONPATH=tests TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m faults --only $(ONLY) --output benchmarks/results/faults.json
	ZOTUNE_FUZZ=10000 $(BIN)/pytest tests/ledger/test_ledger.py tests/llm/data/test_fuzzed_inputs.py tests/llm/data/test_readers.py

# The kernels of a GPU on a GPU; `make test` runs them in Triton's interpreter.
test-gpu: $(VENV)/dev
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu needs an NVIDIA GPU and a CUDA build of torch; here torch.cuda.is_available() is False.")'
	TRITON_INTERPRET=0 $(BIN)/pytest tests/noise/test_triton.py tests/test_gpu.py

test-lm-eval: $(VENV)/lm-eval
	$(BIN)/python benchmarks/lm_eval_agreement.py

bench-speed: $(VENV)/dev
	$(BIN)/python benchmarks/speed/step.py
	$(BIN)/python benchmarks/speed/memory.py
	$(BIN)/python benchmarks/speed/plan.py
	$(BIN)/python benchmarks/speed/ledger.py
	$(BIN)/python benchmarks/speed/forward_gradient.py
	$(BIN)/python benchmarks/speed/growth.py

# Against other packages, which zotune does not need; eggroll-es requires more packages than its code imports.
bench-peers: $(VENV)/dev
	$(BIN)/pip install --quiet torchzero==0.4.4
	$(BIN)/pip install --quiet --no-deps eggroll-es==0.2.0
	$(BIN)/python benchmarks/speed/peers.py

# Fails where a step has become slower than what is recorded, as a multiple of its forward passes.
bench-check: $(VENV)/llm
	$(BIN)/python benchmarks/speed/check.py

bench-gpu: $(VENV)/llm
	$(BIN)/python benchmarks/speed/gpu.py

bench-quickstart: $(VENV)/llm
	$(BIN)/python benchmarks/quickstart_seeds.py

bench-reward: $(VENV)/llm
	$(BIN)/python benchmarks/reward_seeds.py

bench-zero-shot: $(VENV)/llm
	$(BIN)/python benchmarks/zero_shot.py

# The table of model families in the docs; some ten minutes on one core.
bench-families: $(VENV)/llm
	$(BIN)/python benchmarks/families.py

# The paper's tables and figures at the scale of two cores, some hours there; continues where it was stopped.
bench: $(VENV)/llm
	$(BIN)/zotune bench run --scale cpu --jobs 2

$(VENV)/torch: $(TORCH_LOCK) requirements/uv.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(LOCKED_TORCH)
	$(BIN)/$(LOCKED) --requirement requirements/uv.txt || true
	touch $@

$(VENV)/llm: $(VENV)/torch requirements/llm.txt pyproject.toml
	$(call INSTALL_LOCK,requirements/llm.txt)
	$(BIN)/$(EDITABLE)
	touch $@

$(VENV)/dev: $(VENV)/torch requirements/dev.txt pyproject.toml
	$(call INSTALL_LOCK,requirements/dev.txt)
	$(BIN)/$(EDITABLE)
	touch $@

$(VENV)/lm-eval: $(VENV)/llm
	$(BIN)/python -m pip install --quiet 'lm-eval>=0.4.9,<0.5'
	touch $@

# Makes the lock anew out of the ranges of pyproject.toml, with the newest versions of today; run `make test` after it.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/$(INSTALL) uv packaging
	PATH="$(CURDIR)/.venv-lock/bin:$$PATH" .venv-lock/bin/python requirements/lock.py
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-lock runs
