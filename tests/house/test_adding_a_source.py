"""Tests of adding a source of files: it is one class, a ``ByteSource``, and no reader depends on which one it is.

The toy reads ranges from a real server, as from an object store. It replaces files on this machine.
"""

import http.client
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import automodel_conv as amc
from automodel_conv.errors import ReadError
from automodel_conv.files import located as opening

EXPERTS, SIZE, HIDDEN = 4, 24, 32
PATH = "model.layers.0.mlp.experts"


class Server(ThreadingHTTPServer):
    """A server that sends the requested ranges of files, at most ``most`` bytes of a file."""

    most = None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = []


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(os.path.getsize(self.path)))
        self.send_header("ETag", str(os.stat(self.path).st_mtime_ns))
        self.end_headers()

    def do_GET(self):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        with open(self.path, "rb") as file:
            data = file.read()[: self.server.most][first : last + 1]
        self.server.ranges.append((first, last + 1))
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Remote(NamedTuple):
    """The toy source: a file behind the server."""

    port: int
    path: str

    is_remote = True

    def describe(self):
        return f"http://127.0.0.1:{self.port}{self.path}"

    def identity(self):
        return OpenRemote(self).ask("HEAD")[0]["ETag"]

    def open(self):
        return OpenRemote(self)


class OpenRemote(NamedTuple):
    file: Remote

    def ask(self, method, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.file.port, timeout=30)
        connection.request(method, self.file.path, headers=headers)
        answer = connection.getresponse()
        try:
            return answer.headers, answer.read()
        finally:
            connection.close()

    def size(self):
        return int(self.ask("HEAD")[0]["Content-Length"])

    def expect(self, ranges):
        pass  # it could request each range at once

    def read_into(self, views, offset):
        total = sum(map(len, views))
        data = self.ask("GET", Range=f"bytes={offset}-{offset + total - 1}")[1] if total else b""
        if len(data) != total:
            raise ReadError(f"{self.file.describe()} sent {len(data)} of {total} bytes")
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]

    def descriptor(self):
        return None

    def abort(self):
        pass

    def close(self):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(opening, "LocalFile", lambda path: Remote(server.server_port, path))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def published(tmp_path):
    generator = torch.Generator().manual_seed(7)
    shapes = {"gate_proj": (SIZE, HIDDEN), "up_proj": (SIZE, HIDDEN), "down_proj": (HIDDEN, SIZE)}
    tensors = {
        f"{PATH}.{e}.{part}.weight": torch.randn(shape, generator=generator).to(torch.bfloat16)
        for e in range(EXPERTS)
        for part, shape in shapes.items()
    }
    directory = tmp_path / "published"
    directory.mkdir()
    names = list(tensors)
    files = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory, tensors


def grouped(tensors):
    """Return grouped experts as transformers stores them, one expert after the other."""
    parts = {
        part: [tensors[f"{PATH}.{e}.{part}.weight"] for e in range(EXPERTS)]
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    both = zip(parts["gate_proj"], parts["up_proj"], strict=True)
    gate_up = torch.stack([torch.cat(pair) for pair in both])
    return {f"{PATH}.gate_up_proj": gate_up, f"{PATH}.down_proj": torch.stack(parts["down_proj"])}


def rules():
    pytest.importorskip("transformers", reason="the rules are for its models")
    return amc.get_checkpoint_conversion_mapping("qwen3_moe")


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("threads", [1, 4])
def test_checkpoint_is_loaded_from_it(server, published, threads):
    directory, tensors = published
    assert_equal(amc.load_state_dict(directory, rules=rules(), threads=threads), grouped(tensors))
    spans = server.ranges
    sizes = {path.name: path.stat().st_size for path in directory.glob("*.safetensors")}
    read = sum(stop - start for start, stop in spans)
    assert read <= sum(sizes.values())  # each byte once


def test_checkpoint_is_converted_and_compared_from_it(server, published, tmp_path):
    directory, tensors = published
    amc.convert_checkpoint(directory, tmp_path / "own", rules=rules(), verify=True)
    files = list((tmp_path / "own").glob("*.safetensors"))
    assert_equal({name: tensor for file in files for name, tensor in load_file(file).items()}, grouped(tensors))
    assert server.ranges


def test_tensors_that_only_move_are_converted_from_it(server, published, tmp_path):
    """The kernel could copy these bytes from file to file if the source had a descriptor."""
    directory, tensors = published
    amc.convert_checkpoint(directory, tmp_path / "own", rules=[])
    files = list((tmp_path / "own").glob("*.safetensors"))
    assert_equal({name: tensor for file in files for name, tensor in load_file(file).items()}, tensors)


def test_memory_map_of_it_reads_it(server, published):
    directory, tensors = published
    assert_equal(amc.load_state_dict(directory, rules=[], memory_map=True), tensors)


def test_failed_read_keeps_the_message_of_the_source(server, published):
    directory, _ = published
    plan = amc.compile_plan(directory, rules=rules())
    server.most = 2000
    with pytest.raises(ReadError, match=r"(?s)http://127\.0\.0\.1:\d+/.*tensor: .*sent \d+ of \d+ bytes"):
        amc.load_state_dict(directory, plan=plan)
