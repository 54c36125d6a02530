"""Benchmark merges of a LoRA adapter into a checkpoint on disk: seconds, GB/s, memory, against PEFT and ``cp``.

    python -m benchmarks.adapters [--layers N] [--smoke] [--rank N] [--repetitions N] [--threads N]
                                  [--shard-size SIZE] [--method NAME ...] [--memory ready|as-found ...]
                                  [--directory DIR] [--json FILE]
    python -m benchmarks.adapters --table FILE     the tables again from that JSON
    python -m benchmarks.adapters --from FILE      those of docs/performance.md, in Markdown

The checkpoint has N layers of Qwen3-30B-A3B in bfloat16 with few words, a tensor for each expert and projection (2 are
2.5 GB). The adapter has the per-expert form: two matrices of ``--rank``, in bfloat16, for each projection of each
expert and for q, k, v and o. PEFT converts it to its own form when it loads it. All methods write per-expert files with
at most ``--shard-size`` of data.

PEFT        ``AutoModelForCausalLM.from_pretrained``, ``PeftModel.from_pretrained``, ``merge_and_unload``,
            ``save_pretrained``. "huge pages": torch requests them (``THP_MEM_ALLOC_ENABLE=1``), as it does not by
            default.
ours        ``merge_adapter``. It ends when all bytes and names are on the disk (fsync), and does not read them back;
            "verified" reads every file back.
cp          ``cp`` of the checkpoint, as the roof.

PEFT and cp end when the files are in the page cache. For a fair comparison they are followed by fsync ("fsync").

Each run is a process of its own, and methods alternate. As in ``benchmarks.saving``, a run first does the same with a
tiny checkpoint, its files are in the page cache, and free memory is in one of two states. Memory is the peak above the
level at the start of the timing.

Before the first round this package merges once, and the driver checks that the merge changes every tensor with an
adapter and no other. In the first round each process compares its files with that merge. Those of this package must be
equal in every byte. PEFT rounds the deltas to bfloat16 before it adds them, so its elements may differ by the rounding;
the table has the share of those that do. No figure is printed if one differs by more, or if a tensor has another name,
dtype or shape.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import automodel_conv as amc
from benchmarks import measure, memory, options
from benchmarks.saving import TINY_SHARD, TITLES, Prepare, Run, Setting, cells, copy_with_cp, file_system, synced, timed
from benchmarks.shapes import QWEN3_30B, SMALL, Shape, write_checkpoint
from benchmarks.show import show, show_environment

BASE, ADAPTER, MERGED = "base", "adapter", "merged"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
# PEFT rounds to bfloat16 twice and this package once, each time by at most 2**-8 of a value that is not larger than the
# sum of the three values in ``compared``. Sums of float32 in another order differ by less than the second number.
_ROUNDING, _SUM = 2.0**-7, 1e-6


class Method(NamedTuple):
    prepare: Prepare
    merges: bool = True
    variables: Mapping[str, str] = {}
    """Environment variables of its processes."""


def merge_with_peft(setting: Setting) -> Run:
    def run(out: str) -> object:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(setting.files(BASE), dtype=torch.bfloat16)
        merged: Any = PeftModel.from_pretrained(model, setting.files(ADAPTER)).merge_and_unload()
        merged.save_pretrained(out, max_shard_size=setting.shard_size)
        return merged

    return run


def merge_with_ours(setting: Setting) -> Run:
    return lambda out: _merged(setting, out, verify=False)


def merge_with_ours_verified(setting: Setting) -> Run:
    return lambda out: _merged(setting, out, verify=True)


def _merged(setting: Setting, out: str, verify: bool) -> amc.ConvertReport:
    return amc.merge_adapter(
        setting.files(BASE),
        setting.files(ADAPTER),
        out,
        layout="per_expert",
        max_shard_size=setting.shard_size,
        verify=verify,
        threads=setting.threads,
    )


METHODS: Mapping[str, Method] = {
    "cp, fsync": Method(synced(partial(copy_with_cp, source=BASE)), merges=False),
    "PEFT": Method(merge_with_peft),
    "PEFT, fsync": Method(synced(merge_with_peft)),
    "PEFT, huge pages, fsync": Method(synced(merge_with_peft), variables=_HUGE_PAGES),
    "ours": Method(merge_with_ours),
    "ours, verified": Method(merge_with_ours_verified),
}


def qwen3_30b(layers: int) -> Shape:
    """Return layers of Qwen3-30B-A3B with few words."""
    return Shape(
        f"{layers} layers of Qwen3-30B-A3B",
        f"{QWEN3_30B.source}, with {SMALL.config['vocab_size']} words",
        "qwen3_moe",
        {**QWEN3_30B.config, "num_hidden_layers": layers, "vocab_size": SMALL.config["vocab_size"]},
        keys=layers * (128 * 3 + 9) + 3,
        files=2 * layers,
    )


def write_adapter(base: str, directory: str, rank: int) -> None:
    """Write an adapter in the per-expert form for every projection of a checkpoint.

    Its deltas are so large that they change nearly every element.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    config.inference_mode = True
    config.save_pretrained(directory)
    checkpoint = amc.open_checkpoint(base)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, shape in zip(checkpoint.names, checkpoint.shapes, strict=True):
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not module.endswith(PROJECTIONS):
            continue
        outputs, inputs = shape
        for matrix, size, spread in (("A", (rank, inputs), inputs**-0.5), ("B", (outputs, rank), 0.1)):
            values = torch.randn(size, generator=generator) * spread
            tensors[f"base_model.model.{module}.lora_{matrix}.weight"] = values.bfloat16()
    save_file(tensors, os.path.join(directory, "adapter_model.safetensors"), metadata={"format": "pt"})


def write_files(shape: Shape, root: str, rank: int) -> None:
    """Write the checkpoint and a tiny one, each with its adapter."""
    for size, wanted, tensor_rank in (("big", shape, rank), ("tiny", SMALL, 2)):
        base, adapter = (os.path.join(root, size, part) for part in (BASE, ADAPTER))
        write_checkpoint(wanted, base)
        write_adapter(base, adapter, tensor_rank)


def work(name: str, directory: str, threads: int, shard_size: str, state: str, repetition: int) -> dict[str, Any]:
    """Perform one run in this process.

    Args:
        state: state of free memory.
    """
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    method = METHODS[name]
    out = os.path.join(directory, "out")
    tiny = Setting(os.path.join(directory, "tiny"), threads, TINY_SHARD)
    big = Setting(os.path.join(directory, "big"), threads, shard_size)
    method.prepare(tiny)(out)
    shutil.rmtree(out)
    result = timed(method.prepare(big), out, [big.files(part) for part in (BASE, ADAPTER)], state)
    if not method.merges:
        result |= {"anonymous_bytes": None, "resident_bytes": None}  # of another process
    elif repetition == 0:
        result |= compared(out, big)._asdict()
    shutil.rmtree(out)
    return result


class Comparison(NamedTuple):
    """Elements of a merge that differ from those of another merge of the same files, and what cannot be rounding."""

    elements: int
    differing: int
    wrong: list[str]
    """Names of tensors that another merge does not have, or has with another dtype or shape, or of which an element
    differs by more than the rounding."""


def compared(out: str, setting: Setting) -> Comparison:
    """Compare the files of a merge with those of the merge before the first round."""
    with ExitStack() as stack:
        new, known, base = (_handles(path, stack) for path in (out, setting.files(MERGED), setting.files(BASE)))
        elements = differing = 0
        wrong = sorted(set(new) ^ set(known))
        for name in sorted(set(new) & set(known)):
            tensor, expected = new[name].get_tensor(name), known[name].get_tensor(name)
            if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
                wrong.append(name)
                continue
            elements += tensor.numel()
            differing += int((tensor.view(torch.int16) != expected.view(torch.int16)).sum())
            ours, theirs, before = expected.float(), tensor.float(), base[name].get_tensor(name).float()
            if not ((ours - theirs).abs() <= _ROUNDING * (ours.abs() + theirs.abs() + before.abs()) + _SUM).all():
                wrong.append(name)
    return Comparison(elements, differing, wrong)


def check_merge(setting: Setting) -> None:
    """Check that a merge changed each tensor with an adapter, in nearly all of its elements, and no other tensor.

    Raises:
        RuntimeError: it did not.
    """
    with ExitStack() as stack:
        merged, base = (_handles(setting.files(part), stack) for part in (MERGED, BASE))
        adapter = _handles(setting.files(ADAPTER), stack)
        for name in base:
            changed = (merged[name].get_tensor(name) != base[name].get_tensor(name)).float().mean()
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if (changed < 0.9) if f"{module}.lora_A.weight" in adapter else changed:
                raise RuntimeError(f"{name}: the merge changed {changed:.0%} of its elements")


def _handles(directory: str, stack: ExitStack) -> dict[str, Any]:
    """Return the open file of each tensor."""
    handles: dict[str, Any] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        handle = stack.enter_context(safe_open(path, "pt"))
        handles |= dict.fromkeys(handle.keys(), handle)
    return handles


def run(
    shape: Shape,
    rank: int,
    methods: Sequence[str],
    states: Sequence[str],
    repetitions: int,
    threads: int,
    shard_size: str,
    directory: str | None,
) -> dict[str, Any]:
    """Return all runs, by state of free memory and method, and the bytes of the files.

    Raises:
        RuntimeError: a merge is wrong, or a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-adapters-", dir=directory) as root:
        show(f"  writing {shape.name} and an adapter to {root}", err=True)
        write_files(shape, root, rank)
        big = Setting(os.path.join(root, "big"), threads, shard_size)
        _merged(big, big.files(MERGED), verify=True)
        check_merge(big)

        def run_all(state: str) -> dict[str, list[dict[str, Any]]]:
            worker = ["-m", "benchmarks.adapters", "--worker"]
            commands = {method: [*worker, method, root, str(threads), shard_size, state] for method in methods}
            settings = {method: METHODS[method].variables for method in methods}

            def before() -> None:
                os.sync()
                memory.wait(state)

            return measure.run_interleaved(commands, repetitions, before, settings)

        runs = {state: run_all(state) for state in states}
        file_bytes, adapter_bytes = (measure.file_bytes(big.files(part)) for part in (BASE, ADAPTER))
    check(runs)
    return {
        "shape": shape.name,
        "source": shape.source,
        "rank": rank,
        "file_bytes": file_bytes,
        "adapter_bytes": adapter_bytes,
        "threads": threads,
        "shard_size": shard_size,
        "runs": runs,
    }


def check(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Check the comparisons of the first round.

    Raises:
        RuntimeError: a merge differs from the one before by more than the rounding of PEFT.
    """
    for by_method in runs.values():
        for name, [first, *_] in by_method.items():
            if METHODS[name].merges and (first["wrong"] or ("ours" in name and first["differing"])):
                wrong, differing = first["wrong"][:3], first["differing"]
                raise RuntimeError(f"{name} does not merge as we did: {differing} elements differ, {wrong}")


def table(result: Mapping[str, Any], state: str) -> Table:
    """Return the table of the runs in one state of free memory."""
    file_bytes, runs = result["file_bytes"], result["runs"][state]
    shown = Table(
        title=f"{result['shape']}: {file_bytes / 1e9:.2f} GB of files, an adapter of rank {result['rank']} "
        f"({result['adapter_bytes'] / 1e6:.0f} MB), {result['threads']} threads, files in the page cache, "
        f"{memory.MEMORY[state]}, {len(next(iter(runs.values())))} runs each: median (20th-80th percentile)",
        title_justify="left",
    )
    shown.add_column("method")
    for title in (*TITLES, _ROUNDED):
        shown.add_column(title, justify="right")
    for name, row in _rows(result, state).items():
        shown.add_row(name, *row.values())
    return shown


_ROUNDED = "rounded otherwise"
_ON_PAGES = ("seconds", "ours is", "x cp, fsync", "anonymous MiB", "resident MiB", _ROUNDED)
"""The columns that pages show. The terminal and the data have all of them."""


def _rows(result: Mapping[str, Any], state: str) -> dict[str, dict[str, str]]:
    """Return the cells of each method by their titles."""
    file_bytes, runs = result["file_bytes"], result["runs"][state]
    seconds = {name: statistics.median(run["seconds"] for run in method_runs) for name, method_runs in runs.items()}
    rows = {}
    for name, method_runs in runs.items():
        texts = cells(method_runs, file_bytes, seconds.get("ours"), seconds.get("cp, fsync"))
        first = method_runs[0]
        rounded = f"{first['differing'] / first['elements']:.1%}" if METHODS[name].merges else ""
        rows[name] = dict(zip((*TITLES, _ROUNDED), (*texts, rounded), strict=True))
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables with the columns that pages show."""
    paragraphs = [measure.about(result["environment"])]
    for state in result["runs"]:
        lines = [f"| | {' | '.join(_ON_PAGES)} |", "|---" * (len(_ON_PAGES) + 1) + "|"]
        for name, row in _rows(result, state).items():
            texts = [name, *(row[title] for title in _ON_PAGES)]
            lines.append(f"| {' | '.join(f'**{text}**' if name == 'ours' else text for text in texts)} |")
        paragraphs += [f"**{memory.MEMORY[state].capitalize()}**", "\n".join(lines)]
    return "\n\n".join(paragraphs) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("adapters", __doc__, repetitions=5, room="three times the files")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times are meaningless")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=measure.cores())
    parser.add_argument("--shard-size", default="1GB", help="size of the output files")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--memory", action="append", choices=memory.MEMORY, help="default: both")
    parser.add_argument("--table", metavar="FILE", help="only print the tables of a result file")
    parser.add_argument("--from", dest="source", metavar="FILE", help="only print them in Markdown")
    options.add_worker(parser, 5)
    given = parser.parse_args(arguments)
    if given.worker:
        method, directory, threads, shard_size, state = given.worker
        result = work(method, directory, int(threads), shard_size, state, given.repetition)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    if given.table:
        _show(measure.read_json(given.table))
        return
    if given.source:
        sys.stdout.write(markdown(measure.read_json(given.source)))
        return
    environment = measure.environment(touch=not given.smoke)
    shape, shard_size = (SMALL, TINY_SHARD) if given.smoke else (qwen3_30b(given.layers), given.shard_size)
    results = run(
        shape,
        given.rank,
        given.method or list(METHODS),
        given.memory or list(memory.MEMORY),
        given.repetitions,
        given.threads,
        shard_size,
        given.directory,
    )
    environment["file_system"] = file_system(given.directory)
    result = {"environment": environment, **results}
    _show(result)
    measure.write_json(given.json, result)


def _show(result: Mapping[str, Any]) -> None:
    show_environment(result["environment"])
    for state in result["runs"]:
        show(table(result, state))


if __name__ == "__main__":
    main()
