"""Answers of S3 in XML, and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from xml.sax.saxutils import escape

from tests.loopback_messages import Answer, Asked

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class Refused(Exception):
    """An error that a client gets: status, code and text, and further fields of its XML."""

    def __init__(self, status: int, code: str, text: str, headers: Mapping[str, str] | None = None, **fields: str):
        super().__init__(code)
        self.status, self.headers = status, dict(headers or {})
        self.fields = {"Code": code, "Message": text, **fields}


def element(tag: str, *content: str) -> str:
    """Return an element; content that is no element is escaped."""
    inner = "".join(one if isinstance(one, Element) else escape(one) for one in content)
    return Element(f"<{tag}>{inner}</{tag}>")


class Element(str):
    """Text that is an element."""


def answer_xml(root: str) -> Answer:
    name = root[1 : root.index(">")]
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{name} xmlns="{NAMESPACE}">{root[len(name) + 2 :]}'
    return Answer(200, {"Content-Type": "application/xml"}, text.encode())


def error_answer(refusal: Refused, asked: Asked) -> Answer:
    """Return an error as S3 answers it; the body has no namespace, and HEAD has no body."""
    fields = {**refusal.fields, "Resource": asked.path, "RequestId": "1"}
    root = element("Error", *(element(name, value) for name, value in fields.items()))
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{root}'.encode()
    return Answer(refusal.status, {**refusal.headers, "Content-Type": "application/xml"}, body)


def time_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
