# All targets install everything they need into a fresh .venv, once.
PYTHON ?= python3
BIN = .venv/bin
PYTEST = $(BIN)/python -m pytest --numprocesses logical --dist worksteal

.PHONY: demo quick test lint wheel-test

demo: .venv/installed
	$(BIN)/mechdiffusers design examples/targets.csv --checkpoint checkpoints/composites-32 \
		--dataset data/composites-32 --num_rounds 3 --output_dir runs/demo

quick: .venv/installed
	$(BIN)/accelerate launch training/train.py --config training/configs/quick.yaml --resume_from_checkpoint latest
	$(BIN)/python benchmarks/sample_statistics.py runs/quick/pipeline --num 1024 \
		--output runs/quick/sample_statistics.json --figures runs/quick

test: .venv/installed
	$(PYTEST) -m "slow or not slow"

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=$(CURDIR)/src $(BIN)/mypy -p mechdiffusers

wheel-test: .venv/installed build/wheel
	MECHDIFFUSERS_FROM=$(CURDIR)/build/wheel PYTHONPATH=$(CURDIR)/build/wheel $(PYTEST)

# torch-fem is what ours is checked against; it goes without VTK, which draws for it and which nothing here needs
.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv: some minutes, 2 GB"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps torch-fem pyamg
	touch $@

build/wheel: .venv/installed $(shell git ls-files '*.py' 'training/configs/*.yaml' model_cards/template.md)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist
	$(BIN)/python -m pip install --quiet --no-deps --target $@ dist/*.whl
