"""What to ask who adds an account at Oracle Cloud; it needs no SDK."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

from gridcloud.errors import InvalidSpec
from gridcloud.model.asking import Question
from gridcloud.providers.oci.section import OCISection

_DEFAULT = "DEFAULT"


def questions() -> tuple[Question, ...]:
    """Return them, with what the user's profiles say. Raises `InvalidSpec` for a broken file."""
    profiles = _profiles()
    names = tuple(profiles)
    usual = os.environ.get("OCI_CLI_PROFILE") or _DEFAULT
    usual = usual if usual in profiles else next(iter(names), "")
    told = profiles.get(usual, {})
    regions = {one["region"]: None for one in profiles.values() if one.get("region")}
    tenancies = {one["tenancy"]: None for one in profiles.values() if one.get("tenancy")}
    return (
        Question(
            setting="profile",
            text="Which profile of ~/.oci/config (none on a machine at OCI)?",
            default=usual,
            choices=names,
        ),
        Question(
            setting="compartment",
            text="The OCID of the compartment for machines?",
            default=told.get("tenancy", ""),
            choices=tuple(tenancies),
        ),
        Question(
            setting="regions",
            text="Which region?",
            default=told.get("region", ""),
            choices=tuple(regions),
        ),
        Question(
            setting="image",
            text="Which image, by its name (with *) or OCID?",
            default=str(OCISection.model_fields["image"].default),
        ),
    )


def _profiles() -> dict[str, Mapping[str, str]]:
    path = Path(os.environ.get("OCI_CLI_CONFIG_FILE") or "~/.oci/config").expanduser()
    read = configparser.RawConfigParser()
    try:
        read.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        # The error would show the line, which may be a secret.
        raise InvalidSpec(f"{path} cannot be read.", hint="Mend it.") from error
    found: dict[str, Mapping[str, str]] = {}
    if read.defaults():
        found[_DEFAULT] = dict(read.defaults())
    return found | {name: dict(read.items(name)) for name in read.sections()}
