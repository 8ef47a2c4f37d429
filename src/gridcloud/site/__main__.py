"""``python -m gridcloud.site``: what ``gridcloud serve`` becomes."""

from __future__ import annotations

import argparse
import logging
import os
import sys

import structlog

from gridcloud import settings
from gridcloud.errors import STATUSES, GridcloudError
from gridcloud.site.log_lines import Restraint, printable


def main() -> None:
    """Read the settings, serve, and report an error in one line with its exit status."""
    parser = argparse.ArgumentParser(prog="gridcloud serve")
    parser.add_argument("--ephemeral", action="store_true")
    arguments = parser.parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        processors=[
            Restraint(),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            printable,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        file, state = settings.settings_file(os.environ), settings.state_folder(os.environ)
        chosen = settings.load(file)
        from gridcloud.site.daemon import serve  # noqa: PLC0415 - a bad setting is told at once

        serve(chosen, file, state, ephemeral=arguments.ephemeral)
    except GridcloudError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - for the person who started it
        sys.exit(STATUSES[error.code][1])


if __name__ == "__main__":
    main()
