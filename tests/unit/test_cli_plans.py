"""What a person is shown before a machine is made, and of the many shapes of clouds."""

import pytest

from gridcloud.cli import planning, sites
from gridcloud.model.api import OffersReply, ProviderInfo
from gridcloud.model.choice import Strategy
from gridcloud.model.job import JobSpec
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.orchestration.planner import plan


def shape(name, cpus, *, gpus=0, at="aws", **more):
    has = Resources(cpus=cpus, memory_bytes=cpus * 4 * GIB, gpus=gpus)
    more = {"region": "eu", "cost": cpus * 0.1, "currency": "EUR"} | more
    return Offer(site="home", provider=at, capacity=has, free=has, shape=name, **more)


def host(cpus, free):
    have = {"memory_bytes": 8 * GIB}
    return Offer(
        site="home",
        provider="local",
        capacity=Resources(cpus=cpus, **have),
        free=Resources(cpus=free, **have),
    )


class Client:
    """A site with one cloud, and a plan for whatever is asked."""

    def __init__(self, *offers, cloud=True):
        self.offered, self.cloud, self.asked = offers, cloud, []

    def providers(self):
        none = Resources()
        return [
            ProviderInfo(
                name="aws", kind="ec2", capacity=none, free=none, makes_machines=self.cloud
            )
        ]

    def offers(self, need, site, *, constraints, strategy, most, spot=False):
        self.asked.append(spot)
        judged = plan(need, self.offered, site, constraints, Strategy.FIRST_FIT, spot=spot)
        return OffersReply(need=need, plan=judged)


def spec(**more):
    return JobSpec(command=("true",), **more)


def test_a_plan_says_what_where_why_and_what_next():
    """In four lines at most, with the price of the whole job where that is known."""
    need = Need(cpus=2, time="PT90M")
    judged = plan(need, [host(4, 1), shape("m", 2), shape("l", 4, region="us")])
    assert planning.lines(judged, spec(need=need)) == [
        "plan: home/aws m in eu (2 CPUs, 8 GiB): 0.2 EUR an hour, 0.3 EUR for 1h 30m",
        " why: the best of 2 that fit; home/local: has free now 1 of 2 CPUs",
        "next: home/aws l in us (4 CPUs, 16 GiB): 0.4 EUR an hour; dearer",
    ]


def test_a_plan_for_an_array_says_that_it_is_for_each():
    """Else a person would take the price of one for that of all."""
    first, *_ = planning.lines(plan(Need(), [shape("m", 2)]), spec(tasks=(1, 2, 3)))
    assert first.startswith("plan: for each of 3 tasks home/aws m")


def test_what_a_cloud_says_cannot_steer_the_terminal():
    """Names of shapes and regions are the cloud's own."""
    offer = shape("m\x1b[2J", 2, region="eu\x07")
    assert not set("".join(planning.lines(plan(Need(), [offer]), spec()))) & {"\x1b", "\x07"}


@pytest.mark.parametrize(
    ("typed", "terminal", "ask", "goes_on"),
    [
        ("n\n", True, True, False),
        ("\n", True, True, True),
        (None, True, False, True),
        (None, False, True, True),
    ],
)
def test_only_a_person_at_a_terminal_is_asked(monkeypatch, capsys, typed, terminal, ask, goes_on):
    """And never twice; without a terminal it goes on, having told the plan."""
    questions = []

    def confirm(question, **_):
        questions.append(question)
        return typed.strip() != "n"

    monkeypatch.setattr("click.confirm", confirm)
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: terminal, raising=False)
    assert planning.agreed(Client(shape("m", 2)), spec(), ask=ask) is goes_on
    assert len(questions) == (typed is not None)
    assert "plan: home/aws m in eu" in capsys.readouterr().err


def test_where_nothing_is_made_nothing_is_said(capsys):
    """Neither where home has room, nor where nothing fits now: that the job's own waiting tells."""
    assert planning.agreed(Client(host(4, 4), shape("m", 2)), spec(), ask=True)
    assert planning.agreed(Client(host(4, 0)), spec(), ask=True)
    client = Client(cloud=False)
    assert planning.agreed(client, spec(), ask=True)
    assert client.asked == [], "without clouds no plan is made at all"
    assert capsys.readouterr().err == ""


def test_a_plan_for_spot_capacity_is_of_spot_capacity(capsys):
    """What is shown is what would be made."""
    client = Client(shape("firm", 2), shape("cheap", 2, spot=True))
    assert planning.agreed(client, spec(machine=MachineOrder(spot=True)), ask=False)
    assert "plan: home/aws cheap in eu, spot" in capsys.readouterr().err


def test_what_is_asked_of_a_machine_in_vain_is_told(capsys):
    """Where nothing is made an image means nothing; a container heeds it."""
    ordered = spec(machine=MachineOrder(image="debian-12"))
    planning.agreed(Client(host(4, 4)), ordered, ask=True)
    said = capsys.readouterr().err
    assert "home/local is there already: --image counts only where a machine is made" in said
    container = host(4, 4).model_copy(update={"isolation": "podman"})
    planning.agreed(Client(container), ordered, ask=True)
    assert capsys.readouterr().err == ""


def test_offers_show_a_few_shapes_of_each_cloud(capsys):
    """Those that fit and those that do not; the others are counted, and no reason told twice."""
    many = [shape(f"s{n:03}", 1 + n % 4) for n in range(500)]
    need = Need(cpus=2)
    for most in (None, 200):
        judged = plan(need, [*many, shape("other", 8, at="stack"), host(1, 1)], most=most)
        sites._tell_offers(OffersReply(need=need, plan=judged), 5)
        shown = capsys.readouterr().out
        assert len(shown.splitlines()) < 25
        assert "other" in shown
        assert "home/aws: and 490 more shapes; --shapes shows more" in shown
        assert "home/local: has 1 of 2 CPUs" in shown
