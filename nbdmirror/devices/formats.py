"""Image files that are not raw, by how they begin. A disk may be a qcow2 image through qemu-nbd;
served as the file that it is, its first guest would overwrite the format's own data."""

from __future__ import annotations

HEAD_BYTES = 4096

_MAGICS = (
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
)
"""QEMU's name of the format, and the bytes that an image has at an offset."""


def format_of(head: bytes) -> str:
    """The format of an image that begins with `head`; "" for a raw one, as far as that shows."""
    for name, offset, magic in _MAGICS:
        if head.startswith(magic, offset):
            return name
    return ""
