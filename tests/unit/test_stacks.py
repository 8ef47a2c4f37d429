"""Stacks: what a file comes to, and what has to be done about the machines there are."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.errors import InvalidSpec
from gridcloud.model.accounts import NetworkInfo, NetworkReport
from gridcloud.model.fleet import MachineInfo, MachineState
from gridcloud.model.lease import Endpoint
from gridcloud.model.stack import Stack, StackFile, expand
from gridcloud.model.stack_plan import (
    Step,
    changes,
    downwards,
    facts_of,
    lacking_networks,
    networks_of,
    outputs,
    placed,
    request,
    rounds,
)

FILES = {"w.yml": "/books/w.yml", "front.yaml": "#cloud-config\n"}
LAB = {
    "name": "lab",
    "defaults": {"time": "4h", "image": "debian-12"},
    "templates": {"worker": {"cpus": 4, "memory": "8G", "variables": {"role": "worker"}}},
    "volumes": {"results": {"size": "20G"}},
    "machines": {
        "node[01-02]": {
            "template": "worker",
            "after": ["front"],
            "playbooks": ["w.yml"],
            "variables": {"front": "{front.address}", "me": "{name}"},
        },
        "front": {"cpus": 2, "user-data": "front.yaml", "volumes": ["results:/data"]},
    },
    "outputs": {"login": "{front.user}@{front.address}"},
}


def stack(content=LAB, **more):
    return Stack.of(StackFile.read(content | more))


def info(wanted, machine, facts=None, state=MachineState.READY, host="10.0.0.1"):
    """Return a machine as the site shows it after it was made for a stack."""
    asked = request(wanted, machine, FILES, facts or {})
    endpoint = Endpoint(host=host, user="debian", host_keys=())
    return MachineInfo(
        name=asked.order.name,
        state=state,
        provider="nova",
        need=asked.need,
        order=asked.order,
        endpoint=endpoint if state is MachineState.READY else None,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def all_up(wanted):
    """Return all machines of a stack as they are once it is up."""
    there = []
    for machine in wanted.machines:
        there.append(info(wanted, machine, facts_of(wanted, there)))
    return there


def test_a_file_comes_to_machines_in_their_order():
    """Ranges, templates, defaults and volumes are worked out; who is waited for comes first."""
    found = stack()
    assert [machine.name for machine in found.machines] == ["front", "node01", "node02"]
    front, node, _ = found.machines
    assert (front.need.cpus, front.image, front.volumes[0].name) == (2, "debian-12", "lab-results")
    assert front.volumes[0].size_bytes == 20 * 2**30
    assert (node.need.cpus, node.need.memory_bytes, node.after) == (4, 8 * 2**30, ("front",))
    assert node.variables == {"role": "worker", "front": "{front.address}", "me": "{name}"}


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 4))
def test_a_range_counts_as_it_is_written(first, count, width):
    """Leading zeros are kept, both ends are in, and all names differ."""
    last = first + count
    low, high = f"{first:0{width}}", f"{last:0{width}}"
    if len(high) < len(low):
        return
    names = expand(f"n[{low}-{high}]x")
    assert len(set(names)) == count + 1
    assert (names[0], names[-1]) == (f"n{low}x", f"n{last:0{len(low)}}x")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"machines": {}}, "machines"),
        ({"machines": {"a": {"cpu": 1}}}, "machines.a.cpu: there is no such setting"),
        ({"machines": {"a": {"cpus": 0}}}, "machines.a.cpus"),
        ({"machines": {"a": {"memory": "lots"}}}, "machines.a.memory"),
        ({"machines": {"A": {}}}, "machines.A: that is no name"),
        ({"machines": {"a[3-1]": {}}}, "from 3 to 1"),
        ({"machines": {"a[0-999]": {}}}, "500 machines"),
        ({"machines": {"a[0-99][0-99][0-99]": {}}}, "500 machines"),
        ({"machines": {"a[1-3]": {}, "a2": {}}}, "a2 is in"),
        ({"machines": {"a": {"template": "none"}}}, "there is no 'none'"),
        ({"machines": {"a": {"after": ["b"]}}}, "there is no machine 'b'"),
        ({"machines": {"a": {"after": ["b"]}, "b": {"after": ["a"]}}}, "wait for one another"),
        ({"machines": {"a": {"volumes": ["x:/data"]}}}, "names no volume"),
        ({"machines": {"a": {"volumes": ["results:data"]}}}, "no place to mount"),
        ({"machines": {"a": {"variables": {"x": "1"}}}}, "no playbooks|there are none"),
        ({"outputs": {"x": "{front.password}"}}, "outputs.x: {front.password} means nothing"),
        ({"outputs": {"x": "{nobody.address}"}}, "means nothing"),
        ({"name": "Lab"}, "name"),
        ({"name": "l" * 60}, "over 63 characters"),
        ({"surely": 1}, "surely: there is no such setting"),
    ],
)
def test_a_wrong_file_is_told_with_its_place(more, told):
    """Whatever contradicts itself is an error that names the culprit."""
    with pytest.raises(InvalidSpec, match=told):
        stack(outputs=more.pop("outputs", {}), **more)


def test_a_machine_speaks_only_of_those_before_it():
    """A fact of a machine that may not be there yet cannot be asked for."""
    machines = {
        "a": {"playbooks": ["w.yml"], "variables": {"b": "{b.address}"}},
        "b": {},
    }
    with pytest.raises(InvalidSpec, match=r"variables.b of a: \{b.address\} means nothing"):
        stack(machines=machines, outputs={})


@pytest.mark.parametrize("content", [None, [], "text", {"machines": {"a": {}}}])
def test_what_is_no_stack_is_refused(content):
    """Without a name and machines there is no stack."""
    with pytest.raises(InvalidSpec):
        StackFile.read(content)


def test_nothing_there_all_is_made_in_rounds():
    """Machines that wait for none are made together, then those that waited for them."""
    wanted = stack()
    todo = changes(wanted, FILES, [])
    assert {each.step for each in todo} == {Step.MAKE}
    assert [[m.name for m in each] for each in rounds(wanted, todo)] == [
        ["front"],
        ["node01", "node02"],
    ]


def test_what_is_up_is_left_alone():
    """Bringing up twice does nothing the second time."""
    wanted = stack()
    todo = changes(wanted, FILES, all_up(wanted))
    assert {each.step for each in todo} == {Step.KEEP}
    assert rounds(wanted, todo) == []


def test_variables_are_filled_from_the_machines_before():
    """A playbook is told where the front is, and its own machine's name."""
    wanted = stack()
    asked = request(wanted, wanted.machines[1], FILES, facts_of(wanted, all_up(wanted)))
    assert asked.order.playbooks[0].variables == {
        "role": "worker",
        "front": "10.0.0.1",
        "me": "node01",
    }
    assert asked.order.name == "lab-node01"


def test_a_changed_machine_is_made_anew_and_so_is_who_was_told_of_it():
    """Another size of the front: the nodes, which know its address, follow."""
    there = all_up(stack())
    machines = LAB["machines"] | {"front": LAB["machines"]["front"] | {"cpus": 8}}
    todo = {each.machine: each for each in changes(stack(machines=machines), FILES, there)}
    assert (todo["front"].step, todo["front"].why) == (Step.REPLACE, "has other cpus")
    assert todo["node01"].step is Step.REPLACE
    assert "made anew" in todo["node01"].why


def test_other_user_data_is_a_change():
    """What is asked of a machine is compared whole."""
    wanted = stack()
    todo = changes(
        wanted, FILES | {"front.yaml": "#cloud-config\npackages: [git]\n"}, all_up(wanted)
    )
    assert next(each for each in todo if each.machine == "front").why == "has other user-data"


def test_what_is_not_in_the_file_is_removed_first():
    """A node fewer: it goes, and nothing else is touched; others' machines are not seen."""
    wanted = stack()
    there = all_up(wanted)
    other = there[0].model_copy(
        update={"order": there[0].order.model_copy(update={"stack": "other"}), "name": "lab-x"}
    )
    machines = dict(LAB["machines"])
    machines["node01"] = machines.pop("node[01-02]")
    todo = changes(stack(machines=machines), FILES, [*there, other])
    assert (todo[0].machine, todo[0].step) == ("node02", Step.REMOVE)
    assert {each.step for each in todo[1:]} == {Step.KEEP}


@pytest.mark.parametrize("state", [MachineState.ENDED, MachineState.FAILED, MachineState.ENDING])
def test_a_machine_that_is_over_is_made_again(state):
    """What ended by itself, or failed, lacks."""
    wanted = stack()
    front, *nodes = all_up(wanted)
    over = front.model_copy(update={"state": state})
    todo = {each.machine: each.step for each in changes(wanted, FILES, [over, *nodes])}
    assert todo == {"front": Step.MAKE, "node01": Step.REPLACE, "node02": Step.REPLACE}


def test_a_launch_under_way_is_waited_for_not_repeated():
    """An 'up' that was interrupted goes on: what is being made is kept."""
    wanted = stack()
    launching = info(wanted, wanted.machines[0], state=MachineState.LAUNCHING)
    todo = {each.machine: each.step for each in changes(wanted, FILES, [launching])}
    assert todo == {"front": Step.KEEP, "node01": Step.MAKE, "node02": Step.MAKE}


def test_down_goes_the_other_way():
    """Those that others need are stopped last."""
    wanted = stack()
    names = [each.name for each in downwards(wanted, all_up(wanted))]
    assert names[-1] == "lab-front"
    assert len(names) == 3


def test_outputs_tell_what_is_known():
    """An output that speaks of a machine that is not ready is left out."""
    wanted = stack()
    assert outputs(wanted, facts_of(wanted, all_up(wanted))) == {"login": "debian@10.0.0.1"}
    assert outputs(wanted, {}) == {}


def test_braces_can_be_written():
    """Doubled braces stand for themselves."""
    machines = {"a": {"playbooks": ["w.yml"], "variables": {"x": "{{name}} is {name}"}}}
    wanted = stack(machines=machines, outputs={})
    asked = request(wanted, wanted.machines[0], FILES, {})
    assert asked.order.playbooks[0].variables["x"] == "{name} is a"


# Networks

RANGE = "10.20.0.0/24"
INSIDE = {
    "networks": {"inner": {"cidr": RANGE}},
    "defaults": LAB["defaults"] | {"network": "inner"},
}


def report(*networks, makers=("aws",)):
    """Return what there is, each as (name, cidr, provider, region)."""
    there = [
        NetworkInfo(id="x", name=name, cidr=cidr, provider=provider, region=region)
        for name, cidr, provider, region in networks
    ]
    return NetworkReport(networks=tuple(there), makers=makers)


def test_machines_are_made_where_their_network_is():
    """At the one provider that makes networks, and in the region where it was made by then."""
    wanted = stack(**INSIDE)
    before = placed(wanted, report())
    assert {name: each.provider for name, each in lacking_networks(before, report()).items()} == {
        "inner": "aws"
    }
    assert {machine.provider for machine in before.machines} == {"aws"}
    there = report(("lab-inner", RANGE, "aws", "eu"), ("b-inner", "10.9.0.0/24", "aws", ""))
    after = placed(wanted, there)
    assert lacking_networks(after, there) == {}
    assert [each.name for each in networks_of(wanted, there)] == ["lab-inner"]
    asked = request(after, after.machines[0], FILES, {})
    assert (asked.provider, asked.region, asked.order.network) == ("aws", "eu", "lab-inner")
    again = info(after, after.machines[0]).model_copy(update={"provider": "aws"})
    assert changes(after, FILES, [again])[0].step is Step.KEEP


def test_a_machine_of_another_network_is_made_anew():
    """It cannot move."""
    wanted = placed(stack(**INSIDE), report())
    front = next(each for each in stack().machines if each.name == "front")
    old = info(stack(), front).model_copy(update={"provider": "aws"})
    found = {change.machine: change for change in changes(wanted, FILES, [old])}
    assert (found["front"].step, found["front"].why) == (Step.REPLACE, "has other network")


@pytest.mark.parametrize(
    ("entry", "there", "word"),
    [
        ({}, report(makers=()), "none here"),
        ({}, report(makers=("a", "b")), "at which provider"),
        ({"provider": "nova"}, report(), "'nova' makes none by name"),
        ({}, report(("lab-inner", "10.9.0.0/24", "aws", "")), "is there already, as 10.9.0.0/24"),
        (
            {"provider": "b"},
            report(("lab-inner", RANGE, "a", ""), makers=("a", "b")),
            "at a",
        ),
    ],
)
def test_a_network_that_cannot_be_had_is_told_before_anything_is_made(entry, there, word):
    """With the next step."""
    wanted = stack(**INSIDE | {"networks": {"inner": {"cidr": RANGE} | entry}})
    with pytest.raises(InvalidSpec) as refused:
        placed(wanted, there)
    assert word in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"defaults": {"network": "outer"}}, "there is no 'outer'"),
        ({"networks": {"inner": {"cidr": "8.8.8.0/24"}}}, "networks.inner.cidr"),
        ({"networks": {"inner": {"cidr": "10.20.0.7/24"}}}, "networks.inner.cidr"),
        ({"networks": {"inner": {"cidr": "fd00::/64"}}}, "networks.inner.cidr"),
        ({"networks": {"inner": {"cidr": "10.20.0.0/24", "dhcp": True}}}, "networks.inner.dhcp"),
        ({"networks": {"in ner": {"cidr": "10.20.0.0/24"}}}, "networks"),
    ],
)
def test_a_wrong_network_is_told_with_its_place(more, told):
    """Before anything is asked of a site."""
    with pytest.raises(InvalidSpec) as refused:
        stack(**INSIDE | more)
    assert told in str(refused.value)


def test_a_network_is_at_the_provider_of_its_machines():
    """If these name one; at two it cannot be."""
    at = {"defaults": {"network": "inner", "provider": "aws"}}
    assert stack(**INSIDE | at).networks["inner"].provider == "aws"
    machines = LAB["machines"] | {"other": {"provider": "gcp"}}
    with pytest.raises(InvalidSpec, match="is at aws, and the machine at gcp"):
        stack(**INSIDE | at | {"machines": machines})
