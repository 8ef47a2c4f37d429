"""Checks JSON by the models of Oracle's SDK: names, what is required, types, and kinds of kinds."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import oci.core.models
import oci.identity.models
import oci.limits.models

_ROOMS = (oci.core.models, oci.identity.models, oci.limits.models)
_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "datetime": (str,),
    "object": (object,),
}


def problem(model: str, told: Any, where: str = "") -> str:
    """Return what is wrong with a value that is to be of a model; empty when nothing is."""
    where = where or model
    if not isinstance(told, dict):
        return f"{where} is no object"
    kind = _kind(model, told)
    required, types = _known(kind)
    if missing := sorted(required - {name for name, value in told.items() if value is not None}):
        return f"{where} lacks {', '.join(missing)}"
    for name, value in told.items():
        if name not in types:
            return f"{where} has no {name}"
        if value is not None and (wrong := _wrong(types[name], value, f"{where}.{name}")):
            return wrong
    return ""


def _wrong(kind: str, value: Any, where: str) -> str:
    if of := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return f"{where} is no list"
        found = (_wrong(of[1], one, f"{where}[{n}]") for n, one in enumerate(value))
        return next(filter(None, found), "")
    if of := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if not isinstance(value, dict):
            return f"{where} is no map"
        found = (_wrong(of[1], one, f"{where}.{key}") for key, one in value.items())
        return next(filter(None, found), "")
    if kind in _PLAIN:
        right = isinstance(value, _PLAIN[kind])
        if isinstance(value, bool):
            right = kind in {"bool", "object"}
        return "" if right else f"{where} is no {kind}"
    return problem(kind, value, where)


def _kind(model: str, told: dict[str, Any]) -> str:
    subtype = getattr(_class(model), "get_subtype", None)
    return str(subtype(told)) if subtype else model


def _class(model: str) -> Any:
    return next(getattr(room, model) for room in _ROOMS if hasattr(room, model))


@cache
def _known(model: str) -> tuple[frozenset[str], dict[str, str]]:
    """Return what a model requires, and the types of all that it has, by the API's names."""
    kind = _class(model)
    names, types = kind().attribute_map, kind().swagger_types
    required = {
        names[attribute]
        for attribute in names
        if "**[Required]**" in (getattr(kind, attribute).fget.__doc__ or "")
    }
    return frozenset(required), {names[attribute]: types[attribute] for attribute in names}
