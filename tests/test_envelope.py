"""The envelope of records and manifests, by itself."""

from __future__ import annotations

import inspect
import sys
import traceback

import pytest

from ckptstore.envelope import check_json, parse
from ckptstore.errors import Damaged, UsageError

GOOD = b'{"format":1,"deep":[[[[[]]]]]}'


@pytest.mark.parametrize(
    "body", [b"[]", b"1", b"{}", b'{"format":null}', b'{"format":true}', b'{"format":0}', b'{"format":"1"}', b'{"format":1.0}']
)
def test_a_body_without_a_format_number(body: bytes) -> None:
    with pytest.raises(Damaged, match="no format number"):
        parse(body, "it")


def test_a_caller_near_the_end_of_the_stack_is_not_told_that_the_bytes_are_damaged() -> None:
    def parsed_at(depth: int) -> object:
        return parsed_at(depth - 1) if depth else parse(GOOD, "it")

    free = sys.getrecursionlimit() - len(inspect.stack())
    outcomes = set()
    for spare in range(60):
        try:
            outcomes.add(str(parsed_at(free - spare)))
        except RecursionError as exc:
            outcomes.update("out of parse" for frame, _ in traceback.walk_tb(exc.__traceback__) if frame.f_code is parse.__code__)
    assert outcomes == {"{'format': 1, 'deep': [[[[[]]]]]}", "out of parse"}


def test_depth_of_plain_json() -> None:
    value: list[object] = []
    for _ in range(99):
        value = [value]
    assert check_json(value, "metadata") == value
    with pytest.raises(UsageError, match="metadata is nested more than 100 levels deep"):
        check_json([value], "metadata")
