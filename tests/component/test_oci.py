"""The Oracle Cloud provider against an emulation that checks each request by the SDK's models."""

import asyncio
import base64
import configparser
import dataclasses

import pytest

from gridcloud.errors import Conflict, Forbidden, InvalidSpec, NoCapacity, NotFound, Unavailable
from gridcloud.model.identifiers import new_id
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.things import KEPT, Tags
from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.contract import (
    SITE,
    CloudContract,
    MachineProviderContract,
    MakingForTests,
)
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.contract import NAME, assert_telling
from gridcloud.providers.oci import OCIProvider
from gridcloud.providers.oci.cloud import OCICloud
from gridcloud.providers.oci.section import OCISection
from gridcloud.settings import LendingSettings
from testbeds import oci_server
from testbeds.fault_proxy import CALM, FaultProxy, Faults
from testbeds.faults import Subject, hurt, seeds
from testbeds.leases import lease

pytestmark = pytest.mark.xdist_group("oci")

#: So many campaigns are run at a time, since most of theirs is waiting.
_AT_ONCE = 10
BATCHES = [tuple(seeds()[n : n + _AT_ONCE]) for n in range(0, len(seeds()), _AT_ONCE)]
FLEXIBLE = "VM.Standard.E4.Flex"


@pytest.fixture(scope="session")
def server():
    """Keep an emulation running."""
    if problem := oci_server.problem():
        pytest.skip(problem)
    with oci_server.running() as one:
        yield one


@pytest.fixture
def oci(server, monkeypatch):
    """Give an empty Oracle Cloud, with credentials where its users have them."""
    server.reset()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def section(oci, **more):
    """Return settings for it."""
    told = {
        "endpoint": oci.url,
        "compartment": oci_server.COMPARTMENT,
        "calls_per_second": 1000.0,
        **more,
    }
    return read_section(OCISection, NAME, told)


class QuickOCI(OCICloud):
    """OCI that is believed at once, since the emulation shows all that it has."""

    shows_late_seconds = 0.1


class TestOCICloud(CloudContract):
    """What every cloud promises."""

    @pytest.fixture
    def make_cloud(self, oci):
        own = section(oci)
        return lambda site_key: OCICloud(own, site_key)


async def answers(host, port):
    """Be an SSH server that answers at once: the emulation starts no machines."""


class Provider(CloudProvider):
    """A provider over OCI whose machines are taken to answer."""

    kind = "oci"


def provider(tmp_path, cloud, own, site_key=SITE):
    """Return a provider that remembers nothing."""

    async def probe(endpoint, identity):
        raise AssertionError

    context = ProviderContext(site_key, tmp_path, LendingSettings(), probe, MakingForTests())
    return Provider(NAME, own, context, cloud, reach=answers)


@pytest.fixture
async def launching(oci, tmp_path):
    """Return a function that makes providers; all are closed in the end."""
    made = []

    def make(**more):
        own = section(oci, **more)
        made.append(provider(tmp_path, QuickOCI(own, SITE), own))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture
async def cloud(oci):
    """Give a cloud."""
    one = QuickOCI(section(oci), SITE)
    yield one
    await one.close()


class TestOCIProvider(MachineProviderContract):
    """What every provider of machines promises."""

    bad_sections = [
        ({"compartment": "my-compartment"}, "compartment"),
        ({"subnet": "10.0.0.0/8"}, "subnet"),
        ({"ssh_from": ["everywhere"]}, "ssh_from"),
        ({"shapes": []}, "shapes"),
    ]

    @pytest.fixture
    def make(self, context, oci):
        def make(told=None):
            if told is not None:
                return OCIProvider(NAME, told, context)
            own = section(oci)
            return Provider(NAME, own, context, QuickOCI(own, SITE), reach=answers)

        return make


async def test_a_machine_is_made_as_asked(oci, launching):
    """Its size, place, user-data and tags are as OCI is to have them, and only SSH comes in."""
    own = launching()
    order = MachineOrder(user_data="#!/bin/sh\necho hello\n")
    need = Need(cpus=3, memory_bytes=5 * GIB)
    asked = lease(order=order, need=need, shape=FLEXIBLE, region=oci_server.REGION)
    made = await own.launch(asked)
    [machine] = oci.machines()
    assert machine["id"] == made.id
    assert machine["_asked"]["shapeConfig"] == {"ocpus": 2.0, "memoryInGBs": 5.0}
    image = oci_server.IMAGES["Canonical-Ubuntu-24.04-2025.06.30-0"]
    assert machine["imageId"] == image["id"], "the newest of the name that is not minimal"
    assert machine["freeformTags"]["gridcloud-lease"] == asked.id
    assert base64.b64decode(machine["metadata"]["user_data"]).decode() == order.user_data
    assert machine["_asked"]["instanceOptions"]["areLegacyImdsEndpointsDisabled"]
    [vnic] = oci.of("vnic")
    assert vnic["publicIp"] == made.endpoint.host
    [group] = oci.of("networksecuritygroup")
    rules = [r for r in group["_rules"] if r["direction"] == "INGRESS"]
    ports = [r["tcpOptions"]["destinationPortRange"] for r in rules]
    assert (ports, rules[0]["source"]) == ([{"min": 22, "max": 22}], "0.0.0.0/0")
    [rules] = oci.of("securitylist")
    assert rules["ingressSecurityRules"] == [], "the VCN's own rules let nothing more in"
    await own.terminate(asked.id)
    assert oci.tagged() == []


async def test_a_flexible_shape_is_made_within_its_bounds(oci, launching):
    """On Ampere A1 an OCPU is one CPU, elsewhere two; much memory takes more OCPUs."""
    own = launching()
    for shape, need, size in (
        ("VM.Standard.A1.Flex", Need(cpus=3, memory_bytes=GIB), (3.0, 3.0)),
        (FLEXIBLE, Need(cpus=1, memory_bytes=GIB), (1.0, 1.0)),
        (FLEXIBLE, Need(cpus=1, memory_bytes=130 * GIB), (3.0, 130.0)),
    ):
        asked = lease(need=need, shape=shape, region=oci_server.REGION)
        await own.launch(asked)
        [machine] = oci.machines()
        told = machine["_asked"]["shapeConfig"]
        assert (told["ocpus"], told["memoryInGBs"]) == size
        await own.terminate(asked.id)


async def test_shapes_say_what_they_have(cloud):
    """CPUs are hardware threads; GPUs, architecture, and what is free are told."""
    shapes = {shape.name: shape for shape in await cloud.shapes() if not shape.spot}
    assert "BM.Standard.E4.128" not in shapes, "bare metal is not among the usual settings"
    assert shapes[FLEXIBLE].resources == Resources(cpus=128, memory_bytes=1024 * GIB)
    assert shapes[FLEXIBLE].flexible
    ampere = shapes["VM.Standard.A1.Flex"]
    assert (ampere.resources.cpus, ampere.architecture) == (80, "aarch64")
    gpu = shapes["VM.GPU.A10.1"]
    assert (gpu.resources.gpus, gpu.resources.cpus, gpu.architecture) == (1, 30, "x86_64")
    assert shapes["VM.Standard.E2.1.Micro"].price == 0
    assert shapes[FLEXIBLE].price is None
    assert await cloud.places(gpu) == (f"{oci_server.REGION}/{oci_server.DOMAINS[1]}",)


async def test_images_are_found_by_owner_name_and_id(cloud):
    """The newest that boots on the shape; an image of another architecture is not taken."""
    shapes = {shape.name: shape for shape in await cloud.shapes()}
    small, ampere = shapes["VM.Standard2.1"], shapes["VM.Standard.A1.Flex"]
    assert (await cloud.image("own/ours*", small)).name == "ours-3"
    assert (await cloud.image("ours-3", small)).name == "ours-3"
    with pytest.raises(NotFound):
        await cloud.image("platform/ours*", small)
    arm = await cloud.image("", ampere)
    assert "aarch64" in arm.name
    assert (arm.user, arm.architecture) == ("ubuntu", "aarch64")
    oracle = await cloud.image("platform/Oracle-Linux-9*", small)
    assert (await cloud.image(oracle.id, small)) == oracle
    assert oracle.user == "opc"
    with pytest.raises(InvalidSpec, match="does not boot"):
        await cloud.image(oracle.id, ampere)
    with pytest.raises(NotFound) as refused:
        await cloud.image("platform/Oracle-Linux-9.4*", small)
    assert "Oracle-Linux-9.5-2025.05.19-0" in refused.value.hint


async def test_spot_is_asked_for_as_such(oci, launching):
    """An order for spot capacity makes a preemptible machine; once taken back it is gone."""
    own = launching()
    asked = lease(order=MachineOrder(spot=True))
    made = await own.launch(asked)
    [machine] = oci.machines()
    action = machine["_asked"]["preemptibleInstanceConfig"]["preemptionAction"]
    assert action == {"type": "TERMINATE", "preserveBootVolume": False}
    assert {shape.spot for shape in (await own.capacity()).shapes} == {False, True}
    oci.preempt(made.id)
    await own.terminate(asked.id)
    assert oci.tagged() == []


async def test_a_full_domain_is_left_for_the_next(oci, launching):
    """Where OCI has no host in one availability domain, the machine is made in another."""
    own = launching()
    oci.refuse("POST instances", 500, "InternalError", "Out of host capacity.")
    made = await own.launch(lease())
    [machine] = oci.machines()
    assert machine["id"] == made.id
    assert machine["availabilityDomain"] == oci_server.DOMAINS[1]


@pytest.mark.parametrize(
    ("status", "code", "error", "told"),
    [
        (400, "LimitExceeded", NoCapacity, "standard-e4-core-count"),
        (400, "QuotaExceeded", NoCapacity, "limit"),
        (500, "OutOfHostCapacity", NoCapacity, "no room"),
        (403, "NotAuthorized", Forbidden, "manage instance-family"),
        (400, "InvalidParameter", InvalidSpec, "does not take this"),
        (404, "NotAuthorizedOrNotFound", NotFound, "not there, or this user may not see it"),
    ],
)
async def test_refusals_are_told_and_leave_nothing(oci, launching, status, code, error, told):
    """What OCI refuses for good is said in its words, with what to do, and all is removed."""
    own = launching()
    oci.refuse("POST instances", status, code, "standard-e4-core-count", times=3)
    with pytest.raises(error) as refused:
        await own.launch(lease())
    assert_telling(refused.value)
    assert told in str(refused.value)
    assert oci.tagged() == []


async def test_what_passes_is_waited_for(oci, launching):
    """Throttling, an error of OCI's own and something that is being changed are no end."""
    own = launching()
    for status, code in ((429, "TooManyRequests"), (500, "InternalError"), (409, "IncorrectState")):
        oci.refuse("POST instances", status, code)
        assert (await own.launch(lease())).id


async def test_limits_are_told_and_hold(oci, cloud, launching):
    """What the limits leave is asked, and reaching one names it."""
    settings = {"shapes": [FLEXIBLE], "spot": False}
    own = QuickOCI(section(oci, **settings), SITE)
    oci.limits = {"standard-e4-core-count": 2, "standard-e4-memory-count": 64}
    before = await own.headroom(oci_server.REGION)
    assert (before.cpus, before.memory_bytes) == (4, 64 * GIB)
    maker = launching(**settings)
    need = Need(cpus=4, memory_bytes=4 * GIB)
    await maker.launch(lease(need=need, shape=FLEXIBLE, region=oci_server.REGION))
    assert (await own.headroom(oci_server.REGION)).cpus == 0
    with pytest.raises(NoCapacity, match="standard-e4-core-count"):
        await maker.launch(lease(need=need, shape=FLEXIBLE, region=oci_server.REGION))
    oci.refuse("GET limitValues", 404, "NotAuthorizedOrNotFound")
    assert (await own.headroom(oci_server.REGION)).cpus is None, "it may be forbidden to ask"
    await own.close()


async def test_all_pages_of_a_list_are_read(oci, launching):
    """Lists that come in pieces are read whole, also what removing needs."""
    oci.page_size = 1
    own = launching()
    leases = [lease() for _ in range(3)]
    for one in leases:
        await own.launch(one)
    assert await own.made() == sorted(one.id for one in leases)
    for one in leases:
        await own.terminate(one.id)
    assert oci.tagged() == []


async def test_wrong_credentials_are_refused_with_what_to_do(oci, launching, monkeypatch, tmp_path):
    """Signatures are verified by the testbed: a wrong key's id is found out, and keys not shown."""
    wrong = configparser.RawConfigParser()
    wrong.read(oci.config)
    wrong["DEFAULT"]["fingerprint"] = "00:" * 15 + "00"
    with (tmp_path / "config").open("w") as file:
        wrong.write(file)
    monkeypatch.setenv("OCI_CLI_CONFIG_FILE", str(tmp_path / "config"))
    capacity = await launching().check()
    assert "NotAuthenticated" in capacity.problem
    assert "oci iam region list" in capacity.problem
    monkeypatch.setenv("OCI_CLI_CONFIG_FILE", str(tmp_path / "nowhere"))
    assert "oci setup config" in (await launching().check()).problem
    monkeypatch.setenv("OCI_CLI_CONFIG_FILE", str(oci.config))
    assert "no profile 'other'" in (await launching(profile="other").check()).problem
    (tmp_path / "key.pem").write_text("secret words")
    monkeypatch.setenv("OCI_CLI_KEY_FILE", str(tmp_path / "key.pem"))
    problem = (await launching().check()).problem
    assert "cannot be used" in problem
    assert "secret words" not in problem


async def test_a_wrong_compartment_or_region_is_told(oci, launching):
    """OCI does not say whether it is missing or forbidden, so both are told."""
    capacity = await launching(compartment="ocid1.compartment.oc1..aaaaother").check()
    assert "not there, or this user may not see it" in capacity.problem
    assert "compartment" in capacity.problem
    assert "not there" in (await launching(regions=["eu-paris-1"]).check()).problem


async def test_a_token_makes_one_machine_though_the_request_comes_twice(oci):
    """A proxy that repeats requests makes no second machine, and the token of a machine that has
    ended is not used again."""
    async with FaultProxy(oci.url.removesuffix("/{region}"), faults=CALM) as proxy:
        cloud = QuickOCI(section(oci, endpoint=f"{proxy.url}/{{region}}"), SITE)
        asked = CloudContract()
        build = await asked.build(cloud, new_id(16))
        small = Resources(cpus=1, memory_bytes=GIB)
        build = build.model_copy(update={"resources": small})
        proxy.faults = dataclasses.replace(CALM, duplicated=1)
        made = await cloud.create(build)
        assert [one["id"] for one in oci.machines()] == [made]
        proxy.calm()
        await asked.removed(cloud, build.tags.lease)
        network = await cloud.network(build.tags, build.place)
        assert await cloud.create(build.model_copy(update={"network": network})) != made
        await asked.removed(cloud, build.tags.lease)
        await cloud.close()
    assert oci.tagged() == []


async def test_a_network_that_went_is_made_again(oci, cloud):
    """A machine whose network was removed meanwhile asks for it again, and is not given up."""
    asked = CloudContract()
    build = await asked.build(cloud, new_id(16))
    await asked.removed(cloud, build.tags.lease)
    with pytest.raises(Unavailable):
        await cloud.create(build)
    network = await cloud.network(build.tags, build.place)
    assert await cloud.create(build.model_copy(update={"network": network}))
    await asked.removed(cloud, build.tags.lease)


async def test_regions_are_apart_and_all_are_swept(oci, launching):
    """A machine is made in the region of its lease; what is tagged is found in all of them."""
    own = launching(regions=[oci_server.REGION, oci_server.OTHER_REGION])
    asked = lease(shape="VM.Standard2.1", region=oci_server.OTHER_REGION)
    made = await own.launch(asked)
    [machine] = oci.machines()
    assert (made.region, machine["region"]) == (oci_server.OTHER_REGION, oci_server.OTHER_REGION)
    assert await own.made() == [asked.id]
    await own.terminate(asked.id)
    assert oci.tagged() == []


async def test_the_users_own_network_is_used_and_left(oci, cloud, launching):
    """In a subnet of the settings only a security group is made, and removed with the last."""
    other = QuickOCI(section(oci), "07" * 32)
    tags = Tags.of("07" * 32, new_id(16))
    place = (await other.places((await other.shapes())[0]))[0]
    subnet = (await other.network(tags, place)).partition("/")[0]
    theirs = set(oci.tagged())
    own = launching(network=subnet)
    asked = lease()
    await own.launch(asked)
    [machine] = oci.machines()
    assert machine["_asked"]["createVnicDetails"]["subnetId"] == subnet
    await own.terminate(asked.id)
    assert set(oci.tagged()) == theirs
    await other.close()


async def test_the_boot_log_is_the_end_of_the_console(oci, launching):
    """It is copied for the question, at most 64 KiB of it, and the copy is removed."""
    own = launching()
    asked = lease()
    await own.launch(asked)
    oci.console = "x" * 100_000 + "the end"
    log = await own.boot_log(asked.id)
    assert log.endswith("xthe end")
    assert len(log) == 64 * 1024
    assert oci.of("consolehistory") == []


async def test_a_volume_is_attached_by_a_name_that_stays(oci, cloud):
    """Its device is one of OCI's consistent names; a small one is as large as OCI's smallest."""
    asked = CloudContract()
    build = await asked.build(cloud, new_id(16))
    build = build.model_copy(update={"resources": Resources(cpus=1, memory_bytes=GIB)})
    volume = await cloud.volume(Tags.of(SITE, KEPT), "data", GIB, build.place)
    await cloud.create(build)

    async def running():
        server = await cloud.server(build.tags.lease)
        return server is not None and server.condition == "running"

    await asked.eventually(running)
    assert await cloud.attach(build.tags.lease, volume) == "/dev/oracleoci/oraclevdb"
    [shown] = await cloud.volumes()
    assert (shown.name, shown.size_bytes, shown.place) == ("data", 50 * GIB, build.place)
    with pytest.raises(Conflict):
        await cloud.volume(Tags.of(SITE, KEPT), "data", 0, build.place)
    await asked.removed(cloud, build.tags.lease)
    await cloud.remove_volume(volume)


async def test_questions_offer_the_users_profiles(oci, monkeypatch, tmp_path):
    """Who adds a provider is asked with what ~/.oci/config has; keys are not read."""
    (tmp_path / "config").write_text(
        oci.config.read_text() + "[work]\nregion=uk-london-1\ntenancy=ocid1.tenancy.oc1..b\n"
    )
    monkeypatch.setenv("OCI_CLI_CONFIG_FILE", str(tmp_path / "config"))
    questions = {one.setting: one for one in OCIProvider.questions()}
    assert questions["profile"].choices == ("DEFAULT", "work")
    assert questions["compartment"].default == oci_server.TENANCY
    assert questions["regions"].choices == (oci_server.REGION, "uk-london-1")
    answers = {one.setting: one.default for one in questions.values()}
    assert read_section(OCISection, NAME, answers).regions == (oci_server.REGION,)
    (tmp_path / "config").write_text("no section\n")
    with pytest.raises(InvalidSpec):
        OCIProvider.questions()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("few", BATCHES, ids=lambda few: f"{few[0]}-{few[-1]}")
async def test_faults_leave_nothing(few, oci, tmp_path):
    """Launches hurt by errors, cuts, throttling, duplicates and stale lists, and killed at random
    instants, end with nothing tagged at OCI."""
    oci.page_size = 20
    await asyncio.gather(*(campaign(seed, oci, tmp_path) for seed in few))


async def campaign(seed, oci, tmp_path):
    """Hurt one site of its own, in a compartment of its own."""
    site_key = f"{seed:08x}" * 8
    faults = Faults(withheld_seconds=0.5, stale_seconds=0.3, retry_after="0.3")
    own = {
        "patience": {"removal": "120s"},
        "shapes": ["VM.Standard2.1"],
        "compartment": f"{oci_server.COMPARTMENT}{seed}",
    }

    def make():
        told = section(oci, endpoint=f"{proxy.url}/{{region}}", **own)
        return provider(tmp_path, HurtOCI(told, site_key), told, site_key)

    async def left():
        return await asyncio.to_thread(oci.tagged, site_key[:32])

    async with FaultProxy(oci.url.removesuffix("/{region}"), seed, faults) as proxy:
        await hurt(
            seed,
            Subject(
                make=make,
                new_lease=lease,
                left=left,
                kill=lambda one: one._cloud.kill(),
                calm=proxy.calm,
                launch_seconds=6.0,
                settles_seconds=0.5,
            ),
        )


class HurtOCI(OCICloud):
    """OCI whose lists may be a moment behind; ``kill`` ends it as ``kill -9`` does."""

    shows_late_seconds = 0.8

    def kill(self):
        async def never(work):
            await asyncio.get_running_loop().create_future()

        self._regions.in_thread = never
