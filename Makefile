# Two commands are enough: `make quickstart` and `make test`. Both make .venv first if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Where there is no NVIDIA GPU, torch's CPU build: the usual one brings gigabytes of CUDA with it.
TORCH := torch==2.13.0
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: quickstart reward test test-faults test-gpu test-lm-eval bench-speed bench-peers bench-check bench-gpu bench-quickstart bench-reward bench-zero-shot bench clean

quickstart: $(VENV)/llm
	$(BIN)/python examples/quickstart.py

reward: $(VENV)/llm
	$(BIN)/python examples/reward.py

test: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# What `make test` does in a short form; some twenty minutes.
test-faults: $(VENV)/dev
	$(BIN)/python tests/faults.py --count 330 --output benchmarks/results/faults.json
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

# Against packages of others, which nothing here needs; eggroll-es asks for more than its own code does.
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

# The paper's tables and figures at the scale of two cores, some 90 minutes there; goes on where it was stopped.
bench: $(VENV)/llm
	$(BIN)/zotune bench run --scale cpu --jobs 2

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zotune needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 1 $(TORCH_INDEX) $(TORCH)
	touch $@

$(VENV)/llm: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[llm]'
	touch $@

$(VENV)/dev: $(VENV)/llm pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[llm,dev]'
	touch $@

$(VENV)/lm-eval: $(VENV)/llm
	$(BIN)/python -m pip install --quiet 'lm-eval>=0.4.9,<0.5'
	touch $@

clean:
	rm -rf $(VENV) runs
