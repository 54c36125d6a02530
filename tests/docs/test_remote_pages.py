"""Tests of the pages about remote checkpoints: their numbers and permissions are those of the code."""

import json
import re

import pytest

from automodel_conv.execution.host import DEFAULT_SCRATCH_BYTES
from automodel_conv.files.remote import cache_blocks, connections, requests
from automodel_conv.schedule import requests as ranges
from tests.docs.running import ROOT

TASKS = ROOT / "docs" / "tasks"
REMOTE = (TASKS / "remote.md").read_text(encoding="utf-8")
S3 = (TASKS / "s3.md").read_text(encoding="utf-8")
MIB = 1 << 20
# Source: Amazon S3 API Reference, the permissions of each request.
ACTIONS = {
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "complete_multipart_upload": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "delete_object": "s3:DeleteObject",
    "head_object": "s3:GetObject",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_objects_v2": "s3:ListBucket",
    "list_parts": "s3:ListMultipartUploadParts",
    "put_object": "s3:PutObject",
    "upload_part": "s3:PutObject",
}


def policies():
    """Return the actions of each policy of the page, in order."""
    blocks = map(json.loads, re.findall(r"```json\n(.*?)```", S3, re.DOTALL))
    return [
        {action for statement in block["Statement"] for action in _listed(statement["Action"])}
        for block in blocks
        if "Statement" in block
    ]


def _listed(actions):
    return [actions] if isinstance(actions, str) else actions


def test_permissions_to_write_are_those_of_the_requests_that_are_sent():
    [store] = (ROOT / "automodel_conv").rglob("s3_store.py")
    sent = {name for name in ACTIONS if f'"{name}"' in store.read_text(encoding="utf-8")}
    assert sent == ACTIONS.keys()
    assert policies()[1] == {*ACTIONS.values()}


def test_permissions_to_read_list_the_folder_and_get_its_objects():
    assert policies()[0] == {"s3:ListBucket", "s3:GetObject"}


@pytest.mark.parametrize(
    "sentence",
    [
        f"By default {ranges.CONNECTIONS} threads read",
        f"mostly of {ranges.LEAST_REQUEST_BYTES // MIB} to {ranges.MOST_REQUEST_BYTES // MIB} MiB",
        f"A gap of at most {ranges._GAP_BYTES // MIB} MiB",
        f"at most 1/{ranges._GAP_SHARE} of the range",
        f"at most {DEFAULT_SCRATCH_BYTES // MIB} MiB (`scratch_bytes=`)",
        f"given up after {requests.ATTEMPTS} failures in a row",
        f"{requests.FIRST_ATTEMPTS} failures are enough",
        f"at most {requests.FIRST_WAIT_SECONDS} seconds after the first failure",
        f"up to {requests._MOST_WAIT_SECONDS:.0f} seconds. Waits are random",
        f"`Retry-After` is respected up to {requests._MOST_WAIT_SECONDS:.0f} seconds",
        f"no connection within {connections.CONNECT_SECONDS:.0f} seconds",
        f"no byte for {connections.SILENT_SECONDS:.0f} seconds",
        f"Each block of {cache_blocks.BLOCK_BYTES // MIB} MiB",
        f"| {', '.join(map(str, requests._PASSING))} |",
    ],
)
def test_numbers_of_the_page_are_those_of_the_code(sentence):
    assert sentence in " ".join(REMOTE.split())
