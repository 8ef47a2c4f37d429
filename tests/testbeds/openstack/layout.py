"""Where the testbed's OpenStack keeps things and answers; shared by those outside and inside."""

from __future__ import annotations

import os
from pathlib import Path

#: What is installed; the caches carry a digest of this.
PACKAGES = (
    "keystone==30.0.0",
    "glance==33.0.0",
    "openstack-placement==16.0.0",
    "nova==34.0.0",
    "neutron==29.0.0",
    "cinder==29.0.0",
    "PyMySQL==1.1.*",
    "gunicorn>=23",
)
GUEST_PACKAGES = (
    "ca-certificates",
    "cloud-init",
    "e2fsprogs",
    "iproute2",
    "openssh-server",
    "procps",
    "python3",
    "sudo",
)
PROGRAMS = ("mariadbd", "mariadb-install-db", "rabbitmq-server", "mmdebstrap", "ip", "iptables")

CACHE = Path(os.environ.get("GRIDCLOUD_TESTBEDS", "/var/tmp/gridcloud-testbeds"))
HERE = Path(__file__).parent

#: The range that is reserved for testing networks (RFC 2544): nobody else is met in it.
RANGE = "198.18.0.0/15"
#: The cable between this host and the namespace in which the cloud runs.
OUTSIDE, INSIDE = "198.18.0.1", "198.18.0.2"
DEVICE = "gc-openstack"
PUBLIC = "198.19.0.0/24"
#: All that the networks of tenants may use.
TENANTS = "198.18.16.0/20"

PORTS = {
    "identity": 5000,
    "image": 9292,
    "placement": 8778,
    "compute": 8774,
    "network": 9696,
    "volumev3": 8776,
}
AUTH_URL = f"http://{INSIDE}:{PORTS['identity']}/v3"
REGION = "RegionOne"
#: Of the cloud's administrator, in a network that only this host is in.
ADMIN = {
    "username": "admin",
    "password": "admin",
    "project_name": "admin",
    "user_domain_id": "default",
    "project_domain_id": "default",
}
