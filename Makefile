# make demo   corpus to samples in about five minutes on a 2-core CPU
# make test   all tests; make test-fast is the inner loop, and make lint checks style and types
# make clean  start over
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/tiny
CORPUS := llada_jax/data/austen6.txt.xz

.PHONY: demo test test-fast lint clean

demo: .venv/installed
	$(BIN)/llada-jax prepare --input $(CORPUS) --output $(RUN)/data --tokenizer spm-bpe:4096 \
		--sequence-length 64 --document-start '^(CHAPTER|Chapter) ' --heldout 0.05
	$(BIN)/llada-jax train --config configs/tiny.py --workdir $(RUN)/run
	$(BIN)/llada-jax evaluate --checkpoint $(RUN)/run --data $(RUN)/data --baselines
	$(BIN)/llada-jax sample --checkpoint $(RUN)/run --gen-length 48 --temperature 0.9 --seed 1 --show \
		--prompt "She was determined"
	@echo "curves and samples: $(BIN)/pip install tensorboard &&" \
		"$(BIN)/tensorboard --logdir $(RUN)/run"

# One worker more than cores: some of the tests wait, for SLURM or for a peer to be missed.
test: .venv/installed-dev
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The inner loop: what is not marked slow, under three minutes on two cores.
test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-newest runs

.venv/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; assert v >= (3, 11), ( \
		f"Python {v.major}.{v.minor} is too old: 3.11 or newer is needed; " \
		"try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.py
	$(BIN)/pip install --quiet -e .
	touch $@

# Not after .venv/installed, because pip would resolve everything twice.
.venv/installed-dev: .venv/bin/python setup.py
	$(BIN)/pip install --quiet -e '.[dev]'
	touch .venv/installed $@
