"""Receipts: what both sides of a loan sign once it has ended, and the rules they are judged by.

The lender signs a `Receipt`, the borrower a `Countersignature` under its very text. A lender's
receipts in one community are numbered from 1, and each holds the hash of the one before: a lender
can neither drop nor alter one unnoticed by who has seen a later one. All here is pure; times are
those the papers say, so that old receipts can be checked whatever the clock shows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from gridcloud.errors import Forbidden, InvalidSpec
from gridcloud.grid.documents import LEEWAY, AnyPaper, verify
from gridcloud.grid.identity import short
from gridcloud.grid.papers import CommunityId, Key, LeaseId, Moment, Paper, Person
from gridcloud.model.need import Resources
from gridcloud.model.prices import Prices
from gridcloud.model.usage import Loan

#: A receipt is some 1100 characters long; what is much longer is refused unread.
MAX_RECEIPT_BYTES = 4096
#: The ``previous`` of the first receipt of a chain.
NO_RECEIPT = "0" * 64
#: How long after a borrower gave a loan back it may be counted: clocks differ, words travel.
TOLERANCE = 2 * LEEWAY
#: A time at which every paper that does not lapse holds: checking old books asks for no clock.
ANY_TIME = datetime(9000, 1, 1, tzinfo=UTC)

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[int, Field(ge=1, lt=2**53)]
Amount = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]


class Receipt(Paper):
    """What one loan took: ``resources`` set aside from ``begun_at`` to ``ended_at``.

    ``credits`` are its price, rounded to millionths; see `price`. ``previous`` is the hash of the
    receipt numbered one lower, of the same lender in the same community.
    """

    kind: ClassVar[str] = "gridcloud-receipt"
    community: CommunityId
    lender: Key
    borrower: Key
    person: Person
    lease_id: LeaseId
    resources: Resources
    begun_at: Moment
    ended_at: Moment
    prices: Prices
    credits: Amount
    number: Number
    previous: Hash

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.ended_at < self.begun_at:
            raise ValueError("the loan ends before it begins")
        return self

    @property
    def signer(self) -> str:
        """The lender."""
        return self.lender

    @property
    def begins_at(self) -> datetime:
        """The loan's end: there is no receipt for what is still to come."""
        return self.ended_at


class Countersignature(Paper):
    """The borrower agrees to one receipt, named by the hash of its text."""

    kind: ClassVar[str] = "gridcloud-countersignature"
    receipt: Hash
    borrower: Key
    agreed_at: Moment

    @property
    def signer(self) -> str:
        """The borrower."""
        return self.borrower

    @property
    def begins_at(self) -> datetime:
        """When it agreed."""
        return self.agreed_at


class Link(NamedTuple):
    """A receipt's place in its chain; ``id`` is its hash."""

    id: str
    lender: str
    community: str
    lease_id: str
    number: int
    previous: str


def link(document: str, receipt: Receipt) -> Link:
    """Return the place of a receipt, from its text and what that says."""
    return Link(
        id=receipt_hash(document),
        lender=receipt.lender,
        community=receipt.community,
        lease_id=receipt.lease_id,
        number=receipt.number,
        previous=receipt.previous,
    )


def receipt_hash(document: str) -> str:
    """Return the SHA-256 of a receipt's text, in hex: what the next receipt and the borrower name.

    It is of the text, not of what it says: nobody else can make the same signed text.
    """
    return hashlib.sha256(document.encode()).hexdigest()


def price(prices: Prices, resources: Resources, begun_at: datetime, ended_at: datetime) -> float:
    """Return what a loan costs, in credits, rounded to millionths."""
    return round(prices.cost(resources, ended_at - begun_at), 6)


def read_receipt(document: str, lender: str, now: datetime = ANY_TIME) -> Receipt:
    """Return what a receipt says, once it is proved to be ``lender``'s.

    By default at any time; with ``now`` one that ends later is refused. Raises `InvalidSpec` or
    `Forbidden`.
    """
    return _read(document, Receipt, lender, now)


def read_countersignature(document: str, receipt: str, borrower: str) -> Countersignature:
    """Return a countersignature, once it is proved to be ``borrower``'s under this receipt.

    Raises `InvalidSpec` or `Forbidden`.
    """
    read = _read(document, Countersignature, borrower, ANY_TIME)
    if read.receipt != receipt_hash(receipt):
        raise Forbidden(f"{short(borrower)} countersigned another receipt.")
    return read


def sum_objection(receipt: Receipt) -> str:
    """Return why a receipt's credits are not what its own figures make, or nothing."""
    due = price(receipt.prices, receipt.resources, receipt.begun_at, receipt.ended_at)
    if math.isclose(receipt.credits, due, rel_tol=1e-9, abs_tol=2e-6):
        return ""
    return f"it says {receipt.credits:g} credits where its own figures make {due:g}"


def loan_objections(receipt: Receipt, loan: Loan) -> list[str]:
    """Return in what a receipt differs from the loan as its borrower knows it; [] if in nothing.

    Less than was lent is no objection. An empty ``person`` of a loan is one that is not known.
    """
    objections = []
    if receipt.lender != loan.lender:
        objections.append(f"the loan was {short(loan.lender)}'s")
    if receipt.community != loan.community:
        objections.append("the loan was made in another community")
    if loan.person and receipt.person != loan.person:
        objections.append(f"the loan was for {loan.person}, not {receipt.person}")
    if receipt.resources != loan.resources:
        objections.append("other CPUs, memory or GPUs were lent")
    if receipt.prices != loan.prices:
        objections.append("other prices were granted")
    if receipt.begun_at < loan.starts_at - LEEWAY:
        objections.append(f"the loan began only at {_shown(loan.starts_at)}")
    latest = loan.ends_at + LEEWAY
    if loan.given_back_at is not None:
        latest = min(latest, loan.given_back_at + TOLERANCE)
    if receipt.ended_at > latest:
        objections.append(f"the loan was over at {_shown(loan.ended_at)}")
    if objection := sum_objection(receipt):
        objections.append(objection)
    return objections


def chain_objections(mine: Link, others: Iterable[Link]) -> list[str]:
    """Return in what a receipt contradicts others of its lender; [] if in nothing.

    Only others of the same chain or the same lease matter. Where numbers are missing between two
    receipts, which is so wherever a lender has several borrowers, nothing can be said.
    """
    objections = []
    if (mine.number == 1) != (mine.previous == NO_RECEIPT):
        objections.append("its number and the hash of the receipt before do not agree")
    for other in others:
        if other.id == mine.id or other.lender != mine.lender:
            continue
        if other.lease_id == mine.lease_id:
            objections.append(f"there is another receipt of this lease, number {other.number}")
        if other.community != mine.community:
            continue
        if other.number == mine.number:
            objections.append(f"there is another receipt numbered {mine.number}")
        elif other.number == mine.number - 1 and mine.previous != other.id:
            objections.append(f"it does not follow receipt {other.number} as that was shown")
        elif other.number == mine.number + 1 and other.previous != mine.id:
            objections.append(f"receipt {other.number} follows another one than this")
    return objections


def _read(document: str, paper: type[AnyPaper], issuer: str, now: datetime) -> AnyPaper:
    if len(document) > MAX_RECEIPT_BYTES:
        raise InvalidSpec(f"No receipt is longer than {MAX_RECEIPT_BYTES} characters.")
    return verify(document, paper, issuer, now)


def _shown(at: datetime) -> str:
    return at.isoformat(sep=" ", timespec="seconds")
