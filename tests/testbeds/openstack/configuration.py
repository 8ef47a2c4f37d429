"""What the services of the testbed's OpenStack are told; all of them run in one network of their
own, so that the usual ports are free."""

from __future__ import annotations

from pathlib import Path

from testbeds.openstack.layout import AUTH_URL, INSIDE, PORTS, REGION

_QUEUE = "transport_url = rabbit://guest:guest@127.0.0.1:5672/"


def database(name: str) -> str:
    """Return the address of a database."""
    return f"mysql+pymysql://openstack:openstack@127.0.0.1:3306/{name}"


def _as_service(section: str) -> str:
    return f"""
[{section}]
auth_type = password
auth_url = {AUTH_URL}
www_authenticate_uri = {AUTH_URL}
username = service
password = service
project_name = service
user_domain_id = default
project_domain_id = default
region_name = {REGION}
"""


def _asked_with_tokens() -> str:
    return _as_service("keystone_authtoken") + "service_token_roles_required = true\n"


def write(folder: Path, state: Path, venv: Path, sources: Path) -> None:
    """Write the files of all services, each into a folder of its name."""
    texts = {
        "keystone/keystone.conf": _keystone(state),
        "glance/glance-api.conf": _glance(state, venv),
        "placement/placement.conf": _placement(),
        "nova/nova.conf": _nova(state),
        "neutron/neutron.conf": _neutron(state, venv),
        "cinder/cinder.conf": _cinder(state, venv),
        "rabbit/rabbitmq.conf": "loopback_users = none\nlisteners.tcp.default = 127.0.0.1:5672\n",
        "rabbit/enabled_plugins": "[].\n",
    }
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "nova/api-paste.ini").write_text((venv / "etc/nova/api-paste.ini").read_text())
    packages = next(venv.glob("lib/python3.*/site-packages"))
    for plugin, target in _PLUGINS.items():
        place = packages / target
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text((sources / plugin).read_text())
        place.chmod((sources / plugin).stat().st_mode)
    about = packages / "gridcloud_testbed-1.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: gridcloud-testbed\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[neutron.ml2.mechanism_drivers]\ngridcloud = gridcloud_ml2:Bound\n"
    )


_PLUGINS = {
    "gridcloud_ml2.py": "gridcloud_ml2.py",
    # Nova loads drivers from its own package alone.
    "gridcloud_virt.py": "nova/virt/gridcloud_virt.py",
    "guest": "nova/virt/guest",
    "gridcloud_volumes.py": "gridcloud_volumes.py",
}


def _keystone(state: Path) -> str:
    return f"""
[DEFAULT]
use_stderr = true
[database]
connection = {database("keystone")}
[fernet_tokens]
key_repository = {state}/fernet
[credential]
key_repository = {state}/credentials
[identity]
# No secret is kept here, and every login costs it.
password_hash_rounds = 4
[cache]
enabled = false
"""


def _glance(state: Path, venv: Path) -> str:
    return f"""
[DEFAULT]
use_stderr = true
enabled_backends = files:file
node_staging_uri = file://{state}/glance/staging
[database]
connection = {database("glance")}
[glance_store]
default_backend = files
[files]
filesystem_store_datadir = {state}/glance/images
[os_glance_staging_store]
filesystem_store_datadir = {state}/glance/staging
[os_glance_tasks_store]
filesystem_store_datadir = {state}/glance/tasks
[paste_deploy]
flavor = keystone
config_file = {venv}/etc/glance/glance-api-paste.ini
{_asked_with_tokens()}"""


def _placement() -> str:
    return f"""
[DEFAULT]
use_stderr = true
[placement_database]
connection = {database("placement")}
[api]
auth_strategy = keystone
{_asked_with_tokens()}"""


def _nova(state: Path) -> str:
    return f"""
[DEFAULT]
use_stderr = true
{_QUEUE}
my_ip = 127.0.0.1
host = testbed
state_path = {state}/nova
compute_driver = gridcloud_virt.Namespaces
instance_usage_audit = false
resume_guests_state_on_host_boot = false
graceful_shutdown_timeout = 3
sync_power_state_interval = 30
[api]
auth_strategy = keystone
[api_database]
connection = {database("nova_api")}
[database]
connection = {database("nova")}
[conductor]
workers = 1
[scheduler]
workers = 1
[quota]
instances = 100
cores = 200
ram = 400000
[filter_scheduler]
# All guests share one machine, whose size the driver only claims.
image_properties_default_architecture = x86_64
[oslo_concurrency]
lock_path = {state}/locks
[vnc]
enabled = false
[glance]
region_name = {REGION}
endpoint_override = http://{INSIDE}:{PORTS["image"]}
{_as_service("placement")}
{_as_service("neutron")}
{_as_service("cinder")}
{_as_service("service_user")}
send_service_user_token = true
{_asked_with_tokens()}"""


def _neutron(state: Path, venv: Path) -> str:
    return f"""
[DEFAULT]
use_stderr = true
{_QUEUE}
core_plugin = ml2
service_plugins = router
auth_strategy = keystone
state_path = {state}/neutron
api_paste_config = {venv}/etc/neutron/api-paste.ini
notify_nova_on_port_status_changes = true
notify_nova_on_port_data_changes = true
dhcp_agent_notification = false
router_scheduler_driver = neutron.scheduler.l3_agent_scheduler.LeastRoutersScheduler
[database]
connection = {database("neutron")}
[oslo_concurrency]
lock_path = {state}/locks
[ml2]
type_drivers = flat,vxlan
tenant_network_types = vxlan
mechanism_drivers = gridcloud
extension_drivers = port_security
[ml2_type_flat]
flat_networks = public
[ml2_type_vxlan]
vni_ranges = 1:1000
{_as_service("nova")}
{_as_service("placement")}
{_asked_with_tokens()}"""


def _cinder(state: Path, venv: Path) -> str:
    return f"""
[DEFAULT]
use_stderr = true
{_QUEUE}
auth_strategy = keystone
state_path = {state}/cinder
api_paste_config = {venv}/etc/cinder/api-paste.ini
enabled_backends = files
host = testbed
[files]
volume_driver = gridcloud_volumes.Files
volume_backend_name = files
[database]
connection = {database("cinder")}
[oslo_concurrency]
lock_path = {state}/locks
{_as_service("nova")}
{_as_service("service_user")}
send_service_user_token = true
{_asked_with_tokens()}"""
