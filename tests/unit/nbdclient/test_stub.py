"""typings/nbd.pyi says what libnbd's binding has: names, and the names of arguments."""

from __future__ import annotations

import ast
import inspect

import nbd
from support.processes import ROOT

STUB = ast.parse((ROOT / "typings" / "nbd.pyi").read_text())
LATER = {"aio_block_status_64"}
"""Not in every libnbd that is supported."""


def test_constants_and_classes_exist() -> None:
    for node in STUB.body:
        if isinstance(node, ast.AnnAssign):
            assert hasattr(nbd, ast.unparse(node.target)), ast.unparse(node)
        elif isinstance(node, ast.ClassDef):
            assert hasattr(nbd, node.name)


def test_calls_take_these_arguments() -> None:
    handle = next(node for node in STUB.body if getattr(node, "name", "") == "NBD")
    assert isinstance(handle, ast.ClassDef)
    calls = [node for node in handle.body if isinstance(node, ast.FunctionDef)]
    assert len(calls) > 40
    for call in calls:
        if call.name in LATER and not hasattr(nbd.NBD, call.name):
            continue
        there = inspect.signature(getattr(nbd.NBD, call.name)).parameters
        assert [argument.arg for argument in call.args.args] == list(there), call.name
