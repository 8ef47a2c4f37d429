"""Asking to be admitted: who asks this site, and where this site asks itself. Kept in the store."""

from __future__ import annotations

import hashlib

from pydantic import AwareDatetime, ValidationError

from gridcloud.errors import Conflict, GridcloudError, NotFound
from gridcloud.grid.community_store import CommunityStore, Shelf
from gridcloud.grid.documents import Clock, verify
from gridcloud.grid.messages import JoinBody
from gridcloud.grid.papers import Invitation, SiteName
from gridcloud.model.frozen import Frozen

#: How many may wait for one community's approval at a time.
MOST_REQUESTS = 256
_FEWEST_DIGITS = 8


class Request(Frozen):
    """A site that used an invitation which needs approval."""

    key: str
    invitation: Invitation
    site_name: SiteName
    presence: str
    since: AwareDatetime
    refused: bool = False


class Wait(Frozen):
    """A community that this site asked to be admitted to. ``over`` once it will not ask again;
    ``inviter_name`` is what the inviter calls itself."""

    community: str
    code: str
    site_name: SiteName
    inviter: str
    inviter_name: str = ""
    since: AwareDatetime
    problem: str = ""
    over: bool = False


class Requests:
    """Who asks this site to be admitted, by community."""

    def __init__(self, key: str, store: CommunityStore, clock: Clock) -> None:
        self._key = key
        self._store = store
        self._clock = clock

    async def ask(self, key: str, body: JoinBody, invitation: Invitation) -> Request:
        """Note that a site asks; return what is known of that. Idempotent.

        Asking by a newer invitation forgets that an older one was refused. Raises `Conflict` if
        `MOST_REQUESTS` wait.
        """
        known = (await self.all(invitation.community)).get(key)
        same = known is not None and known.invitation.secret == invitation.secret
        if known is None and len(await self.all(invitation.community)) >= MOST_REQUESTS:
            raise Conflict("Too many sites wait for approval.", hint="Ask again later.")
        request = Request(
            key=key,
            invitation=invitation,
            site_name=body.site_name,
            presence=body.presence,
            since=known.since if known is not None and same else self._clock(),
            refused=known is not None and same and known.refused,
        )
        await self._save(body.invitation, request)
        return request

    async def all(self, community: str) -> dict[str, Request]:
        """Return who asked, by key, the refused too; those whose invitation expired are dropped."""
        found: dict[str, Request] = {}
        gone = []
        for key, (document, note) in (await self._store.read(Shelf.REQUEST, community)).items():
            try:
                verify(document, Invitation, self._key, self._clock())
                found[key] = Request.model_validate_json(note)
            except (GridcloudError, ValidationError):  # expired, or of another version
                gone.append(key)
        await self._store.remove(Shelf.REQUEST, community, gone)
        return found

    async def find(self, community: str, site: str) -> Request:
        """Return who asks under a name, or with a key that begins so; raises `NotFound`, and
        `Conflict` if that could be several."""
        asking = [each for each in (await self.all(community)).values() if not each.refused]
        found = [each for each in asking if each.site_name == site] or [
            each for each in asking if len(site) >= _FEWEST_DIGITS and each.key.startswith(site)
        ]
        if not found:
            raise NotFound(
                f"No site {site!r} asks to be admitted.",
                hint="See 'gridcloud community requests NAME'.",
            )
        if len(found) > 1:
            keys = ", ".join(each.key[:16] for each in found)
            raise Conflict(f"Several sites ask as {site}: {keys}.", hint="Name one by its key.")
        return found[0]

    async def refuse(self, request: Request) -> None:
        """Note that a request is refused: whoever asks again by that invitation is told so."""
        rows = await self._store.read(Shelf.REQUEST, request.invitation.community)
        document, _ = rows[request.key]
        await self._save(document, request.model_copy(update={"refused": True}))

    async def drop(self, request: Request) -> None:
        """Forget a request, as once it is granted. Idempotent."""
        await self._store.remove(Shelf.REQUEST, request.invitation.community, [request.key])

    async def _save(self, document: str, request: Request) -> None:
        row = {request.key: (document, request.model_dump_json())}
        await self._store.save(Shelf.REQUEST, request.invitation.community, row)


class Waiting:
    """Where this site asked to be admitted, and waits."""

    def __init__(self, store: CommunityStore) -> None:
        self._store = store

    async def all(self) -> list[Wait]:
        """Return all, by community."""
        shelves = await self._store.read_all(Shelf.WAITING)
        return [
            Wait.model_validate_json(note)
            for _, rows in sorted(shelves.items())
            for _, note in rows.values()
        ]

    async def keep(self, wait: Wait) -> None:
        """Keep what is known of one; of a community there is one only."""
        row = {"": ("", wait.model_dump_json())}
        await self._store.save(Shelf.WAITING, wait.community, row)

    async def drop(self, community: str) -> None:
        """Ask there no more. Idempotent."""
        await self._store.remove(Shelf.WAITING, community, [""])


def invitation_id(invitation: Invitation) -> str:
    """Return a word that names an invitation without giving its secret away."""
    return hashlib.sha256(invitation.secret.encode()).hexdigest()[:8]
