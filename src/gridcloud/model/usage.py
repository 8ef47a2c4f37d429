"""What was lent and borrowed: figures, receipts as a site keeps them, and shares that fade.

All figures are of what was *leased*: CPUs, memory and GPUs set aside for the borrower, times how
long. They are not measured: an idle lease costs its owner as much as a busy one. An hour of a CPU
is a CPU-hour, of a GiB of memory a GB-hour, of a GPU a GPU-hour.
"""

from __future__ import annotations

from collections.abc import Hashable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Generic, TypeVar

from pydantic import AwareDatetime, Field

from gridcloud.model.frozen import Frozen
from gridcloud.model.need import GIB, Resources
from gridcloud.model.prices import Prices

_HOUR = timedelta(hours=1)
CommunityText = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}(\.[0-9a-f]{0,64})?$")]
PersonText = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}@[a-z0-9][a-z0-9-]{0,62}$")]
Key = TypeVar("Key", bound=Hashable)


class Side(StrEnum):
    """Whether a site lent what a receipt is about, or borrowed it."""

    LENT = "lent"
    BORROWED = "borrowed"


class ReceiptState(StrEnum):
    """How far both sides agree. Only what is agreed counts in the figures.

    OPEN: the borrower has not answered yet. DISPUTED: it does not agree. MISSING: a loan ended a
    day ago or longer, and its lender has shown no receipt.
    """

    AGREED = "agreed"
    OPEN = "open"
    DISPUTED = "disputed"
    MISSING = "missing"


class Grouping(StrEnum):
    """What the rows of a usage table stand for. Months are those of UTC."""

    COMMUNITY = "community"
    PERSON = "person"
    SITE = "site"
    MONTH = "month"


class Figures(Frozen):
    """Sums over ``receipts`` receipts, the first of which begins and the last ends at these times.

    ``credits`` are in the credits of the community.
    """

    receipts: int = 0
    cpu_hours: float = 0.0
    gb_hours: float = 0.0
    gpu_hours: float = 0.0
    credits: float = 0.0
    begun_at: datetime | None = None
    ended_at: datetime | None = None

    def __add__(self, other: Figures) -> Figures:
        begun = [at for at in (self.begun_at, other.begun_at) if at]
        ended = [at for at in (self.ended_at, other.ended_at) if at]
        return Figures(
            receipts=self.receipts + other.receipts,
            cpu_hours=self.cpu_hours + other.cpu_hours,
            gb_hours=self.gb_hours + other.gb_hours,
            gpu_hours=self.gpu_hours + other.gpu_hours,
            credits=self.credits + other.credits,
            begun_at=min(begun, default=None),
            ended_at=max(ended, default=None),
        )


def leased(
    resources: Resources, begun_at: datetime, ended_at: datetime, credits_: float
) -> Figures:
    """Return the figures of one loan."""
    hours = (ended_at - begun_at) / _HOUR
    return Figures(
        receipts=1,
        cpu_hours=resources.cpus * hours,
        gb_hours=resources.memory_bytes / GIB * hours,
        gpu_hours=resources.gpus * hours,
        credits=credits_,
        begun_at=begun_at,
        ended_at=ended_at,
    )


class UsageRow(Frozen):
    """One row: the figures of a community, of a person or site in one, or of a month."""

    side: Side
    community: str = ""
    group: str
    figures: Figures


class UsageReport(Frozen):
    """What a site lent and borrowed by the receipts that both sides signed.

    ``open``, ``disputed`` and ``missing`` count what is left out of the figures.
    """

    by: Grouping
    since: datetime | None = None
    rows: tuple[UsageRow, ...] = ()
    open: int = 0
    disputed: int = 0
    missing: int = 0

    def total(self, side: Side) -> Figures:
        """Return the sum of one side."""
        return sum((row.figures for row in self.rows if row.side is side), Figures())


class Loan(Frozen):
    """What this site borrowed: the terms its receipt must keep to. ``site`` is the lender's name.

    ``notice`` is how long ahead the lender may recall it; None if it agreed not to.
    ``given_back_at`` is when the lender was last told that the loan is over; None if it never was.
    """

    lease_id: str
    lender: str
    community: str
    site: str
    person: str
    resources: Resources
    prices: Prices = Prices()
    starts_at: datetime
    ends_at: datetime
    notice: timedelta | None = None
    given_back_at: datetime | None = None

    @property
    def ended_at(self) -> datetime:
        """When it ended, or will at the latest."""
        return min(self.given_back_at or self.ends_at, self.ends_at)


class KeptReceipt(Frozen):
    """A receipt as a site keeps it, or a `Loan` for which none came (then without a number).

    ``id`` is the SHA-256 of ``document``, ``site`` the other side's name in the community,
    ``remark`` why there is no agreement. ``document`` and ``countersignature`` are the signed
    texts; a list leaves them out.
    """

    id: str = ""
    side: Side
    state: ReceiptState
    number: int = 0
    community: str
    lender: str
    borrower: str
    site: str
    person: str
    lease_id: str
    resources: Resources
    begun_at: datetime
    ended_at: datetime
    credits: float = 0.0
    remark: str = ""
    document: str = ""
    countersignature: str = ""

    @property
    def figures(self) -> Figures:
        """What it counts for."""
        return leased(self.resources, self.begun_at, self.ended_at, self.credits)


class ReceiptFilter(Frozen):
    """Which receipts are meant; what is not given does not matter.

    ``community`` is NAME, NAME.KEY or the beginning of the latter; ``since`` counts from a loan's
    end.
    """

    community: CommunityText | None = None
    person: PersonText | None = None
    side: Side | None = None
    states: tuple[ReceiptState, ...] = ()
    since: AwareDatetime | None = None


class UsageQuery(ReceiptFilter):
    """What a usage table is asked for."""

    by: Grouping = Grouping.COMMUNITY


class ReceiptsQuery(ReceiptFilter):
    """What a list of receipts is asked for."""

    latest: Annotated[int, Field(ge=1, le=100_000)] = 50


class Flaw(Frozen):
    """What is wrong with one receipt in a file, or with one line if that holds no receipt."""

    file: str
    line: int
    receipt: str = ""
    problem: str


class Audit(Frozen):
    """What came out of checking files of receipts, with no help from anyone.

    ``agreed`` sums the receipts in which nothing is wrong and which both sides signed, by
    community, lender and borrower. ``open`` counts those without a countersignature; ``notes``
    tell what is no fault but should be known.
    """

    receipts: int = 0
    open: int = 0
    flaws: tuple[Flaw, ...] = ()
    notes: tuple[str, ...] = ()
    agreed: tuple[AuditedLoans, ...] = ()


class AuditedLoans(Frozen):
    """What one site lent to another by their receipts; names as their memberships prove them."""

    community: str
    lender: str
    lender_name: str
    borrower: str
    borrower_name: str
    figures: Figures


class FadingSums(Generic[Key]):
    """Sums whose parts fade: what was used one ``half_life`` ago counts half.

    Adding is cheap, in any order; a part from after the time asked for counts in full.
    """

    def __init__(self, half_life: timedelta) -> None:
        if half_life <= timedelta(0):
            raise ValueError("a half-life is positive")
        self._half_life_seconds = half_life.total_seconds()
        #: Each sum as it stands at a time, in seconds since the epoch.
        self._sums: dict[Key, tuple[float, float]] = {}

    def add(self, key: Key, at_seconds: float, amount: float) -> None:
        """Add ``amount``, used up to ``at_seconds`` (since the epoch), to the sum of ``key``."""
        value, stands_at = self._sums.get(key, (0.0, at_seconds))
        newest = max(stands_at, at_seconds)
        value = value * self._fade(newest - stands_at) + amount * self._fade(newest - at_seconds)
        self._sums[key] = (value, newest)

    def sums(self, now: datetime) -> dict[Key, float]:
        """Return all sums as they stand at ``now``."""
        seconds = now.timestamp()
        return {
            key: value * self._fade(max(0.0, seconds - stands_at))
            for key, (value, stands_at) in self._sums.items()
        }

    def _fade(self, age_seconds: float) -> float:
        halvings = age_seconds / self._half_life_seconds
        return 0.5**halvings if halvings < 1000 else 0.0
