"""Layers on a confidential GPU, from ``--gpu-layers`` to an answer; synthetic evidence, and the CPU in the GPU's place.

The worker runs in a thread of this process, told that it is in a confidential VM: the only seams are those of Python.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motte.attest.anchors import Anchors
from motte.attest.configuration import RunConfiguration
from motte.attest.evidence import Evidence
from motte.attest.platforms import nvml
from motte.capture.export import capture
from motte.capture.graph import Graph
from motte.capture.signature import Signature
from motte.cli.gpu_placing import GpuOptions
from motte.errors import AttestationError, BundleError, MotteError, ResourceError, SettingError, UnsupportedError
from motte.link.frames import PROTOCOL
from motte.link.local import Link
from motte.offload import confidential_gpu
from motte.offload.graph_layers import choose_gpu_layers
from motte.offload.placement import to_plan
from motte.plan.plan import Plan, Tile
from motte.plan.planner import plan_parts
from motte.plan.text import loads
from motte.run.tensors import to_wire
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.seal.manifest import Manifest
from motte.seal.package import seal_model
from motte.seal.reader import open_bundle
from motte.seal.run_terms import check_terms, terms_of
from motte.trusted import confidential, harden
from motte.trusted import worker as worker_module
from motte.trusted.worker import Worker

torch = pytest.importorskip("torch")
make: Any = importlib.import_module("attest_makers.certificate_maker")
makers: Any = importlib.import_module("attest_makers.nvidia_maker")
GPU = makers.Gpu()
ANCHORS: Anchors = GPU.evidence(bytes(64))[1]
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6))
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))

def net():
    torch.manual_seed(1)
    return Net()
"""
X = np.random.default_rng(3).random((2, 3, 8, 8), dtype=np.float32)


@dataclass(frozen=True)
class Place:
    """A folder with a model, keys and a GPU's good measurements."""

    folder: Path
    motte: Callable[..., Any]

    def words(self, verb: str, *cuts: object) -> tuple[object, ...]:
        model = (verb, f"{self.folder}/model.py:net", "--random-weights", "--input-shape", "3,8,8")
        return (*model, *(cuts or ("--parts", "2")))

    @property
    def keys(self) -> tuple[object, ...]:
        keys = ("--recipient", self.folder / "alice.pub", "--signer-key", self.folder / "owner.key")
        return (*keys, "--lower", "off", "--skip-check")

    @property
    def rim(self) -> tuple[object, ...]:
        return "--nvidia-rim", self.folder / "rim.json"

    @property
    def gpu(self) -> tuple[object, ...]:
        return "--gpu-layers", "third,head", *self.rim

    def seal(self, name: str, *options: object) -> Path:
        path = self.folder / f"{name}.motte"
        ran = self.motte(*self.words("seal"), *self.keys, "-o", path, *options)
        assert ran.code == 0, ran.err
        return path

    def run_words(self, path: Path) -> tuple[object, ...]:
        np.save(self.folder / "x.npy", X)
        keys = ("--key", self.folder / "alice.key", "--signer", self.folder / "owner.pub")
        return ("run", path, *keys, "--input", self.folder / "x.npy", "--repeat", "1")


@pytest.fixture
def place(motte: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "rim.json").write_bytes(GPU.reference())
    for name, kind in (("alice", "recipient"), ("owner", "signer")):
        assert motte("keys", "new", name, "--kind", kind, "--folder", tmp_path).code == 0
    return Place(tmp_path, motte)


@dataclass(frozen=True)
class Bundle:
    """A bundle of the net of :data:`MODEL`, with its keys, made by the library; ``layers`` run on the GPU."""

    path: Path
    recipient: RecipientPrivateKey
    signer: SignerPrivateKey
    graph: Graph
    plan: Plan

    def load(self, **options: Any) -> Any:
        import motte

        return motte.load(self.path, keys=self.recipient, signer=self.signer.public, timeout_s=60.0, **options)


def net() -> Any:
    found: dict[str, Any] = {"__name__": "net"}
    exec(MODEL, found)
    return found["net"]().eval()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``third`` and ``head`` on the GPU, the other layers inside."""
    captured = capture(net(), (torch.zeros(2, 3, 8, 8),), dims={"x": {0: "batch"}}, name="net")
    plan = plan_parts(captured.graph, parts=3, objective="memory", dims={"batch": 2})
    placement = choose_gpu_layers(captured.graph, ["third,head"])
    section = to_plan(None, placement, gpu_references=[confidential_gpu.planned_reference(GPU.reference())])
    plan = replace(plan, offload=section)
    path = tmp_path_factory.mktemp("gpu") / "net.motte"
    recipient, signer = RecipientPrivateKey.new(), SignerPrivateKey.new()
    seal_model(
        path,
        Manifest(captured.graph, plan, Signature("net", "random")),
        captured.weights,
        release=1,
        recipients=[recipient.public],
        signer=signer,
        run=terms_of(section),
    )
    return Bundle(path, recipient, signer, captured.graph, plan)


class Vm:
    """A worker behind ``unix:PATH``, one connection after the other, in a thread of this process."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.path, self._options = folder / "vm.sock", {"gpu": True, "kind": "vm", **options}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(4)
        self._listener.settimeout(0.05)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def options(self) -> dict[str, Any]:
        return {"enclave": "vm", "vm": f"unix:{self.path}"}

    @property
    def words(self) -> tuple[str, ...]:
        return "--enclave", "vm", "--vm", f"unix:{self.path}"

    def close(self) -> None:
        self._ended.set()
        self._thread.join(30)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        from motte.engines.torch_engine import TorchEngine

        while not self._ended.is_set():
            try:
                stream, _ = self._listener.accept()
            except TimeoutError:
                continue
            hello = {
                "protocol": PROTOCOL, "enclave": "vm", "simulated": True, "pid": os.getpid(), "engine": "torch",
                "engine_version": "0", "precision": "f32", "threads": 1,
                "hardening": harden.elsewhere("a test").to_json(),
                "seconds": {"import_engine": 0.0, "import_worker": 0.0},
            }  # fmt: skip
            link = Link(stream, peer="client")
            Worker(link, TorchEngine(), hello=hello, **self._options).serve()
            link.close()


@pytest.fixture
def start_vm(tmp_path: Path) -> Iterator[Callable[..., Vm]]:
    started: list[Vm] = []

    def start(**options: Any) -> Vm:
        started.append(Vm(tmp_path, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


def guest(report_data: bytes) -> Evidence:
    return GPU.machine.evidence(report_data)[0]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This machine's CPU does a proved GPU's work; the nodes that it did are listed."""
    nodes: list[str] = []
    runner = confidential_gpu._runner

    def noting(node: Any, device: Any, held: Any) -> Any:
        inner = runner(node, device, held)

        def run(*args: Any, **named: Any) -> Any:
            nodes.append(node.name)
            return inner(*args, **named)

        return run

    monkeypatch.setattr(confidential_gpu, "_runner", noting)
    monkeypatch.setattr(confidential_gpu, "_target", lambda gpu: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(nvml, "count_gpus", lambda: 1)
    monkeypatch.setattr(nvml, "read_gpu", GPU.answer)
    monkeypatch.setattr(worker_module, "issuer", lambda kind, host: guest)
    return nodes


PERMITTED = {"anchors": ANCHORS, "insecure_allow_simulated": True, "clock": lambda: make.NOW}


def prove_with(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    monkeypatch.setattr(confidential, "prove", partial(confidential.prove, **{**PERMITTED, **changed}))


def test_the_answer_is_that_of_everything_inside(
    bundle: Bundle, ran: list[str], start_vm: Callable[..., Vm], monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_with(monkeypatch)
    options = start_vm().options
    with torch.inference_mode():
        expected = net()(torch.from_numpy(X)).numpy()
    for mode in ({}, {"mode": "streamed", "weight_memory_bytes": 1 << 20, "dims": {"batch": 2}}):
        with bundle.load(**options, **mode) as model:
            for _ in range(2):
                # The same operations on the same numbers: the same bits.
                assert np.array_equal(model(X), expected)
            assert len(ran) == 4
            ran.clear()
            told = model.offload.gpu
            assert (told.layers, told.simulated, told.guest, told.gpu) == (("third", "head"), True, "snp", "GH100")


def test_from_the_option_to_an_answer_that_says_where_it_ran(
    place: Place, ran: list[str], start_vm: Callable[..., Vm], monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_with(monkeypatch)
    sealed = place.motte(*place.words("seal"), *place.keys, "-o", place.folder / "gpu.motte", *place.gpu)
    assert (sealed.code, "--enclave vm --vm ADDRESS" in sealed.err) == (0, True)
    words = (*place.run_words(place.folder / "gpu.motte"), *start_vm().words)
    found = place.motte(*words)
    assert found.code == 0, found.err
    line = next(line for line in found.out.splitlines() if "confidential GPU" in line)
    assert line.startswith("SIMULATED: inside, on a confidential GPU: 2 layers (third, head) on cuda:0; GH100, driver")
    assert f"driver {makers.DRIVER}, firmware {makers.VBIOS}, proved 2026-01-15T12:00:00+00:00 with its snp" in line
    assert "inside: all; nothing may leave" in found.out
    assert "--accelerator" not in found.err
    shown = place.motte(*words, "--json").json["offload"]
    assert (shown["gpu"]["layers"], shown["gpu"]["simulated"], shown["layers"]) == (["third", "head"], True, [])
    assert len(ran) == 8


def test_beside_layers_that_run_split(
    place: Place, ran: list[str], start_vm: Callable[..., Vm], monkeypatch: pytest.MonkeyPatch
) -> None:
    import motte
    from motte.accelerator.in_process import InProcessAccelerator

    prove_with(monkeypatch)
    scheme = ("--scheme", "asymmetric", "--noise", "none", "--public-weights")
    none_left = place.motte(*place.words("seal"), *place.keys, "-o", place.folder / "x", *scheme, "third", *place.gpu)
    assert (none_left.code, "no layer is left" in none_left.err) == (2, True)
    both = place.seal("both", *scheme, "second,third", "--rank", "fixed:2", *place.gpu)
    seen = place.motte("inspect", both, "--key", place.folder / "alice.key", "--json").json
    # What runs on the GPU is inside: its weight is not public.
    assert seen["public_weights"] == ["second.weight"]
    sides = {each["name"]: (each["side"], each["inside"]) for each in seen["offload"]["layers"]}
    assert sides == {
        "first": ("inside", True), "second": ("split", False), "third": ("confidential-gpu", True),
        "head": ("confidential-gpu", True),
    }  # fmt: skip
    keys = {"keys": place.folder / "alice.key", "signer": place.folder / "owner.pub"}
    with motte.load(both, **keys, **start_vm(accelerator=InProcessAccelerator).options) as model:
        answer = model.run([to_wire(X, where="x")])
    assert answer.outside is not None
    assert (answer.outside.layers, len(ran)) == (1, 2)
    assert model.offload is not None
    assert model.offload.gpu is not None
    with torch.inference_mode():
        expected = net()(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(np.frombuffer(answer.outputs[0].data, np.float32).reshape(2, 3), expected, atol=1e-5)


def test_a_bundle_that_lets_nothing_out_takes_no_accelerator(
    bundle: Bundle, ran: list[str], start_vm: Callable[..., Vm], monkeypatch: pytest.MonkeyPatch
) -> None:
    from motte.accelerator.in_process import InProcessAccelerator

    prove_with(monkeypatch)
    with pytest.raises(SettingError, match="lets nothing out"):
        bundle.load(**start_vm(accelerator=InProcessAccelerator).options)


def lies() -> dict[str, tuple[str, dict[str, Any]]]:
    old = GPU.answer(b"n" * 32)
    other = makers.Gpu(vendor="other")
    tampered = makers.Gpu(measurements={**makers.MEASUREMENTS, 1: b"\x09" * 48})
    tampered.__dict__["_made"] = GPU.chain()

    def absent(_: bytes) -> Any:
        raise ResourceError("NVIDIA's management library is missing", where=nvml.LIBRARY)

    def no_vm(_: bytes) -> Any:
        raise ResourceError("no report device")

    def debug(bound: bytes) -> Evidence:
        evidence: Evidence = GPU.machine.evidence(bound, at_0x08=0x30000 | 1 << 19)[0]
        return evidence

    return {
        "no GPU that can prove itself": ("U-1", {"ask": absent}),
        "no confidential VM": ("U-1", {"issue": no_vm}),
        "a report for an old nonce": ("V-9", {"ask": lambda nonce: old}),
        "a GPU of another vendor": ("V-4", {"ask": other.answer}),
        "a report that its guest does not vouch for": ("V-10", {"issue": lambda bound: guest(bytes(64))}),
        "other measurements than the owner's": ("V-11", {"ask": tampered.answer}),
        "a debug guest": ("P-6", {"issue": debug}),
        "SIMULATED, and nobody permits it": ("P-1", {"insecure_allow_simulated": False}),
        "the vendors' own roots, and no permission: as every worker asks": (
            "V-4",
            {"anchors": None, "insecure_allow_simulated": False},
        ),
        "certificates that have ended": ("V-5", {"clock": lambda: make.END + (make.END - make.NOW)}),
    }


@pytest.mark.parametrize("lie", lies())
def test_without_a_genuine_verdict_no_weight_is_opened(
    bundle: Bundle, ran: list[str], start_vm: Callable[..., Vm], monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    check, changed = lies()[lie]
    issue = changed.pop("issue", guest)
    monkeypatch.setattr(worker_module, "issuer", lambda kind, host: issue)
    monkeypatch.setattr(worker_module, "ResidentWeights", Opened)
    prove_with(monkeypatch, **changed)
    with pytest.raises(MotteError) as refused:
        bundle.load(**start_vm().options)
    assert refused.value.check == check
    assert ran == []
    if check == "U-1":
        assert "this machine cannot prove one" in str(refused.value)
        assert "confidential-computing mode" in str(refused.value.hint)


class Opened:
    def __init__(self, *arguments: Any, **named: Any) -> None:
        raise RuntimeError("a part was opened")


def test_one_of_several_gpus_is_refused_also_where_cuda_shows_one(
    bundle: Bundle, ran: list[str], start_vm: Callable[..., Vm], monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_with(monkeypatch)
    # CUDA may have been told to show one of them; the driver has two, and a report does not say of which it is.
    monkeypatch.setattr(nvml, "count_gpus", lambda: 2)
    with pytest.raises(UnsupportedError, match="one of several") as several:
        bundle.load(**start_vm().options)
    assert several.value.check == "U-6"


def test_the_driver_is_asked_how_many_gpus_it_has() -> None:
    class Planted:
        def __init__(self, status: int) -> None:
            self.open, self.status = 0, status

        def nvmlInit_v2(self) -> int:
            self.open += 1
            return 0

        def nvmlShutdown(self) -> int:
            self.open -= 1
            return 0

        def nvmlDeviceGetCount_v2(self, pointer: Any) -> int:
            pointer._obj.value = 3
            return self.status

    good, bad = Planted(0), Planted(9)
    assert (nvml.count_gpus(library=good), good.open) == (3, 0)
    with pytest.raises(ResourceError, match="the driver is not loaded"):
        nvml.count_gpus(library=bad)
    assert bad.open == 0


@pytest.mark.parametrize("kind", ["process", "gramine-sgx", "vm"])
def test_workers_that_were_not_started_for_a_gpu_refuse_by_name(
    bundle: Bundle, start_vm: Callable[..., Vm], kind: str
) -> None:
    quick = "torch" if find_spec("onnxruntime") is None else "onnxruntime"
    options = {"engine": quick, "threads": 1} if kind == "process" else start_vm(gpu=False, kind=kind).options
    with pytest.raises(UnsupportedError, match=rf"third, head.*kind {kind}, .*not started for a GPU") as refused:
        bundle.load(**options)
    assert refused.value.check == "U-1"
    assert "--enclave vm" in str(refused.value.hint)


IN_A_VM = """
import socket, subprocess, sys
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(sys.argv[1])
listener.listen(1)
print("listening", flush=True)
connection, _ = listener.accept()
command = [sys.executable, "-P", "-m", "motte.trusted", "--fd", "0", "--threads", "1", *sys.argv[2:]]
sys.exit(subprocess.run(command, stdin=connection, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode)
"""


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU, whose refusal says more")
def test_a_worker_started_for_a_gpu_that_is_not_there(bundle: Bundle, tmp_path: Path) -> None:
    words = ("--engine", "torch", "--enclave", "vm", "--gpu", "nvidia")
    at = tmp_path / "real.sock"
    with subprocess.Popen([sys.executable, "-c", IN_A_VM, at, *words], stdout=subprocess.PIPE, text=True) as vm:
        assert vm.stdout is not None
        assert vm.stdout.readline() == "listening\n"
        with pytest.raises(AttestationError, match="cannot prove one") as refused:
            bundle.load(enclave="vm", vm=f"unix:{at}")
        assert refused.value.check == "U-1"
        assert vm.wait(30) == 1
    for wrong in (("--engine", "torch", "--gpu", "nvidia"), ("--engine", "torch", "--enclave", "vm", "--gpu", "amd")):
        command = [sys.executable, "-P", "-m", "motte.trusted", "--fd", "0", "--threads", "1", *wrong]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "SettingError" in done.stderr


def test_the_signed_run_binds_layers_and_measurements(bundle: Bundle) -> None:
    with open_bundle(bundle.path, signer=bundle.signer.public) as signed:
        header = signed.header
    section = bundle.plan.offload
    assert section is not None
    terms = terms_of(section)
    assert header.run == terms
    assert (terms.scheme, terms.noise, terms.integrity) == ("trusted", None, "off")
    assert header.public_weights == ()
    other = replace(section.gpu_references[0], vbios="96.00.9F.00.02")
    layers = tuple(replace(each, side="inside") for each in section.layers)
    digests = {RunConfiguration.of(header).digest()}
    for changed in (replace(section, gpu_references=(other,)), replace(section, layers=layers), None):
        with pytest.raises(BundleError) as refused:
            check_terms(terms, changed)
        assert refused.value.check == "M-6"
        digests.add(RunConfiguration.of(replace(header, run=terms_of(changed))).digest())
    assert len(digests) == 4


def test_plans_show_it_as_inside(place: Place) -> None:
    plan = place.folder / "plan.txt"
    shown = place.motte(*place.words("plan"), "--gpu-layers", "s*,head", *place.rim, "-o", plan)
    assert shown.code == 0, shown.err
    assert "2 of 4 layers run on a confidential GPU" in shown.out
    assert "inside, GPU" in next(line for line in shown.out.splitlines() if line.startswith("head"))
    assert "inside, on a GPU that the worker's confidential VM proves: second, head" in shown.out
    assert f"(good: driver {makers.DRIVER}, firmware {makers.VBIOS})" in shown.out
    section = loads(plan.read_text()).offload
    assert section is not None
    assert (section.scheme, section.confidential_gpu) == ("trusted", ("second", "head"))
    sealed = place.motte(*place.words("seal", "--plan", plan), *place.keys, "-o", place.folder / "p.motte", "--json")
    assert sealed.code == 0, sealed.err
    assert sealed.json["offload"]["layers"][1]["side"] == "confidential-gpu"
    twice = place.motte(*place.words("seal", "--plan", plan), *place.keys, "-o", place.folder / "q.motte", *place.gpu)
    assert (twice.code, "the plan holds a scheme already" in twice.err) == (2, True)
    offload = ("--offload", "all", "--noise", "none", "--gpu-layers", "third", *place.rim)
    found = place.motte(*place.words("plan"), *offload, "--json")
    assert found.code == 0, found.err
    sides = {each["name"]: each["side"] for each in found.json["offload"]["layers"]}
    assert sides == {"first": "inside", "second": "split", "third": "confidential-gpu", "head": "inside"}
    third = found.json["work"]["layers"][2]
    assert (third["name"], third["side"], third["outside_forward"]) == ("third", "inside", 0)
    assert "gpu-reference" in found.json["plan"]


def test_a_worker_that_drives_a_gpu_says_what_does_not_hold_for_it() -> None:
    script = "from motte.trusted.harden import beside_driver; print(*beside_driver().lines(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for measure in ("Landlock", "seccomp"):
        assert f"not hardened: {measure}: it drives a GPU" in done.stdout


@pytest.mark.parametrize(
    ("layers", "files", "message"),
    [
        (["third"], None, "go together"),
        (None, ["rim.json"], "go together"),
        (["third"], ["model.py"], "reference"),
        (["third"], ["none.json"], "cannot read a file"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, layers: Any, files: Any, message: str) -> None:
    (tmp_path / "rim.json").write_bytes(GPU.reference())
    (tmp_path / "model.py").write_text(MODEL)
    options = GpuOptions(layers, None if files is None else [tmp_path / each for each in files])
    with pytest.raises(MotteError, match=message):
        options.references()


def test_layers_that_can_run_on_a_gpu(bundle: Bundle) -> None:
    every = choose_gpu_layers(bundle.graph, ["*"])
    # Nothing is taken apart there, so that a linear layer on one vector is one of them.
    assert every.confidential_gpu == ("first", "second", "third", "head")
    assert choose_gpu_layers(bundle.graph, ["second.weight", "t*"]).confidential_gpu == ("second", "third")
    for words, message in ((["fourth"], "no such layer"), (["norm"], "no such layer"), ([","], "no layer is named")):
        with pytest.raises(SettingError, match=message):
            choose_gpu_layers(bundle.graph, words)
    node = next(node for node in bundle.graph.nodes if node.op == "aten.conv2d.default")
    with pytest.raises(SettingError, match="in tiles"):
        choose_gpu_layers(bundle.graph, ["first"], tiles=[Tile(node.name, 2)])


def test_a_reference_comes_back_from_the_plan_as_it_was_stated() -> None:
    stated = GPU.reference()
    assert confidential_gpu.stated_reference(confidential_gpu.planned_reference(stated)) == stated
