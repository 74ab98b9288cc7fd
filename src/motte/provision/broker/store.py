"""SQLite under a broker: write-ahead log, every commit on disk before it is answered, one writer at a time."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, select
from sqlalchemy.exc import SQLAlchemyError

from motte.errors import FormatError, InputError, ResourceError
from motte.provision.broker import tables

_BUSY_MS: Final = 30_000
"""How long a commit waits for another process (a verb of the command line beside the server)."""


class Store:
    """One database file. Safe to use from several threads, and from several processes at once.

    Raises:
        InputError: no such file, or one that others can read. FormatError: not a broker's database.
    """

    def __init__(self, path: Path) -> None:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as problem:
            hint = "motte broker init makes one"
            raise InputError("no broker here", where=str(path), got=problem.strerror, hint=hint) from problem
        if mode & 0o077:
            raise InputError(
                "the broker's database can be read by others",
                where=str(path),
                expected="mode 0600",
                got=f"mode {mode:04o}",
                hint=f"chmod 600 {path}",
            )
        self.path = path
        self._engine = _engine(path)
        self._writing = threading.Lock()
        try:
            with self.read() as db:
                schema = setting(db, "schema")
        except ResourceError as problem:
            raise FormatError("not a broker's database", where=str(path), got=problem.got) from problem
        if schema != str(tables.SCHEMA):
            raise FormatError("a database of another version", where=str(path), expected=str(tables.SCHEMA), got=schema)

    @staticmethod
    def create(path: Path) -> Store:
        """A new, empty database, readable by its owner alone.

        Raises:
            InputError: the file exists. ResourceError: it cannot be made.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as problem:
            raise InputError("a broker is here already", where=str(path)) from problem
        except OSError as problem:
            raise ResourceError("cannot make the database", where=str(path), got=problem.strerror) from problem
        os.close(fd)
        engine = _engine(path)
        with engine.begin() as db:
            tables.metadata.create_all(db)
            db.execute(tables.settings.insert().values(name="schema", value=str(tables.SCHEMA)))
        engine.dispose()
        return Store(path)

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the database for as long as the block runs.

        Raises:
            ResourceError: it cannot be read.
        """
        try:
            with self._engine.connect() as db, db.begin():
                yield db
        except SQLAlchemyError as problem:
            raise ResourceError(
                "the broker's database cannot be read", where=str(self.path), got=str(problem)[:200]
            ) from problem

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """The one writer: whatever the block did is on disk when it has ended, or none of it happened.

        Raises:
            ResourceError: the disk is full, or another process holds the database for too long.
        """
        # Within this process we take turns here: SQLite's own waiting is polling, and unfair among many threads.
        with self._writing:
            try:
                with self._engine.connect().execution_options(motte_write=True) as db, db.begin():
                    yield db
            except SQLAlchemyError as problem:
                raise ResourceError(
                    "the broker's database cannot be written", where=str(self.path), got=str(problem)[:200]
                ) from problem

    def copy_to(self, path: Path) -> None:
        """A consistent copy of the whole database, while others go on, into the empty file at ``path``."""
        with self._writing, contextlib.closing(sqlite3.connect(path)) as target, self._engine.connect() as db:
            source = db.connection.driver_connection
            if source is None:
                raise ResourceError("the broker's database is closed", where=str(self.path))
            source.backup(target)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def setting(db: Connection, name: str) -> str:
    """One value of the table ``settings``. Raises: FormatError: it is not there."""
    value = db.execute(select(tables.settings.c.value).where(tables.settings.c.name == name)).scalar_one_or_none()
    if value is None:
        raise FormatError("not a broker's database", where=f"settings.{name}")
    return str(value)


def put_setting(db: Connection, name: str, value: str) -> None:
    """Set one value of the table ``settings``."""
    db.execute(tables.settings.delete().where(tables.settings.c.name == name))
    db.execute(tables.settings.insert().values(name=name, value=value))


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", pool_size=16, max_overflow=48, pool_timeout=60)

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        # We begin transactions ourselves: sqlite3 would begin one only at the first change, too late to read safely.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA secure_delete = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("motte_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine
