"""One SQLite file, one thread that owns it, and group commits.

Callers hand over functions of a connection. Whatever has queued up while the thread was busy
shares one transaction, so that two hundred jobs changing state at once cost a few disk flushes
instead of hundreds, and a promise is kept only once it is on disk (``synchronous=FULL``): an intent
written here survives a power cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from gridcloud.errors import Conflict, Unavailable
from gridcloud.store.schema import REVISION

T = TypeVar("T")
_Work = tuple[Callable[[Connection], Any], "asyncio.Future[Any]", asyncio.AbstractEventLoop]
_MOST_IN_ONE_COMMIT = 256


class Database:
    """The store's file. Open it once per process; all methods may be used from any task."""

    def __init__(self, path: Path) -> None:
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10})
        self._path = path
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        event.listen(self._engine, "connect", _prepare)
        event.listen(self._engine, "begin", _begin)

    async def open(self) -> None:
        """Bring the file to the present schema and start the thread. Raises `Conflict` when the
        file was written by a newer version, `Unavailable` when it cannot be used."""
        await asyncio.to_thread(self._migrate)
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Finish what is queued, then close. Idempotent."""
        if self._thread:
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        self._engine.dispose()

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction and return its value once that is on disk.

        ``work`` runs in the store's thread, must not block on anything but the connection, and may
        be run once more where a neighbour in its transaction failed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.put((work, future, loop))
        return await future

    def _migrate(self) -> None:
        try:
            with self._engine.connect() as connection:
                known = connection.execute(
                    text("SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'")
                ).scalar()
                found = (
                    connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
                    if known
                    else None
                )
            if found == REVISION:
                return  # the usual start: Alembic is not even imported
            from gridcloud.store.migrations import upgrade  # noqa: PLC0415

            upgrade(self._engine, found)
        except SQLAlchemyError as error:
            raise _translate(error, self._path) from error
        self._path.chmod(0o600)

    def _work(self) -> None:
        with self._engine.connect() as connection:
            while (first := self._queue.get()) is not None:
                batch = [first]
                stop = False
                while len(batch) < _MOST_IN_ONE_COMMIT:
                    try:
                        item = self._queue.get_nowait()
                    except queue.Empty:
                        break
                    if item is None:
                        stop = True
                        break
                    batch.append(item)
                self._commit(connection, batch)
                if stop:
                    return

    def _commit(self, connection: Connection, batch: list[_Work]) -> None:
        """Do the whole batch in one transaction; if any of it fails, each in one of its own.

        Not in savepoints: a full disk makes SQLite roll back all of the transaction unasked.
        """
        try:
            with connection.begin():
                values = [work(connection) for work, _, _ in batch]
        except Exception as error:  # noqa: BLE001 - what a piece of work raises belongs to its caller
            if len(batch) > 1:
                for item in batch:
                    self._commit(connection, [item])
                return
            failed = _translate(error, self._path) if isinstance(error, SQLAlchemyError) else error
            _tell(batch[0], None, failed)
            return
        for item, value in zip(batch, values, strict=True):
            _tell(item, value, None)


def _tell(item: _Work, value: object, failed: Exception | None) -> None:
    _, future, loop = item
    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
        loop.call_soon_threadsafe(_resolve, future, value, failed)


def _resolve(future: asyncio.Future[Any], value: object, failed: BaseException | None) -> None:
    if future.done():
        return
    if failed is None:
        future.set_result(value)
    else:
        future.set_exception(failed)


def _prepare(connection: sqlite3.Connection, _: object) -> None:
    # SQLAlchemy's recipe for SQLite: the driver must not begin transactions on its own.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _translate(error: SQLAlchemyError, path: Path) -> Unavailable | Conflict:
    cause = str(error.orig) if isinstance(error, OperationalError) else str(error)
    if "full" in cause:
        return Unavailable(
            f"The disk that holds {path.parent} is full.", hint="Free some space and try again."
        )
    return Unavailable(f"The store {path} failed: {cause}.", hint="Check the disk and the file.")
