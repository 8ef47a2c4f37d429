"""The foam demo as a person runs it: it comes to its end, or is interrupted, and leaves nothing."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testbeds.sites import wait_until

pytestmark = pytest.mark.component
DEMO = Path(__file__).parents[2] / "examples" / "foam" / "demo.py"


@pytest.fixture
def demo(tmp_path):
    """Return a function that starts the demo in a session of its own; nothing of it outlives."""
    for name in ("matplotlib", "sklearn", "skimage"):
        pytest.importorskip(name)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    started = []

    def start(*arguments):
        with (tmp_path / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, DEMO, "--results", tmp_path / "results", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=os.environ | {"TMPDIR": str(temporary), "COLUMNS": "150"},
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for pid in processes(temporary):
        os.kill(pid, signal.SIGKILL)


def processes(folder):
    """Return the processes that name a folder in their command line or environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) + b"/" in text:
            found.append(int(entry.name))
    return found


def nothing_left(tmp_path):
    """Assert that neither a process nor a folder of the demo is there any more."""
    said = (tmp_path / "said").read_text()
    assert "nothing is left behind" in said, said
    assert not list((tmp_path / "temporary").glob("gridcloud-demo-*")), said
    assert not processes(tmp_path / "temporary")


def test_the_demo_does_what_it_says(demo, tmp_path):
    """Every volume is served or discarded, the summary and the figures are there, nothing else."""
    process = demo("--volumes", "3", "--size", "64")
    assert process.wait(150) == 0, (tmp_path / "said").read_text()
    results = tmp_path / "results"
    with (results / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert {row["state"] for row in rows} <= {"COMPLETED", "discarded"}
    served = [row for row in rows if row["state"] == "COMPLETED"]
    assert served
    for row in served:
        assert 0 < float(row["porosity"]) < 1
        assert int(row["number_of_pores"]) > 0
        assert float(row["mean_radius"]) > 0
        figure = results / f"{row['volume']}_pores.png"
        assert figure.read_bytes().startswith(b"\x89PNG")
    assert {site for row in rows for site in row["sites"].split()} <= {
        "laptop",
        "university",
        "institute",
    }
    nothing_left(tmp_path)


def test_an_interrupt_in_the_middle_leaves_nothing(demo, tmp_path):
    """Ctrl-C while jobs run in sandboxes: they end, with the sites and all their folders."""
    process = demo("--volumes", "6", "--size", "96")
    sandboxes = "gridcloud-demo-*/*/state/sandboxes/*"
    wait_until(lambda: list((tmp_path / "temporary").glob(sandboxes)))
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130, (tmp_path / "said").read_text()
    nothing_left(tmp_path)


@pytest.mark.parametrize("sites", [1, 3])
def test_a_termination_during_the_start_leaves_nothing(demo, tmp_path, sites):
    """SIGTERM while the sites are being started is as orderly as Ctrl-C."""
    process = demo("--volumes", "3", "--size", "64")
    logs = "gridcloud-demo-*/*/site.log"
    wait_until(lambda: len(list((tmp_path / "temporary").glob(logs))) >= sites)
    process.terminate()
    assert process.wait(90) == 130, (tmp_path / "said").read_text()
    nothing_left(tmp_path)
