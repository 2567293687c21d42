"""Shell completion from the parser, by shtab. The program itself knows nothing of it."""

from __future__ import annotations

import argparse
import re

import shtab

from nbdmirror.cli.main import build_parser

PLACES = {
    "bash": "bash-completion/completions/nbdmirror",
    "zsh": "zsh/site-functions/_nbdmirror",
    "fish": "fish/vendor_completions.d/nbdmirror.fish",
}
"""Where each shell looks, under share."""


def completions() -> dict[str, str]:
    """Path under share -> the script."""
    parser = build_parser()
    _complete_paths(parser)
    return {path: shtab.complete(parser, shell=shell) for shell, path in PLACES.items()}


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Arguments that are called like files are completed as such."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command)
        elif re.search(r"\b(PATH|FILE|DISK|SOCKET)$", str(action.metavar)):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
