"""Sizes of disks that are served, as whole sectors and others."""

from __future__ import annotations

from support.images import KiB, MiB

SIZES = (0, 1, 511, 512, MiB, MiB + 1, 1025 * KiB)
