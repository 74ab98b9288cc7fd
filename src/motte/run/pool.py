"""``motte.Pool``: started, empty workers that get a bundle and its keys later, so that an answer waits for no start.

A worker serves one bundle in its life: what was handed out, whatever became of it, never comes back to the pool.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Final, Self

from motte.enclave.host_service import Issue
from motte.enclave.process import WorkerProcess
from motte.engines.select import ENGINES
from motte.errors import (
    MotteError,
    ResourceError,
    SettingError,
    UnsupportedError,
    WorkerClosed,
    WorkerDied,
    WorkerStalled,
)
from motte.link.frames import Frame, WireTensor
from motte.provision.address import BrokerAddress
from motte.run.model import Model, load
from motte.run.settings import AUTO, LoadSettings
from motte.run.told import Answered
from motte.seal.keys import RecipientPrivateKey, SignerPublicKey

_LOG = logging.getLogger("motte")
MAX_POOL: Final = 256
START_TIMEOUT_S: Final = 120.0
_LOOK_S: Final = 0.5
"""How often idle workers are looked at: one that ended is replaced."""
_QUIET_S: Final = 0.25
"""After a bundle was loaded its first answer has the cores for itself; only then is the next worker started."""


class _Spare(WorkerProcess):
    """A worker of a pool: another thread can end it while it starts or opens a bundle."""

    def __init__(self, begun: Callable[[_Spare], None], **options: Any) -> None:
        self._begun: Callable[[_Spare], None] | None = begun
        super().__init__(**options)

    def receive(self, *, timeout_s: float) -> Frame:
        """As of a worker; the first call, for its first frame, tells the pool that the process is there."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun(self)
        return super().receive(timeout_s=timeout_s)

    def break_off(self) -> None:
        """End the process, and nothing else: the thread that waits for it sees that and cleans up."""
        self._process.kill()


@dataclass(slots=True)
class _Spares:
    """The workers of one pool. ``changed`` guards all of it and is notified of every change."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    ready: deque[_Spare] = field(default_factory=deque)
    starting: set[_Spare] = field(default_factory=set)
    starts: int = 0
    """Starts under way; a process that exists already is also in ``starting``."""
    lent: dict[_Spare, int] = field(default_factory=dict)
    """Workers that are being given a bundle, and the thread that does it."""
    waiting: int = 0
    handed_out: int = 0
    failure: MotteError | None = None
    quiet_until: float = 0.0
    closed: bool = False


class Pool:
    """``size`` started, empty workers, kept ready in the background.

    >>> with motte.Pool(2) as pool:                                                              # doctest: +SKIP
    ...     with pool.load("model.motte", keys="me.key", signer="owner.pub") as model:
    ...         y = model(x)

    Several threads may load at once. Closing the pool ends every worker that it still has; a loaded
    :class:`~motte.run.model.Model` is its caller's, and lives on.

    Args:
        size: how many are kept ready.
        engine: of all of them; one of :data:`motte.engines.select.ENGINES`. ``auto`` is not possible: it chooses by the
            bundle, and these workers have loaded their engine before any bundle is known.
        precision: in which they compute, see :class:`~motte.run.settings.LoadSettings`.
        threads: compute threads of each; 0: all cores.
        start_timeout_s: time from the spawn of a worker to its first frame.
        refill: start a new worker for one that was handed out. Without it the pool ends with ``size`` bundles.

    Raises:
        SettingError: an unknown engine or precision, or a size out of range. UnsupportedError: the engine is not
            installed.
    """

    def __init__(
        self,
        size: int,
        *,
        engine: str = "onnxruntime",
        precision: str = "f32",
        threads: int = 0,
        start_timeout_s: float = START_TIMEOUT_S,
        refill: bool = True,
    ) -> None:
        if type(size) is not int or not 1 <= size <= MAX_POOL:
            raise SettingError("not a size of a pool", expected=f"1 to {MAX_POOL}", got=repr(size))
        self.engine, self.precision = _engine(engine), precision
        # The same rules as for a bundle: which precision goes with which engine, and no negative number.
        LoadSettings(engine=engine, precision=precision, threads=threads, timeout_s=start_timeout_s)
        self.size, self.start_timeout_s, self.refill = size, start_timeout_s, refill
        cores = len(os.sched_getaffinity(0))
        self.threads = threads or cores
        self._spares = _Spares()
        self._starters = [
            threading.Thread(target=self._keep_ready, name="motte-pool", daemon=True) for _ in range(min(size, cores))
        ]
        try:
            for thread in self._starters:
                thread.start()
        except BaseException:
            self.close()
            raise

    @property
    def ready(self) -> int:
        """How many workers could be handed out now."""
        with self._spares.changed:
            self._drop_dead()
            return len(self._spares.ready)

    def wait(self, *, wait_s: float | None = None) -> None:
        """Return when at least one worker is ready; within ``wait_s`` seconds, by default the time for a start.

        Raises:
            ResourceError: none was ready in time. WorkerClosed: this pool was closed, or has handed out all.
            MotteError: what the start of a worker failed with.
        """
        with self._spares.changed:
            self._await_one(time.monotonic() + (self.start_timeout_s if wait_s is None else wait_s))

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        keys: RecipientPrivateKey | BrokerAddress | str | os.PathLike[str],
        signer: SignerPublicKey | str | os.PathLike[str],
        settings: LoadSettings | None = None,
        wait_s: float | None = None,
        issue: Issue | None = None,
        **options: Any,
    ) -> Model:
        """Open a bundle in a worker that is ready, or in the next one to be.

        Args:
            path, keys, signer, settings, issue, options: as of :func:`motte.load`. Engine, precision and threads are
                the pool's; an accelerator is not possible.
            wait_s: how long to wait for a worker to be ready. (default: ``start_timeout_s``)

        Raises:
            SettingError: a setting that the workers of this pool cannot follow.
            UnsupportedError: the bundle cannot run on the pool's engine; says why, and which engine to ask for.
            ResourceError: no worker was ready within ``wait_s``. WorkerClosed: the pool was closed, or has handed out
                all that it had.
            WorkerDied, WorkerStalled: the workers do not start, or ended while the bundle was opened.
            MotteError: all else that :func:`motte.load` raises.
        """
        chosen = self._settings(settings, options)
        deadline = time.monotonic() + (self.start_timeout_s if wait_s is None else wait_s)
        # A worker may have ended between our look at it and the hand-over. A second one is no chance.
        for last in (False, True):
            with self._lent(deadline) as worker:
                try:
                    return load(path, keys=keys, signer=signer, settings=chosen, worker=worker, issue=issue)
                except WorkerDied:
                    if self._spares.closed:
                        raise _closed() from None
                    if last:
                        raise
        raise RuntimeError("unreachable")

    def close(self) -> None:
        """End every worker that was not handed out, and the threads that start them. Safe to call again."""
        spares = self._spares
        with spares.changed:
            spares.closed = True
            for worker in spares.starting:
                worker.break_off()
            for worker, thread in tuple(spares.lent.items()):
                if thread == threading.get_ident():
                    # An interrupt came to this very thread between two steps of its load: nobody else cleans up.
                    del spares.lent[worker]
                    worker.kill()
                else:
                    worker.break_off()
            while spares.ready:
                spares.ready.popleft().kill()
            spares.changed.notify_all()
        _join(self._starters)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- handing out ------------------------------------------------------------------------------------------------

    def _settings(self, settings: LoadSettings | None, options: dict[str, Any]) -> LoadSettings:
        if settings is not None and options:
            raise SettingError("give either settings or keywords", got=", ".join(options))
        unknown = sorted(set(options) - set(LoadSettings.__dataclass_fields__))
        if unknown:
            raise SettingError(
                "unknown setting", got=", ".join(unknown), expected=", ".join(LoadSettings.__dataclass_fields__)
            )
        own: dict[str, Any] = {"engine": self.engine, "precision": self.precision, "threads": self.threads}
        chosen = LoadSettings(**{**own, **options}) if settings is None else settings
        asked = {
            "engine": (chosen.engine, (AUTO, self.engine)),
            "precision": (chosen.precision, (self.precision,)),
            "threads": (chosen.threads, (0, self.threads)),
        }
        for name, (value, allowed) in asked.items():
            if value not in allowed:
                raise SettingError(
                    "the workers of this pool were started with another setting",
                    where=name,
                    expected=str(allowed[-1]),
                    got=str(value),
                    hint=f"make the pool with {name}={value!r}",
                )
        if chosen.accelerator is not None:
            raise SettingError(
                "a pool has no accelerator: a worker gets its link to one when it is started",
                got=chosen.accelerator,
                hint="use motte.load, or motte run without --pool",
            )
        return replace(chosen, engine=self.engine, precision=self.precision, threads=self.threads)

    @contextmanager
    def _lent(self, deadline: float) -> Iterator[_Spare]:
        spares = self._spares
        worker: _Spare | None = None
        try:
            worker = self._take(deadline)
            yield worker
        finally:
            with spares.changed:
                if worker is not None:
                    spares.lent.pop(worker, None)
                spares.quiet_until = time.monotonic() + _QUIET_S
                spares.changed.notify_all()

    def _take(self, deadline: float) -> _Spare:
        """A worker that is alive, which is the caller's from now on and stands in ``lent`` until its load has ended."""
        spares = self._spares
        with spares.changed:
            self._await_one(deadline)
            worker = spares.ready.popleft()
            spares.lent[worker] = threading.get_ident()
            spares.handed_out += 1
            return worker

    def _await_one(self, deadline: float) -> None:
        """Return when a worker is ready and alive; called with the lock held, which it keeps."""
        spares = self._spares
        # What failed before may be past; one more start is tried for whoever asks.
        spares.failure = None
        spares.waiting += 1
        spares.changed.notify_all()
        try:
            while True:
                self._drop_dead()
                if spares.closed:
                    raise _closed()
                if spares.ready:
                    return
                if not self.refill and spares.handed_out >= self.size:
                    raise WorkerClosed("this pool has handed out all its workers", got=str(self.size))
                if spares.failure is not None and not spares.starts:
                    raise spares.failure
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ResourceError(
                        "no worker of the pool was ready in time",
                        got=f"{spares.starts} of {self.size} still starting",
                        hint="allow more time (wait_s=), or make the pool earlier or larger",
                    )
                spares.changed.wait(left)
        finally:
            spares.waiting -= 1

    # --- keeping ready ----------------------------------------------------------------------------------------------

    def _keep_ready(self) -> None:
        spares = self._spares
        while True:
            with spares.changed:
                while not spares.closed and not self._one_is_missing():
                    spares.changed.wait(_LOOK_S)
                if spares.closed:
                    return
                spares.starts += 1
            started: _Spare | None = None
            failure: MotteError | None = None
            try:
                started = _Spare(
                    self._begun,
                    threads=self.threads,
                    engine=self.engine,
                    precision=self.precision,
                    start_timeout_s=self.start_timeout_s,
                )
            except MotteError as problem:
                failure = problem
            except OSError as problem:
                failure = ResourceError("a worker of the pool could not be started", got=str(problem))
            finally:
                self._arrived(started, failure)

    def _begun(self, worker: _Spare) -> None:
        with self._spares.changed:
            if self._spares.closed:
                raise _closed()
            self._spares.starting.add(worker)

    def _arrived(self, started: _Spare | None, failure: MotteError | None) -> None:
        spares = self._spares
        with spares.changed:
            spares.starts -= 1
            spares.starting = {each for each in spares.starting if each is not started and each.alive}
            if failure is not None and not spares.closed:
                spares.failure = failure
                _LOG.warning("a worker of the pool did not start: %s", failure)
            if started is not None and not spares.closed:
                spares.ready.append(started)
            elif started is not None:
                started.kill()
            spares.changed.notify_all()

    def _one_is_missing(self) -> bool:
        """Whether to start one more now; called with the lock held."""
        spares = self._spares
        self._drop_dead()
        if spares.failure is not None:
            # Not again and again: the next one who asks has it tried once more.
            return False
        held = len(spares.ready) + spares.starts
        if not self.refill:
            return held + spares.handed_out < self.size
        if held < spares.waiting:
            return True
        # While a bundle is opened, and for a moment after, the cores are for it.
        return held < self.size and not spares.lent and time.monotonic() >= spares.quiet_until

    def _drop_dead(self) -> None:
        spares = self._spares
        dead = [worker for worker in spares.ready if not worker.alive]
        for worker in dead:
            spares.ready.remove(worker)
            worker.kill()
            _LOG.warning("an idle worker of the pool ended (pid %d); another one is started", worker.pid)


class PooledModel:
    """One bundle, answered by one worker of a pool after the other: a batch on which a worker dies or stalls is asked
    again of the next.

    What a batch asked again costs is time only: nothing of an answer is released before it is whole.

    Args:
        pool: gives the workers; it is not closed with this model.
        path, keys, signer, settings, wait_s, issue: see :meth:`Pool.load`.
        retries: how often one call may go on to another worker, the first load included.

    Raises:
        MotteError: as :meth:`Pool.load`, after ``retries`` where a worker died or stalled.
    """

    def __init__(
        self,
        pool: Pool,
        path: str | os.PathLike[str],
        *,
        keys: RecipientPrivateKey | BrokerAddress | str | os.PathLike[str],
        signer: SignerPublicKey | str | os.PathLike[str],
        settings: LoadSettings,
        retries: int,
        wait_s: float | None = None,
        issue: Issue | None = None,
    ) -> None:
        self._load: Callable[[], Model] = lambda: pool.load(
            path, keys=keys, signer=signer, settings=settings, wait_s=wait_s, issue=issue
        )
        if type(retries) is not int or retries < 0:
            raise SettingError("not a number of retries", expected="0 or more", got=repr(retries))
        self._retries = retries
        self._lock = threading.Lock()
        self._current: Model | None = None
        self._closed = False
        self.reloads = 0
        """How often another worker had to go on."""
        self._ask(lambda model: None)

    @property
    def model(self) -> Model:
        """The bundle in the worker that has it now: for what a model tells of itself."""
        if self._current is None:
            raise WorkerClosed("this model was closed, or its workers failed", hint="load the bundle again")
        return self._current

    def run(self, inputs: Sequence[WireTensor]) -> Answered:
        """As :meth:`motte.run.model.Model.run`; one call at a time.

        Raises:
            WorkerDied, WorkerStalled: so did every worker that was tried. WorkerClosed: this model was closed.
            MotteError: what :meth:`Model.run` raises; only a worker that died or stalled is followed by another one.
        """
        answered: list[Answered] = []
        self._ask(lambda model: answered.append(model.run(inputs)))
        return answered[0]

    def close(self) -> None:
        """End the worker. Safe to call again."""
        with self._lock:
            self._closed = True
            if self._current is not None:
                self._current.close()
                self._current = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: Callable[[Model], None]) -> None:
        with self._lock:
            failed: WorkerDied | WorkerStalled | None = None
            for left in range(self._retries, -1, -1):
                if self._closed:
                    raise WorkerClosed("this model was closed", hint="load the bundle again")
                try:
                    if self._current is None:
                        self._current = self._load()
                    request(self._current)
                    return
                except (WorkerDied, WorkerStalled) as problem:
                    # A model closes itself at either of the two.
                    self._current, failed = None, problem
                    if not left:
                        raise
                    self.reloads += 1
                    _LOG.warning("%s: the next worker of the pool goes on", problem)
                except WorkerClosed:
                    # The pool has none left, or was closed: what ended the last worker says more.
                    if failed is None:
                        raise
                    raise failed from None


def _engine(name: str) -> str:
    if name == AUTO:
        raise SettingError(
            "a pool cannot choose the engine: that is done by the bundle, and its workers are started before",
            got=AUTO,
            expected=", ".join(ENGINES),
            hint="name the engine, such as engine='onnxruntime'",
        )
    if name not in ENGINES:
        raise SettingError("unknown engine", expected=", ".join(ENGINES), got=repr(name))
    if find_spec(name) is None:
        raise UnsupportedError("this engine is not installed", got=name, hint=f"pip install {name}")
    return name


def _closed() -> WorkerClosed:
    return WorkerClosed("this pool was closed")


def _join(threads: Sequence[threading.Thread]) -> None:
    # An interrupt while waiting is raised when they have ended: no worker may be started behind our back.
    interrupt: BaseException | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as problem:  # noqa: BLE001 - raised again below
                interrupt = problem
    if interrupt is not None:
        raise interrupt
