"""Script of test_wheel.py for an environment with only the wheel, run with and without ``python -O``.

It has no ``assert``, which ``-O`` removes.
"""

import importlib
import sys
import tempfile
from importlib import metadata
from pathlib import Path


def main() -> None:
    package_directory, *kernels = sys.argv[1:]

    import automodel_conv
    import automodel_conv.dtypes

    directory = Path(automodel_conv.__file__).parent
    if directory != Path(package_directory):
        raise SystemExit(f"imported from {directory}, expected {package_directory}")
    if metadata.version("automodel-conv") == "":
        raise SystemExit("the distribution has no version")
    if [point.name for point in metadata.entry_points(group="vllm.general_plugins")] != ["automodel_conv"]:
        raise SystemExit("vLLM does not find the load format")
    for name in kernels:
        importlib.import_module(f"automodel_conv.kernels.{name}")
    with tempfile.TemporaryDirectory() as directory:
        load_and_lay_out(directory)
    print("smoke passed")


def load_and_lay_out(directory: str) -> None:
    """Save grouped experts, load them transposed, and convert them back in memory."""
    import torch

    import automodel_conv as amc
    from automodel_conv.testing import assert_bytes_equal

    name = "layers.0.experts.gate_up_proj"
    experts = torch.arange(3 * 4 * 5).reshape(3, 4, 5).to(torch.bfloat16)
    amc.save_checkpoint({name: experts, "norm": torch.ones(5)}, directory, rules=[])
    plan = amc.compile_plan(directory, rules=[], layout="nemo")
    if plan.bytes_written != experts.nbytes + 5 * 4:
        raise SystemExit(f"the plan writes {plan.bytes_written} bytes")
    loaded = amc.load_state_dict(directory, rules=[], layout="nemo")
    for shown, page in ((plan, Path(directory, "plan.html")), (loaded.report, Path(directory, "load.html"))):
        shown.to_html(page)
        if "</html>" not in page.read_text(encoding="utf-8"):
            raise SystemExit(f"{page.name} is not a whole page")
    assert_bytes_equal(loaded["layers.0.experts.gate_and_up_projs"], experts.transpose(1, 2).contiguous())
    back = amc.convert_state_dict(loaded, source_layout="nemo", layout="transformers")
    assert_bytes_equal(back[name], experts)
    try:
        amc.open_checkpoint(Path(directory) / "absent.safetensors")
    except amc.CheckpointError:
        return
    raise SystemExit("a checkpoint that is not there was opened")


if __name__ == "__main__":
    main()
