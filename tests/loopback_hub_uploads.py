"""Uploads to the Hub on this machine: new repositories, large files by the LFS protocol, and commits.

Large files go to the content network, in one part or many; a commit moves them into the folder of the repository.

Source: huggingface_hub 1.33.0, ``create_repo``, ``_commit_api``, ``lfs``; git-lfs, ``docs/api/batch.md``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.loopback_files import etag_of
from tests.loopback_messages import Answer, Asked

LARGE = {".bin", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors", ".zip"}


def is_large(name: str, size: int) -> bool:
    """Return whether the Hub keeps a file outside of git."""
    return size > 0 and (Path(name).suffix in LARGE or size > 10_000_000)


@dataclass
class HubUploads:
    hub: Any
    """The ``Hub``, with its repositories and its content network."""
    folder: Path
    part_size: int
    """Largest number of bytes that are uploaded in one part."""
    blobs: dict[str, Path] = field(default_factory=dict)
    """Whole large files by the SHA-256 of their content."""
    unverified: dict[str, Path] = field(default_factory=dict)
    """Large files, by the hash that was announced."""
    _parts: dict[str, list[Path]] = field(default_factory=dict)
    _committing: threading.Lock = field(default_factory=threading.Lock)

    def create(self, asked: Asked) -> Answer:
        wanted = json.loads(asked.body.read())
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        value = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return answer_json(value | {"error": "You already created this model repo"}, 409)
        folder = self.folder / "repositories" / name
        folder.mkdir(parents=True)
        self.hub.repositories[name] = folder
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.hub.private = {*self.hub.private, name}
        return answer_json(value)

    def preupload(self, asked: Asked, name: str) -> Answer:
        files = json.loads(asked.body.read())["files"]
        modes = [(one["path"], "lfs" if is_large(one["path"], one["size"]) else "regular") for one in files]
        return answer_json(
            {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}
        )

    def batch(self, asked: Asked, name: str) -> Answer:
        objects = json.loads(asked.body.read())["objects"]
        return answer_json({"transfer": "multipart", "objects": [self._actions(one, name) for one in objects]})

    def _actions(self, wanted: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return where the bytes of a file must go; nowhere if they are here."""
        oid, size, place = wanted["oid"], wanted["size"], {"oid": wanted["oid"], "size": wanted["size"]}
        if oid in self.blobs:
            return place
        upload = uuid.uuid4().hex
        count = max(-(-size // self.part_size), 1)
        self._parts[upload] = [self.folder / f"{upload}-{number}" for number in range(1, count + 1)]
        links = [self.hub.cdn.upload(path) for path in self._parts[upload]]
        if count == 1:
            self.unverified[oid] = self._parts[upload][0]
            action = {"href": links[0]}
        else:
            header = {"chunk_size": str(self.part_size)} | {str(n): link for n, link in enumerate(links, 1)}
            action = {"href": f"{self.hub.url}/api/complete_multipart?uploadId={upload}", "header": header}
        verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
        return place | {"actions": {"upload": action, "verify": verify}}

    def complete(self, asked: Asked) -> Answer:
        paths, wanted = self._parts.get(asked.query.get("uploadId", "")), json.loads(asked.body.read())
        if paths is None:
            return answer_json({"error": "The upload does not exist."}, 404)
        etags = [one["etag"] for one in sorted(wanted["parts"], key=lambda one: one["partNumber"])]
        if not all(path.is_file() for path in paths) or etags != [etag_of(path.stat()) for path in paths]:
            return answer_json({"error": "The parts are not those of the upload."}, 400)
        whole = self.folder / f"{uuid.uuid4().hex}-whole"
        with whole.open("wb") as target:
            for path in paths:
                with path.open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 20)
                path.unlink()
        self.unverified[wanted["oid"]] = whole
        return answer_json({})

    def verify(self, asked: Asked) -> Answer:
        wanted = json.loads(asked.body.read())
        path = self.unverified.get(wanted["oid"])
        if path is None or not path.is_file() or path.stat().st_size != wanted["size"]:
            return answer_json({"message": "The object is absent, or has another size."}, 404)
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
        if digest.hexdigest() != wanted["oid"]:
            return answer_json({"message": "The content of the object has another hash."}, 422)
        self.blobs[wanted["oid"]] = path
        return answer_json({})

    def commit(self, asked: Asked, name: str) -> Answer:
        """Change the files of a repository: all of the operations, or none."""
        lines = [json.loads(line) for line in asked.body.read().splitlines()]
        operations = [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self._committing:
            if header.get("parentCommit") not in (None, self.hub.commit(name)):
                return answer_json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            absent = [value["oid"] for key, value in operations if key == "lfsFile" and value["oid"] not in self.blobs]
            unknown = {key for key, _ in operations} - {"file", "lfsFile", "deletedFile", "deletedFolder"}
            if absent or unknown or "create_pr" in asked.query:
                return answer_json({"error": f"Cannot commit: {absent or sorted(unknown) or 'create_pr'}"}, 400)
            for key, value in operations:
                self._apply(self.hub.repositories[name], key, value)
            oid = self.hub.advance(name)
        return answer_json(
            {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}
        )

    def _apply(self, root: Path, key: str, value: Mapping[str, Any]) -> None:
        target = root / value["path"]
        if key == "deletedFolder":
            return shutil.rmtree(target)
        if key == "deletedFile":
            return target.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        new = self.folder / uuid.uuid4().hex
        if key == "file":
            new.write_bytes(base64.b64decode(value["content"]))
        else:
            shutil.copyfile(self.blobs[value["oid"]], new)
        shutil.move(new, target)


def answer_json(value: Any, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())
