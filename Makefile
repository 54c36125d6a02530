# `make test` runs the whole check, as CI does, except tests that take minutes: `make test-long` runs those. `make demo`
# shows what the package does. `make release-check` runs the checks before a release is tagged. Each target sets up what
# it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Outside $(VENV): creating that again deletes its content.
DEMO := .venv-demo
LEG := .ci/leg
# -n 2: most tests use one core. Derandomized examples: a run that fails once fails again.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal --hypothesis-profile=ci

# Releases of transformers to test in addition to that of requirements-dev.txt, all with the same build of torch.
OTHER_TRANSFORMERS := 5.23.0 5.17.0 5.12.1
# Older packages to install with a release that the shared environment is too new for.
EXTRA_5.12.1 := tokenizers==0.22.2
# Tests of the code that calls transformers' objects. On every other release, `test` runs those whose results depend on
# the release: RULE_TESTS if its loader is that of the pinned release, else TRANSFORMERS_TESTS. The sweep leaves out two
# loads that differ from the others only in the executor. `test-long` runs all tests that import transformers, except
# those of crash safety, which count the files that one release writes, and those of pages, which show what one release
# prints.
RULE_TESTS := tests/upstream tests/doors/conversion_mapping tests/planning/test_compiler.py \
	tests/planning/test_operations.py tests/planning/test_upstream_operations.py tests/planning/test_square.py \
	tests/quantized/test_models.py tests/whole/test_installed_transformers.py tests/whole/test_sweep.py \
	--deselect tests/whole/test_sweep.py::test_state_dict_streamed_to_a_device_equals_from_pretrained \
	--deselect tests/whole/test_sweep.py::test_model_in_memory_equals_from_pretrained
TRANSFORMERS_TESTS := $(RULE_TESTS) tests/integrations
TESTS_5.23.0 := $(RULE_TESTS)
IMPORT_TRANSFORMERS = $(sort $(wildcard tests/destinations/test_*.py tests/doors/*/test_*.py) $(filter-out tests/fuzz/% \
	tests/benchmarks/% tests/docs/% tests/house/% tests/crash_safety/%,$(shell grep -rlwE --include='test_*.py' --exclude-dir=packaging 'transformers|model_zoo' tests)))

# What NeMo AutoModel imports, and some of its models; then other projects whose loading code is traced, with what they
# import.
OTHER_LOADERS := einops==0.8.2 pillow==13.0.0 fla-core==0.6.0 flash-linear-attention==0.6.0 \
	torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17 typeguard==4.6.1 docstring_parser==0.18.0 \
	megatron-bridge==0.3.1 megatron-core==0.16.1

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' automodel_conv/__init__.py)

.PHONY: version test lint types format demo docs docs-serve clean \
	test-style test-docs test-main test-software-gpu test-packaging test-without-triton test-without-transformers test-notebook test-fuzz test-vllm test-long \
	test-installs release-check release-tree release-notes release-distributions release-audit
.NOTPARALLEL:
.DELETE_ON_ERROR:
.SECONDARY: $(OTHER_TRANSFORMERS:%=$(VENV)/transformers-%/.installed) $(VENV)/triton-3.6.0/.installed \
	$(VENV)/nemo-0.7.0/.installed $(VENV)/atheris-3.0.0/.installed

# The legs run in this order, and the first one that fails ends the check.
test: test-style test-docs test-main test-software-gpu test-packaging $(OTHER_TRANSFORMERS:%=test-transformers-%) test-triton-3.6.0 test-nemo-0.7.0 \
	test-without-triton test-without-transformers test-notebook test-fuzz

test-style: $(VENV)/installed
	@$(LEG) "ruff and pyright" $(MAKE) --no-print-directory lint types

test-main: $(VENV)/installed
	@$(LEG) "tests" $(PYTEST) -m "not packaging and not long" --doctest-modules --ignore=automodel_conv/kernels \
		--ignore-glob='automodel_conv/integrations/vllm/[!_]*' --ignore=tests/docs automodel_conv tests

# The site is built strictly, then its links are checked and the code blocks of all pages run.
test-docs: $(VENV)/installed docs
	@$(LEG) "documentation" $(PYTEST) tests/docs

# All GPU code, at the sizes of a real GPU. Tests that need more memory than this machine has need a real GPU.
test-software-gpu: $(VENV)/installed
	@$(LEG) "software GPU" $(PYTEST) -p tests.software_gpu.plugin tests/gpu

# One worker per file, because the tests of a file share what they build. More workers than cores, because most wait for
# pip.
test-packaging: $(OTHER_TRANSFORMERS:%=$(VENV)/transformers-%/.installed)
	@$(LEG) "packaging" $(PYTEST) -n 4 --dist loadfile -m packaging tests/packaging

test-transformers-%: $(VENV)/transformers-%/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/transformers-$* $(LEG) "transformers $*" \
		$(PYTEST) -m "not packaging and not long" $(or $(TESTS_$*),$(TRANSFORMERS_TESTS))

test-without-triton: $(VENV)/installed
	@PYTHONPATH=$(CURDIR)/tests/hide HIDDEN_PACKAGES=triton $(LEG) "without triton" \
		$(PYTEST) -m "not packaging and not long" -k "not random_schedules" tests/kernels tests/test_imports.py \
		$(addprefix tests/execution/test_,copy_batch.py device.py memory.py quantized_device.py window_copies.py window_decoding.py writing.py) \
		tests/doors/in_memory

# The functions that a user without transformers can call, and the errors if they need transformers.
test-without-transformers: $(VENV)/installed
	@PYTHONPATH=$(CURDIR)/tests/hide HIDDEN_PACKAGES=transformers $(LEG) "without transformers" \
		$(PYTEST) -m "not packaging and not long" tests/cli tests/compiling tests/destinations tests/doors tests/integrations \
		tests/quantized tests/upstream tests/whole/test_broken_checkpoints.py tests/whole/test_nothing_lost.py \
		tests/test_examples.py tests/test_imports.py

# A kernel runs the notebook, cell by cell.
test-notebook: $(VENV)/notebook/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/notebook $(LEG) "notebook" $(PYTEST) -n 0 tests/test_notebook.py

# Full test matrices, which take longer than `test`: run them before you merge a change to the code that they test.
test-long: $(VENV)/installed $(OTHER_TRANSFORMERS:%=test-long-transformers-%) test-vllm
	@$(LEG) "long tests" $(PYTEST) -m long tests

test-long-transformers-%: $(VENV)/transformers-%/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/transformers-$* $(LEG) "long tests, transformers $*" \
		$(PYTEST) -m "not packaging" $(IMPORT_TRANSFORMERS)

# vLLM's own model classes. Its wheel is for CUDA, but builds and loads models on a CPU; 1.5 GB on disk.
test-vllm: $(VENV)/vllm/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/vllm VLLM_TARGET_DEVICE=cpu $(LEG) "vLLM" $(PYTEST) tests/vllm tests/benchmarks/test_vllm.py

# A few seconds for each target, and the planted mistakes.
test-fuzz: $(VENV)/atheris-3.0.0/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/atheris-3.0.0 $(LEG) "fuzzing" $(PYTEST) tests/fuzz

# The oldest Triton that the kernels are written for.
test-triton-%: $(VENV)/triton-%/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/triton-$* $(LEG) "triton $*" $(PYTEST) tests/machine_code tests/kernels tests/gpu

test-nemo-%: $(VENV)/nemo-%/.installed
	@PYTHONPATH=$(CURDIR)/$(VENV)/nemo-$* $(LEG) "NeMo AutoModel $* and others" $(PYTEST) $(addprefix tests/integrations/test_, \
		nemo.py nemo_adapters.py torchtitan.py megatron_bridge.py)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(DEMO)/installed
	@$(DEMO)/bin/automodel-conv demo --html $(DEMO)/plan.html

# Cheapest first. test-packaging, a part of test, installs the wheel and the source distribution and tries them.
release-check: release-tree release-notes release-audit test release-distributions
	@echo "$(VERSION) can be tagged; what to upload is in dist/"

# The whole wheel again, as a user installs it: each extra on each Python, with about 20 GB of packages.
test-installs: $(VENV)/release/.installed
	PATH=$(CURDIR)/$(VENV)/release/bin:$$PATH $(VENV)/release/bin/python tests/packaging/installs.py

version:
	@echo $(VERSION)

release-tree:
	@test -z "$$(git status --porcelain)" || { git status --short; echo "release: commit or remove these first" >&2; exit 1; }

release-notes:
	@case "$(VERSION)" in *dev*) echo "release: automodel_conv.__version__ is $(VERSION), a version under development" >&2; exit 1;; esac
	@grep -qE '^## \[$(VERSION)\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$$' CHANGELOG.md || \
		{ echo "release: CHANGELOG.md has no line '## [$(VERSION)] - YYYY-MM-DD'" >&2; exit 1; }

# Known vulnerabilities of all pinned packages, as PyPI lists them.
release-audit: $(VENV)/release/.installed
	$(VENV)/release/bin/pip-audit --no-deps --disable-pip --requirement requirements-dev.txt
	$(VENV)/release/bin/pip-audit --no-deps --disable-pip --requirement requirements-docs.txt

release-distributions: $(VENV)/release/.installed
	rm -rf dist
	$(VENV)/release/bin/python -m build --outdir dist
	$(VENV)/release/bin/twine check --strict dist/*

# The site in site/, as it is published. It needs no network when it is viewed.
docs: $(VENV)/docs/.installed
	@NO_MKDOCS_2_WARNING=1 $(LEG) "site" $(VENV)/docs/bin/mkdocs build --strict --quiet

docs-serve: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs serve

clean:
	rm -rf $(VENV) $(DEMO) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# All versions are pinned, so pip need not resolve them again. triton is installed separately: a torch built for CUDA
# requires one exact triton, and the tests need the same one everywhere.
$(VENV)/requirements: requirements-dev.txt
	@$(LEG) "new environment" $(PYTHON) -m venv --clear $(VENV)
	@grep -v '^triton==' $< > $(VENV)/most.txt && grep '^triton==' $< > $(VENV)/triton.txt
	@$(LEG) "install" $(BIN)/python -m pip install -qq -r $(VENV)/most.txt
	@$(LEG) "install triton" $(BIN)/python -m pip install -qq --no-deps -r $(VENV)/triton.txt
	@touch $@

$(VENV)/installed: $(VENV)/requirements pyproject.toml setup.py
	@$(LEG) "install this package" $(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

# An environment with only what the demo needs, at the same versions. A torch built for CUDA requires a triton of its
# own. Modules are compiled when they are first imported, because most never are.
$(DEMO)/installed: requirements-dev.txt pyproject.toml setup.py
	@echo "Installing PyTorch, transformers and this package into $(DEMO): 1 GB on disk. PyTorch for CUDA, as PyPI has it: 2.7 GB to download."
	@$(PYTHON) -m venv --clear $(DEMO)
	@sed -e '/^triton==/d' -e 's/\[.*\]//' $< > $(DEMO)/constraints.txt
	@$(DEMO)/bin/python -m pip install -qq --no-compile -c $(DEMO)/constraints.txt -e '.[transformers]'
	@touch $@

$(VENV)/triton-%/.installed: $(VENV)/installed
	@rm -rf $(@D)
	@$(LEG) "install triton $*" $(BIN)/python -m pip install -qq --no-deps --target $(@D) triton==$*
	@touch $@

$(VENV)/nemo-%/.installed: $(VENV)/installed Makefile
	@rm -rf $(@D)
	@$(LEG) "install NeMo AutoModel $* and others" \
		$(BIN)/python -m pip install -qq --no-deps --target $(@D) nemo_automodel==$* $(OTHER_LOADERS)
	@touch $@

$(VENV)/vllm/.installed: .ci/vllm-packages.txt $(VENV)/installed
	@rm -rf $(@D)
	@$(LEG) "install vLLM" $(BIN)/python -m pip install -qq --no-deps --no-compile --target $(@D) -r $<
	@touch $@

$(VENV)/atheris-%/.installed: $(VENV)/installed
	@rm -rf $(@D)
	@$(LEG) "install atheris $*" $(BIN)/python -m pip install -qq --no-deps --target $(@D) atheris==$*
	@touch $@

$(VENV)/notebook/.installed: .ci/notebook-tools.txt $(VENV)/installed
	@rm -rf $(@D)
	@$(LEG) "install what runs notebooks" $(BIN)/python -m pip install -qq --no-deps --no-compile --target $(@D) -r $<
	@touch $@

$(VENV)/transformers-%/.installed: $(VENV)/installed
	@rm -rf $(@D)
	@$(LEG) "install transformers $*" \
		$(BIN)/python -m pip install -qq --no-deps --target $(@D) transformers==$* $(EXTRA_$*)
	@touch $@

$(VENV)/docs/.installed: requirements-docs.txt $(VENV)/installed
	@$(LEG) "new environment" $(PYTHON) -m venv --clear $(@D)
	@$(LEG) "install mkdocs" $(@D)/bin/python -m pip install -qq -r $<
	@touch $@

$(VENV)/release/.installed: .ci/release-tools.txt $(VENV)/installed
	@$(LEG) "new environment" $(PYTHON) -m venv --clear $(@D)
	@$(LEG) "install release tools" $(@D)/bin/python -m pip install -qq -r $<
	@touch $@
