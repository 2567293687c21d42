"""A Ceph of one node, for all tests of this folder, which run in one worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cephnode import Ceph


@pytest.fixture(scope="package")
def node() -> Iterator[Ceph]:
    node = Ceph()
    node.start()
    yield node
    node.stop()


@pytest.fixture
def ceph(node: Ceph) -> Iterator[Ceph]:
    """The same for all tests; one that fails leaves it as it was."""
    yield node
    node.heal()
