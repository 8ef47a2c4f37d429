"""Gather the results of all volumes into one table, ``summary.csv``.

Looks in the folder and all folders below it for what the steps wrote: the verdicts
(``accepted/NAME.json``, ``discarded/NAME.json``) and the measurements (``NAME_pores.json``). One
row per volume, sorted by its name. The porosity is the measured one, or for a volume that was not
analysed the estimate of the check; what is not known is left empty.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

COLUMNS = ("volume", "accepted", "porosity", "number_of_pores", "mean_radius")
VERDICTS = ("accepted", "discarded")


def gather(results: Path) -> list[dict[str, Any]]:
    """Return a row for each volume that anything is known of."""
    files = sorted(results.rglob("*.json"))
    verdicts = [file for file in files if file.parent.name in VERDICTS]
    measured = [file for file in files if file.name.endswith("_pores.json")]
    rows: dict[str, dict[str, Any]] = {}
    for file in [*verdicts, *measured]:  # in this order, so what is measured replaces estimates
        try:
            found = json.loads(file.read_text())
            row = rows.setdefault(found["volume"], {})
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"summarise: {file} is not a result of a step: {error!r}") from error
        if "accepted" in row and "accepted" in found:
            raise SystemExit(f"summarise: {file}: there is another verdict on {found['volume']}")
        row.update((column, found[column]) for column in COLUMNS if column in found)
    return [rows[name] for name in sorted(rows)]


def main(argv: list[str] | None = None) -> None:
    """Write the summary."""
    parser = argparse.ArgumentParser(
        description="Gather the verdicts and measurements of all volumes into summary.csv: "
        + ", ".join(COLUMNS)
        + "."
    )
    parser.add_argument("results", type=Path, help="folder the steps wrote to")
    parser.add_argument("--into", type=Path, required=True, help="folder to write to; made if new")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.results.is_dir():
            raise SystemExit(f"summarise: {arguments.results} is not a folder")
        rows = gather(arguments.results)
        if not rows:
            raise SystemExit(f"summarise: no results in {arguments.results}")
        arguments.into.mkdir(parents=True, exist_ok=True)
        with (arguments.into / "summary.csv").open("w", newline="") as stream:
            table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    except OSError as error:
        raise SystemExit(f"summarise: {error}") from error
    accepted = sum(row.get("accepted", False) for row in rows)
    print(f"{arguments.into / 'summary.csv'}  {len(rows)} volumes, {accepted} accepted")


if __name__ == "__main__":
    main()
