"""The grants of loans: the documents that tell borrowers what they have, made out and kept.

A lease in the store says what holds. Its grant is made out after it, and anew whenever the lease's
end was moved, so that a crash in between leaves nothing contradictory.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from gridcloud.access.certificates import parse_certificate
from gridcloud.access.keys import public_line
from gridcloud.grid.leasing import LeaseRequest
from gridcloud.grid.papers import LeaseGrant
from gridcloud.model.lease import Endpoint, Lease
from gridcloud.site.keyring import Keyring
from gridcloud.site.ports import parse_address
from gridcloud.store.papers import PaperStore

#: A certificate must end after it begins, though a loan may be recalled at once.
_SHORTEST = timedelta(seconds=1)
#: How long a grant is kept once it has ended, and how often is looked for such.
_KEPT_FOR = timedelta(days=30)
_LOOK_EVERY = timedelta(hours=1)


class Grants:
    """Makes grants out and remembers them."""

    def __init__(self, keyring: Keyring, papers: PaperStore) -> None:
        self._keyring = keyring
        self._papers = papers
        self._look_at = datetime.min.replace(tzinfo=UTC)

    async def make(
        self, request: LeaseRequest, lease: Lease, folder: str, gateway_address: str
    ) -> LeaseGrant:
        """Make out and keep the first grant of a lease."""
        assert lease.ends_at and lease.terms
        host, port = parse_address(gateway_address) if gateway_address else ("", 0)
        notice = lease.terms.notice
        grant = LeaseGrant(
            lease_id=lease.id,
            community=request.community,
            lender=self._keyring.identity.key,
            borrower=request.borrower,
            person=request.person,
            need=lease.need,
            endpoint=Endpoint(
                host=host,
                port=port,
                user=lease.id,
                host_keys=(public_line(self._keyring.gateway_host_key),),
            ),
            certificate=self._certificate(request.ssh_public_key, lease),
            folder=folder,
            starts_at=lease.created_at,
            ends_at=lease.ends_at,
            prices=lease.terms.prices,
            notice_seconds=None if notice is None else int(notice.total_seconds()),
            revision=lease.revision,
        )
        await self._keep(grant)
        return grant

    async def current(self, lease: Lease) -> LeaseGrant | None:
        """Return the grant of a lease as it stands; None if it was never granted."""
        document = await self._papers.grant(lease.id)
        if document is None:
            return None
        grant = LeaseGrant.model_validate_json(document)
        if lease.ends_at and grant.revision < lease.revision:
            key = public_line(parse_certificate(grant.certificate).key)
            changes = {
                "ends_at": lease.ends_at,
                "revision": lease.revision,
                "certificate": self._certificate(key, lease),
            }
            grant = grant.model_copy(update=changes)
            await self._keep(grant)
        return grant

    async def forget_old(self, live: Iterable[str], now: datetime) -> None:
        """Drop the grants of loans that are long over, but those of ``live`` leases.

        Does so once an hour, however often it is called.
        """
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY
            await self._papers.forget_grants(now - _KEPT_FOR, live)

    def _certificate(self, public_key: str, lease: Lease) -> str:
        assert lease.ends_at
        ends = max(lease.ends_at, lease.created_at + _SHORTEST)
        return self._keyring.user_ca.issue(public_key, lease.id, lease.created_at, ends)

    async def _keep(self, grant: LeaseGrant) -> None:
        text = grant.model_dump_json()
        await self._papers.save_grant(grant.community, grant.lease_id, text, grant.ends_at)
