# `make demo` and `make test` are all it takes on a fresh machine; both install first. Variables:
#   PYTHON      the Python that the virtual environment is made from (3.10 or newer)
#   DETECTRON2  a checkout of detectron2 to use instead of what is installed

PYTHON ?= python3
DETECTRON2 ?=

bin := .venv/bin
installed := .venv/installed
requirements := requirements/runtime.txt requirements/dev.txt
# One process for each core, of 1 to 2 GB each; one that is done takes tests over from the others.
parallel := -n auto --maxprocesses 8 --dist worksteal

ifneq ($(DETECTRON2),)
ifeq ($(wildcard $(DETECTRON2)/detectron2/__init__.py),)
$(error DETECTRON2=$(DETECTRON2) is not a checkout of detectron2: expected the folder that contains detectron2/__init__.py)
endif
export PYTHONPATH := $(abspath $(DETECTRON2))$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

.PHONY: help venv demo test test-coco bench clean

help:
	@echo "make demo       install, detect persons in photographs, fine-tune, draw: output/demo"
	@echo "make test       install, run the test suite"
	@echo "make test-coco  the tests on real COCO images, in the folder DETECTRON2_DATASETS"
	@echo "make bench      install, measure time and memory beside BatchNorm: output/benchmark"
	@echo "make venv       install only: into .venv"
	@echo "make clean      remove .venv and what building left; output/ stays"

demo: venv
	$(bin)/python tools/demo.py --output output/demo

test: venv
	$(bin)/python -m pytest tests --ignore=tests/real_coco $(parallel) --durations=10

# In two processes: the runs of one file take as long as all the others.
test-coco: venv
	@test -n "$$DETECTRON2_DATASETS" || { echo "DETECTRON2_DATASETS is not set: set it to the\
	 folder that contains coco/, laid out as detectron2 expects it." >&2; exit 1; }
	$(bin)/python -m pytest tests/real_coco -n 2 --dist loadfile

bench: venv
	$(bin)/python tools/benchmark.py --preset cpu --output output/benchmark

# A detectron2 that Python finds already, on PYTHONPATH or installed into .venv by hand, is used
# as it is. Looking for it takes no time, so it is done at every call: it may be gone since.
venv: $(installed)
	@$(bin)/python -c 'import sys; from importlib.util import find_spec; \
	  spec = find_spec("detectron2"); sys.exit(spec is None or spec.origin is None)' \
	|| { echo "Installing detectron2 0.4 from PyPI (1 MB), since Python finds no other." \
	&& $(bin)/python -m pip install --quiet --no-deps --only-binary=:all: --platform win_amd64 \
	  --python-version 3.7 --implementation cp --require-hashes -r requirements/detectron2.txt \
	  --target "$$($(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; }
	$(if $(filter venv,$(MAKECMDGOALS)),@echo "Installed. Activate it: . .venv/bin/activate")

$(installed): $(requirements) setup.py pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON) here: install Python 3.10\
	 or newer, or name it with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is\
	 older than Python 3.10: name a newer one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks its venv\
	 module: install it (on Debian and Ubuntu the package python3-venv)." >&2; exit 1; }
	@echo "Installing into .venv: with torch and its CUDA libraries some 3 GB to download and\
	 6 GB on disk, a minute to half an hour depending on the network."
	@"$(PYTHON)" -m venv .venv
	@$(bin)/python -m pip install -r requirements/dev.txt
	@$(bin)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
