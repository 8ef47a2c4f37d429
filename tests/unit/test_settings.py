"""Settings come from defaults, file and environment; a mistake is pointed at."""

from datetime import timedelta

import pytest

from gridcloud.errors import InvalidSpec
from gridcloud.settings import load, settings_file, state_folder


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
