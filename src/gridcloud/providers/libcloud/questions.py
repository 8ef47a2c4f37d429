"""What to ask who adds a cloud by Libcloud; choices are what AWS's own programs would find."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

from gridcloud.model.asking import Question


def of_ec2(
    environ: Mapping[str, str] = os.environ, home: Path | None = None
) -> tuple[Question, ...]:
    """Return the questions about an EC2 account; reads ``~/.aws``."""
    folder = (home or Path.home()) / ".aws"
    files = {
        environ.get("AWS_SHARED_CREDENTIALS_FILE") or str(folder / "credentials"): "",
        environ.get("AWS_CONFIG_FILE") or str(folder / "config"): "profile ",
    }
    names: dict[str, str] = {}  # each with its region, if it has one
    for file, prefix in files.items():
        found = configparser.ConfigParser(interpolation=None)
        try:
            found.read(file)
        except (OSError, UnicodeDecodeError, configparser.Error):
            continue  # the provider itself tells what is wrong with it
        for section in found.sections():
            name = section.removeprefix(prefix)
            names[name] = found[section].get("region", names.get(name, ""))
    by_environment = "AWS_ACCESS_KEY_ID" in environ
    profile = "" if by_environment else environ.get("AWS_PROFILE", "")
    if not profile and not by_environment and names:
        profile = "default" if "default" in names else next(iter(names))
    region = (
        environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or names.get(profile, "")
    )
    return (
        Question(
            setting="profile",
            text="Which profile" + (" (none: the AWS_* variables)" if by_environment else ""),
            default=profile,
            choices=tuple(sorted(names)),
        ),
        Question(
            setting="regions",
            text='Which regions, as ["eu-north-1"]',
            default=f'["{region}"]' if region else "",
            needed=not region,
        ),
        Question(
            setting="network",
            text="Which network: default for the account's own, an id, or none to have one made",
        ),
    )


def of_any() -> tuple[Question, ...]:
    """Return the questions about any other cloud that Libcloud knows."""
    return (
        Question(
            setting="driver", text="Which of Libcloud's drivers, as digitalocean", needed=True
        ),
        Question(
            setting="secrets",
            text='Where its secrets are, as { key = "env:DIGITALOCEAN_TOKEN" }',
            needed=True,
        ),
        Question(setting="image", text="Which image to boot: a name or an id", needed=True),
    )
