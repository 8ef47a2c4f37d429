"""Settings come from defaults, file and environment; a mistake is pointed at."""

from datetime import timedelta
from pathlib import Path

import pytest

from gridcloud.errors import InvalidSpec
from gridcloud.model.prices import Prices
from gridcloud.settings import LendingRule, Quota, load, settings_file, state_folder


def read(tmp_path, text, **environ):
    file = tmp_path / "settings.toml"
    file.write_text(text)
    return load(file, environ)


def test_no_file_means_defaults_that_lend_nothing(tmp_path):
    """Without any configuration a site works, listens on loopback only, and lends nothing."""
    settings = load(tmp_path / "absent.toml", {})
    assert settings.name
    assert not settings.lending.enabled
    assert settings.grid.listen.startswith("127.0.0.1")
    assert settings.gateway.listen.startswith("127.0.0.1")


def test_quantities_are_written_as_people_write_them(tmp_path):
    """Durations and sizes are text in the file."""
    settings = read(tmp_path, 'name = "u"\n[lending]\nmax_time = "2h"\nmemory = "4G"\n')
    assert settings.lending.max_time == timedelta(hours=2)
    assert settings.lending.memory == 4 * 2**30


def test_the_environment_goes_before_the_file(tmp_path):
    """A name in the environment wins."""
    assert read(tmp_path, 'name = "file"', GRIDCLOUD_SITE_NAME="shell").name == "shell"


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ('name = "u"\n[lending]\nmax_tyme = "2h"\n', 3, "spelling"),
        ('name = "u"\n\n[lending]\nenabled = true\nmax_time = "2"\n', 5, "length of time"),
        ('name = "Not A Name"\n', 1, "pattern"),
        ("name = \n", 1, "Invalid value"),
    ],
)
def test_a_mistake_is_pointed_at(tmp_path, text, line, word):
    """File, line and expectation are named."""
    with pytest.raises(InvalidSpec) as caught:
        read(tmp_path, text)
    assert "settings.toml" in str(caught.value)
    assert f"line {line}" in str(caught.value)
    assert word in str(caught.value)


def test_folders_follow_the_desktop_standard(tmp_path):
    """GRIDCLOUD_* goes first, then XDG."""
    assert state_folder({"XDG_STATE_HOME": "/x"}).as_posix() == "/x/gridcloud"
    assert state_folder({"GRIDCLOUD_STATE": "/s"}).as_posix() == "/s"
    assert settings_file({"XDG_CONFIG_HOME": "/c"}).as_posix() == "/c/gridcloud/settings.toml"


LENDING = 'name = "u"\n[lending]\nenabled = true\ncpus = 8\nsoftware = ["/opt/a"]\n'
RULES = """
[[lending.rules]]
community = "optics"
roles = ["manager"]
cpus = 6
max_time = "12h"

[[lending.rules]]
community = "optics"
people = ["alice@uni", "*@lab"]
hours = ["18:00-08:00", "sat-sun"]
prices = { cpu_hour = 1.5 }
notice = "5m"
per_person = { cpus = 2, cpu_hours = 100, period = "30d" }
"""


def test_rules_of_lending_are_read(tmp_path):
    """A policy is one section: limits for all, then rules in the order they are tried."""
    lending = read(tmp_path, LENDING + RULES).lending
    first, second = lending.rules
    assert (first.cpus, first.roles) == (6, ("manager",))
    assert second.notice == timedelta(minutes=5)
    assert second.prices.cpu_hour == 1.5
    assert second.per_person
    assert second.per_person.cpu_hours == 100
    assert [str(hours) for hours in second.hours] == ["18:00-08:00", "sat,sun"]


@pytest.mark.parametrize(
    ("change", "line", "word"),
    [
        (('roles = ["manager"]', 'roles = ["chief"]'), 9, "consumer"),
        (("cpus = 6", "cpus = 0"), 10, "greater than or equal to 1"),
        (("cpus = 6", "cpus = 9"), 10, "more than the 8 of lending.cpus"),
        (('max_time = "12h"', 'max_time = "2d"'), 11, "more than the 1d 0h of lending.max_time"),
        (('"*@lab"', '"lab"'), 15, "pattern"),
        (('"sat-sun"', '"sat-fryday"'), 16, "names a day"),
        (('"18:00-08:00"', '"18:00-18:00"'), 16, "empty window"),
        (('"18:00-08:00"', '"18:00-25:00"'), 16, "time of day"),
        (("cpu_hour = 1.5", "cpu_hour = -1"), 17, "greater than or equal to 0"),
        (("cpu_hour = 1.5", "cpu_hour = nan"), 17, "finite"),
        (('notice = "5m"', 'notice = "2d"'), 18, "longer than the longest loan"),
        (("cpus = 2, cpu_hours = 100,", ""), 19, "needs cpus, cpu_hours or both"),
        (("cpu_hours = 100", "cpu_hours = 0"), 19, "greater than 0"),
        (('notice = "5m"', 'notis = "5m"'), 18, "spelling"),
        (('notice = "5m"', 'software = ["/opt/b"]'), 18, "not among lending.software"),
        (('people = ["alice@uni", "*@lab"]', 'roles = ["manager"]'), 13, "rule 1 takes everybody"),
        (("cpus = 8", 'country = "Denmark"'), 4, "country"),
        (("cpus = 8", 'communities = ["lab"]\ncpus = 8'), 9, "not among lending.communities"),
    ],
)
def test_an_impossible_rule_is_pointed_at(tmp_path, change, line, word):
    """What can never be meant is refused with its own line, in the rule where it stands."""
    text = LENDING + RULES
    assert text.count(change[0]) == 1, "the change hits nothing"
    with pytest.raises(InvalidSpec) as caught:
        read(tmp_path, text.replace(*change))
    assert f"settings.toml, line {line}:" in str(caught.value), caught.value
    assert word in str(caught.value)


def test_a_section_within_a_rule_is_pointed_at(tmp_path):
    """Also where a rule's prices have a section of their own."""
    rules = '[[lending.rules]]\ncommunity = "lab"\n[[lending.rules]]\n'
    with pytest.raises(InvalidSpec, match=r"line 10: lending\.rules\.2\.prices\.cpu_hour"):
        read(tmp_path, LENDING + rules + "[lending.rules.prices]\ncpu_hour = -1\n")


def test_every_part_of_a_rule_is_in_the_reference():
    """No setting of a rule or quota without a line that says its meaning."""
    page = Path(__file__).parents[2] / "docs/reference/settings.md"
    text = page.read_text(encoding="utf-8")
    for name in LendingRule.model_fields:
        assert f"| `lending.rules.{name}` |" in text, name
    for name in (*Quota.model_fields, *Prices.model_fields):
        assert f"{name} = " in text, name
