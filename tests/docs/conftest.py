"""What the documentation is made of: pages, their fenced blocks, and sites to run them on."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from testbeds.sites import SiteProcess

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string (``sh``, ``sh no-test``, ``python``, ...) and where it is."""

    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1].strip(), found[2], text.count("\n", 0, found.start()) + 2)
        for found in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def name(page: Path) -> str:
    """Return what a page is called in the names of tests."""
    return str(page.relative_to(ROOT))


@pytest.fixture
def home(tmp_path):
    """Return a reader's home: a site of two CPUs runs there; a colleague's may be started."""
    site = SiteProcess(tmp_path / "site", "laptop", "[providers.local]\ncpus = 2\n")
    lending = "[lending]\nenabled = true\n"
    colleague = SiteProcess(tmp_path / "colleague", "university", lending)
    site.start()
    yield site
    colleague.close()
    site.close()
