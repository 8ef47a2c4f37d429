"""Credentials: a member's proof of membership that needs nothing but the community's identity.

A credential is the membership's document; if a manager signed that, ``~`` and the manager's own
membership, signed by the founder, follow. There is no longer chain: only the founder makes
managers.
"""

from __future__ import annotations

from datetime import datetime

from gridcloud.errors import Forbidden, InvalidSpec
from gridcloud.grid.documents import claimed_signer, verify
from gridcloud.grid.identity import short
from gridcloud.grid.papers import Membership, Role, split_community

_HINT = "Ask for an invitation."


def verify_credential(credential: str, community: str, now: datetime) -> Membership:
    """Return the membership that a credential proves for ``community``, whoever showed it.

    The caller compares ``member`` with the key that the other side proved. Raises `InvalidSpec`
    if it is malformed and `Forbidden` if it proves nothing about this community.
    """
    name, founder = split_community(community)
    document, *chain = credential.split("~")
    if len(chain) > 1:
        raise InvalidSpec("The credential has more than two parts.", hint=_HINT)
    issuer = claimed_signer(document)
    membership = verify(document, Membership, issuer, now)
    _about(membership, community)
    if issuer == founder:
        return membership
    if not chain:
        raise Forbidden(
            f"The membership of {membership.site_name} in {name} is not signed by its founder.",
            hint=_HINT,
        )
    manager = verify(chain[0], Membership, founder, now)
    _about(manager, community)
    if manager.member != issuer or Role.MANAGER not in manager.roles:
        raise Forbidden(f"{short(issuer)} may not admit members to {name}.", hint=_HINT)
    if Role.MANAGER in membership.roles:
        raise Forbidden(f"Only the founder of {name} makes managers.", hint=_HINT)
    return membership


def make_credential(document: str, issuer_credential: str, *, by_founder: bool) -> str:
    """Return the credential for a fresh membership document of an issuer with its own."""
    return document if by_founder else f"{document}~{issuer_credential}"


def _about(membership: Membership, community: str) -> None:
    if membership.community != community:
        other, _ = split_community(membership.community)
        raise Forbidden(f"That is a membership of another community ({other}).", hint=_HINT)
