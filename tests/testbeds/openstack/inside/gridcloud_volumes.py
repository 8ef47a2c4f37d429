"""A volume driver of cinder: a volume is a sparse file, for the virt driver beside it."""

import os
from pathlib import Path

from cinder import interface
from cinder.volume import driver

FOLDER = Path(os.environ.get("VOLUME_FOLDER", "/nowhere"))


@interface.volumedriver
class Files(driver.VolumeDriver):
    """Only what machines and their volumes need."""

    VERSION = "1"
    CI_WIKI_NAME = "none"

    def check_for_setup_error(self):
        FOLDER.mkdir(parents=True, exist_ok=True)

    def _update_volume_stats(self):
        self._stats = {
            "volume_backend_name": "files",
            "vendor_name": "gridcloud",
            "driver_version": self.VERSION,
            "storage_protocol": "file",
            "total_capacity_gb": 1000,
            "free_capacity_gb": 1000,
        }

    def create_volume(self, volume):
        with (FOLDER / volume.id).open("wb") as file:
            file.truncate(volume.size * 1024**3)

    def delete_volume(self, volume):
        (FOLDER / volume.id).unlink(missing_ok=True)

    def initialize_connection(self, volume, connector):
        path = str(FOLDER / volume.id)
        return {"driver_volume_type": "local", "data": {"device_path": path}}

    def terminate_connection(self, volume, connector, **more):
        return

    def ensure_export(self, context, volume):
        return

    def create_export(self, context, volume, connector):
        return

    def remove_export(self, context, volume):
        return
