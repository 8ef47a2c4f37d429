"""What all tests share."""

import os
import signal
from pathlib import Path

import pytest

# A shell that runs the tests in its background has interrupts ignored, and all children inherit
# that; the tests of Ctrl-C need them to be as they are in a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Everything in tests/component is one, marked or not."""
    for item in items:
        if "component" in Path(item.path).parts:
            item.add_marker("component")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a component test that skips has failed: there the real thing must be there."""
    report = yield
    if os.environ.get("CI") and report.skipped and item.get_closest_marker("component"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report
