"""What has to be asked of a person so that a provider can be added."""

from __future__ import annotations

from gridcloud.model.frozen import Frozen


class Question(Frozen):
    """A setting of a provider that most people have to give.

    ``text`` asks for it in a few words. ``choices`` are what was found on this host, as the
    names in a ``clouds.yaml``; others may be right as well. Without an answer ``default`` holds,
    and where that is empty, too, the setting is left out, unless it is ``needed``.
    """

    setting: str
    text: str
    default: str = ""
    choices: tuple[str, ...] = ()
    needed: bool = False


class ProviderKind(Frozen):
    """A kind of provider that is installed, and what to ask; ``problem`` says why it cannot be
    used, as when its library is missing."""

    kind: str
    questions: tuple[Question, ...] = ()
    problem: str = ""
