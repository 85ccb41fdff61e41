# make demo, make test: each does all the set-up it needs. `make help` lists the rest.
# The set-up itself is tools/install_stack.py; what it makes is kept until the pins change.

STACK ?= mm
VENV ?= $(if $(filter mm,$(STACK)),.venv,.venv-$(STACK))
# The first of these that is of a supported version; name another with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p tools/install_stack.py --check-python >/dev/null 2>&1 && echo $$p && exit; done; echo python3)
MARK ?=
ARGS ?=

.PHONY: help install reinstall demo test lint doctor clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo 'STACK=onedl takes the second stack (.venv-onedl; it compiles mmcv), PYTHON=... another Python,'
	@echo 'MARK=... and ARGS=... go to pytest, as in make test MARK=compat ARGS="-k fuse".'

define set_up
@$(PYTHON) -c '' 2>/dev/null || { echo 'set-up stopped: `$(PYTHON)` does not run here; name a' \
	'Python 3.10 to 3.13, as in `make install PYTHON=python3.11`.' >&2; exit 1; }
@$(PYTHON) tools/install_stack.py --stack $(STACK) --venv $(VENV)
endef

install: ## set up the virtual environment of STACK, unless it is up to date
	$(set_up)

reinstall: ## set it up anew
	$(set_up) --rebuild

demo: install ## train and evaluate a small Mask R-CNN on the sample data set
	$(VENV)/bin/python tools/demo.py $(ARGS)

# Types are those of the newest torch.
test: $(if $(filter mm,$(STACK)),lint,install) ## lint (default stack), then every test (MARK=compat: those marked so)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal $(if $(MARK),-m '$(MARK)') $(ARGS)

lint: install ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

doctor: ## say what works together here, and how to fix what does not
	$(VENV)/bin/python -m repnext_mm_cli doctor

clean: ## remove both virtual environments and the caches
	rm -rf .venv .venv-* .venv.lock .mypy_cache .pytest_cache .ruff_cache
