"""Training and inference: accelerator only, trusted only (fp32 and bf16), asymmetric; with the bound from the work left
inside beside each ratio, and where the time of a step goes, layer by layer.

    python benchmarks/bench_asymmetric.py [NAME ...] [--device cuda:0] [--batch 32] [--image 224] [--mode train]

With ``--device cuda:0``: ImageNet shapes, batch 32, by default. With the CPU on both sides (the default), smaller
shapes, and the figures say nothing about a GPU: the accelerator is then a second process on the same machine.
Trusted only has all cores (``--threads``); the asymmetric scheme has ``--threads`` inside and ``--accelerator-threads``
outside. The enclave is SIMULATED. A training step is forward, loss, backward and an SGD step; the input is in memory.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peers import CONSOLE, arguments
from rich.table import Table
from torch import Tensor, nn

from motte.accelerator.process import LocalAccelerator
from motte.measure.compare import Comparison, compare
from motte.measure.record import PROCESS, UNPROTECTED, Setting, state
from motte.measure.record_file import append
from motte.offload.layers import trace
from motte.offload.placement import place_all, place_listed
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Gaussian, Mechanism
from motte.offload.work import WorkTable, work
from motte.train.models import build_model

NAMES = ("vgg16", "vgg19", "resnet18", "resnet34")
SOME = Mechanism(clip=1.0, noise_multiplier=1.0)
NOISE = Gaussian(residual=SOME, gradient=SOME, update=SOME)


@dataclass(frozen=True)
class Options:
    """What one model is measured with."""

    batch: int
    image: int
    device: str
    train: bool
    threads: int
    accelerator_threads: int
    late: int


def main() -> None:
    """The models named, or all four of the published table."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--image", type=int)
    parser.add_argument("--mode", choices=("train", "infer", "both"), default="both")
    parser.add_argument("--accelerator-threads", type=int, default=1)
    parser.add_argument("--late", type=int, default=0, help="split only layers from this one on (0: every layer)")
    given = parser.parse_args()
    real = given.device != "cpu"
    if not real:
        CONSOLE.print("[bold]CPU on both sides: these figures say nothing about a GPU.[/]")
    CONSOLE.print("[bold]SIMULATED: no hardware protection.[/]")
    for name in given.names or (NAMES if real else ("vgg16", "resnet18")):
        for train in (True, False):
            if given.mode in ("both", "train" if train else "infer"):
                options = Options(
                    batch=given.batch or (32 if real else 4),
                    image=given.image or (224 if real else 64),
                    device=given.device,
                    train=train,
                    threads=given.threads,
                    accelerator_threads=given.accelerator_threads,
                    late=given.late,
                )
                one(name, options, given.repeats, given.records)


def one(name: str, options: Options, repeats: int, records: object) -> None:
    """Measure one model in one mode."""
    model = build_model(name, classes=1000, image_shape=(3, options.image, options.image), seed=0, stem="imagenet")
    x = torch.randn(options.batch, 3, options.image, options.image, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(options.batch) % 1000
    layers = placed(model, x, options.late)
    with contextlib.ExitStack() as stack:

        def split(**settings: object) -> nn.Module:
            local = stack.enter_context(LocalAccelerator(options.device, threads=options.accelerator_threads))
            scheme = Asymmetric(**{"noise": None, "offloaded_layers": layers, **settings})
            return protect(copy.deepcopy(model), scheme, accelerator=local.link)

        protected = split()
        candidates = {
            "trusted only, fp32": step(copy.deepcopy(model), x, labels, options),
            "trusted only, bf16": step(copy.deepcopy(model), x, labels, options, bf16=True),
            "accelerator only": accelerator_only(copy.deepcopy(model), x, labels, options),
            "asymmetric": step(protected, x, labels, options),
            "asymmetric, integrity off": step(split(integrity="off"), x, labels, options),
            "asymmetric, noise on": step(split(noise=NOISE), x, labels, options),
        }
        found = compare(candidates, warmup=2, repeats=repeats)
        table = counted(model, x, layers)
        report(name, found, table, options, records)
        timeline(protected, table, step(protected, x, labels, options))


def placed(model: nn.Module, x: Tensor, late: int) -> tuple[str, ...]:
    """The layers to split: those that the scheme allows, from number ``late`` on."""
    names = place_all(trace(model, x).layers, Asymmetric(noise=None)).split
    return tuple(names[late:])


def counted(model: nn.Module, x: Tensor, layers: tuple[str, ...]) -> WorkTable:
    """The work left inside."""
    scheme, seen = Asymmetric(noise=None), trace(model, x)
    return work(seen, None, scheme, place_listed(seen.layers, scheme, layers))


def step(model: nn.Module, x: Tensor, labels: Tensor, options: Options, *, bf16: bool = False) -> Callable[[], object]:
    """One step of ``model`` inside."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train(options.train)

    def run() -> None:
        with threads(options.threads), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if not options.train:
                with torch.no_grad():
                    model(x)
                return
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        with threads(options.threads):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def accelerator_only(model: nn.Module, x: Tensor, labels: Tensor, options: Options) -> Callable[[], object]:
    """One step of the whole model outside; the input and the answer cross."""
    device = torch.device(options.device)
    model = model.to(device)
    inner = Options(**{**vars_of(options), "threads": options.accelerator_threads})
    if device.type == "cpu":
        return step(model, x, labels, inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train(options.train)

    def run() -> None:
        there = x.to(device)
        if options.train:
            loss = nn.functional.cross_entropy(model(there), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        else:
            with torch.no_grad():
                model(there).cpu()

    return run


def vars_of(options: Options) -> dict[str, object]:
    """Its fields."""
    return {name: getattr(options, name) for name in Options.__dataclass_fields__}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """``count`` compute threads of this process for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(name: str, found: Comparison, table: WorkTable, options: Options, records: object) -> None:
    """Print the comparison with the bounds beside it, and append the figures."""
    which = "training" if options.train else "forward"
    mode = "train" if options.train else "infer"
    title = f"{name}, {mode}, batch {options.batch}, {options.image} px, device {options.device}"
    shown = Table("candidate", "n", "median s", "IQR s", "faster than trusted fp32", "95 % interval", title=title)
    for row in found.rows():
        ratio, interval = "baseline", ""
        if row["ratio"] is not None:
            ratio = f"{1 / row['ratio']:.2f}x"
            interval = f"{1 / row['high']:.2f} to {1 / row['low']:.2f}"
        shown.add_row(row["name"], str(row["repeats"]), f"{row['median']:.4f}", f"{row['spread']:.4f}", ratio, interval)
    CONSOLE.print(shown)
    CONSOLE.print(
        f"left inside: {table.share(which, published=True):.1%} by the published count, "
        f"{table.share(which, published=False):.1%} with decomposition, per-sample weights and checks: "
        f"at most {table.bound(which, published=False):.1f}x faster than everything inside, whatever the accelerator"
    )
    if records is None:
        return
    for one in found.series:
        outside = one.name == "accelerator only"
        setting = Setting(
            threads=options.accelerator_threads if outside else options.threads,
            dtype="bf16" if "bf16" in one.name else "f32",
            device=options.device if outside or "asymmetric" in one.name else "cpu",
            engine="torch",
            enclave=UNPROTECTED if outside else PROCESS,
        )
        parameters = {"model": name, "batch": options.batch, "image": options.image, "late": options.late}
        what = "one training step" if options.train else "one forward pass"
        record = state(
            series=f"asymmetric, {one.name}", what=what, value=one.median, unit="s", statistic="median",
            samples=one.samples, setting=setting, parameters=parameters,
        )  # fmt: skip
        append(records, record)


def timeline(model: nn.Module, table: WorkTable, run: Callable[[], object]) -> None:
    """Where one step goes: trusted arithmetic, sending, waiting for the accelerator, and its own claim of computing."""
    session = model.motte_session
    session.timeline.clear()
    before = {layer: traffic.compute_s for layer, traffic in session.accelerator.stats().items()}
    started = time.perf_counter()
    run()
    total = time.perf_counter() - started
    stats = session.accelerator.stats()
    shown = Table(
        "layer", "inside ms", "send ms", "wait ms", "accelerator ms", "left inside", title="one step, by layer"
    )
    rows = {row.name: row for row in table.rows}
    accounted = 0.0
    for layer, spent in session.timeline.by_layer().items():
        accounted += spent.trusted_s + spent.send_s + spent.wait_s
        row = rows[layer]
        share = row.forward.total / row.whole_forward
        claimed = stats[layer].compute_s - before.get(layer, 0.0)
        cells = (spent.trusted_s, spent.send_s, spent.wait_s, claimed)
        shown.add_row(layer, *(f"{seconds * 1e3:.1f}" for seconds in cells), f"{share:.0%}")
    CONSOLE.print(shown)
    CONSOLE.print(
        f"{total:.3f} s in all, of which split layers {accounted:.3f} s; accelerator ms is what it says itself"
    )


if __name__ == "__main__":
    main()
