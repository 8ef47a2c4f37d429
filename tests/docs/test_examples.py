"""The documentation is true: examples run, commands and settings exist, links lead somewhere.

Blocks fenced ``sh`` and ``python`` are run, in order, in the home of a reader whose site runs;
those fenced ``sh no-test`` are not, but the commands in them must exist.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from pydantic import BaseModel

from docs.conftest import PAGES, ROOT, blocks, name, prose
from gridcloud.cli.main import cli
from gridcloud.model.stack import Stack, StackFile
from gridcloud.providers import registry
from gridcloud.providers.base import ProviderContext
from gridcloud.providers.containers import ContainersSection
from gridcloud.providers.local import LocalSection
from gridcloud.providers.ssh import SSHSection
from gridcloud.settings import LendingSettings, SiteSettings, load
from testbeds.sites import GRIDCLOUD

sys.path.insert(0, str(ROOT / "tools"))
import make_reference

_SHELLS = {"sh", "sh no-test"}
_KNOWN = _SHELLS | {"python", "toml", "yaml", "ini", "text"}
RUNNABLE = [page for page in PAGES if any(b.info in ("sh", "python") for b in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_examples_run(page, home, tmp_path):
    """What a reader copies from a page works, block after block."""
    runnable = [block for block in blocks(page) if block.info in ("sh", "python")]
    if any("curl " in block.text for block in runnable) and not shutil.which("curl"):
        pytest.skip("there is no curl here")
    folder = tmp_path / "home"
    folder.mkdir()
    environment = home.environment | {
        "HOME": str(tmp_path),
        "PATH": f"{GRIDCLOUD.parent}:{os.environ['PATH']}",
        "PYTHONWARNINGS": "error",
    }
    for block in runnable:
        program = ["bash", "-euo", "pipefail"] if block.info == "sh" else [sys.executable]
        done = subprocess.run(
            [*program, "-c", block.text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        where = f"{name(page)}, line {block.line}"
        assert done.returncode == 0, f"{where}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_are(page):
    """A misspelt mark does not leave an example unchecked."""
    assert {block.info for block in blocks(page)} <= _KNOWN


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_documented_commands_exist(page):
    """Every command and option named on a page, run or not, is one that gridcloud has."""
    lines = [
        line
        for block in blocks(page)
        if block.info in _SHELLS
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    lines += [" ".join(each.split()) for each in re.findall(r"`(gridcloud [^`]*)`", prose(page))]
    for line in lines:
        for command in _commands_in(line):
            assert not (problem := _unknown(command)), f"{name(page)}: {line!r}: {problem}"


def _commands_in(line):
    """Return the arguments of each gridcloud command on a line of shell, as far as they are its."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, found = list(lexer), []
    for at, word in enumerate(words):
        program = word == "gridcloud" and not (at and words[at - 1] == "-u")
        if program or word.endswith("/bin/gridcloud"):
            rest = words[at + 1 :]
            end = next((i for i, w in enumerate(rest) if re.fullmatch(r"--|[;|&()<>]+", w)), None)
            found.append(rest[:end])
    return found


def _unknown(words):
    """Return what is wrong with a command line, or nothing."""
    command = cli
    context = click.Context(cli)
    for word in words:
        if word.startswith("$"):
            break  # only a shell knows what comes from here on
        if word.startswith("-") and word != "-":  # the latter means standard input
            option = word.partition("=")[0]
            known = {"-h", "--help", "--version"}
            known |= {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
            if option not in known:
                return f"no such option: {option}"
        elif isinstance(command, click.Group):
            command = command.get_command(context, word)
            if command is None:
                return f"no such command: {word}"
    return ""


def test_the_check_of_commands_notices():
    """An invented command or option is found, also behind other commands of the line."""
    assert _unknown(["nonsense"])
    assert _unknown(["run", "--fast"])
    assert not _unknown(["community", "invite", "--valid-for", "2h", "optics"])
    assert [_unknown(c) for c in _commands_in("echo hi; gridcloud jobs --al | cat")] != [""]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    """Files, headings, paths in the tree and tests that a page points to are there."""
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in _anchors(file), f"{name(page)}: {target}"
    for path in re.findall(r"`((?:src|tests|tools|docs|examples|bench)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{name(page)}: {path}"
    for file, groups, test in re.findall(r"`(tests/[\w/.-]+\.py)::((?:\w+::)*)(\w+)`", text):
        code = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {test}(" in code, f"{name(page)}: {file}::{test}"
        for group in groups.split("::")[:-1]:
            assert f"class {group}" in code, f"{name(page)}: {file}::{group}"


def _anchors(file: Path):
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_shown_are_accepted(page, tmp_path):
    """A settings file copied from a page is one that a site takes."""
    for block in blocks(page):
        if block.info == "toml":
            file = tmp_path / "settings.toml"
            file.write_text(block.text)
            load(file, {})
            sections = tomllib.loads(block.text).get("providers", {})
            for each, section in sections.items():
                context = ProviderContext("5e" * 32, tmp_path, LendingSettings(), probe=None)
                registry.make(each, section.get("kind", "local"), section, context)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_stacks_shown_are_accepted(page):
    """A stack copied from a page is one that can be brought up."""
    for block in blocks(page):
        if block.info == "yaml" and "machines:" in block.text:
            Stack.of(StackFile.read(yaml.safe_load(block.text)))


def test_every_setting_is_in_the_reference():
    """No setting without a line that says its meaning, and its true default."""
    text = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", text, re.MULTILINE))
    for path, field in _fields(SiteSettings):
        assert path in rows, path
        shown = rows[path].strip().strip("`")
        if shown and not shown.startswith("("):
            parts = path.split(".")
            content = tomllib.loads(f"{path} = {shown}")
            value = SiteSettings.model_validate({"name": "site"} | content)
            for part in parts:
                value = getattr(value, part)
            assert value == field.default, path
    for prefix, section in (
        ("providers.local", LocalSection),
        ("providers.NAME", SSHSection),
        ("providers.NAME", ContainersSection),
    ):
        for path, _ in _fields(section, f"{prefix}."):
            assert path in rows, path


def _fields(model, prefix=""):
    for field_name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{field_name}.")
        else:
            yield prefix + field_name, field


def test_the_command_line_reference_is_up_to_date():
    """The page is what tools/make_reference.py writes."""
    page = ROOT / "docs/reference/command-line.md"
    assert page.read_text(encoding="utf-8") == make_reference.reference(), (
        "run: python tools/make_reference.py"
    )


def test_every_page_is_linked():
    """A reader who starts at the index finds every page."""
    found, todo = set(), [ROOT / "docs/index.md"]
    while todo:
        page = todo.pop()
        if page in found or page.suffix != ".md" or not page.exists():
            continue
        found.add(page)
        targets = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", prose(page))
        todo += [(page.parent / target).resolve() for target in targets]
    assert set(ROOT.glob("docs/**/*.md")) <= found
