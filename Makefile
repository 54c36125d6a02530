# `make test` is the whole check, as CI runs it, but for what takes minutes, which is `make test-long`; `make demo` shows what
# the package does; `make release-check` is what must hold before a release is tagged. All set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LEG := .ci/leg
# -n 2: most tests are one core's work. Derandomised examples: a red run is red again.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal --hypothesis-profile=ci

# Besides the transformers of requirements-dev.txt; torch stays one build.
OTHER_TRANSFORMERS := 5.17.0 5.12.1
# Where the shared environment is too new for an old release: what goes beside it.
BESIDE_5.12.1 := tokenizers==0.22.2
# Tests of the code that asks transformers' objects. `test` runs them on every release, `test-long` all tests that import
# transformers.
TRANSFORMERS_TESTS := tests/upstream tests/integrations tests/doors/conversion_mapping tests/planning/test_rules.py \
	tests/planning/test_lowering.py tests/planning/test_upstream_operations.py tests/planning/test_square.py \
	tests/quantized/test_models.py tests/whole/test_sweep.py
IMPORT_TRANSFORMERS = $(sort $(wildcard tests/destinations/test_*.py tests/doors/*/test_*.py) $(filter-out tests/fuzz/% \
	tests/benchmarks/% tests/house/%,$(shell grep -rlwE --include='test_*.py' --exclude-dir=packaging 'transformers|model_zoo' tests)))

VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: test lint types format demo clean test-style test-main test-software-gpu test-packaging \
	test-without-triton test-without-transformers test-fuzz test-long \
	release-check release-tree release-notes release-distributions release-audit
.NOTPARALLEL:
.DELETE_ON_ERROR:
.SECONDARY: $(OTHER_TRANSFORMERS:%=$(VENV)/transformers-%/.installed) $(VENV)/triton-3.6.0/.installed \
	$(VENV)/nemo-0.7.0/.installed $(VENV)/atheris-3.0.0/.installed

# In this order, and the first red leg ends it.
test: test-style test-main test-software-gpu test-packaging $(OTHER_TRANSFORMERS:%=test-transformers-%) test-triton-3.6.0 test-nemo-0.7.0 \
	test-without-triton test-without-transformers test-fuzz

test-style: $(VENV)/installed
	@$(LEG) "ruff and pyright" $(MAKE) --no-print-directory lint types

test-main: $(VENV)/installed
	@$(LEG) "tests" $(PYTEST) -m "not packaging and not long" --doctest-modules --ignore=automodel_conv/kernels automodel_conv tests

# All that runs on a GPU, at the sizes that it has there; what needs more memory than there is, a real one tests.
test-software-gpu: $(VENV)/installed
	@$(LEG) "software GPU" $(PYTEST) -p tests.software_gpu.plugin tests/gpu

# A file to a worker, since its tests share what it built; more workers than cores, since most of them wait for pip.
test-packaging: $(OTHER_TRANSFORMERS:%=$(VENV)/transformers-%/.installed)
	@$(LEG) "packaging" $(PYTEST) -n 4 --dist loadfile -m packaging tests/packaging

test-transformers-%: $(VENV)/transformers-%/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/transformers-$* $(LEG) "transformers $*" \
		$(PYTEST) -m "not packaging and not long" $(TRANSFORMERS_TESTS)

test-without-triton: $(VENV)/installed
	@PYTHONPATH=$(CURDIR)/tests/hide HIDDEN_PACKAGES=triton $(LEG) "without triton" \
		$(PYTEST) -m "not packaging and not long" -k "not random_schedules" tests/kernels tests/test_imports.py \
		$(addprefix tests/execution/test_,copy_batch.py device.py memory.py quantized_device.py window_copies.py window_decoding.py writing.py) \
		tests/doors/in_memory

# What a user without transformers can call, and what it says where that is not enough.
test-without-transformers: $(VENV)/installed
	@PYTHONPATH=$(CURDIR)/tests/hide HIDDEN_PACKAGES=transformers $(LEG) "without transformers" \
		$(PYTEST) -m "not packaging and not long" tests/cli tests/compiling tests/destinations tests/doors tests/integrations \
		tests/quantized tests/upstream tests/whole/test_broken_checkpoints.py tests/whole/test_nothing_lost.py \
		tests/test_examples.py tests/test_imports.py

# Whole matrices, which take longer than `test`: run them before a change of what they test is merged.
test-long: $(VENV)/installed $(OTHER_TRANSFORMERS:%=test-long-transformers-%)
	@$(LEG) "long tests" $(PYTEST) -m long tests

test-long-transformers-%: $(VENV)/transformers-%/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/transformers-$* $(LEG) "long tests, transformers $*" \
		$(PYTEST) -m "not packaging" $(IMPORT_TRANSFORMERS)

# A few seconds for each target, and the planted mistakes.
test-fuzz: $(VENV)/atheris-3.0.0/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/atheris-3.0.0 $(LEG) "fuzzing" $(PYTEST) tests/fuzz

# The oldest Triton that the kernels are written for.
test-triton-%: $(VENV)/triton-%/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/triton-$* $(LEG) "triton $*" $(PYTEST) tests/machine_code tests/kernels tests/gpu

test-nemo-%: $(VENV)/nemo-%/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/nemo-$* $(LEG) "NeMo AutoModel $*" $(PYTEST) tests/integrations/test_nemo.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/installed
	$(BIN)/python -m benchmarks.demo

# Cheapest first. The wheel and the source distribution are installed and tried by test-packaging, as part of test.
release-check: release-tree release-notes release-audit test release-distributions
	@echo "$(VERSION) can be tagged; what to upload is in dist/"

release-tree:
	@test -z "$$(git status --porcelain)" || { git status --short; echo "release: commit or remove these first" >&2; exit 1; }

release-notes:
	@case "$(VERSION)" in *dev*) echo "release: pyproject.toml says $(VERSION), a version under development" >&2; exit 1;; esac
	@grep -qE '^## \[$(VERSION)\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$$' CHANGELOG.md || \
		{ echo "release: CHANGELOG.md has no line '## [$(VERSION)] - YYYY-MM-DD'" >&2; exit 1; }

# Known vulnerabilities of all that is pinned, as PyPI tells them.
release-audit: $(VENV)/release/.installed
	$(VENV)/release/bin/pip-audit --no-deps --disable-pip --requirement requirements-dev.txt

release-distributions: $(VENV)/release/.installed
	rm -rf dist
	$(VENV)/release/bin/python -m build --outdir dist
	$(VENV)/release/bin/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything is pinned, so nothing is resolved twice. triton goes in alone: a torch built for CUDA asks for one exact
# triton, and the tests want the same one everywhere.
$(VENV)/requirements: requirements-dev.txt
	@$(LEG) "new environment" $(PYTHON) -m venv --clear $(VENV)
	@grep -v '^triton==' $< > $(VENV)/most.txt && grep '^triton==' $< > $(VENV)/triton.txt
	@$(LEG) "install" $(BIN)/python -m pip install -qq -r $(VENV)/most.txt
	@$(LEG) "install triton" $(BIN)/python -m pip install -qq --no-deps -r $(VENV)/triton.txt
	@touch $@

$(VENV)/installed: $(VENV)/requirements pyproject.toml setup.py
	@$(LEG) "install this package" $(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/triton-%/.installed: $(VENV)/installed
	@rm -rf $(@D)
	@$(LEG) "install triton $*" $(BIN)/python -m pip install -qq --no-deps --target $(@D) triton==$*
	@touch $@

# einops is all that it imports and this environment lacks.
$(VENV)/nemo-%/.installed: $(VENV)/installed
	@rm -rf $(@D)
	@$(LEG) "install NeMo AutoModel $*" \
		$(BIN)/python -m pip install -qq --no-deps --target $(@D) nemo_automodel==$* einops==0.8.2
	@touch $@

$(VENV)/atheris-%/.installed: $(VENV)/installed
	@rm -rf $(@D)
	@$(LEG) "install atheris $*" $(BIN)/python -m pip install -qq --no-deps --target $(@D) atheris==$*
	@touch $@

$(VENV)/transformers-%/.installed: $(VENV)/installed
	@rm -rf $(@D)
	@$(LEG) "install transformers $*" \
		$(BIN)/python -m pip install -qq --no-deps --target $(@D) transformers==$* $(BESIDE_$*)
	@touch $@

$(VENV)/release/.installed: .ci/release-tools.txt $(VENV)/installed
	@$(LEG) "new environment" $(PYTHON) -m venv --clear $(@D)
	@$(LEG) "install release tools" $(@D)/bin/python -m pip install -qq -r $<
	@touch $@
