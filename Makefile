# Targets install what they need into .venv first, once; see `make help`.
PYTHON ?= python3
ARGS ?=

VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python -m

# Packages come from .venv alone.
unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test lint format lock clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo     from raw IMDb reviews to a DPO-trained policy, into runs/imdb'
	@echo 'make test     the tests; ARGS=tests/test_metrics.py runs one file'
	@echo 'make lint     ruff, mypy and shellcheck'
	@echo 'make format   mends what ruff can mend'
	@echo 'make lock     resolves requirements*.txt anew and writes requirements.lock'
	@echo 'make clean    removes .venv and caches; runs/ stays'
	@echo
	@echo 'ARGS="…" is passed on: make demo ARGS="--seed=1". PYTHON=python3.12 chooses the interpreter of a new .venv.'

# With the GNU C library: huge pages, so that a step's large buffers cost few page faults.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(STAMP)
	$(RUN) experiments.imdb.run --workdir=runs/imdb $(ARGS)

test: $(STAMP)
	$(RUN) pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/shellcheck --external-sources experiments/tpu/*.sh .ci/*

format: $(STAMP)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

# The stamp is there only when everything is installed: an interrupted installation starts anew, with an empty .venv.
$(STAMP): requirements.lock
	@if [ ! -e $@ ]; then $(CHECK_PYTHON) && echo 'Creating $(VENV)' && $(PYTHON) -m venv --clear $(VENV); fi
	@rm -f $@
	@echo 'Installing requirements.lock into $(VENV): once, one or two minutes'
	@$(RUN) pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	@$(RUN) compileall -q -j 0 $(VENV)/lib >/dev/null || true  # on all cores; some packages hold files that are no programs
	@touch $@

lock:
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	{ sed '/^[^#]/,$$d' requirements.lock; build/lock/bin/python -m pip freeze; } > build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -r build/lock

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

define CHECK_PYTHON
$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	"Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is %d.%d: choose another one, as in make PYTHON=python3.12" % v)'
endef
