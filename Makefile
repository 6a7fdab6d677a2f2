# Needs Python >= 3.11 and make; everything else goes into .venv.
# PIP_ARGS goes to pip, e.g. an extra index with CPU builds of PyTorch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# onnxruntime-gpu carries the CPU provider too, so one environment serves both. It and TensorRT for RTX and
# NVIDIA's Model Optimizer (the extra quantize) exist for Linux x86-64 (and Windows) only.
ifeq ($(shell uname -sm),Linux x86_64)
ORT := onnxruntime-gpu
NVIDIA := ,tensorrt-rtx,quantize
else
ORT := onnxruntime
endif

TESTS := -q -n 2 --dist loadfile --durations=10 -m 'not gpu and not wheel'

.PHONY: demo test test-wheel test-gpu bench-gpu coverage lint clean

demo: $(VENV)/installed
	$(BIN)/elit-export demo --out build/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TESTS)

# The wheel as a person installs it: needs a package index.
test-wheel: $(VENV)/installed
	$(BIN)/python -m pytest -q -m wheel tests/test_wheel.py

# On a machine with an NVIDIA GPU; tests of libraries that are missing are skipped by name.
test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -q -rs tests/gpu

bench-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py --json build/gpu.json

# Not part of `make test`: three quarters more processor time, because tracing slows torch's exporter.
coverage: $(VENV)/installed
	$(BIN)/python -m pytest $(TESTS) --cov --cov-report=term:skip-covered --cov-fail-under=92

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "elit_export needs Python >= 3.11; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[$(ORT)$(NVIDIA),openvino,export,diffusers,text,train,report,tune,polygraphy,dev]'
	touch $@

clean:
	rm -rf build dist $(VENV)
