"""The OpenStack provider against the real OpenStack: its contracts, whole sites, and what hurts."""

import asyncio
import contextlib
import json
import secrets
import subprocess
from datetime import UTC, datetime, timedelta

import aiohttp
import openstack
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gridcloud.errors import Forbidden, InvalidSpec, NoCapacity, TimedOut, Unavailable
from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.model.things import SHARED, Tags
from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.clouds import Build, Condition
from gridcloud.providers.cloud.contract import (
    CloudContract,
    MachineProviderContract,
    MakingForTests,
)
from gridcloud.providers.contract import NAME, assert_telling
from gridcloud.providers.openstack import OpenStackProvider, OpenStackSection
from gridcloud.providers.openstack.cloud import OpenStackCloud
from gridcloud.settings import LendingSettings
from testbeds import fault_proxy
from testbeds.faults import Subject, hurt, seeds
from testbeds.openstack.layout import INSIDE, PORTS, REGION
from testbeds.openstack.testbed import lacking, openstack_testbed
from testbeds.sites import GRIDCLOUD, SiteProcess, wait_until

pytestmark = [
    pytest.mark.openstack,
    pytest.mark.xdist_group("openstack"),
    pytest.mark.skipif(bool(lacking()), reason=lacking() or "openstack"),
    pytest.mark.timeout(900),
]

SITE = "5e" * 32
#: A whole cloud on two cores is slow while other tests run.
BOOTED = 400.0
PATIENCE = {"patience": dict.fromkeys(("image", "place", "network", "volumes", "create"), "5m")}


@pytest.fixture(scope="module")
def testbed():
    """Keep this machine's OpenStack running."""
    with openstack_testbed() as cloud:
        yield cloud


@pytest.fixture(scope="module")
def common(testbed):
    """A project for tests that leave nothing behind."""
    with testbed.project() as project:
        yield project


@pytest.fixture
def project(testbed):
    """A project of one test's own, with its own quota."""
    with testbed.project() as project:
        yield project


def section(project, folder, image="empty", **more):
    """Return settings for a project of the testbed."""
    file = folder / f"clouds-{secrets.token_hex(4)}.yaml"
    file.write_text(project.clouds_yaml(**more.pop("yaml", {})))
    return {
        "cloud": "testbed",
        "clouds_file": str(file),
        "image": image,
        "subnet": project.subnet,
        "address": "fixed",
        "flavors": ["m1.*"],
        **more,
    }


def cloud_of(told, site=SITE):
    return OpenStackCloud(read_section(OpenStackSection, NAME, told), site)


def provider_of(told, folder, site=SITE, making=None):
    context = ProviderContext(
        site_key=site,
        state_folder=folder,
        lending=LendingSettings(),
        probe=None,
        making=making or MakingForTests(),
    )
    return OpenStackProvider(NAME, told, context)


def new_lease(**more):
    now = datetime.now(UTC)
    return Lease(
        id=new_id(16),
        role=LeaseRole.OWN,
        state=LeaseState.INTENT,
        provider=NAME,
        need=Need(memory_bytes=2**28),
        created_at=now,
        ends_at=now + timedelta(minutes=10),
        **more,
    )


def toml(told, name="nova"):
    """Return settings as the text of a site's settings file."""
    lines = [f"[providers.{name}]", 'kind = "openstack"']
    flat = {key: value for key, value in told.items() if key != "patience"}
    flat |= {f"patience.{step}": limit for step, limit in told.get("patience", {}).items()}
    return "\n".join([*lines, *(f"{k} = {json.dumps(v)}" for k, v in flat.items())]) + "\n"


class TestOpenStackCloud(CloudContract):
    """What every cloud promises. Nothing boots."""

    @pytest.fixture
    def make_cloud(self, common, tmp_path):
        told = section(common, tmp_path)
        return lambda site_key: cloud_of(told, site_key)


class TestOpenStackProvider(MachineProviderContract):
    """What every provider of machines promises. They boot without cloud-init, within a second."""

    bad_sections = [
        ({"subnet": "10.0.0.0/33"}, "subnet"),
        ({"address": "everywhere"}, "address"),
        ({"token_command": ["true"], "token_file": "/nowhere"}, ""),
        ({"ssh_from": ["anywhere"]}, "ssh_from"),
    ]

    @pytest.fixture
    def make(self, context, common, tmp_path):
        good = section(common, tmp_path, image="without-cloud-init")
        return lambda told=None: OpenStackProvider(NAME, good if told is None else told, context)


@pytest.fixture
async def cloud(common, tmp_path):
    """A cloud in which nothing is, and nothing is left."""
    made = cloud_of(section(common, tmp_path))
    yield made
    for lease_id in {thing.tags.lease for thing in await made.things()}:
        await removed(made, lease_id)
    await made.close()


async def removed(cloud, lease_id):
    async with asyncio.timeout(60):
        while not await cloud.remove(lease_id):
            await asyncio.sleep(0.2)


async def build(cloud, lease_id, *, flavor="m1.tiny", image="empty"):
    shapes = {shape.name: shape for shape in await cloud.shapes()}
    shape = shapes[flavor]
    place = (await cloud.places(shape))[0]
    tags = Tags.of(SITE, lease_id, datetime.now(UTC) + timedelta(minutes=5))
    return Build(
        tags=tags,
        name=f"test-{lease_id}",
        token=lease_id,
        shape=shape,
        resources=shape.resources,
        place=place,
        image=await cloud.image(image, shape),
        network=await cloud.network(tags, place),
        user_data=b"#!/bin/sh\n",
    )


async def ended(cloud, lease_id):
    """Return the machine of a lease once it is built, or could not be."""
    async with asyncio.timeout(60):
        while True:
            server = await cloud.server(lease_id)
            if server and server.condition is not Condition.BUILDING:
                return server
            await asyncio.sleep(0.1)


async def test_shapes_tell_their_gpus(common, tmp_path):
    """By nova's own words, and by what the settings say of a name."""
    told = section(common, tmp_path, flavors=["g*"], gpus={"g2.*": 4}, prices={"g*": 1.5})
    cloud = cloud_of(told | {"currency": "EUR"})
    shapes = {shape.name: shape for shape in await cloud.shapes()}
    assert {name: shape.resources.gpus for name, shape in shapes.items()} == {
        "g1.small": 1,
        "g2.large": 4,
    }
    assert {(shape.price, shape.currency) for shape in shapes.values()} == {(1.5, "EUR")}
    await cloud.close()


async def test_no_valid_host_is_no_capacity(cloud):
    """A machine that nova cannot place fails with nova's words for it."""
    lease_id = new_id(16)
    with contextlib.suppress(NoCapacity):
        await cloud.create(await build(cloud, lease_id, flavor="m1.giant"))
        server = await ended(cloud, lease_id)
        assert server.condition is Condition.FAILED
        assert "No valid host" in server.reason


async def test_a_machine_that_cannot_be_built_says_why(cloud):
    """The fault that the hypervisor told is the reason."""
    lease_id = new_id(16)
    await cloud.create(await build(cloud, lease_id, image="broken"))
    server = await ended(cloud, lease_id)
    assert server.condition is Condition.FAILED
    assert server.reason


async def test_a_floating_address_goes_with_its_machine(common, tmp_path):
    """It is made for one machine, answers there, and is tagged and removed with it."""
    told = section(common, tmp_path, image="without-cloud-init", address="floating")
    provider = provider_of(told, tmp_path)
    lease = new_lease()
    machine = await provider.launch(lease)
    assert machine.endpoint.host.startswith("198.19.")
    kinds = {thing.kind for thing in await provider.things() if thing.tags.lease == lease.id}
    assert kinds == {"machine", "address", "port"}
    await provider.terminate(lease.id)
    assert await provider.things() == []
    await provider.close()


async def test_only_ssh_is_let_in(cloud, common):
    """The security group of the machines has no other rule for what comes in."""
    await build(cloud, new_id(16))
    (group,) = [
        group
        for group in common.user.network.security_groups(project_id=common.id)
        if group.name != "default"
    ]
    coming = [
        (rule["protocol"], rule["port_range_min"], rule["port_range_max"])
        for rule in group.security_group_rules
        if rule["direction"] == "ingress"
    ]
    assert set(coming) == {("tcp", 22, 22)}
    await removed(cloud, SHARED)


async def test_a_quota_reached_halfway_is_told_and_leaves_nothing_forgotten(project, tmp_path):
    """Of ten machines those are made that the quota lets be; the others say which quota it is.

    Nova itself may refuse too many of those that are asked for at once.
    """
    project.limit(instances=4)
    told = section(project, tmp_path, "without-cloud-init", **PATIENCE)
    provider = provider_of(told, tmp_path)
    leases = [new_lease() for _ in range(10)]
    await provider.launch(leases[0])
    results = await asyncio.gather(
        *(provider.launch(lease) for lease in leases[1:]), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, NoCapacity)]
    made = 10 - len(refused)
    assert made <= 4
    for error in refused:
        assert "quota" in str(error).lower()
        assert "instances" in str(error)
    assert len(await provider.made()) == made
    assert (await provider.check()).headroom["RegionOne"].machines == 4 - made
    for lease in leases:
        await provider.terminate(lease.id)
    assert await provider.things() == []
    await provider.close()


async def test_wrong_credentials_are_told(common, tmp_path):
    """A wrong password, and a cloud that clouds.yaml does not have, say what to do."""
    wrong = {"auth": common.auth | {"password": "wrong"}}
    provider = provider_of(section(common, tmp_path, yaml=wrong), tmp_path)
    capacity = await provider.check()
    assert "does not accept the login" in capacity.problem
    with pytest.raises(Forbidden) as refused:
        await provider.launch(new_lease())
    assert_telling(refused.value)
    await provider.close()
    provider = provider_of(section(common, tmp_path, cloud="nowhere"), tmp_path)
    with pytest.raises(InvalidSpec, match="nowhere") as unknown:
        await provider.launch(new_lease())
    assert_telling(unknown.value)
    await provider.close()


async def test_an_expired_token_is_told(common, tmp_path):
    """A token that the cloud takes no more is an error with what to do, not one to repeat."""
    session = openstack.connect(auth=common.auth, region_name=REGION).session
    token = session.get_token()
    auth = {"auth_url": common.auth["auth_url"], "project_id": common.id, "token": token}
    told = section(common, tmp_path, yaml={"auth_type": "v3token", "auth": auth})
    cloud = cloud_of(told)
    assert await cloud.shapes()
    await cloud.close()
    url = f"{common.auth['auth_url']}/auth/tokens"
    session.delete(url, headers={"X-Subject-Token": token})
    cloud = cloud_of(told)
    with pytest.raises(Forbidden) as expired:
        await cloud.shapes()
    assert "token_command" in expired.value.hint
    await cloud.close()


async def test_an_application_credential_is_enough(common, tmp_path):
    """Users need not give their password away."""
    user = common.user
    made = user.identity.create_application_credential(user.current_user_id, "gridcloud")
    auth = {
        "auth_url": common.auth["auth_url"],
        "application_credential_id": made.id,
        "application_credential_secret": made.secret,
    }
    told = section(common, tmp_path, yaml={"auth_type": "v3applicationcredential", "auth": auth})
    cloud = cloud_of(told)
    assert await cloud.shapes()
    await cloud.close()


@contextlib.asynccontextmanager
async def check_in(project, tokens):
    """Stand before keystone as a front end that knows an identity provider: whoever bears one of
    its ``tokens`` is the project's user. The rest is keystone's own."""
    keystone = project.auth["auth_url"].removesuffix("/v3")

    async def log_in(request):
        if request.headers.get("Authorization", "").removeprefix("Bearer ") not in tokens:
            return web.json_response({"error": {"code": 401, "message": "not known"}}, status=401)
        who = {"name": project.name, "password": project.password, "domain": {"id": "default"}}
        identity = {"methods": ["password"], "password": {"user": who}}
        body = {"auth": {"identity": identity, "scope": "unscoped"}}
        return await passed(request, "/v3/auth/tokens", "POST", json.dumps(body).encode())

    async def passed(request, path, method, body):
        names = {"X-Auth-Token", "X-Subject-Token", "Content-Type", "Accept"}
        headers = {k: v for k, v in request.headers.items() if k in names}
        headers.setdefault("Content-Type", "application/json")
        async with session.request(method, keystone + path, data=body, headers=headers) as answer:
            more = {k: v for k, v in answer.headers.items() if k in names}
            return web.Response(status=answer.status, body=await answer.read(), headers=more)

    async def forward(request):
        return await passed(request, request.path_qs, request.method, await request.read())

    app = web.Application()
    provider = "/v3/OS-FEDERATION/identity_providers/egi.eu/protocols/openid/auth"
    app.router.add_post(provider, log_in)
    app.router.add_route("*", "/{rest:.*}", forward)
    async with aiohttp.ClientSession() as session, TestServer(app) as server:
        yield str(server.make_url("/v3"))


async def test_an_access_token_is_fetched_anew_for_each_login(common, tmp_path):
    """As at EGI: the command is asked when it is needed, and an ended token is told."""
    tokens, file = {"first"}, tmp_path / "token"
    file.write_text("first\n")
    async with check_in(common, tokens) as url:
        auth = {"auth_url": url, "identity_provider": "egi.eu", "protocol": "openid"}
        yaml = {"auth": auth | {"project_id": common.id}}
        told = section(common, tmp_path, yaml=yaml, token_command=["cat", str(file)])
        cloud = cloud_of(told)
        assert await cloud.shapes()
        await cloud.close()
        tokens.clear()
        cloud = cloud_of(told)
        with pytest.raises(Forbidden) as ended_token:
            await cloud.shapes()
        assert "token_command" in ended_token.value.hint
        tokens.add("second")
        file.write_text("second\n")
        assert await cloud.shapes()
        await cloud.close()


async def test_an_unknown_region_is_told(common, tmp_path):
    """With what the cloud said, and where to look."""
    cloud = cloud_of(section(common, tmp_path, regions=["Atlantis"]))
    with pytest.raises(InvalidSpec) as unknown:
        await cloud.shapes()
    assert "Atlantis" in unknown.value.message
    assert_telling(unknown.value)
    await cloud.close()


async def test_a_machine_deleted_by_hand_is_seen(common, tmp_path):
    """It is not shown any more, and terminating removes what else there was."""
    provider = provider_of(section(common, tmp_path, "without-cloud-init"), tmp_path)
    lease = new_lease()
    machine = await provider.launch(lease)
    common.user.compute.delete_server(machine.id)
    await asyncio.to_thread(wait_until, lambda: not list(common.user.compute.servers()))
    assert await provider.made() in ([], [SHARED])
    await provider.terminate(lease.id)
    assert await provider.things() == []
    await provider.close()


@pytest.fixture
def new_site(project, tmp_path):
    """Return a maker of sites whose only machines are at the cloud."""
    made = []

    def make(image="debian-12", **more):
        told = section(project, tmp_path, image, **(PATIENCE | more))
        made.append(SiteProcess(tmp_path / f"site{len(made)}", "site", toml(told)))
        made[-1].start()
        with made[-1].client() as client:
            # The first answer of a slow cloud comes after the site is up.
            wait_until(lambda: client.providers()[0].capacity.cpus, 180)
        return made[-1]

    yield make
    for site in made:
        site.close()


def patiently(site, *arguments):
    """Run a command that waits for a boot."""
    return subprocess.run(
        [GRIDCLOUD, *arguments],
        env=site.environment,
        capture_output=True,
        text=True,
        timeout=BOOTED,
        check=False,
    )


def servers(project):
    return list(project.user.compute.servers())


def test_a_site_runs_a_job_on_a_machine_made_for_it(new_site, project):
    """From nothing to output and back to nothing; the machine trusts the site's certificates."""
    site = new_site()
    done = patiently(site, "run", "--kind", "openstack", "--", "sh", "-c", "hostname; id -un")
    assert done.returncode == 0, done.stderr
    name, user = done.stdout.split()
    assert name.startswith("gridcloud-")
    assert user == "debian"
    wait_until(lambda: not servers(project), 60)


def test_a_cloud_is_proved_by_a_machine(new_site, project):
    """`provider check` makes the smallest machine, logs in, and removes it."""
    done = patiently(new_site(), "provider", "check", "nova")
    assert done.returncode == 0, done.stdout + done.stderr
    assert servers(project) == []


def test_a_volume_outlives_its_machine(new_site, project):
    """What is written on it is there for the next machine that has it."""
    site = new_site()
    start = ("machine", "start", "--name", "web", "--time", "1h", "--volume")
    done = patiently(site, *start, "results:1G:/srv/results")
    assert done.returncode == 0, done.stderr
    written = patiently(site, "machine", "ssh", "web", "echo kept > /srv/results/file")
    assert written.returncode == 0, written.stderr
    assert patiently(site, "machine", "stop", "web").returncode == 0
    assert [volume.status for volume in project.user.block_storage.volumes()] == ["available"]
    done = patiently(site, *start, "results:0:/srv/results")
    assert done.returncode == 0, done.stderr
    again = patiently(site, "machine", "ssh", "web", "cat", "/srv/results/file")
    assert again.stdout.strip() == "kept", again.stderr
    assert patiently(site, "machine", "stop", "web").returncode == 0


def test_a_site_killed_in_a_launch_goes_on_with_it(new_site, project):
    """The machine that was begun is the one that becomes ready; stopped, nothing is left."""
    site = new_site()
    done = site.cli("machine", "start", "--name", "web", "--time", "1h", "--detach")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: servers(project))
    site.kill()
    (first,) = servers(project)
    site.start()
    with site.client() as client:
        assert client.wait_machine("web").state.value == "ready"
    assert [server.id for server in servers(project)] == [first.id]
    assert patiently(site, "machine", "stop", "web").returncode == 0
    assert servers(project) == []
    mine = project.user.network
    wait_until(lambda: not list(mine.networks(project_id=project.id)), 60)


def test_a_machine_ends_itself_when_its_site_is_gone(new_site, project):
    """The switch that it got at first boot powers it off at its end; a new site sweeps it up."""
    site = new_site()
    done = patiently(site, "machine", "start", "--name", "web", "--time", "2m")
    assert done.returncode == 0, done.stderr
    site.kill()
    wait_until(lambda: [server.status for server in servers(project)] == ["SHUTOFF"], 180)


def test_an_image_without_ssh_is_told_and_removed(new_site, project):
    """What the cloud shows, and the end of the boot log, say why nobody can log in."""
    site = new_site("without-ssh", patience=PATIENCE["patience"] | {"reachable": "15s"})
    done = patiently(site, "machine", "start", "--name", "web", "--time", "1h")
    assert done.returncode != 0
    assert "no SSH server answers" in done.stderr
    assert "login:" in done.stderr
    wait_until(lambda: not servers(project), 60)


@contextlib.asynccontextmanager
async def proxies(seed=0, faults=fault_proxy.CALM):
    """Put nova and neutron behind proxies; give these, and what clouds.yaml says of them."""
    async with contextlib.AsyncExitStack() as stack:
        made = {
            service: await stack.enter_async_context(
                fault_proxy.FaultProxy(
                    f"http://{INSIDE}:{PORTS[service]}", seed=seed, faults=faults
                )
            )
            for service in ("compute", "network")
        }
        paths = {"compute": "/v2.1", "network": "/v2.0"}
        yield (
            list(made.values()),
            {f"{one}_endpoint_override": made[one].url + paths[one] for one in made},
        )


async def test_an_api_that_is_down_is_waited_for(common, tmp_path):
    """While it is away nothing is made, and all goes on once it is back."""
    async with proxies() as (doors, yaml):
        told = section(common, tmp_path, "without-cloud-init", yaml=yaml)
        making = MakingForTests()
        provider = provider_of(told, tmp_path, making=making)
        for door in doors:
            door.down = True
        with pytest.raises((Unavailable, TimedOut)):
            await provider.things()
        launch = asyncio.create_task(provider.launch(new_lease()))
        async with asyncio.timeout(30):
            while not any(message.startswith("trying on") for _, _, message in making.notes):
                await asyncio.sleep(0.05)
        for door in doors:
            door.calm()
        machine = await launch
        await provider.terminate(machine.lease_id)
        assert await provider.things() == []
        await provider.close()


_AT_ONCE = 5


@pytest.mark.parametrize("batch", [seeds()[n : n + _AT_ONCE] for n in seeds()[::_AT_ONCE]])
async def test_faults_leave_nothing(batch, common, tmp_path):
    """Errors, cuts, repeats, stale answers and kills at random instants: nothing is left."""
    async with asyncio.TaskGroup() as group:
        for seed in batch:
            group.create_task(campaign(seed, common, tmp_path))


async def campaign(seed, project, folder):
    site = secrets.token_hex(32)
    async with proxies(seed, fault_proxy.Faults()) as (doors, yaml):
        told = section(project, folder, yaml=yaml)
        truth = cloud_of(section(project, folder), site)

        def make():
            made = provider_of(told, folder, site)
            made._shared.reach = reached
            return made

        def calm():
            for door in doors:
                door.calm()

        await hurt(
            seed,
            Subject(
                make=make,
                new_lease=new_lease,
                left=truth.things,
                kill=lambda provider: provider._cloud._regions.close(),
                calm=calm,
                launch_seconds=4.0,
                settles_seconds=2.5,
                leases=1,
            ),
        )
        await truth.close()


async def reached(host, port):
    """Find every machine reachable: these do not boot."""
