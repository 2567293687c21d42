"""hatchling's hook: what is generated goes into the wheel, and is never in the repository, where it
could go stale."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GeneratedFiles(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        # The checkout's nbdmirror: where packages are built in isolation there is no other.
        sys.path[:0] = [str(root), str(root / "packaging")]
        from completions import completions
        from manpages import manual_pages

        files = {f"share/man/{path}": text for path, text in manual_pages().items()}
        files |= {f"share/{path}": text for path, text in completions().items()}
        self.place = Path(tempfile.mkdtemp(prefix="nbdmirror-build-"))
        for path, text in files.items():
            file = self.place / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            build_data["shared_data"][str(file)] = path
        for document in sorted([*root.glob("docs/**/*.md"), *root.glob("docs/monitoring/*")]):
            place = document.relative_to(root / "docs")
            build_data["shared_data"][str(document)] = f"share/doc/nbdmirror/{place}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(self.place)
