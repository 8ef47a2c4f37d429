"""Credentials for Oracle Cloud, from where its users have them; read when used, never copied.

As Oracle's own tools: the variables ``OCI_CLI_*`` and a profile of ``~/.oci/config`` (or where
``OCI_CLI_CONFIG_FILE`` says), variables first unless the settings name a profile. How to log in is
told by the settings, by ``OCI_CLI_AUTH``, or by the profile: one with a ``security_token_file`` is
of a session in a browser. A machine at OCI can be its own user: an instance or resource principal.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oci
from oci.auth import signers

from gridcloud.errors import Forbidden, InvalidSpec
from gridcloud.providers.oci.section import OCISection

_VARIABLES = ("user", "tenancy", "fingerprint", "key_file", "key_content", "region")
_LONGEST_TOKEN = 64 * 1024


@dataclass(frozen=True)
class Login:
    """One that holds now. ``signer`` signs requests; ``config`` is what the SDK wants to see of a
    key besides. Neither is shown when this is printed."""

    tenancy: str
    region: str
    signer: Any = field(repr=False)
    config: Mapping[str, str] = field(default_factory=dict, repr=False)


class Source:
    """Where one account's credentials are. Its methods block; threads may share it."""

    def __init__(self, section: OCISection) -> None:
        self._section = section
        self._lock = threading.Lock()
        self._kept: tuple[object, Login] | None = None

    def login(self) -> Login:
        """Return the login that holds now, the same object while its files stay as they are.

        Raises `Forbidden` or `InvalidSpec` if there is none.
        """
        with self._lock:
            how, told = self._told()
            stamp = how, tuple(sorted(told.items())), _stamps(told)
            if self._kept is None or self._kept[0] != stamp:
                self._kept = stamp, _made(how, told)
            return self._kept[1]

    def _told(self) -> tuple[str, dict[str, str]]:
        section, environment = self._section, os.environ
        own = {
            key: value
            for key in _VARIABLES
            if (value := environment.get(f"OCI_CLI_{key.upper()}")) and not section.profile
        }
        how = section.auth or (environment.get("OCI_CLI_AUTH", "") if not section.profile else "")
        if how in {"instance_principal", "resource_principal"}:
            return how, own
        whole = {"user", "tenancy", "fingerprint", "region"} <= own.keys()
        told = {} if whole else self._profile(bool(own))
        told |= own
        if not how:
            how = "security_token" if "security_token_file" in told else "api_key"
        return how, told

    def _profile(self, may_be_missing: bool) -> dict[str, str]:
        section, environment = self._section, os.environ
        path = section.config_file or environment.get("OCI_CLI_CONFIG_FILE")
        path = path or oci.config.DEFAULT_LOCATION
        name = section.profile or environment.get("OCI_CLI_PROFILE") or oci.config.DEFAULT_PROFILE
        try:
            read: Mapping[str, Any] = oci.config.from_file(path, name)
        except oci.exceptions.ConfigFileNotFound as error:
            if may_be_missing:
                return {}
            raise Forbidden(
                f"There are no credentials for OCI: {path} is not there.",
                hint="Run `oci setup config`, or log in with `oci session authenticate`.",
            ) from error
        except oci.exceptions.ProfileNotFound as error:
            raise InvalidSpec(
                f"There is no profile {name!r} in {path}.", hint="Correct profile in the settings."
            ) from error
        except (ValueError, OSError) as error:
            # The error may show a line, which may be a secret.
            raise InvalidSpec(f"{path} cannot be read.", hint="Mend it.") from error
        return {key: str(value) for key, value in read.items() if isinstance(value, str) and value}


def _made(how: str, told: Mapping[str, str]) -> Login:
    try:
        match how:
            case "instance_principal":
                signer = signers.InstancePrincipalsSecurityTokenSigner()
                return Login(signer.tenancy_id, told.get("region") or signer.region, signer)
            case "resource_principal":
                signer = signers.get_resource_principals_signer()
                tenancy = str(signer.get_claim("res_tenant"))
                return Login(tenancy, told.get("region") or str(signer.region), signer)
            case "security_token":
                return _of_session(told)
            case "api_key":
                return _of_key(told)
            case _:
                raise InvalidSpec(
                    f"There is no way {how!r} to log in at OCI.",
                    hint="Set auth in the settings, or leave OCI_CLI_AUTH away.",
                )
    except KeyError as error:
        raise Forbidden(
            f"The credentials for OCI lack {error.args[0]!r}.",
            hint="Run `oci setup config`; `oci iam region list` must work.",
        ) from None
    except (oci.exceptions.ClientError, ValueError, TypeError, OSError) as error:
        # What these tell may be part of a key.
        raise Forbidden(
            f"The credentials for OCI cannot be used ({how}): {type(error).__name__}.",
            hint="Look at the key's file and its passphrase; `oci iam region list` must work.",
        ) from error


def _of_key(told: Mapping[str, str]) -> Login:
    signer = oci.signer.Signer(
        tenancy=told["tenancy"],
        user=told["user"],
        fingerprint=told["fingerprint"],
        private_key_file_location=told.get("key_file"),
        pass_phrase=told.get("pass_phrase") or os.environ.get("OCI_CLI_PASSPHRASE"),
        private_key_content=told.get("key_content"),
    )
    config = {key: told[key] for key in _VARIABLES if key in told}
    return Login(told["tenancy"], told["region"], signer, config)


def _of_session(told: Mapping[str, str]) -> Login:
    token = Path(told["security_token_file"]).expanduser().read_text()[:_LONGEST_TOKEN].strip()
    key = oci.signer.load_private_key_from_file(told["key_file"], told.get("pass_phrase"))
    return Login(told["tenancy"], told["region"], signers.SecurityTokenSigner(token, key))


def _stamps(told: Mapping[str, str]) -> tuple[object, ...]:
    """Return what changes when the files of a login do: `oci session refresh` writes them anew."""
    found = []
    for key in ("key_file", "security_token_file"):
        try:
            found.append(Path(told[key]).expanduser().stat().st_mtime_ns if key in told else None)
        except OSError:
            found.append(None)  # reading it says what is wrong
    return tuple(found)
