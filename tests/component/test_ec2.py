"""The EC2 provider against moto, which keeps EC2's call shapes and starts no machines."""

import asyncio
import base64
import dataclasses

import pytest

from gridcloud.errors import Forbidden, InvalidSpec, NoCapacity, NotFound
from gridcloud.model.identifiers import new_id
from gridcloud.model.machine import MachineOrder
from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.contract import (
    SITE,
    CloudContract,
    MachineProviderContract,
    MakingForTests,
)
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.contract import NAME, assert_telling
from gridcloud.providers.libcloud import EC2Provider
from gridcloud.providers.libcloud.ec2 import EC2Cloud
from gridcloud.providers.libcloud.section import EC2Section
from gridcloud.settings import LendingSettings
from testbeds import moto_server
from testbeds.fault_proxy import CALM, FaultProxy, Faults
from testbeds.faults import Subject, hurt, seeds
from testbeds.leases import lease

pytestmark = pytest.mark.xdist_group("moto")

#: So many campaigns are run at a time, since most of theirs is waiting.
_AT_ONCE = 25
BATCHES = [tuple(seeds()[n : n + _AT_ONCE]) for n in range(0, len(seeds()), _AT_ONCE)]


@pytest.fixture(scope="session")
def server():
    """Keep a moto running."""
    if problem := moto_server.problem():
        pytest.skip(problem)
    with moto_server.running() as one:
        yield one


@pytest.fixture
def ec2(server, monkeypatch):
    """Give an empty EC2, with credentials in the environment."""
    server.reset()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def section(ec2, **more):
    """Return settings for it."""
    types = ["t3.micro", "t3.small", "m7g.medium", "g4dn.xlarge"]
    told = {"endpoint": ec2.url, "types": types, "calls_per_second": 1000.0, **more}
    return read_section(EC2Section, NAME, told)


class TestEC2Cloud(CloudContract):
    """What every cloud promises."""

    @pytest.fixture
    def make_cloud(self, ec2):
        own = section(ec2)
        return lambda site_key: EC2Cloud(own, site_key)


async def answers(host, port):
    """Be an SSH server that answers at once: moto starts no machines."""


class Provider(CloudProvider):
    """A provider over EC2 whose machines are taken to answer."""

    kind = "ec2"


def provider(tmp_path, cloud, own):
    """Return a provider that remembers nothing."""

    async def probe(endpoint, identity):
        raise AssertionError

    context = ProviderContext(SITE, tmp_path, LendingSettings(), probe, MakingForTests())
    return Provider(NAME, own, context, cloud, reach=answers)


@pytest.fixture
async def launching(ec2, tmp_path):
    """Return a function that makes providers; all are closed in the end."""
    made = []

    def make(**more):
        own = section(ec2, **more)
        made.append(provider(tmp_path, QuickEC2(own, SITE), own))
        return made[-1]

    yield make
    for one in made:
        await one.close()


class QuickEC2(EC2Cloud):
    """EC2 that is believed at once, since moto shows all that it has."""

    shows_late_seconds = 0.1


class TestEC2Provider(MachineProviderContract):
    """What every provider of machines promises."""

    bad_sections = [
        ({"network": "my-vpc"}, "network"),
        ({"subnet": "10.0.0.0/8"}, "subnet"),
        ({"ssh_from": ["everywhere"]}, "ssh_from"),
        ({"types": []}, "types"),
    ]

    @pytest.fixture
    def make(self, context, ec2):
        def make(told=None):
            if told is not None:
                return EC2Provider(NAME, told, context)
            own = section(ec2)
            return Provider(NAME, own, context, QuickEC2(own, SITE), reach=answers)

        return make


async def test_a_machine_is_made_as_asked(ec2, launching):
    """Its type, zone, token, user-data, tags and disks are as EC2 is to have them; it ends by
    itself, and only SSH comes in."""
    own = launching()
    order = MachineOrder(user_data="#!/bin/sh\necho hello\n")
    asked = lease(order=order, shape="t3.small", region=moto_server.REGION)
    made = await own.launch(asked)
    [machine] = ec2.machines()
    assert machine["InstanceId"] == made.id
    assert machine["InstanceType"] == "t3.small"
    assert machine["ImageId"] == "ami-0000000000000002a", "the newest of the name"
    assert machine["ClientToken"].startswith(asked.id)
    assert machine["MetadataOptions"]["HttpTokens"] == "required"
    assert machine["PublicIpAddress"] == made.endpoint.host
    tags = {tag["Key"]: tag["Value"] for tag in machine["Tags"]}
    assert tags["gridcloud-lease"] == asked.id
    client = ec2.client()
    told = client.describe_instance_attribute(InstanceId=made.id, Attribute="userData")
    assert base64.b64decode(told["UserData"]["Value"]).decode() == order.user_data
    behaviour = client.describe_instance_attribute(
        InstanceId=made.id, Attribute="instanceInitiatedShutdownBehavior"
    )
    assert behaviour["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"
    [group] = client.describe_security_groups(
        GroupIds=[one["GroupId"] for one in machine["NetworkInterfaces"][0]["Groups"]]
    )["SecurityGroups"]
    rules = [(r["FromPort"], r["ToPort"], r["IpRanges"]) for r in group["IpPermissions"]]
    assert rules == [(22, 22, [{"CidrIp": "0.0.0.0/0"}])]
    [table] = client.describe_route_tables(
        Filters=[{"Name": "vpc-id", "Values": [machine["VpcId"]]}]
    )["RouteTables"]
    assert any(r.get("GatewayId", "").startswith("igw-") for r in table["Routes"])
    await own.terminate(asked.id)
    assert ec2.tagged() == []


async def test_spot_is_asked_for_as_such(ec2, launching):
    """An order for spot capacity makes a machine of it, for once."""
    own = launching()
    await own.launch(lease(order=MachineOrder(spot=True)))
    [machine] = ec2.machines()
    assert machine["InstanceLifecycle"] == "spot"
    assert {shape.spot for shape in (await own.capacity()).shapes} == {False, True}


async def test_a_full_zone_is_left_for_the_next(ec2, launching):
    """Where EC2 has none of a type in a zone, the machine is made in another."""
    own = launching()
    ec2.refuse("RunInstances", "InsufficientInstanceCapacity", status=500)
    made = await own.launch(lease())
    [machine] = ec2.machines()
    assert machine["InstanceId"] == made.id
    assert machine["Placement"]["AvailabilityZone"] == f"{moto_server.REGION}b"


@pytest.mark.parametrize(
    ("code", "status", "error", "told"),
    [
        ("VcpuLimitExceeded", 400, NoCapacity, "quota"),
        ("InstanceLimitExceeded", 400, NoCapacity, "quota"),
        ("UnauthorizedOperation", 403, Forbidden, "ec2:RunInstances"),
        ("InvalidParameterValue", 400, InvalidSpec, "does not take this"),
        ("InvalidAMIID.NotFound", 400, NotFound, "InvalidAMIID"),
    ],
)
async def test_refusals_are_told_and_leave_nothing(ec2, launching, code, status, error, told):
    """What EC2 refuses for good is said in its words, with what to do, and all is removed."""
    own = launching()
    ec2.refuse("RunInstances", code, status=status, times=3)
    with pytest.raises(error) as refused:
        await own.launch(lease())
    assert_telling(refused.value)
    assert told in str(refused.value)
    assert "0123456789abcdef" not in str(refused.value), "an encoded message is of no use"
    assert ec2.tagged() == []


async def test_what_passes_is_waited_for(ec2, launching):
    """Throttling, an error of EC2's own and a network that is not shown yet are no end."""
    own = launching()
    ec2.refuse("RunInstances", "RequestLimitExceeded", status=503)
    assert (await own.launch(lease())).id
    ec2.refuse("RunInstances", "InternalError", status=500)
    assert (await own.launch(lease())).id
    ec2.refuse("RunInstances", "InvalidSubnetID.NotFound")
    assert (await own.launch(lease())).id


async def test_wrong_credentials_are_refused_with_what_to_do(ec2, launching, monkeypatch):
    """Signatures are verified by the testbed: a wrong secret is found out, and not shown."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    capacity = await launching().check()
    assert "SignatureDoesNotMatch" in capacity.problem
    assert "aws sts get-caller-identity" in capacity.problem
    assert "wrong-secret" not in capacity.problem


async def test_a_token_makes_one_machine_though_the_request_comes_twice(ec2):
    """A proxy that repeats requests makes no second machine, and the token of a machine that has
    ended is not used again."""
    async with FaultProxy(ec2.url, faults=CALM) as proxy:
        cloud = QuickEC2(section(ec2, endpoint=proxy.url), SITE)
        asked = CloudContract()
        build = await asked.build(cloud, new_id(16))
        proxy.faults = dataclasses.replace(CALM, duplicated=1)
        made = await cloud.create(build)
        assert [one["InstanceId"] for one in ec2.machines()] == [made]
        proxy.calm()
        await asked.removed(cloud, build.tags.lease)
        network = await cloud.network(build.tags, build.place)
        assert await cloud.create(build.model_copy(update={"network": network})) != made
        await asked.removed(cloud, build.tags.lease)
        await cloud.close()
    assert ec2.tagged() == []


async def test_regions_are_apart_and_all_are_swept(ec2, launching):
    """A machine is made in the region of its lease; what is tagged is found in all of them."""
    both = [moto_server.REGION, moto_server.OTHER_REGION]
    own = launching(regions=both)
    asked = lease(shape="t3.micro", region=moto_server.OTHER_REGION)
    made = await own.launch(asked)
    assert (made.region, ec2.machines()) == (moto_server.OTHER_REGION, [])
    assert await own.made() == [asked.id]
    await own.terminate(asked.id)
    assert ec2.tagged(region=moto_server.OTHER_REGION) == []


async def test_the_accounts_own_network_is_used_and_left(ec2, launching):
    """With ``default`` only a security group is made, and removed with the last machine."""
    own = launching(network="default")
    asked = lease()
    await own.launch(asked)
    [machine] = ec2.machines()
    client = ec2.client()
    [vpc] = client.describe_vpcs(VpcIds=[machine["VpcId"]])["Vpcs"]
    assert vpc["IsDefault"]
    await own.terminate(asked.id)
    assert ec2.tagged() == []
    assert client.describe_vpcs(VpcIds=[machine["VpcId"]])["Vpcs"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("few", BATCHES, ids=lambda few: f"{few[0]}-{few[-1]}")
async def test_faults_leave_nothing(few, ec2, tmp_path):
    """Launches hurt by errors, cuts, throttling, duplicates and stale lists, and killed at random
    instants, end with nothing tagged at EC2."""
    await asyncio.gather(*(campaign(seed, ec2, tmp_path) for seed in few))


async def campaign(seed, ec2, tmp_path):
    """Hurt one site of its own."""
    site_key = f"{seed:08x}" * 8
    faults = Faults(withheld_seconds=0.5, stale_seconds=0.3, retry_after="0.3")
    own = {"patience": {"removal": "120s"}, "types": ["t3.micro"]}

    def make():
        told = section(ec2, endpoint=proxy.url, **own)

        async def probe(endpoint, identity):
            raise AssertionError

        context = ProviderContext(site_key, tmp_path, LendingSettings(), probe, MakingForTests())
        return Provider(NAME, told, context, HurtEC2(told, site_key), reach=answers)

    async def left():
        return await asyncio.to_thread(ec2.tagged, site_key[:32])

    async with FaultProxy(ec2.url, seed, faults) as proxy:
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


class HurtEC2(EC2Cloud):
    """EC2 whose lists may be a moment behind; ``kill`` ends it as ``kill -9`` does."""

    shows_late_seconds = 0.8

    def kill(self):
        async def never(work):
            await asyncio.get_running_loop().create_future()

        self._regions.in_thread = never
