"""The project's own modules, for tests that read them: each is parsed and walked once in a process.
Tests that read all of them are of one `xdist_group`, so that one worker does."""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from pathlib import Path

import pytest

in_one_worker = pytest.mark.xdist_group("sources")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All nodes of the tree."""
    return list(ast.walk(tree_of(path)))


@functools.cache
def comments_of(path: Path) -> list[str]:
    """Docstrings, and the strings below constants, and comments."""
    source = path.read_text()
    return [
        *(
            str(node.value.value)
            for node in nodes_of(path)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ),
        *(
            token.string
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        ),
    ]
