"""Small sealed models with a scheme, and accelerators of every character that listen on a socket of this process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.calculator import Calculator
from motte.accelerator.server import AcceleratorServer, Offer
from motte.capture.binding import bind_dims
from motte.capture.export import Captured, capture
from motte.capture.signature import Signature
from motte.engines.torch_engine import TorchEngine
from motte.link.calls import Call, Op
from motte.link.wire import SocketWire
from motte.offload.graph_layers import choose_layers, public_names, split_nodes
from motte.offload.placement import to_plan
from motte.offload.settings import Asymmetric
from motte.plan.plan import Plan
from motte.plan.planner import plan_parts
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.seal.manifest import Manifest
from motte.seal.package import seal_model
from motte.seal.run_terms import terms_of
from motte.split.chain import run_parts
from motte.split.oracle import weights_of
from motte.split.split import split

CANARY = torch.frombuffer(bytearray(b"CANARY-PRIVATE-" * 18)[:256], dtype=torch.float32)


class Many(nn.Module):
    """(N, 3, 12, 12) -> (N, 5), with every form of convolution between a private stem and a private head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.uneven = nn.Conv2d(12, 8, (2, 4), padding="same", dilation=(1, 1))
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.head = nn.Linear(8, 5)
        self.register_buffer("planted", CANARY.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.strided(x)))
        x = torch.relu(self.depthwise(x) + x)
        x = self.dilated(torch.relu(self.up(self.uneven(x))))
        return self.head(x.mean((2, 3))) + self.planted.clamp(0, 0).sum()


def many() -> Many:
    """The net with fixed random weights, every bias too, in eval mode."""
    generator = torch.Generator().manual_seed(11)
    model = Many().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.norm.weight.add_(1.0)
        # Channels last in memory, as a trained model may have it: what is sealed keeps that order.
        model.strided.weight.data = model.strided.weight.data.contiguous(memory_format=torch.channels_last)
    return model


def placed(
    captured: Captured,
    scheme: Asymmetric,
    words: Sequence[str],
    *,
    parts: int = 3,
    dims: Mapping[str, int] | None = None,
) -> Plan:
    """A plan in parts with an offload section."""
    plan = plan_parts(captured.graph, parts=parts, objective="memory", dims=dims or {"batch": 2})
    return replace(plan, offload=to_plan(scheme, choose_layers(captured.graph, words, tiles=plan.tiles)))


def answer(
    captured: Captured, plan: Plan, scheme: Asymmetric, accelerator: Any, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """What the worker computes, in this process."""
    from motte.trusted.outside import Outside

    assert plan.offload is not None
    nodes = split_nodes(captured.graph, plan.offload, public_names(captured.graph, plan.offload))
    outside = Outside(nodes, scheme, accelerator)
    engine, parts = TorchEngine(), split(captured.graph, plan)
    programs = []
    for part in parts:
        own = {node.name for node in part.graph.nodes}
        programs.append(engine.compile(part.graph, runners={k: v for k, v in outside.runners.items() if k in own}))

    @contextmanager
    def held(index: int) -> Iterator[Mapping[str, Tensor]]:
        yield weights_of(parts[index].graph, captured.weights)

    names = {torch.float32: "f32", torch.float64: "f64", torch.int64: "i64", torch.bfloat16: "bf16"}
    dims = bind_dims(captured.graph, [(names[x.dtype], tuple(x.shape)) for x in inputs])
    outside.begin_run()
    outputs = run_parts(parts, programs, captured.graph, list(inputs), held, dims)
    assert outside.end_run()["layers"] == len(nodes)
    return outputs


@dataclass
class Sealed:
    """A bundle with a scheme, the model that it was made from and the keys that open it."""

    path: Path
    model: nn.Module
    captured: Captured
    plan: Plan
    recipient: RecipientPrivateKey
    signer: SignerPrivateKey

    def load(self, **options: Any) -> Any:
        """motte.load with one thread and this bundle's keys, unless told otherwise."""
        import motte

        keywords = {"keys": self.recipient, "signer": self.signer.public, "threads": 1, "timeout_s": 60.0, **options}
        return motte.load(self.path, **keywords)

    def whole(self, x: Tensor) -> Tensor:
        """What the model itself answers."""
        with torch.inference_mode():
            return self.model(x)


def seal_many(
    folder: Path,
    scheme: Asymmetric | None,
    words: Sequence[str] = ("all-but-first-last",),
    *,
    public: Sequence[str] | None = None,
    peers: tuple[str, ...] = (),
) -> Sealed:
    """Capture, plan and seal :class:`Many`; ``public`` is what the header marks, by default what the plan needs."""
    model = many()
    captured = capture(model, (torch.zeros(2, 3, 12, 12),), dims={"x": {0: "batch"}}, name="many")
    if scheme is None:
        plan = plan_parts(captured.graph, parts=3, objective="memory", dims={"batch": 2})
        marked: Sequence[str] = ()
    else:
        plan = placed(captured, scheme, words)
        assert plan.offload is not None
        marked = public_names(captured.graph, plan.offload)
    recipient, signer = RecipientPrivateKey.new(), SignerPrivateKey.new()
    path = folder / "many.motte"
    seal_model(
        path,
        Manifest(captured.graph, plan, Signature("many", "random")),
        captured.weights,
        release=1,
        recipients=[recipient.public],
        signer=signer,
        public_weights=marked if public is None else public,
        run=terms_of(plan.offload, peers=peers),
    )
    return Sealed(path, model, captured, plan, recipient, signer)


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    """Rank 2 everywhere, no noise, integrity on."""
    from motte.offload.settings import Fixed

    return seal_many(tmp_path_factory.mktemp("many"), Asymmetric(noise=None, rank=Fixed(2)))


# --- accelerators ---------------------------------------------------------------------------------------------------
@dataclass
class Seen:
    """What an accelerator was given: every frame with its tensors."""

    calls: list[tuple[Call, list[Tensor]]] = field(default_factory=list)

    def of(self, op: Op) -> list[tuple[Call, list[Tensor]]]:
        """The frames of one kind."""
        return [(call, tensors) for call, tensors in self.calls if call.op is op]

    def everything(self) -> bytes:
        """All bytes, descriptors and JSON included."""
        from motte.link.calls import encode

        return b"".join(
            encode(call) + b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
            for call, tensors in self.calls
        )


class Observer(AcceleratorServer):
    """Honest, and keeps a copy of everything that it is given."""

    seen: Seen

    def handle(self, call: Call, tensors: list[Tensor]) -> None:
        self.seen.calls.append((call, [tensor.clone() for tensor in tensors]))
        super().handle(call, tensors)


class Liar(Observer):
    """Changes one element of every product by one in a thousand of the largest."""

    def answer(self, call: Call, tensors: Sequence[Tensor], compute_ns: int) -> None:
        y = tensors[0].view(-1)
        y[len(y) // 2] += 1e-3 * float(y.abs().max())
        super().answer(call, tensors, compute_ns)


class Mute(Observer):
    """Takes requests and never answers one."""

    def answer(self, call: Call, tensors: Sequence[Tensor], compute_ns: int) -> None:
        return


class Dying(Observer):
    """Closes the connection instead of giving the third product."""

    def answer(self, call: Call, tensors: Sequence[Tensor], compute_ns: int) -> None:
        if len(self.seen.of(Op.FORWARD)) == 3:
            self.wire.close()
        else:
            super().answer(call, tensors, compute_ns)


@dataclass
class Listening:
    """One accelerator: its address, and what it was given."""

    address: str
    seen: Seen


@contextmanager
def listening(folder: Path, kind: type[Observer] = Observer) -> Iterator[Listening]:
    """An accelerator of this class in a thread of this process."""
    path, seen = folder / "accelerator.sock", Seen()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def loop() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    server = kind(SocketWire(connection, peer="worker"), Calculator(), Offer(region_bytes=1 << 20))
                    server.seen = seen
                    server.serve()

        threading.Thread(target=loop, daemon=True).start()
        yield Listening(f"unix:{path}", seen)
        # Wakes the thread that waits in accept.
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def accelerator(tmp_path: Path) -> Iterator[Callable[..., Listening]]:
    """Starts one accelerator of a given class, an honest one by default."""
    with contextlib.ExitStack() as stack:
        yield lambda kind=Observer: stack.enter_context(listening(tmp_path, kind))


@dataclass(frozen=True)
class Tools:
    """The functions of this file, for tests, which cannot import it."""

    many: Callable[[], Many]
    placed: Callable[..., Plan]
    answer: Callable[..., list[Tensor]]
    seal_many: Callable[..., Sealed]
    kinds: Mapping[str, type[Observer]]
    listening: Callable[[Path], Any]


@pytest.fixture(scope="session")
def offload_tools() -> Tools:
    """What tests of this folder build with."""
    kinds = {kind.__name__: kind for kind in (Observer, Liar, Mute, Dying)}
    return Tools(many, placed, answer, seal_many, kinds, listening)
