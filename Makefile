# Everything a newcomer needs: `make quickstart`, `make test`. The rest is for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := work_dirs/quickstart
export HF_HUB_OFFLINE = 1

.PHONY: quickstart test test-all test-lowest lint messages docs bench clean install

install: $(VENV)/.installed

# The package alone, which is all that the quickstart needs; then what tests and linters need.
$(VENV)/.package: pyproject.toml requirements/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint requirements/tested.txt --editable .
	touch $@

$(VENV)/.installed: $(VENV)/.package
	$(BIN)/python -m pip install --constraint requirements/tested.txt --editable '.[test]'
	touch $@

# Fine-tune the embedded tiny model on the embedded data, convert it and ask it a question.
quickstart: $(VENV)/.package
	$(BIN)/xtuner train quickstart --work-dir $(OUT) --overwrite
	$(BIN)/xtuner convert pth_to_hf $$(ls -t $(OUT)/*.pth | head -n 1) $(OUT)/hf --force
	printf '请做一下自我介绍\nRESET\nPlease introduce yourself\nexit\n' | \
		$(BIN)/xtuner chat $(OUT)/hf --prompt-template internlm2_chat

# Each worker begins with a half and takes tests over from the other at the end: fixtures are made
# once. Compiled files are kept, for the processes that tests start.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal
test: install
	$(PYTEST) -m "not slow"

# More families, sizes and ways of sharing the work (tests/helpers/tiers.py): before a release.
test-all: install
	$(PYTEST)

# The fast part of the suite with the lowest version of each library that pyproject.toml allows.
LOWEST := .venv-lowest
FAST := tests/test_foreign_internals.py tests/tokenization tests/dataset/prepare \
	tests/dataset/test_map_fns.py tests/model/test_sft.py tests/model/test_dpo.py \
	tests/model/lora/test_targets.py tests/model/lora/test_fast_lora.py \
	tests/engine/test_schedules.py tests/engine/test_train.py \
	tests/tools/test_merge.py tests/tools/test_pth_to_hf.py
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --constraint requirements/lowest.txt --editable '.[test]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(FAST)

lint: install
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# After a change to a message: bring xtuner/locale up to date; names what is to be translated.
messages: install
	$(BIN)/python scripts/messages.py

# The docs as a site in site/; a broken link is an error.
docs: install
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install
	@for file in benchmarks/*.py; do \
		echo "$$file"; $(BIN)/python $$file || [ $$? = 2 ] || exit 1; done  # 2: needs what is not here

clean:
	rm -rf $(VENV) build dist *.egg-info work_dirs site .pytest_cache .ruff_cache .mypy_cache
