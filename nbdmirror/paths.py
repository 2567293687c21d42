"""Paths that mean the same file in every directory. For any thread."""

from __future__ import annotations

import os


def absolute_path(path: str) -> str:
    """The same file to the kernel, for a process with another directory. A `..` after a name stays,
    as the name may be a link: the kernel follows the link first. The kernel's own name of this
    directory has no links, so a `..` in front removes the last part of that. Raises
    FileNotFoundError for a relative path in a directory that does not exist any more."""
    steps = _steps(path)
    if path.startswith("/"):
        return "/" + "/".join(steps)
    here = _steps(os.getcwd())
    while steps[:1] == [".."]:
        here, steps = here[:-1], steps[1:]
    return "/" + "/".join(here + steps)


def _steps(path: str) -> list[str]:
    return [step for step in path.split("/") if step not in ("", ".")]
