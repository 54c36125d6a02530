"""Tests of imports: importing the package loads nothing unneeded and requires no optional package."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv

PACKAGE = Path(automodel_conv.__file__).parent
HIDE = Path(__file__).parent / "hide"
OPTIONAL = ("safetensors", "transformers", "triton")
# Imported only if vLLM is installed: when it loads its plugins, or for its weight transfer.
_OF_VLLM = ("loader", "other_version", "trace_key", "weight_source")
OF_VLLM = {f"automodel_conv.integrations.vllm.{name}" for name in _OF_VLLM}


def modules() -> list[str]:
    """Return every module of the package, kernels included, by its import name."""
    files = [path for folder in (PACKAGE, PACKAGE / "kernels") for path in folder.rglob("*.py")]
    names = {path.relative_to(PACKAGE.parent).with_suffix("").as_posix() for path in files}
    return sorted(name.removesuffix("/__init__").replace("/", ".") for name in names)


def modules_loaded_by(code: str) -> set[str]:
    """Return the modules that a new interpreter has loaded after running ``code``."""
    report = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return {*json.loads(run.stdout.splitlines()[-1])}


def optional_packages_loaded_by(code: str) -> set[str]:
    """Return the optional packages that a new interpreter has loaded after running ``code``."""
    return {name.partition(".")[0] for name in modules_loaded_by(code)} & set(OPTIONAL)


def loaded_by_module(*arguments: str) -> set[str]:
    """Return the packages that a new interpreter loads when it runs the package as a command."""
    command = [sys.executable, "-X", "importtime", "-m", "automodel_conv", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def failures_without_optional_packages(names: list[str]) -> dict[str, str]:
    """Return the error of each module that cannot be imported without the optional packages."""
    code = """
import importlib, json, sys
failures = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception as error:
        failures[name] = repr(error)
print(json.dumps(failures))
"""
    path = os.pathsep.join(filter(None, [str(HIDE), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path, "HIDDEN_PACKAGES": ",".join(OPTIONAL)},
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_the_package_loads_no_optional_package():
    assert optional_packages_loaded_by("import automodel_conv") == set()


def test_load_imports_no_masked_arrays(tmp_path):
    save_file({f"experts.{n}.weight": torch.ones(2, 2) for n in range(40)}, tmp_path / "model.safetensors")
    code = f"import automodel_conv; automodel_conv.load_state_dict({str(tmp_path)!r}, rules=[])"
    assert "numpy.ma" not in modules_loaded_by(code)


def test_dir_lists_the_public_names_before_they_are_imported():
    code = "import automodel_conv as amc; print(*(name for name in dir(amc) if not name.startswith('_')))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(listed) - {"doors", "errors"} == set(automodel_conv.__all__) - {"__version__"}


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="load_modle"):
        automodel_conv.load_modle  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"]], ids=" ".join)
def test_help_loads_nothing_large(arguments):
    loaded = loaded_by_module(*arguments)
    assert {"automodel_conv", "typer"} <= loaded
    assert not loaded & {"torch", "numpy", *OPTIONAL}


def test_modules_loaded_by_a_command_are_reported(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert {"torch", "numpy"} <= loaded_by_module("plan", str(file), "--no-model")


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_package_that_is_loaded_is_reported(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert package in optional_packages_loaded_by(f"import automodel_conv, {package}")


def test_every_module_imports_without_optional_packages():
    assert {"automodel_conv.dtypes", "automodel_conv.kernels.verbs", *OF_VLLM} <= set(modules())
    assert failures_without_optional_packages(sorted({*modules()} - OF_VLLM)) == {}


def test_only_verbs_import_triton():
    """Check that a load on the host imports no verb. Tables, torch versions and launch plans need no Triton."""
    pytest.importorskip("triton")
    doors = ("automodel_conv.loading", "automodel_conv.saving", "automodel_conv.converting", "automodel_conv.in_memory")
    execution = [name for name in modules() if name.startswith("automodel_conv.execution")]
    verbs = {"strided_copy", "transpose", "interleave", "deinterleave", "dequantize"}
    made_of_triton = {f"automodel_conv.kernels.{name}" for name in (*verbs, "verbs", "tiles", "jit")}
    others = [name for name in modules() if name.startswith("automodel_conv.kernels.") and name not in made_of_triton]
    assert "triton" not in optional_packages_loaded_by(f"import {', '.join((*doors, *execution, *others))}")
    assert "triton" in optional_packages_loaded_by("import automodel_conv.kernels.verbs")


def test_module_that_needs_an_optional_package_is_reported():
    failures = failures_without_optional_packages([*OPTIONAL, "automodel_conv"])
    assert set(failures) == set(OPTIONAL)
    assert all(error.startswith("ModuleNotFoundError") for error in failures.values())
