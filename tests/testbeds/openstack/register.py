"""Fill a new OpenStack: `services` and their users, then the `things` that machines are made of."""

from __future__ import annotations

import sys

import openstack

from testbeds.openstack.layout import ADMIN, AUTH_URL, INSIDE, PORTS, PUBLIC, REGION

FLAVORS = {
    "m1.tiny": (1, 512, 5, {}),
    "m1.small": (1, 1024, 10, {}),
    "m1.medium": (2, 4096, 20, {}),
    # No host has such a card, so nothing can be made of it.
    "g1.small": (4, 16384, 20, {"pci_passthrough:alias": "a100:1"}),
    "g2.large": (8, 32768, 20, {"resources:VGPU": "2"}),
    "m1.giant": (500, 1024, 20, {}),
}
IMAGES = ("debian-12", "without-cloud-init", "without-ssh", "empty", "broken")


def things(cloud: openstack.connection.Connection) -> None:
    """Make flavors, images and the public network."""
    for name, (cpus, memory, disk, extra) in FLAVORS.items():
        flavor = cloud.compute.create_flavor(name=name, vcpus=cpus, ram=memory, disk=disk)
        if extra:
            cloud.compute.create_flavor_extra_specs(flavor, extra)
    for name in IMAGES:
        cloud.image.create_image(
            name=name,
            disk_format="raw",
            container_format="bare",
            data=b"the virt driver looks at the name",
            visibility="public",
            os_distro="debian",
            os_admin_user="debian",
        )
    network = cloud.network.create_network(
        name="public",
        is_router_external=True,
        is_shared=False,
        provider_network_type="flat",
        provider_physical_network="public",
    )
    cloud.network.create_subnet(
        network_id=network.id, cidr=PUBLIC, ip_version=4, is_dhcp_enabled=False, name="public"
    )


def services(cloud: openstack.connection.Connection) -> None:
    """Make the catalogue, in a cloud that has an administrator and nothing else."""
    identity = cloud.identity
    project = identity.create_project(name="service", domain_id="default")
    user = identity.create_user(name="service", password="service", default_project_id=project.id)
    roles = {role.name: role for role in identity.roles()}
    roles.setdefault(
        "service", identity.find_role("service") or identity.create_role(name="service")
    )
    for role in ("admin", "service"):
        identity.assign_project_role_to_user(project, user, roles[role])
    paths = {"compute": "/v2.1", "volumev3": "/v3/%(project_id)s"}
    names = {
        "image": "glance",
        "placement": "placement",
        "compute": "nova",
        "network": "neutron",
        "volumev3": "cinderv3",
    }
    for kind, name in names.items():
        service = identity.create_service(name=name, type=kind)
        for interface in ("public", "internal", "admin"):
            identity.create_endpoint(
                service_id=service.id,
                interface=interface,
                url=f"http://{INSIDE}:{PORTS[kind]}{paths.get(kind, '')}",
                region_id=REGION,
            )


if __name__ == "__main__":
    {"services": services, "things": things}[sys.argv[1]](
        openstack.connect(auth=ADMIN | {"auth_url": AUTH_URL}, region_name=REGION)
    )
