"""What is asked of who adds a provider: what their own programs would find are the choices."""

import pytest

from gridcloud.errors import InvalidSpec
from gridcloud.providers import registry
from gridcloud.providers.libcloud.questions import of_ec2
from gridcloud.providers.openstack.asking import questions


@pytest.mark.parametrize("kind", [kind for kind in registry.kinds() if kind != "local"])
def test_every_kind_can_be_asked_about(kind):
    """No kind that is shipped fails before it is added, and each setting is one it has."""
    about = registry.about(kind)
    assert about.kind == kind
    assert about.problem == ""
    assert len({each.setting for each in about.questions}) == len(about.questions)


def test_an_unknown_kind_is_refused():
    """The error names those that are installed."""
    with pytest.raises(InvalidSpec, match="'nonesuch' is not known") as refused:
        registry.about("nonesuch")
    assert "openstack" in refused.value.hint


def test_clouds_are_those_of_clouds_yaml(tmp_path, monkeypatch):
    """The only one is the default; of several none is."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".config" / "openstack"
    folder.mkdir(parents=True)
    (folder / "clouds.yaml").write_text("clouds:\n  egi: {auth: {}}\n")
    cloud = questions({}, tmp_path)[0]
    assert (cloud.choices, cloud.default, cloud.needed) == (("egi",), "egi", True)
    (folder / "clouds.yaml").write_text("clouds:\n  egi: {}\n  own: {}\n")
    assert questions({}, tmp_path)[0].default == ""
    assert questions({"OS_CLOUD": "own"}, tmp_path)[0].default == "own"
    assert not questions({"OS_AUTH_URL": "https://x"}, tmp_path)[0].needed


@pytest.mark.parametrize("text", ["clouds: [", "7", "clouds: []", ""])
def test_a_broken_clouds_yaml_gives_no_choices(tmp_path, monkeypatch, text):
    """It is the provider that tells what is wrong with it, once it reads it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clouds.yaml").write_text(text)
    assert questions({}, tmp_path)[0].choices == ()


def test_profiles_are_those_of_the_users_of_aws(tmp_path):
    """Names of both files, and the region of the profile that is meant."""
    folder = tmp_path / ".aws"
    folder.mkdir()
    (folder / "credentials").write_text("[default]\naws_access_key_id = A\n[lab]\n")
    (folder / "config").write_text(
        "[default]\nregion = eu-north-1\n[profile lab]\nregion = eu-west-1\n"
    )
    profile, regions, _ = of_ec2({}, tmp_path)
    assert (profile.choices, profile.default) == (("default", "lab"), "default")
    assert regions.default == '["eu-north-1"]'
    assert of_ec2({"AWS_PROFILE": "lab"}, tmp_path)[1].default == '["eu-west-1"]'
    assert of_ec2({"AWS_ACCESS_KEY_ID": "A"}, tmp_path)[0].default == ""
    assert of_ec2({}, tmp_path / "nowhere")[1].needed
