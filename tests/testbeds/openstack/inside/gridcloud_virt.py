"""A virt driver of nova: each server is a Debian of its own, as processes in namespaces.

It boots a copy-on-write view of one root file system, with the config drive that nova makes, and
real cloud-init; so it does what its user-data says. It is no jail: root in it is root.
The name of the image chooses what it has: see `guest`. An image named ``empty`` boots nothing.
"""

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path

from nova.api.metadata import base as metadata
from nova.compute import power_state
from nova.virt import driver, event, fake, node

BRIDGE = "servers"
GUEST = Path(__file__).with_name("guest")
ROOT = Path(os.environ["GUEST_ROOT"])
SERVERS = Path(os.environ["GUEST_FOLDER"])


def run(*argv, check=True):
    return subprocess.run(argv, check=check, capture_output=True, text=True).returncode


def free(path):
    """Give the loop devices of a file back to the host."""
    listed = subprocess.check_output(["losetup", "-j", path, "-nO", "NAME"], text=True)
    for loop in listed.split():
        run("losetup", "--detach", loop, check=False)


class Namespaces(fake.FakeDriver):
    """Nova's own fake driver keeps the books; this adds the processes."""

    vcpus, memory_mb, local_gb = 64, 131072, 4000
    # The fake one invents a new identity of the host each time.
    get_nodenames_by_uuid = driver.ComputeDriver.get_nodenames_by_uuid

    def __init__(self, virtapi, read_only=False):
        super().__init__(virtapi, read_only)
        self._guests = {}
        self._lock = threading.Lock()

    def get_available_resource(self, nodename):
        # The fake one invents an identity here as well.
        return super().get_available_resource(nodename) | {"uuid": node.get_local_node_uuid()}

    def spawn(
        self,
        context,
        instance,
        image_meta,
        injected_files,
        admin_password,
        allocations,
        network_info=None,
        **more,
    ):
        super().spawn(
            context,
            instance,
            image_meta,
            injected_files,
            admin_password,
            allocations,
            network_info=network_info,
            **more,
        )
        if image_meta.name == "broken":
            raise RuntimeError("the image has no boot sector")
        folder = self._folder(instance)
        drive = folder / "drive"
        found = metadata.InstanceMetadata(
            instance, content=injected_files, network_info=network_info
        )
        for path, data in found.metadata_for_config_drive():
            file = drive / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        (folder / "image").write_text(image_meta.name)
        self._start(instance, network_info)

    def destroy(self, context, instance, network_info, block_device_info=None, *args, **more):
        self._stop(instance)
        super().destroy(context, instance, network_info, block_device_info, *args, **more)
        for disk in driver.block_device_info_get_mapping(block_device_info):
            if disk["connection_info"]:  # there is none before it is attached
                free(disk["connection_info"]["data"]["device_path"])
        run("rm", "-rf", "--one-file-system", str(SERVERS / instance.uuid), check=False)

    def power_off(self, instance, timeout=0, retry_interval=0):
        super().power_off(instance)
        self._stop(instance)

    def power_on(self, context, instance, network_info, *args, **more):
        super().power_on(context, instance, network_info, *args, **more)
        self._start(instance, network_info)

    def reboot(self, context, instance, network_info, reboot_type, *args, **more):
        self._stop(instance)
        super().reboot(context, instance, network_info, reboot_type, *args, **more)

    def get_console_output(self, context, instance):
        try:
            return (SERVERS / instance.uuid / "console.log").read_bytes()
        except FileNotFoundError:
            return b""

    def get_host_uptime(self):
        return subprocess.check_output(["uptime"], text=True)

    def attach_volume(self, context, connection_info, instance, mountpoint, *args, **more):
        super().attach_volume(context, connection_info, instance, mountpoint, *args, **more)
        path = connection_info["data"]["device_path"]
        loop = subprocess.check_output(["losetup", "--find", "--show", path], text=True).strip()
        number = Path(loop).stat().st_rdev
        self._within(instance, "rm", "-f", mountpoint)
        major, minor = str(os.major(number)), str(os.minor(number))
        self._within(instance, "mknod", "-m", "660", mountpoint, "b", major, minor)
        # As udev does for what KVM gives to a machine.
        links = Path("/dev/disk/by-id")
        self._within(instance, "mkdir", "-p", str(links))
        volume = connection_info["serial"]
        for link in (f"virtio-{volume[:20]}", f"scsi-0QEMU_QEMU_HARDDISK_{volume}"):
            self._within(instance, "ln", "-sfn", mountpoint, str(links / link))

    def detach_volume(self, context, connection_info, instance, mountpoint, encryption=None):
        super().detach_volume(context, connection_info, instance, mountpoint, encryption)
        path = connection_info["data"]["device_path"]
        self._within(instance, "umount", "--lazy", mountpoint)
        self._within(instance, "rm", "-f", mountpoint)
        free(path)

    def _folder(self, instance):
        folder = SERVERS / instance.uuid
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _within(self, instance, *argv):
        guest = self._guests.get(instance.uuid)
        children = Path(f"/proc/{guest.pid}/task/{guest.pid}/children") if guest else None
        if children and (init := children.read_text().split()):
            run("nsenter", "-t", init[0], "--mount", "--root", "--pid", *argv, check=False)

    def _start(self, instance, network_info):
        folder = self._folder(instance)
        image = (folder / "image").read_text()
        with self._lock:
            if instance.uuid in self._guests or image == "empty":
                return
            network = instance.uuid[:8]
            run("ip", "netns", "add", network)
            run("ip", "-n", network, "link", "set", "lo", "up")
            for number, vif in enumerate(network_info or []):
                self._join(network, number, vif)
            with (folder / "console.log").open("ab") as console:
                guest = subprocess.Popen(
                    [
                        *("ip", "netns", "exec", network, "unshare", "--mount", "--uts", "--ipc"),
                        *("--pid", "--fork", "--kill-child"),
                        *(str(GUEST), str(ROOT), str(folder), instance.hostname, image),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    start_new_session=True,
                    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
                )
            self._guests[instance.uuid] = guest
        watch = threading.Thread(target=self._watch, args=(instance.uuid, guest), daemon=True)
        watch.start()

    def _join(self, network, number, vif):
        """Lay a cable from a server to the bridge that all networks share."""
        for subnet in vif["network"]["subnets"]:
            length = subnet["cidr"].split("/")[1]
            gateway = subnet["gateway"]["address"]
            run("ip", "address", "replace", f"{gateway}/{length}", "dev", BRIDGE)
            for address in subnet["ips"]:
                outer, inner = f"{network}{number}", f"eth{number}"
                to = ("peer", "name", inner, "netns", network)
                run("ip", "link", "add", outer, "type", "veth", *to)
                run("ip", "link", "set", outer, "master", BRIDGE, "up")
                run("ip", "-n", network, "link", "set", inner, "address", vif["address"], "up")
                at = f"{address['address']}/{length}"
                run("ip", "-n", network, "address", "add", at, "dev", inner)
                run("ip", "-n", network, "route", "replace", "default", "via", gateway)

    def _stop(self, instance):
        with self._lock:
            guest = self._guests.pop(instance.uuid, None)
        if guest:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guest.pid, signal.SIGKILL)
            guest.wait()
            run("ip", "netns", "delete", instance.uuid[:8], check=False)

    def _watch(self, uuid, guest):
        """Tell nova when a server powers itself off, as libvirt does."""
        guest.wait()
        with self._lock:
            if self._guests.get(uuid) is not guest:
                return
            del self._guests[uuid]
            run("ip", "netns", "delete", uuid[:8], check=False)
        if uuid in self.instances:
            self.instances[uuid].state = power_state.SHUTDOWN
            self.emit_event(event.LifecycleEvent(uuid, event.EVENT_LIFECYCLE_STOPPED))
