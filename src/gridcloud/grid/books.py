"""Books: receipts in a file that anyone can check, with no network and no site.

A file is JSON lines: a heading, then the credentials that prove the members' names, then the
receipts with the borrowers' countersignatures. Nothing in it is believed but what is signed: a
community's identity holds its founder's key, the credentials prove the members' keys and names
from that, the members' keys prove the rest. What the heading says decides only whether numbers
missing in a chain are a fault.

``python -m gridcloud.grid.books [--community NAME.KEY] FILE...`` prints an `Audit` as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from gridcloud.errors import STATUSES, GridcloudError, InvalidSpec, Unavailable
from gridcloud.grid.credentials import verify_credential
from gridcloud.grid.documents import MAX_DOCUMENT_BYTES, claimed_signer
from gridcloud.grid.identity import short
from gridcloud.grid.papers import CommunityId, Key, split_community
from gridcloud.grid.receipts import (
    ANY_TIME,
    MAX_RECEIPT_BYTES,
    Link,
    chain_objections,
    link,
    read_countersignature,
    read_receipt,
    sum_objection,
)
from gridcloud.model.frozen import Frozen
from gridcloud.model.usage import Audit, AuditedLoans, Figures, Flaw, leased

_MAX_LINE_BYTES = 4 * MAX_DOCUMENT_BYTES
_NOTES_TOLD = 100
#: Of receipts that contradict one another each is held against so many others: enough to be told.
_HELD_AGAINST = 4


class Heading(Frozen):
    """The first line: the format, whose books these are, and how many receipts follow."""

    gridcloud_receipts: Literal[1] = 1
    site: Key
    receipts: Annotated[int, Field(ge=0)]


class NameLine(Frozen):
    """What proves a member's name."""

    community: CommunityId
    credential: Annotated[str, Field(max_length=2 * MAX_DOCUMENT_BYTES + 1)]


class ReceiptLine(Frozen):
    """A receipt, and the borrower's signature under it if there is one."""

    receipt: Annotated[str, Field(max_length=MAX_RECEIPT_BYTES)]
    countersignature: Annotated[str, Field(max_length=MAX_RECEIPT_BYTES)] = ""


Line = Heading | NameLine | ReceiptLine
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


@dataclass
class _Entry:
    """What is kept of one receipt while files are read; its texts are not."""

    file: str
    line: int
    link: Link
    borrower: str
    person: str
    figures: Figures
    agreed: bool
    problems: list[str] = field(default_factory=list)


class Auditor:
    """Checks books. Hand it all files that belong together, then ask for the `audit`."""

    def __init__(self, communities: Iterable[str] = ()) -> None:
        self._pinned = frozenset(communities)
        self._names: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._entries: dict[str, _Entry] = {}
        self._sites: set[str] = set()
        self._flaws: list[Flaw] = []
        self._notes: list[str] = []

    def read(self, name: str, lines: Iterable[bytes]) -> None:
        """Read one file of this name. What cannot be read or proved becomes a flaw of its line."""
        heading: Heading | None = None
        found = 0
        for number, text in enumerate(lines, start=1):
            try:
                line = _parse(text)
                if isinstance(line, Heading):
                    if number > 1:
                        raise InvalidSpec("A heading belongs at the beginning only.")
                    heading = line
                    self._sites.add(line.site)
                elif isinstance(line, NameLine):
                    membership = verify_credential(line.credential, line.community, ANY_TIME)
                    self._names[line.community, membership.member].add(membership.site_name)
                else:
                    found += 1
                    self._read_receipt(name, number, line, heading)
            except GridcloudError as error:
                self._flaws.append(Flaw(file=name, line=number, problem=error.message))
        if heading is None:
            self._flaws.append(Flaw(file=name, line=1, problem="The heading is missing."))
        elif heading.receipts != found:
            problem = f"There should be {heading.receipts} receipts, but {found} can be read."
            self._flaws.append(Flaw(file=name, line=1, problem=problem))

    def audit(self) -> Audit:
        """Return what came out."""
        chains: dict[tuple[str, str], dict[int, list[Link]]] = {}
        leases: dict[str, list[Link]] = defaultdict(list)
        for entry in self._entries.values():
            chain = chains.setdefault((entry.link.lender, entry.link.community), {})
            chain.setdefault(entry.link.number, []).append(entry.link)
            leases[entry.link.lease_id].append(entry.link)
        for entry in self._entries.values():
            mine = entry.link
            chain = chains[mine.lender, mine.community]
            near = [
                each
                for step in (-1, 0, 1)
                for each in chain.get(mine.number + step, [])[:_HELD_AGAINST]
            ]
            others = {each.id: each for each in (*near, *leases[mine.lease_id][:_HELD_AGAINST])}
            entry.problems += chain_objections(mine, others.values())
            entry.problems += self._unproved(entry)
        for chain in chains.values():
            self._look_for_gaps(chain)
        return self._result()

    def _read_receipt(
        self, name: str, number: int, line: ReceiptLine, heading: Heading | None
    ) -> None:
        receipt = read_receipt(line.receipt, claimed_signer(line.receipt))
        place = link(line.receipt, receipt)
        entry = _Entry(
            file=name,
            line=number,
            link=place,
            borrower=receipt.borrower,
            person=receipt.person,
            figures=leased(receipt.resources, receipt.begun_at, receipt.ended_at, receipt.credits),
            agreed=False,
        )
        if heading and heading.site not in (receipt.lender, receipt.borrower):
            entry.problems.append(f"it is none of {short(heading.site)}, whose books these are")
        if objection := sum_objection(receipt):
            entry.problems.append(objection)
        if line.countersignature:
            try:
                read_countersignature(line.countersignature, line.receipt, receipt.borrower)
                entry.agreed = True
            except GridcloudError as error:
                entry.problems.append(f"its countersignature is wrong: {error.message}")
        known = self._entries.setdefault(place.id, entry)
        if known is not entry:  # the other side's books, or the same twice
            known.agreed |= entry.agreed
            known.problems += [each for each in entry.problems if each not in known.problems]

    def _unproved(self, entry: _Entry) -> Iterator[str]:
        community = entry.link.community
        if self._pinned and community not in self._pinned:
            yield f"it is of another community, {community}"
        for role, key in (("lender", entry.link.lender), ("borrower", entry.borrower)):
            if not self._names.get((community, key)):
                yield f"nothing proves that its {role} {short(key)} is a member of the community"
        names = self._names.get((community, entry.borrower), set())
        if names and entry.person.rpartition("@")[2] not in names:
            yield f"its borrower is not called as {entry.person} says"

    def _look_for_gaps(self, chain: dict[int, list[Link]]) -> None:
        before = 0
        for number in sorted(chain):
            mine = chain[number][0]
            if number > before + 1:
                gap = f"{before + 1}" if number == before + 2 else f"{before + 1} to {number - 1}"
                if mine.lender in self._sites:
                    self._entries[mine.id].problems.append(f"before it number {gap} is missing")
                else:
                    where = f"{short(mine.lender)} in {mine.community.partition('.')[0]}"
                    self._note(f"{where}: number {gap} is not here (of others, or left out)")
            before = number

    def _note(self, text: str) -> None:
        if len(self._notes) < _NOTES_TOLD:
            self._notes.append(text)
        elif len(self._notes) == _NOTES_TOLD:
            self._notes.append("and more of the kind")

    def _result(self) -> Audit:
        sums: dict[tuple[str, str, str], Figures] = {}
        open_ = 0
        for entry in self._entries.values():
            for problem in entry.problems:
                flaw = Flaw(
                    file=entry.file, line=entry.line, receipt=entry.link.id, problem=problem
                )
                self._flaws.append(flaw)
            if not entry.agreed:
                open_ += 1
            elif not entry.problems:
                parties = entry.link.community, entry.link.lender, entry.borrower
                sums[parties] = sums.get(parties, Figures()) + entry.figures
        agreed = tuple(
            AuditedLoans(
                community=community,
                lender=lender,
                lender_name=self._name(community, lender),
                borrower=borrower,
                borrower_name=self._name(community, borrower),
                figures=figures,
            )
            for (community, lender, borrower), figures in sorted(sums.items())
        )
        flaws = sorted(self._flaws, key=lambda flaw: (flaw.file, flaw.line))
        return Audit(
            receipts=len(self._entries),
            open=open_,
            flaws=tuple(flaws),
            notes=tuple(self._notes),
            agreed=agreed,
        )

    def _name(self, community: str, key: str) -> str:
        return ", ".join(sorted(self._names[community, key]))


def _parse(text: bytes) -> Line:
    if len(text) > _MAX_LINE_BYTES:
        raise InvalidSpec("It is too long to be a line of such a file.")
    try:
        return _LINE.validate_json(text)
    except ValidationError as error:
        raise InvalidSpec("It is no line of such a file, or was damaged.") from error


def _lines(path: Path) -> Iterator[bytes]:
    """Return the lines of a file; more of a line than may be is cut off."""
    try:
        with path.open("rb") as file:
            while text := file.readline(_MAX_LINE_BYTES + 2):
                yield text
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.") from error


def _telling(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Pass lines on; a person who waits sees how many: about a thousand are checked in a second."""
    shown = sys.stderr.isatty()
    for number, line in enumerate(lines, start=1):
        if shown and number % 500 == 0:
            sys.stderr.write(f"\r{number} lines checked ")
            sys.stderr.flush()
        yield line
    if shown:
        sys.stderr.write("\r\x1b[K")


def main() -> None:
    """Check the files named on the command line; see the module."""
    parser = argparse.ArgumentParser(prog="gridcloud receipts verify")
    parser.add_argument("--community", action="append", default=[])
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    auditor = Auditor(arguments.community)
    try:
        for community in arguments.community:
            split_community(community)
        for path in arguments.files:
            auditor.read(str(path), _telling(_lines(path)))
    except GridcloudError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(STATUSES[error.code][1])
    sys.stdout.write(auditor.audit().model_dump_json())


if __name__ == "__main__":
    main()
