"""Builds ahead what a test would have to wait a minute for: ``python -m testbeds.build``.

Each is built once on a machine and kept, see the test beds. What cannot be built here (not root, a
program that is missing) is left out; the tests that need it say so.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from testbeds import booted, lxd, podman

#: What says why it cannot be built, and what builds it.
IMAGES: list[tuple[Callable[[], str], Callable[[], object]]] = [
    (lxd.problem, lxd.build),
    (podman.missing, podman.image_store),
    (booted.lacking, booted.root),
]


def main() -> None:
    """Build them at the same time; raises what one of them does."""
    with ThreadPoolExecutor() as pool:
        for building in [pool.submit(build) for problem, build in IMAGES if not problem()]:
            building.result()


if __name__ == "__main__":
    main()
