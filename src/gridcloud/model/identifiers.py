"""Names of things made here: short, unique, safe in file names, URLs and SSH user names."""

from __future__ import annotations

import secrets
from typing import Annotated

from pydantic import Field

# No vowels (no accidental words), no characters that are easily taken for another.
_ALPHABET = "23456789bcdfghjkmnpqrstvwxz"


def new_id(length: int = 8) -> str:
    """Return a random identifier; 8 characters tell apart 2.8 · 10¹¹, lowercase."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


#: The address of an iroh relay.
RelayUrl = Annotated[str, Field(pattern=r"^https://[a-zA-Z0-9.:\[\]-]{1,200}/?$")]
