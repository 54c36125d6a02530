"""Script of installs.py for an environment with the wheel and one extra: do what the extra is for.

python trying.py [EXTRA]; it needs nothing but the standard library and what the extra installs.
"""

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
PLAIN = "model.safetensors"


def write_plain(folder: Path) -> None:
    """Write a checkpoint of one tensor."""
    import torch

    import automodel_conv as amc

    folder.mkdir(parents=True)
    amc.save_checkpoint({"a": torch.arange(6)}, folder, rules=[])


def check_plain(path: object) -> None:
    """Load that checkpoint, from any place."""
    import torch

    import automodel_conv as amc

    if not torch.equal(amc.load_state_dict(path, rules=[])["a"], torch.arange(6)):  # pyright: ignore[reportArgumentType]
        raise SystemExit(f"{path} has other values")


def try_nothing(folder: Path) -> None:
    write_plain(folder / "plain")
    check_plain(folder / "plain")


def try_transformers(folder: Path) -> None:
    """Load a small model as from_pretrained does, with the hook and without it."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import automodel_conv as amc
    from automodel_conv.testing import assert_bytes_equal

    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    config = Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **sizes, **heads, **ends)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "qwen")
    expected = AutoModelForCausalLM.from_pretrained(folder / "qwen", dtype="auto").state_dict()
    loaded = amc.load_state_dict(folder / "qwen")
    if list(loaded) != list(expected) or not any("gate_up_proj" in name for name in loaded):
        raise SystemExit(f"names: {list(loaded)}")
    for name, tensor in expected.items():
        assert_bytes_equal(loaded[name], tensor)
    with amc.accelerate_transformers() as acceleration:
        AutoModelForCausalLM.from_pretrained(folder / "qwen", dtype="auto")
    if not acceleration.loads[0].lowered:
        raise SystemExit("the hook has converted nothing")


def try_triton(folder: Path) -> None:
    """Run a kernel in Triton's interpreter."""
    import torch

    import automodel_conv as amc

    name = "layers.0.experts.gate_up_proj"
    experts = torch.arange(2 * 32 * 64, dtype=torch.bfloat16).reshape(2, 32, 64)
    by_kernel = amc.convert_state_dict({name: experts}, source_layout="transformers", layout="nemo", backend="triton")
    if not torch.equal(by_kernel["layers.0.experts.gate_and_up_projs"], experts.transpose(1, 2)):
        raise SystemExit("the kernel has written other values")


def try_hub(folder: Path) -> None:
    """Load a repository from the cache of huggingface_hub."""
    commit = "0123456789" * 4
    repository = folder / "hub" / "models--org--name"
    write_plain(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    os.environ["HF_HUB_CACHE"] = str(folder / "hub")  # read when huggingface_hub is imported
    check_plain("org/name")


def try_http(folder: Path) -> None:
    """Load a file of a web server on this machine."""
    write_plain(folder / "plain")
    with served((folder / "plain" / PLAIN).read_bytes()) as url:
        check_plain(f"{url}/{PLAIN}")


@contextmanager
def served(data: bytes) -> Iterator[str]:
    """Serve one file, by ranges."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            if self.path != f"/{PLAIN}":
                self.send_error(404)
                return
            ranged = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(ranged[1]), min(int(ranged[2]) + 1, len(data))) if ranged else (0, len(data))
            self.send_response(206 if ranged else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            if ranged:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[start:stop])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def try_s3(folder: Path) -> None:
    """Create fsspec's file system, which sends no request."""
    import fsspec

    fsspec.filesystem("s3", anon=True)


def try_gcs(folder: Path) -> None:
    """Create fsspec's file system, which sends no request."""
    import fsspec

    fsspec.filesystem("gs", token="anon")


TRIALS = {
    "": [try_nothing],
    "transformers": [try_hub, try_transformers],  # transformers needs huggingface_hub
    "triton": [try_triton],
    "hub": [try_hub],
    "http": [try_http],
    "s3": [try_s3],
    "gcs": [try_gcs],
    "all": [try_hub, try_transformers, try_triton, try_http, try_s3, try_gcs],
}


def main() -> None:
    for trial in TRIALS["".join(sys.argv[1:])]:
        with tempfile.TemporaryDirectory() as folder:
            trial(Path(folder))
    print("tried")


if __name__ == "__main__":
    main()
