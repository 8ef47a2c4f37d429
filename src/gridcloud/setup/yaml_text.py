"""Reading YAML that somebody wrote, so that every problem is told with its line.

Bounded: aliases cannot make it larger than it looks, nor nesting exhaust the stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from gridcloud.errors import InvalidSpec

#: How many values a text may stand for once its aliases are followed.
_MOST_NODES = 200_000
_SHOWN = 100
#: What PyYAML raises besides its own errors for values such as ``!!bool x`` or a 13th month.
_ODD_VALUES = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)


@dataclass(frozen=True)
class Yaml:
    """A YAML text: its ``value``, and where the parts of that were written."""

    value: Any
    _node: yaml.Node | None
    _text: str

    def line(self, path: Sequence[Any]) -> int:
        """Return the line (from 1) of what ``path`` (keys and indices) leads to, or of the nearest
        thing on the way there."""
        node = self._node
        line = node.start_mark.line if node else 0
        for step in path:
            node, mark = _below(node, step)
            if mark is None:
                break
            line = mark.line
        return line + 1


def read_yaml(text: str, where: str) -> Yaml:
    """Return what a YAML text says; ``where`` tells people which text it is.

    Raises `InvalidSpec` with the line for what is no YAML, stands for too much, or names a key
    twice, of which YAML readers silently take the last.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_nodes(node, where, text)
        value = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise problem(where, text, mark.line + 1 if mark else 1, _said(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise problem(where, text, line, "there is a character that YAML does not allow") from error
    except RecursionError as error:
        raise InvalidSpec(f"{where} is nested too deeply.") from error
    except _ODD_VALUES as error:
        raise InvalidSpec(
            f"{where} has a value that is not what it says to be: {str(error)[:_SHOWN]}.",
            hint="Put quotes around texts that look like dates or numbers.",
        ) from error
    finally:
        if loader is not None:
            loader.dispose()
    return Yaml(value, node, text)


def problem(where: str, text: str, line: int, what: str) -> InvalidSpec:
    """Return the error that shows a line of a text, and says what is wrong there."""
    lines = text.splitlines()
    shown = lines[line - 1].strip()[:_SHOWN] if 0 < line <= len(lines) else ""
    return InvalidSpec(
        f"{where}, line {line}: {what}" + (f" (the line is: {shown})." if shown else "."),
        hint="Mend it, and try again: nothing was started.",
    )


def _check_nodes(root: yaml.Node, where: str, text: str) -> None:
    """Refuse what grows by aliases, contains itself, or has a key twice."""
    sizes: dict[int, int] = {}
    open_now: set[int] = set()
    # Without recursion: the composer has limited the depth of the text, not that of its aliases.
    waiting: list[tuple[yaml.Node, bool]] = [(root, False)]
    while waiting:
        node, children_done = waiting.pop()
        if id(node) in sizes:
            continue
        children = list(_children(node))
        if children_done:
            open_now.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            if sizes[id(node)] > _MOST_NODES:
                line = node.start_mark.line + 1
                raise problem(where, text, line, "its aliases stand for too much")
            continue
        if isinstance(node, yaml.MappingNode):
            _refuse_doubles(node, where, text)
        open_now.add(id(node))
        waiting.append((node, True))
        for child in children:
            if id(child) in open_now:
                line = child.start_mark.line + 1
                raise problem(where, text, line, "this value contains itself")
            waiting.append((child, False))


def _refuse_doubles(node: yaml.MappingNode, where: str, text: str) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if (key.tag, key.value) in seen:
            line = key.start_mark.line + 1
            name = str(key.value)[:_SHOWN]
            raise problem(where, text, line, f"the key {name!r} is there a second time")
        seen.add((key.tag, key.value))


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _below(node: yaml.Node | None, step: Any) -> tuple[yaml.Node | None, yaml.Mark | None]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(step):
                return value, key.start_mark
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        found = node.value[step]
        return found, found.start_mark
    return None, None


def _said(error: yaml.MarkedYAMLError) -> str:
    text = " ".join(part for part in (error.context, error.problem) if part)
    if "\\t" in text:
        return "YAML allows no tabs at the beginning of a line"
    return f"this is not YAML: {text}"
