# Two commands set everything up on a machine with Python 3.11 or newer: make quickstart, make test.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

.PHONY: quickstart test test-slow test-large test-soak docs clean
quickstart: $(VENV)/installed
	$(VENV)/bin/python train.py configs/quickstart.yaml $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(ARGS)

# What `test` leaves out (docs/development.md): trainings and whole commands, which CI runs, too; networks of published size; full figures, minutes to hours.
test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m slow $(ARGS)

test-large: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -s -m large $(ARGS)

test-soak: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -s -m soak $(ARGS)

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar on --disable-pip-version-check -e ".[test]"
	@touch $@

# The pages as a site, in site/; a link that leads nowhere is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet $(ARGS)

clean:
	rm -rf $(VENV)
