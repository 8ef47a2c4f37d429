"""Schema migrations, run by Alembic when a site opens its store."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from gridcloud.errors import Conflict
from gridcloud.store.schema import REVISION


def upgrade(engine: Engine, found: str | None) -> None:
    """Bring the store from revision ``found`` to the newest. Blocks; idempotent.

    Raises `Conflict` when the store was made by a newer gridcloud.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise Conflict(
            f"The store {engine.url.database} was written by a newer gridcloud ({found}).",
            hint="Upgrade gridcloud, or use another state folder.",
        )
    config.attributes["engine"] = engine
    command.upgrade(config, REVISION)
