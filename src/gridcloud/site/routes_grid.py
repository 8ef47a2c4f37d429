"""Routes about communities, the sites in them, loans and accounts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from gridcloud.model.api import (
    CommunityInfo,
    GridSite,
    InvitationInfo,
    LeftInfo,
    MemberInfo,
    RequestInfo,
)
from gridcloud.model.frozen import Frozen
from gridcloud.model.loan import LoanInfo
from gridcloud.model.usage import (
    CommunityText,
    KeptReceipt,
    ReceiptsQuery,
    UsageQuery,
    UsageReport,
)
from gridcloud.model.written import Duration
from gridcloud.settings import SiteName
from gridcloud.site.routes_site import TheSite


class LoanEnd(Frozen):
    """How a loan is ended: after its notice, or now."""

    now: bool = False


class NewCommunity(Frozen):
    """A community to found."""

    name: str


class NewInvitation(Frozen):
    """An invitation to make out, for so many uses, each to be approved or not."""

    roles: tuple[str, ...] = ("provider", "consumer")
    valid_for: Duration
    approve: bool = False
    uses: int = 1


class RoleChange(Frozen):
    """Roles to give a member, and to take away."""

    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


class Decided(Frozen):
    """The key of the site that was refused or removed."""

    key: str


class JoinRequest(Frozen):
    """A join code, and the name to be known by (the site's own by default)."""

    code: str
    site_name: SiteName | None = None


router = APIRouter()


@router.get("/loans")
async def loans(site: TheSite) -> list[LoanInfo]:
    """Return what is lent, the oldest first."""
    return await site.loans()


@router.post("/loans/{lease_id}/end")
async def end_loan(site: TheSite, lease_id: str, end: LoanEnd) -> LoanInfo:
    """End a loan, after its notice or now."""
    return await site.end_loan(lease_id, now=end.now)


@router.get("/grid")
async def grid(site: TheSite, community: str | None = None) -> list[GridSite]:
    """Return the sites of one community, or of all, as known now; nobody is asked."""
    return await site.peers.grid(community)


@router.get("/communities")
async def communities(site: TheSite) -> list[CommunityInfo]:
    """Return the communities this site belongs to."""
    return await site.peers.communities()


@router.post("/communities", status_code=201)
async def create_community(site: TheSite, new: NewCommunity) -> CommunityInfo:
    """Found a community."""
    return await site.peers.create_community(new.name)


@router.post("/communities/join", status_code=201)
async def join_community(site: TheSite, request: JoinRequest) -> CommunityInfo:
    """Join by a code."""
    return await site.peers.join(request.code, request.site_name)


@router.post("/communities/{name}/invitations", status_code=201)
async def invite(site: TheSite, name: str, new: NewInvitation) -> InvitationInfo:
    """Make out a join code."""
    return await site.peers.invite(
        name, new.roles, new.valid_for, approve=new.approve, uses=new.uses
    )


@router.get("/communities/{name}/members")
async def members(site: TheSite, name: str) -> list[MemberInfo]:
    """Return the members, as last seen."""
    return await site.peers.members(name)


@router.delete("/communities/{name}")
async def leave_community(site: TheSite, name: str) -> LeftInfo:
    """Leave a community, or ask no more to be admitted to it."""
    return await site.leave_community(name)


@router.get("/communities/{name}/requests")
async def requests(site: TheSite, name: str) -> list[RequestInfo]:
    """Return who asks to be admitted."""
    return await site.peers.requests(name)


@router.post("/communities/{name}/requests/{member}/approve")
async def approve(site: TheSite, name: str, member: str) -> MemberInfo:
    """Admit a site that asks."""
    return await site.peers.approve(name, member)


@router.post("/communities/{name}/requests/{member}/refuse")
async def refuse(site: TheSite, name: str, member: str) -> Decided:
    """Refuse a site that asks."""
    return Decided(key=await site.peers.refuse(name, member))


@router.patch("/communities/{name}/members/{member}")
async def change_roles(site: TheSite, name: str, member: str, change: RoleChange) -> MemberInfo:
    """Give a member roles, or take some away."""
    return await site.peers.change_roles(name, member, change.add, change.drop)


@router.delete("/communities/{name}/members/{member}")
async def remove_member(site: TheSite, name: str, member: str, reason: str = "") -> Decided:
    """Remove a member for good."""
    return Decided(key=await site.peers.remove(name, member, reason))


@router.get("/usage")
async def usage(
    site: TheSite,
    chosen: Annotated[UsageQuery, Query()],
) -> UsageReport:
    """Return what was lent and borrowed, by the receipts that both sides signed."""
    return await site.accounting.report(chosen.by, chosen)


@router.get("/receipts")
async def receipts(site: TheSite, chosen: Annotated[ReceiptsQuery, Query()]) -> list[KeptReceipt]:
    """Return the latest receipts, oldest first, and loans for which none came."""
    return await site.accounting.receipts(chosen, chosen.latest)


@router.get("/receipts/{receipt}")
async def receipt(site: TheSite, receipt: str) -> KeptReceipt:
    """Return one receipt, by the beginning of its id or by its lease, with its signed texts."""
    return await site.accounting.receipt(receipt)


@router.get("/books")
async def books(
    site: TheSite, community: Annotated[CommunityText | None, Query()] = None
) -> StreamingResponse:
    """Return all receipts as JSON lines that prove themselves."""
    lines = site.accounting.books(community)
    return StreamingResponse(lines, media_type="application/jsonl")
