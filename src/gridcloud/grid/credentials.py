"""Credentials: a member's proof of membership that needs nothing but the community's identity.

A credential is the membership's document; if a manager signed that, ``~`` and the manager's own
membership, signed by the founder, follow. There is no longer chain: only the founder makes
managers. A revocation is proved alike. What is proved here was true when it was signed; whether it
still holds is for the `Roster` to say, which knows what was revoked since.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from gridcloud.errors import Forbidden, InvalidSpec
from gridcloud.grid.documents import LEEWAY, claimed_signer, verify
from gridcloud.grid.identity import short
from gridcloud.grid.messages import RevocationRecord
from gridcloud.grid.papers import Membership, Revocation, Role, split_community

_HINT = "Ask for an invitation."


class Admission(NamedTuple):
    """A proved credential: the membership, and that of the manager who signed it, if one did."""

    text: str
    membership: Membership
    chain: Membership | None


class Removal(NamedTuple):
    """A proved revocation, and the membership of the manager on whose word its proof rests."""

    record: RevocationRecord
    revocation: Revocation
    chain: Membership | None


def verify_credential(credential: str, community: str, now: datetime) -> Membership:
    """Return the membership that a credential proves; see `read_credential`."""
    return read_credential(credential, community, now).membership


def read_credential(credential: str, community: str, now: datetime) -> Admission:
    """Return what a credential proves for ``community``, whoever showed it.

    The caller compares ``member`` with the key that the other side proved. Raises `InvalidSpec`
    if it is malformed and `Forbidden` if it proves nothing about this community.
    """
    name, founder = split_community(community)
    document, *chain = credential.split("~")
    if len(chain) > 1:
        raise InvalidSpec("The credential has more than two parts.", hint=_HINT)
    issuer = claimed_signer(document)
    membership = verify(document, Membership, issuer, now)
    _about(membership.community, community, "membership")
    if issuer == founder:
        if chain:
            raise InvalidSpec("A credential by the founder has one part.", hint=_HINT)
        return Admission(credential, membership, None)
    if not chain:
        raise Forbidden(
            f"The membership of {membership.site_name} in {name} is not signed by its founder.",
            hint=_HINT,
        )
    manager = _manager(chain[0], issuer, community, now)
    if Role.MANAGER in membership.roles:
        raise Forbidden(f"Only the founder of {name} makes managers.", hint=_HINT)
    if membership.issued_at < manager.issued_at - LEEWAY:
        raise Forbidden(f"{short(issuer)} was no manager of {name} yet.", hint=_HINT)
    return Admission(credential, membership, manager)


def read_revocation(record: RevocationRecord, community: str, now: datetime) -> Removal:
    """Return what a revocation proves for ``community``, whoever passed it on.

    Raises `InvalidSpec` if it is malformed and `Forbidden` if its signer may not remove members,
    or nobody but the founder might.
    """
    name, founder = split_community(community)
    issuer = claimed_signer(record.revocation)
    revocation = verify(record.revocation, Revocation, issuer, now)
    _about(revocation.community, community, "revocation")
    if issuer == founder:
        if record.proof:
            raise InvalidSpec("A revocation by the founder needs no proof.")
        return Removal(record, revocation, None)
    if revocation.member == founder:
        raise Forbidden(f"Nobody removes the founder of {name}.")
    if not record.proof:
        raise Forbidden(f"{short(issuer)} shows no leave to remove members of {name}.")
    if issuer == revocation.member:  # only who was a member can leave: strangers fill no rosters
        admission = read_credential(record.proof, community, now)
        if admission.membership.member != issuer:
            raise Forbidden(f"{short(issuer)} leaves {name} by another's membership.")
        return Removal(record, revocation, admission.chain)
    manager = _manager(record.proof, issuer, community, now)
    if revocation.revoked_at < manager.issued_at - LEEWAY:
        raise Forbidden(f"{short(issuer)} was no manager of {name} yet.")
    return Removal(record, revocation, manager)


def make_credential(document: str, issuer_credential: str, *, by_founder: bool) -> str:
    """Return the credential for a fresh membership document of an issuer with its own."""
    return document if by_founder else f"{document}~{issuer_credential}"


def _manager(document: str, key: str, community: str, now: datetime) -> Membership:
    """Return the membership that makes ``key`` a manager."""
    name, founder = split_community(community)
    membership = verify(document, Membership, founder, now)
    _about(membership.community, community, "membership")
    if membership.member != key or Role.MANAGER not in membership.roles:
        raise Forbidden(f"{short(key)} is no manager of {name}.", hint=_HINT)
    return membership


def _about(theirs: str, community: str, what: str) -> None:
    if theirs != community:
        other, _ = split_community(theirs)
        raise Forbidden(f"That is a {what} of another community ({other}).", hint=_HINT)
