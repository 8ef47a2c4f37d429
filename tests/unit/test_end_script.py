"""The dead-man's switch: a machine is off at its end, whatever happens to its clock and its boots.

The real script is run by the real shell, in a time that passes only when it sleeps.
"""

import os
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gridcloud.setup.scripts import Script, text_of

NOW = 1_900_000_000
EVERY = 20
LEASE = "lease-1"
_FAKES = {
    "date": 'cat "$T/now"',
    # Time passes; then the clock may jump, or the machine be started again.
    "sleep": """
now=$(($(cat "$T/now") + $1)) up=$(($(cut -d. -f1 "$T/uptime") + $1))
ran=$(($(cat "$T/ran") + $1))
read -r jump boot <<END
$(head -n1 "$T/events")
END
sed -i 1d "$T/events"
echo $((now + ${jump:-0})) >"$T/now"
echo "$ran" >"$T/ran"
echo "$up.50 0.0" >"$T/uptime"
[ "${boot:-0}" = 0 ] && exit
echo "boot-$ran" >"$T/boot_id"
echo "0.10 0.0" >"$T/uptime"
kill $PPID
""",
    "poweroff": 'cat "$T/ran" >"$T/off"; kill $PPID',
    "systemctl": "exit 1",
    "halt": "exit 1",
    "shutdown": "exit 1",
}


def _init(started):
    """What /proc says of a first process that started so many seconds after its host."""
    return f"1 (some (odd) init) S {'0 ' * 18}{started * 100} 0 0"


class FakeMachine:
    """A folder that stands for a machine."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("bin", "lib"):
            (folder / name).mkdir()
        for name, text in _FAKES.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        self.clock(NOW)
        self.put(uptime="5.00 0.0", boot_id="boot-0", ran="0", events="", stat=_init(0))
        script = text_of(Script.END).replace("/var/lib/gridcloud", str(folder / "lib"))
        script = script.replace("/proc/uptime", str(folder / "uptime"))
        script = script.replace("/proc/1/stat", str(folder / "stat"))
        script = script.replace("/proc/sys/kernel/random/boot_id", str(folder / "boot_id"))
        self.script = script.replace("/run/systemd/system", str(folder / "none"))

    def put(self, **files):
        for name, text in files.items():
            (self.folder / name).write_text(f"{text}\n" if text else "")

    def clock(self, now):
        self.put(now=str(now))

    def run(self, *arguments):
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["sh", "-s", "--", *map(str, arguments)],
            input=self.script,
            text=True,
            env={"PATH": path, "T": str(self.folder)},
            capture_output=True,
            timeout=60,
            check=False,
        )

    def watch(self):
        """Watch until it is off, again after each boot; return how long it ran in all."""
        for _ in range(20):
            self.run("watch")
            if (self.folder / "off").exists():
                return int((self.folder / "off").read_text())
        raise AssertionError("it never went off")

    def told(self):
        return (self.folder / "lib/ends-at").read_text().split()


@pytest.fixture
def machine(tmp_path):
    return FakeMachine(tmp_path)


def test_it_is_off_at_its_end(machine):
    """A machine powers itself off when its end comes, not before and not later."""
    machine.run("first", NOW + 90, 500, LEASE)
    assert machine.watch() == 90


def test_a_clock_set_back_does_not_lengthen_it(machine):
    """What has run for as long as was told is off, whatever the clock says."""
    machine.run("first", NOW + 100, 100, LEASE)
    machine.clock(NOW - 10_000)
    assert machine.watch() == 100


def test_the_uptime_of_a_host_is_not_that_of_its_container(machine):
    """A container that sees how long its host has run is not taken to have run for as long."""
    machine.put(uptime="90005.00 0.0", stat=_init(90_000))
    machine.run("first", NOW + 100, 100, LEASE)
    assert machine.watch() == 100
    (machine.folder / "off").unlink()
    machine.clock(NOW)
    machine.run("move", NOW + 200, 101, LEASE)
    machine.put(events="0 0\n0 1", ran="0")
    machine.run("watch")
    machine.put(uptime="90205.00 0.0", stat=_init(90_200))
    assert machine.watch() == 40 + 101 - 20 - 5


def test_a_later_end_is_believed_and_an_earlier_one_too(machine):
    """Another end counts from when it is told, in both directions."""
    machine.run("first", NOW + 40, 40, LEASE)
    machine.run("move", NOW + 200, 200, LEASE)
    assert machine.watch() == 200
    machine.put(ran="0")
    (machine.folder / "off").unlink()
    machine.clock(NOW)
    machine.run("move", NOW + 30, 30, LEASE)
    assert machine.watch() == 30


def test_the_first_end_is_told_once_for_a_lease(machine):
    """A boot does not take back what was told since; an image of another lease's machine does."""
    machine.run("first", NOW + 40, 40, LEASE)
    machine.run("move", NOW + 200, 200, LEASE)
    machine.run("first", NOW + 40, 40, LEASE)
    assert machine.told() == [str(NOW + 200), "200", LEASE]
    machine.run("first", NOW + 70, 70, "lease-2")
    assert machine.told() == [str(NOW + 70), "70", "lease-2"]


@pytest.mark.parametrize("text", ["", "never", "1e9 5 lease-1", "-5 5 lease-1", "12"])
def test_an_end_that_cannot_be_read_is_now(machine, text):
    """A switch that does not know its end does not wait for ever."""
    (machine.folder / "lib/ends-at").write_text(text + "\n")
    assert machine.watch() == 0


def test_words_that_are_no_end_are_refused(machine):
    """Nothing but two numbers moves an end."""
    machine.run("first", NOW + 40, 40, LEASE)
    for wrong in (("x", "5"), ("5", ""), ("-5", "5"), ("5;reboot", "5")):
        assert machine.run("move", *wrong, LEASE).returncode == 64
    assert machine.told() == [str(NOW + 40), "40", LEASE]


EVENTS = st.lists(
    st.tuples(st.integers(-5000, 0), st.sampled_from([0, 0, 0, 1])), min_size=0, max_size=12
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.integers(1, 150), EVENTS)
def test_no_clock_and_no_reboot_lets_it_run_longer(tmp_path_factory, seconds, events):
    """However often the clock is set back and the machine is started again, it does not run for
    longer than was told, but for one look at the clock a boot."""
    machine = FakeMachine(tmp_path_factory.mktemp("machine"))
    machine.put(events="\n".join(f"{jump} {boot}" for jump, boot in events))
    machine.run("first", NOW + seconds, seconds, LEASE)
    boots = sum(boot for _, boot in events)
    assert machine.watch() <= seconds + EVERY * boots
