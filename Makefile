# setup · demo · test · lint · bench: each one first installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
# glibc asks for huge pages: on a CPU a tenth of a training step goes into touching its memory for the first time
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: setup demo test lint bench

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  "Python 3.11, 3.12 or 3.13 is needed, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: setup
	$(VENV)/bin/python -m ggsd_jax.main --config=configs/synthetic.py --workdir=out/demo

test: setup
	$(VENV)/bin/python -m pytest -q --timeout=600 -n 2 --dist worksteal

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: setup
	$(VENV)/bin/python -m experiments.benchmark
