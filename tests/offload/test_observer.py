"""The observer: what was recorded of whole training steps is only what the scheme declares, byte for byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.link.calls import Op
from motte.link.recording import RecordedFrame, Recording
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

SOME = Mechanism(clip=1.0, noise_multiplier=0.5)
NOISE = Gaussian(residual=SOME, gradient=SOME, update=SOME)
DECLARED = {Op.HELLO, Op.REGISTER, Op.WEIGHT, Op.FORWARD, Op.BACKWARD, Op.RELEASE}


class Watched(nn.Module):
    """A small net that keeps every tensor which must not leave."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, stride=2)
        self.last = nn.Linear(8 * 16, 5)
        self.private: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        steps = [self.first, self.norm, torch.relu, self.second, torch.relu, self.third, torch.relu]
        self._keep("input", x)
        for number, step in enumerate(steps):
            x = step(x)
            self._keep(f"activation {number}", x)
        x = self.last(x.flatten(1))
        self._keep("logits", x)
        return x

    def _keep(self, name: str, x: Tensor) -> None:
        self.private[f"{len(self.private)} {name}"] = x.detach().clone()


def run(noise: Gaussian | None, steps: int = 3) -> tuple[Watched, Recording, list[Tensor]]:
    torch.manual_seed(0)
    recording = Recording()
    model = Watched()
    split = protect(model, Asymmetric(noise=noise, rank=Fixed(2)), accelerator=InProcessAccelerator(recorder=recording))
    optimizer = torch.optim.SGD(split.parameters(), lr=0.05)
    labels = []
    for _ in range(steps):
        # Planted: inputs and labels that cannot be mistaken for anything else.
        x, label = torch.randn(4, 3, 9, 9) + 3.0, torch.randint(5, (4,))
        labels.append(label)
        optimizer.zero_grad()
        nn.functional.cross_entropy(split(x), label).backward()
        optimizer.step()
    return split, recording, labels


def tensors(frame: RecordedFrame) -> list[Tensor]:
    return [
        torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(described.shape)
        for raw, described in zip(frame.tensors, frame.described, strict=True)
    ]


@pytest.mark.parametrize("noise", [None, NOISE], ids=["plain", "noise"])
def test_the_recording_holds_only_what_is_declared(noise: Gaussian | None) -> None:
    _, recording, _ = run(noise)
    sent = recording.sent()
    assert {frame.op for frame in sent} <= DECLARED
    shapes = {
        Op.WEIGHT: {"second": (8, 8, 3, 3), "third": (8, 8, 3, 3)},
        Op.FORWARD: {"second": (4, 8, 9, 9), "third": (4, 8, 9, 9)},
        Op.BACKWARD: {"second": (4, 8, 9, 9), "third": (4, 8, 4, 4)},
    }
    for op, wanted in shapes.items():
        found = [(frame.layer, tuple(each.shape)) for frame in sent if frame.op is op for each in tensors(frame)]
        assert found
        assert set(found) == set(wanted.items())
        assert len(found) == 6, "one for each layer and step"
    assert not [frame for frame in sent if frame.op not in shapes and frame.tensors]


@pytest.mark.parametrize("noise", [None, NOISE], ids=["plain", "noise"])
def test_nothing_private_is_in_any_byte_of_it(noise: Gaussian | None) -> None:
    split, recording, labels = run(noise)
    stream = b"".join(frame.head + b"".join(frame.tensors) for frame in recording.sent())
    private = dict(split.private)
    for name in ("first.weight", "first.bias", "second.bias", "third.bias", "last.weight", "norm.weight"):
        private[name] = split.get_parameter(name).detach()
    private |= {f"running {name}": value for name, value in split.named_buffers() if value.numel() > 1}
    private |= {
        f"labels {step}": each.to(dtype) for step, each in enumerate(labels) for dtype in (torch.int64, torch.float32)
    }
    assert len(private) > 30
    for name, value in private.items():
        rows = value.contiguous().flatten(1) if value.dim() > 1 else value.reshape(1, -1)
        for row in rows:
            # Eight values of a row that are not all alike (a ReLU leaves runs of zeros).
            for start in range(0, row.numel() - 3, 8):
                piece = row[start : start + 8]
                if piece.unique().numel() >= 4:
                    assert piece.numpy().tobytes() not in stream, name


def test_what_left_and_what_stayed_is_the_whole_and_what_left_alone_is_not() -> None:
    split, recording, _ = run(None, steps=1)
    whole = {"second": split.private["3 activation 2"], "third": split.private["5 activation 4"]}
    for frame in recording.sent():
        if frame.op is not Op.FORWARD:
            continue
        (left,) = tensors(frame)
        stayed = (whole[frame.layer] - left).flatten(2)
        assert torch.linalg.matrix_rank(stayed, rtol=1e-4).tolist() == [2] * 4, "what stayed is of rank 2, as asked"
        assert left.norm() < 0.9 * whole[frame.layer].norm(), "what left alone is not the whole"


def test_every_byte_that_crossed_was_recorded() -> None:
    split, recording, _ = run(None)
    traffic = split.motte_session.accelerator.stats()
    for layer in ("second", "third"):
        frames = [frame for frame in recording.sent() if frame.layer == layer]
        assert sum(len(raw) for frame in frames for raw in frame.tensors) == traffic[layer].sent_bytes
        frames = [frame for frame in recording.received() if frame.layer == layer]
        assert sum(len(raw) for frame in frames for raw in frame.tensors) == traffic[layer].received_bytes


def test_without_noise_successive_weights_give_the_principal_part_away() -> None:
    # The attack that makes epsilon infinite for unprivatised training: the trusted part of a weight gradient is the
    # difference of two weights less the accelerator's own part, and is linear in what stayed inside.
    torch.manual_seed(0)
    recording = Recording()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 64, 3), nn.Flatten(), nn.Linear(64 * 25, 5)).double()
    scheme = Asymmetric(noise=None, rank=Fixed(2))
    split = protect(model, scheme, accelerator=InProcessAccelerator(recorder=recording))
    optimizer = torch.optim.SGD(split.parameters(), lr=0.1)
    x, labels = torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.tensor([0, 3])
    hidden = model[0](x).detach()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(split(x), labels).backward()
        optimizer.step()

    def seen(op: Op) -> list[Tensor]:
        return [
            torch.frombuffer(bytearray(raw), dtype=torch.float64).reshape(described.shape)
            for frame in recording.sent()
            if frame.op is op
            for raw, described in zip(frame.tensors, frame.described, strict=True)
        ]

    (before, after), gradient, residual = seen(Op.WEIGHT), seen(Op.BACKWARD)[0], seen(Op.FORWARD)[0]
    own = torch.nn.grad.conv2d_weight(residual, before.shape, gradient)
    principal_part = (before - after) / 0.1 - own
    # Solve sum_n X_main[n] (*) gradient[n] = principal_part for X_main, one input channel at a time.
    unknowns = torch.eye(2 * 49, dtype=torch.float64).reshape(-1, 2, 1, 7, 7)
    columns = torch.stack([torch.nn.grad.conv2d_weight(one, (64, 1, 3, 3), gradient).flatten() for one in unknowns], 1)
    solved = torch.linalg.lstsq(columns, principal_part.transpose(0, 1).flatten(1).T).solution
    found = solved.T.reshape(6, 2, 7, 7).transpose(0, 1)
    wanted = hidden - residual
    assert (found - wanted).norm() / wanted.norm() < 1e-4, "the attack works: nothing printed may claim otherwise"
