"""Only what was asked for comes back from a machine, and only to where it belongs."""

import pytest

from gridcloud.data.files import LocalFiles
from gridcloud.data.staging import asked_for, stage_out
from gridcloud.errors import Forbidden


@pytest.mark.parametrize(
    ("pattern", "name", "yes"),
    [
        ("*.csv", "a.csv", True),
        ("*.csv", "sub/a.csv", False),
        ("*.csv", ".a.csv", False),
        ("results", "results/deep/.hidden", True),
        ("results/", "results/a", True),
        ("./r/*.txt", "r/a.txt", True),
        ("**/*.txt", "a.txt", True),
        ("**/*.txt", "x/y/a.txt", True),
        ("**/*.txt", ".git/a.txt", False),
        ("r/**", "r/x/y", True),
        ("results", "results2/a", False),
        ("r.txt", ".bashrc", False),
        ("*", ".ssh/authorized_keys", False),
        ("[ab].txt", "b.txt", True),
    ],
)
def test_asked_for(pattern, name, yes):
    """The supervisor's rules: no leading dots by wildcards, all beneath a folder."""
    assert asked_for(pattern, name) is yes


@pytest.mark.parametrize("name", ["analyse.py", ".git/hooks/pre-commit", "sub/r.csv"])
async def test_a_machine_cannot_choose_what_to_write(tmp_path, name):
    """A lender that names files nobody asked for changes nothing on the borrower's disk."""
    work, into = tmp_path / "work", tmp_path / "into"
    for folder in (work, into):
        folder.mkdir()
    (work / "r.csv").write_text("good")
    (work / name).parent.mkdir(parents=True, exist_ok=True)
    (work / name).write_text("evil")
    with pytest.raises(Forbidden, match="not asked for"):
        await stage_out(LocalFiles(), str(work), [("r.csv", 4), (name, 4)], into, ["*.csv"])
    assert not list(into.iterdir())
    await stage_out(LocalFiles(), str(work), [("r.csv", 4)], into, ["*.csv"])
    assert (into / "r.csv").read_text() == "good"
