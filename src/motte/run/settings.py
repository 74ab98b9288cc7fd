"""How a bundle is opened and run, as its user chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from motte.engines.select import ENGINES, PRECISIONS
from motte.errors import SettingError
from motte.trusted.surroundings import KINDS
from motte.trusted.weights import MODES

DEFAULT_TIMEOUT_S = 120.0
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How a bundle is opened and run; see :func:`motte.run.model.load`.

    ``accelerator`` is an address: ``unix:PATH``, ``tcp:HOST:PORT``, or ``local`` for one started here. What may be sent
    there is not a setting: it stands in the bundle. ``engine`` is one of :data:`motte.engines.select.ENGINES`, or
    ``auto``: onnxruntime where every part is lowered, else torch. ``precision`` other than f32 is for openvino and for
    bundles whose owner measured what it changes. ``enclave`` is one of :data:`motte.trusted.surroundings.KINDS`; the
    Gramine kinds start the ``image`` of ``motte enclave build``, whose engine, precision and threads are fixed; ``vm``
    is the address of a worker in a confidential VM: ``vsock:CID:PORT`` or ``unix:PATH``.
    """

    mode: str = "resident"
    weight_memory_bytes: int = 0
    threads: int = 0
    dims: Mapping[str, int] | None = None
    min_release: int = 0
    verify_digests: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S
    accelerator: str | None = None
    engine: str = AUTO
    precision: str = "f32"
    enclave: str = "process"
    image: Path | None = None
    vm: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingError("unknown mode", expected=" or ".join(MODES), got=repr(self.mode))
        if self.mode == "streamed" and not self.weight_memory_bytes:
            raise SettingError(
                "streamed mode needs a bound", where="weight_memory", hint="give --weight-memory, such as 128MiB"
            )
        if self.engine not in (AUTO, *ENGINES):
            raise SettingError("unknown engine", expected=", ".join((AUTO, *ENGINES)), got=repr(self.engine))
        if self.precision not in PRECISIONS:
            raise SettingError("unknown precision", expected=" or ".join(PRECISIONS), got=repr(self.precision))
        if self.precision != "f32" and self.engine != "openvino":
            raise SettingError(
                f"only openvino computes in {self.precision}",
                got=f"engine {self.engine}",
                hint="add --engine openvino (engine='openvino')",
            )
        if self.enclave not in KINDS:
            raise SettingError("unknown kind of enclave", expected=", ".join(KINDS), got=repr(self.enclave))
        if (self.image is not None) != self.enclave.startswith("gramine") or (self.vm is not None) != (
            self.enclave == "vm"
        ):
            raise SettingError(
                "this kind of enclave needs another setting",
                where=self.enclave,
                expected="gramine-*: an image (--image DIR); vm: its address (--vm ADDRESS); process: neither",
                got=f"image {self.image}, vm {self.vm}",
            )
        if self.enclave != "process" and self.accelerator is not None:
            raise SettingError(
                "only a worker in a process can be handed a link to an accelerator", got=f"enclave {self.enclave}"
            )
        if self.weight_memory_bytes < 0 or self.threads < 0 or self.min_release < 0:
            raise SettingError("a setting is negative", got=str(self))
        if not self.timeout_s > 0:
            raise SettingError("the time limit must be positive", where="timeout_s", got=str(self.timeout_s))
