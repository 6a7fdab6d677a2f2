# Needs Python >= 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# onnxruntime-gpu carries the CPU provider too, so one environment serves both; it exists for Linux x86-64 only.
ifeq ($(shell uname -sm),Linux x86_64)
ORT := onnxruntime-gpu
else
ORT := onnxruntime
endif

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/elit-export demo --out build/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(ORT),export,train,report,dev]'
	touch $@

clean:
	rm -rf build dist $(VENV)
