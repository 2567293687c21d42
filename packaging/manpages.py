"""Manual pages from the documentation: docs/*.md become what `man` shows.

The texts are those files; what they say of options and arguments is held to the parser and to the
entries of QMP's commands by tests/unit/project/test_docs.py. From the parser itself come the
synopses of commands.

Markdown is read by markdown-it-py. Of it what the documentation uses is known here, and anything
else is an error. Tables become lists, a row an entry: no terminal is wide enough for them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from nbdmirror import __version__
from nbdmirror.cli.main import build_parser

DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class Page:
    source: str
    """The file in docs/."""
    name: str
    section: int
    purpose: str
    see_also: str

    @property
    def file(self) -> str:
        return f"man{self.section}/{self.name}.{self.section}"


PAGES = (
    Page(
        "cli.md",
        "nbdmirror",
        1,
        "serve a disk over NBD, and mirror it to another server while it is in use",
        "nbdmirror-plugin(1), nbdmirror-qmp(7), nbdkit(1), nbd_connect_uri(3), qemu-nbd(8)",
    ),
    Page(
        "plugin.md",
        "nbdmirror-plugin",
        1,
        "the nbdkit plugin of nbdmirror, for those who run nbdkit themselves",
        "nbdmirror(1), nbdmirror-qmp(7), nbdkit(1), nbdkit-python-plugin(3)",
    ),
    Page(
        "qmp.md",
        "nbdmirror-qmp",
        7,
        "QMP as nbdmirror speaks it: commands, events, states",
        "nbdmirror(1), qemu-qmp-ref(7), qemu-storage-daemon-qmp-ref(7)",
    ),
)
_PAGE_OF = {page.source: page for page in PAGES}


def manual_pages() -> dict[str, str]:
    """Path under share/man -> the page, in man(7)."""
    return {page.file: render(page) for page in PAGES}


def render(page: Page) -> str:
    name, section = escape(page.name), page.section
    lines = [
        '.\\" Made from docs/' + page.source + "; change that.",
        f'.TH {page.name.upper()} {section} "" "nbdmirror {__version__}" "nbdmirror"',
        ".SH NAME",
        f"{name} \\- {escape(page.purpose)}",
        *_synopsis(page),
        ".SH DESCRIPTION",
    ]
    text = (DOCS / page.source).read_text()
    tree = SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(text))
    title, *rest = tree.children
    assert title.type == "heading" and title.tag == "h1", f"{page.source} has no title"
    for node in rest:
        lines += _block(node, page)
    lines += [
        ".SH SEE ALSO",
        _references(page.see_also) + ".",
        ".PP",
        "Where this speaks of other files, they are in share/doc/nbdmirror.",
    ]
    return "\n".join(lines) + "\n"


# Generated parts


def _synopsis(page: Page) -> Iterator[str]:
    if page.name != "nbdmirror":
        return
    yield ".SH SYNOPSIS"
    for command in subparsers().values():
        usage = command.format_usage().removeprefix("usage: ")
        words = re.findall(r"\[[^\[\]]*(?:\[[^\]]*\][^\[\]]*)*\]|\(.*?\)|\S+", usage)
        yield f'.SY "nbdmirror {escape(words[1])}"'
        for word in words[2:]:
            if word != "[-h]":
                yield _beginning(_usage(word))
        yield ".YS"


def subparsers() -> dict[str, argparse.ArgumentParser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no commands")


def _usage(word: str) -> str:
    """A part of a usage line: options bold, what stands for something else italic."""
    pieces = re.split(r"(--?[a-z][a-z-]*|[A-Z][A-Z_]+|\bS\b|\bN\b)", word)
    fonts = {True: "\\fB", False: "\\fI"}
    return "".join(
        f"{fonts[piece.startswith('-')]}{escape(piece)}\\fR" if number % 2 else escape(piece)
        for number, piece in enumerate(pieces)
    )


# Blocks


def _block(node: SyntaxTreeNode, page: Page) -> Iterator[str]:
    if node.type == "heading":
        yield from _heading(node)
    elif node.type == "paragraph":
        yield ".PP"
        yield _beginning(_inline(node.children[0]))
    elif node.type in ("code_block", "fence"):
        yield from (".PP", ".RS 4", ".EX")
        yield from (_beginning(escape(line)) for line in node.content.rstrip("\n").split("\n"))
        yield from (".EE", ".RE")
    elif node.type == "table":
        yield from _table(node)
    elif node.type in ("bullet_list", "ordered_list"):
        for number, item in enumerate(node.children, 1):
            yield ".IP \\(bu 2" if node.type == "bullet_list" else f".IP {number}. 4"
            for child in item.children:
                assert child.type == "paragraph", f"{page.source}: {child.type} in a list"
                yield _beginning(_inline(child.children[0]))
    elif node.type != "hr":
        raise AssertionError(f"{page.source}: no rule for {node.type}")


def _heading(node: SyntaxTreeNode) -> Iterator[str]:
    text = "".join(child.content for child in node.children[0].children)
    if node.tag == "h2":
        yield f'.SH "{escape(text if "nbdmirror" in text else text.upper())}"'
    else:
        yield f'.SS "{escape(text)}"'


def _table(node: SyntaxTreeNode) -> Iterator[str]:
    """Each row as an entry: its first cell is the name. Of the others those whose column has a
    title say so, but for types and defaults, which stand behind the name."""
    head, *bodies = node.children
    titles = [_inline(cell.children[0]) for cell in head.children[0].children]
    for row in (row for body in bodies for row in body.children):
        name, *cells = [_inline(cell.children[0]) for cell in row.children]
        behind, paragraphs = [], []
        for title, cell in zip(titles[1:], cells, strict=True):
            if title in ("type", "default"):
                behind.append(f"default: {cell}" if title == "default" and cell else cell)
            elif cell:
                paragraphs.append(f"\\fI{title}:\\fR {cell}" if title and len(cells) > 1 else cell)
        behind = [part.replace("default: required", "required") for part in behind if part]
        yield ".TP"
        yield _beginning(name + (f" ({', '.join(behind)})" if behind else "")) or "\\&"
        for number, paragraph in enumerate(paragraphs):
            if number:
                yield ".br"
            yield _beginning(paragraph)
        if not paragraphs:
            yield "\\&"


# Inline


def _inline(node: SyntaxTreeNode) -> str:
    return "".join(_piece(child) for child in node.children)


def _piece(node: SyntaxTreeNode) -> str:
    if node.type == "text":
        return escape(node.content)
    if node.type in ("softbreak", "hardbreak"):
        return " "
    if node.type == "code_inline":
        return "".join(
            escape(word) if word.isspace() else f"\\f{_font(word)}{escape(word)}\\fR"
            for word in re.split(r"(\s+)", node.content)
            if word
        )
    if node.type in ("em", "strong"):
        return f"\\f{'I' if node.type == 'em' else 'B'}{_inline(node)}\\fR"
    if node.type == "link":
        return _link(node)
    raise AssertionError(f"no rule for {node.type}: {node.content}")


def _font(word: str) -> str:
    """What users put something of their own for is in capitals."""
    return "I" if re.fullmatch(r"[A-Z][A-Z_]*", word) else "B"


def _link(node: SyntaxTreeNode) -> str:
    target = str(node.attrs["href"]).partition("#")[0]
    if target in _PAGE_OF:
        page = _PAGE_OF[target]
        reference = f"\\fB{escape(page.name)}\\fR({page.section})"
        text = _inline(node)
        return reference if target in text.replace("\\-", "-") else f"{text} ({reference})"
    return _inline(node)


def _references(text: str) -> str:
    return re.sub(r"([\w-]+)\((\d)\)", lambda m: f"\\fB{escape(m[1])}\\fR({m[2]})", text)


_ESCAPES = {"\\": "\\e", "-": "\\-", "~": "\\(ti", "^": "\\(ha", "`": "\\(ga", "'": "\\(aq"}


def escape(text: str) -> str:
    """So that roff prints what is there: ASCII as it is typed, nothing as a request."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def _beginning(line: str) -> str:
    """A line of text: one that began with a dot would be a request."""
    return f"\\&{line}" if line.startswith(".") else line
