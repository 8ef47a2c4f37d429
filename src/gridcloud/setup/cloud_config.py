"""Checking cloud-config before anything is paid for, by the schema of cloud-init itself.

The schema is of cloud-init 25.1 and knows everything that older ones did. On a machine cloud-init
only warns of what it does not understand, in a log that nobody reads; here it is an error.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from gridcloud.errors import InvalidSpec
from gridcloud.setup.yaml_text import Yaml, problem, read_yaml

_SCHEMA = Path(__file__).parent / "cloud_config_schema.json"
_PROBLEMS_TOLD = 5
_TYPES = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "nothing",
}
_WANTED = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "null": "nothing",
}


def check_cloud_config(text: str, where: str) -> None:
    """Raise `InvalidSpec` for a cloud-config that cloud-init would not understand.

    ``where`` tells people which text it is. Takes milliseconds; up to seconds for a very large one.
    """
    document = read_yaml(text, where)
    if document.value is None:
        raise InvalidSpec(f"{where} is an empty cloud-config.", hint="Write keys, or leave it out.")
    if not isinstance(document.value, dict):
        raise problem(where, text, 1, f"a cloud-config is a mapping, not {_kind(document.value)}")
    found = sorted(_problems(document), key=lambda each: each[0])
    if not found:
        return
    line, first = found[0]
    more = "".join(f"\n  line {line}: {what}" for line, what in found[1:_PROBLEMS_TOLD])
    error = problem(where, text, line, first)
    raise InvalidSpec(f"{error.message}{more}", hint=error.hint)


def _problems(document: Yaml) -> Iterable[tuple[int, str]]:
    # Imported when used: it takes some time and memory, and most sites never need it.
    from jsonschema.exceptions import best_match  # noqa: PLC0415

    seen = set()
    for error in _validator().iter_errors(_as_json(document.value)):
        nearest = best_match([error]) or error
        path = list(nearest.absolute_path)
        for extra, what in _told(nearest):
            one = (document.line([*path, *extra]), f"{_named([*path, *extra])}{what}")
            if one not in seen:
                seen.add(one)
                yield one


@cache
def _validator() -> Any:
    from jsonschema import Draft4Validator, FormatChecker  # noqa: PLC0415 (as above)

    return Draft4Validator(json.loads(_SCHEMA.read_text()), format_checker=FormatChecker())


def _told(error: Any) -> Iterable[tuple[list[str], str]]:
    """Say what is wrong, without the values, which may be secrets: the keys below, and words."""
    wanted = error.validator_value
    match error.validator:
        case "additionalProperties":
            known = list(error.schema.get("properties", {}))
            patterns = list(error.schema.get("patternProperties", {}))
            for key in error.instance:
                if key not in known and not any(re.search(each, key) for each in patterns):
                    near = difflib.get_close_matches(key, known, 1)
                    meant = f"; did you mean {near[0]!r}?" if near else ""
                    yield [key], f"there is no such key{meant}"
        case "type":
            kinds = wanted if isinstance(wanted, list) else [wanted]
            words = " or ".join(dict.fromkeys(_WANTED.get(str(kind), str(kind)) for kind in kinds))
            yield [], f"must be {words}, and is {_kind(error.instance)}"
        case "enum":
            yield [], f"must be one of {', '.join(map(str, wanted))}"
        case "required":
            missing = [key for key in wanted if key not in error.instance]
            yield [], f"lacks {', '.join(missing)}"
        case "minItems" | "minProperties" | "minLength":
            yield [], "must not be empty"
        case "uniqueItems":
            yield [], "has the same item twice"
        case "pattern" | "format":
            yield [], f"does not have the form {wanted}"
        case "anyOf" | "oneOf":
            yield [], "has none of the forms that are understood here"
        case rule:
            yield [], f"breaks the rule {rule}"


def _named(path: list[Any]) -> str:
    if not path:
        return ""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"{text.lstrip('.')[:200]}: "


def _kind(value: Any) -> str:
    return _TYPES.get(type(value), f"a {type(value).__name__}")


def _as_json(value: Any) -> Any:
    """Return the value as a JSON schema sees it: keys are texts, and so are bytes."""
    if isinstance(value, dict):
        return {str(key): _as_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    return value.decode(errors="replace") if isinstance(value, bytes) else value
