"""Sealed bundles for a bench: made once for each model, part count and kind, and kept if a folder is named.

A bundle's name carries a digest of everything that it was made from, so that another model, other weights, another
scheme or another version of this package never meets an old file. A model of one's own is always sealed anew: nobody
can tell from outside whether its code has changed.

**The keys lie beside the bundles.** This is a bench on the owner's machine, not a deployment.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self

from motte.bench.inputs import dims_for
from motte.bench.request import Request
from motte.digests import sha256, sha256_of
from motte.errors import FormatError, InputError, MotteError, SettingError, UnsupportedError
from motte.limits import KIB, MIB
from motte.offload.graph_layers import choose_layers, public_names
from motte.offload.placement import to_plan
from motte.plan.plan import Plan
from motte.plan.planner import plan_cuts, plan_parts
from motte.plan.streamed import PartNeed, copy_bytes, streamed_need
from motte.seal import keys as key_files
from motte.seal.atomic import atomic_file
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey, SignerPublicKey
from motte.seal.manifest import Manifest, lay_out_parts, loads
from motte.seal.package import seal_model
from motte.seal.reader import open_bundle
from motte.strict_json import Fields, canonical, parse
from motte.zoo import own_models
from motte.zoo.published_cuts import PUBLISHED_CUTS, PUBLISHED_PARTS
from motte.zoo.weights import WeightsChoice

if TYPE_CHECKING:
    from motte.capture.export import Captured
    from motte.zoo.models import BuiltModel

Kind = Literal["trusted", "asymmetric"]
Say = Callable[[str], None]
_NOTE_FORMAT: Final = "motte-bench-bundle/1"
_RANDOM_SEED: Final = 0


@dataclass(frozen=True)
class SealedModel:
    """A bundle and what opens it. ``build_s``: from the captured graph to the file; None: it was there already, and
    the note of its making is gone."""

    path: Path
    key: RecipientPrivateKey
    signer: SignerPublicKey
    manifest: Manifest
    build_s: float | None

    def streamed_need_bytes(self) -> int:
        """The weight memory that a streamed run needs at least."""
        parts = lay_out_parts(self.manifest, checked=True)
        return streamed_need([PartNeed(part.layout.bytes, copy_bytes(part.part.graph)) for part in parts])


def weights_choice(request: Request) -> WeightsChoice:
    """The weights that were asked for."""
    return WeightsChoice(file=request.weights, random_seed=_RANDOM_SEED if request.random_weights else None)


class Bundles:
    """The bundles of one run. A context manager: without a folder of their own they vanish with it."""

    def __init__(self, request: Request, *, say: Say = lambda text: None) -> None:
        self._request = request
        self._say = say
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._latest: tuple[str, BuiltModel, Captured] | None = None
        self._digests: dict[Path, str] = {}
        self._made: dict[Path, SealedModel] = {}
        if request.bundles is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="motte-bench-")
            self._folder = Path(self._temporary.name)
        else:
            self._folder = request.bundles.resolve()
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._key = self._load_or_make("bench-recipient", RecipientPrivateKey)
            self._signer = self._load_or_make("bench-signer", SignerPrivateKey)
        except BaseException:
            self.close()
            raise

    def built(self, model: str) -> tuple[BuiltModel, Captured]:
        """The model and its capture; the latest one is kept.

        Raises:
            MotteError: as :func:`motte.zoo.registry.build` and :func:`motte.zoo.models.capture_built`.
        """
        if self._latest is None or self._latest[0] != model:
            from motte.zoo.models import capture_built
            from motte.zoo.registry import build

            self._latest = None
            self._say(f"building and capturing {model}")
            made = build(model, weights=weights_choice(self._request), input_shape=self._request.input_shape)
            self._latest = (model, made, capture_built(made))
        return self._latest[1], self._latest[2]

    def forget(self, model: str) -> None:
        """No more of ``model`` will be asked for: give its memory, and temporary files, back."""
        if self._latest is not None and self._latest[0] == model:
            self._latest = None
        if self._temporary is not None:
            for path in self._folder.glob("*.motte"):
                path.unlink(missing_ok=True)
                self._made.pop(path, None)

    def sealed(self, model: str, parts: int, kind: Kind) -> SealedModel:
        """The bundle of ``model`` in ``parts`` parts; made now if it is not there.

        Raises:
            UnsupportedError: no such plan, no layer to split, or a model that cannot be captured.
            MotteError: it cannot be built or written.
        """
        path = self._folder / f"{self._stem(model)}-p{parts}-{kind}-{self._digest(model, parts, kind)}.motte"
        if path not in self._made:
            self._made[path] = self._found(path, model) or self._make(path, model, parts, kind)
        return self._made[path]

    def digest(self, path: Path) -> str:
        """SHA-256 of a bundle's file, in hexadecimal; read once."""
        if path not in self._digests:
            self._digests[path] = _file_digest(path)
        return self._digests[path]

    def close(self) -> None:
        """Remove what was temporary."""
        self._latest = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def plan(self, model: str, captured: Captured, parts: int, kind: Kind) -> Plan:
        """The plan of a bundle.

        Raises:
            UnsupportedError: there is none.
        """
        graph, wanted = captured.graph, self._request.cuts
        batch = 1 if any(dim.name == "batch" for dim in graph.dims) else _fixed_batch(captured)
        dims = dims_for(graph, batch, self._request.dims)
        if wanted == "published" and parts == PUBLISHED_PARTS:
            if model not in PUBLISHED_CUTS:
                raise UnsupportedError("no cuts were published for this model", got=model)
            made = plan_cuts(graph, cut_after=PUBLISHED_CUTS[model], objective="published", dims=dims)
        else:
            objective = "memory" if wanted == "memory" else "weights"
            made = plan_parts(graph, parts=parts, objective=objective, dims=dims)
        if kind == "trusted":
            return made
        try:
            placement = choose_layers(graph, self._request.layers, tiles=made.tiles)
        except SettingError as problem:
            raise UnsupportedError(
                problem.message, where=problem.where, got=problem.got, expected=problem.expected, hint=problem.hint
            ) from problem
        return replace(made, offload=to_plan(self._request.scheme, placement))

    def split(self, path: Path, model: str, parts: int, kind: Kind) -> float:
        """Plan, cut, lower and seal into ``path``, which is replaced; seconds from the captured graph to the file.

        Raises:
            UnsupportedError: there is no such plan.
        """
        from motte.lower.lower import lower

        made, captured = self.built(model)
        began = time.perf_counter()
        plan = self.plan(model, captured, parts, kind)
        lowered = lower(captured.graph, plan) if self._lowers else None
        public = () if plan.offload is None else public_names(captured.graph, plan.offload)
        seal_model(
            path,
            Manifest(captured.graph, plan, made.signature, lowered),
            captured.weights,
            release=1,
            recipients=[self._key.public],
            signer=self._signer,
            public_weights=public,
            threads=self._request.threads,
            overwrite=True,
        )
        return time.perf_counter() - began

    @property
    def _lowers(self) -> bool:
        return any(engine != "torch" for engine in self._request.engines)

    def _found(self, path: Path, model: str) -> SealedModel | None:
        """What an earlier run left there; None: nothing that can be used."""
        if own_models.is_path(model) or not path.exists():
            return None
        try:
            return self._read(path)
        except MotteError as problem:
            self._say(f"making {path.name} again: {problem.message}")
            return None

    def _make(self, path: Path, model: str, parts: int, kind: Kind) -> SealedModel:
        self.built(model)
        self._say(f"sealing {model} in {parts} part{'s' * (parts != 1)}, {kind}")
        seconds = self.split(path, model, parts, kind)
        found = self._read(path)
        note = {"format": _NOTE_FORMAT, "build_s": seconds}
        with atomic_file(path.with_suffix(".json"), overwrite=True) as fd:
            os.write(fd, canonical(note) + b"\n")
        return replace(found, build_s=seconds)

    def _read(self, path: Path) -> SealedModel:
        with open_bundle(path, signer=self._signer.public) as signed:
            manifest = loads(signed.unlock(signed.unwrap(self._key)).manifest())
        return SealedModel(path, self._key, self._signer.public, manifest, _read_note(path.with_suffix(".json")))

    def _load_or_make(self, name: str, kind: type[key_files.P]) -> key_files.P:
        private, _ = key_files.key_paths(self._folder, name)
        return key_files.load(private, kind) if private.exists() else key_files.new(self._folder, name, kind)

    def _stem(self, model: str) -> str:
        name = model.rpartition(":")[2] if own_models.is_path(model) else model
        return "".join(char if char.isalnum() or char in "_-" else "_" for char in name)[:80]

    def _digest(self, model: str, parts: int, kind: Kind) -> str:
        request = self._request
        words = {
            "model": model,
            "parts": parts,
            "cuts": request.cuts,
            "lowered": self._lowers,
            "random": request.random_weights,
            "weights": None if request.weights is None else _file_digest(request.weights),
            "input_shape": request.input_shape,
            "dims": dict(request.dims),
            "scheme": [request.noise, request.rank, request.integrity, list(request.layers)]
            if kind == "asymmetric"
            else None,
            "versions": [version("motte"), version("torch"), version("torchvision")],
        }
        return sha256(canonical(words)).hex()[:16]


def _fixed_batch(captured: Captured) -> int:
    first = captured.graph.inputs[0].type.shape[0] if captured.graph.inputs[0].type.shape else 1
    return first if isinstance(first, int) else 1


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return sha256_of(iter(lambda: file.read(MIB), b"")).hex()
    except OSError as problem:
        raise InputError("a file cannot be read", where=str(path), got=problem.strerror) from problem


def _read_note(path: Path) -> float | None:
    try:
        data = path.read_bytes()[: 4 * KIB]
    except OSError:
        return None
    try:
        fields = Fields(parse(data, max_bytes=4 * KIB, what=path.name), where=path.name)
        fields.choice("format", (_NOTE_FORMAT,))
        seconds = fields.number("build_s")
        fields.done()
    except FormatError:
        return None
    return seconds
