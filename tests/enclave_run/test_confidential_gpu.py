"""cuda counts as inside only by a verdict about this process's own GPU; synthetic evidence under test roots."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from motte.attest.policy import AllOf, InsecureAllowSimulated, NotDebug, Platform, Policy
from motte.attest.report_data import Binding
from motte.attest.verify import Verdict, verify
from motte.errors import AttestationError, MotteError, SettingError, UnsupportedError
from motte.offload import confidential_gpu
from motte.offload.confidential_gpu import ConfidentialGpu, ProvedGpu, gpu_runners, require_proved
from motte.offload.graph_layers import choose_gpu_layers, gpu_nodes, split_nodes
from motte.offload.placement import Placed, Placement, from_plan, place_on_gpu, to_plan
from motte.offload.settings import Asymmetric
from motte.plan.plan import Plan
from motte.plan.text import dumps, loads

torch = pytest.importorskip("torch")
make: Any = importlib.import_module("attest_makers.certificate_maker")
GPU: Any = importlib.import_module("attest_makers.nvidia_maker").Gpu()
NOW = make.NOW
BINDING = Binding(nonce=b"n" * 32, public_key=b"k" * 32, tls_spki_digest=b"", configuration_digest=b"c" * 32)
OTHER = replace(BINDING, nonce=b"m" * 32)
SECTION = to_plan(
    Asymmetric(noise=None),
    Placement(
        (Placed("a", "inside", "first"), Placed("b", "confidential-gpu", "named"), Placed("c", "split", "named"))
    ),
)


def verdict(*, measured: bool = True, binding: Binding | None = BINDING, policy: Policy | None = None) -> Verdict:
    evidence, anchors = GPU.evidence(BINDING.report_data(), measured=measured)
    asked = AllOf(InsecureAllowSimulated(), policy or NotDebug())
    return verify(evidence, asked, NOW, anchors=anchors, binding=binding)


GOOD = verdict()


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def proved(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> ProvedGpu:
    """A proved GPU whose work this machine's CPU does."""
    monkeypatch.setattr(confidential_gpu, "_target", lambda gpu: torch.device("cpu"))
    return ProvedGpu(verdict=GOOD, binding=BINDING, now=NOW, insecure_allow_simulated=True)


def lies() -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
    guest, anchors = GPU.machine.evidence(BINDING.report_data())
    alone = verify(guest, AllOf(InsecureAllowSimulated(), Platform(frozenset({"snp"}))), NOW, anchors=anchors)
    unmeasured = verdict(measured=False, policy=Platform(frozenset({"nvidia"})))
    of_debug = replace(GOOD, claims=replace(GOOD.claims, debug=True))
    without_guest = replace(GOOD, claims=replace(GOOD.claims, details={}))
    return {
        "no verdict": ("U-1", lambda: {"verdict": None}),
        "claims in place of a verdict": ("U-1", lambda: {"verdict": GOOD.claims}),
        "a guest without a GPU": ("U-1", lambda: {"verdict": alone}),
        "a GPU without a guest": ("U-1", lambda: {"verdict": without_guest}),
        "evidence of another process": ("U-2", lambda: {"binding": OTHER}),
        "evidence that was compared with nothing": ("U-2", lambda: {"verdict": verdict(binding=None)}),
        "a GPU without a reference": ("U-3", lambda: {"verdict": unmeasured}),
        "a debug guest": ("U-3", lambda: {"verdict": of_debug}),
        "an old verdict": ("U-4", lambda: {"now": NOW + timedelta(seconds=3601)}),
        "older than asked": ("U-4", lambda: {"now": NOW + timedelta(seconds=61), "max_age_s": 60.0}),
        "a verdict of tomorrow": ("U-4", lambda: {"now": NOW - timedelta(seconds=1)}),
        "any age": ("U-4", lambda: {"max_age_s": 1e9}),
        "no age": ("U-4", lambda: {"max_age_s": float("nan")}),
        "simulated": ("U-5", lambda: {"insecure_allow_simulated": False}),
        "simulated, nearly permitted": ("U-5", lambda: {"insecure_allow_simulated": 1}),
    }


@pytest.mark.parametrize("lie", lies())
def test_each_lie_meets_its_check(one_gpu: None, lie: str) -> None:
    check, changes = lies()[lie]
    given = {"verdict": GOOD, "binding": BINDING, "now": NOW, "insecure_allow_simulated": True, **changes()}
    with pytest.raises(AttestationError) as caught:
        ProvedGpu(**given)
    assert caught.value.check == check


@pytest.mark.parametrize("count", [0, 2])
def test_one_of_several_gpus_is_not_proved(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UnsupportedError) as caught:
        ProvedGpu(verdict=GOOD, binding=BINDING, now=NOW, insecure_allow_simulated=True)
    assert caught.value.check == "U-6"


def test_a_plan_states_the_side_and_nobody_runs_it_unproved(proved: ProvedGpu) -> None:
    text = dumps(Plan("01" * 32, "memory", (), (), offload=SECTION))
    assert "layer b confidential-gpu named\n" in text
    read = loads(text).offload
    assert read == SECTION
    assert (SECTION.split, SECTION.inside, SECTION.confidential_gpu) == (("c",), ("a",), ("b",))
    with pytest.raises(AttestationError) as caught:
        from_plan(SECTION)
    assert (caught.value.check, "b" in str(caught.value.got)) == ("U-1", True)
    scheme, placement = from_plan(SECTION, gpu=proved)
    # What is on the trusted side's GPU never leaves.
    assert (scheme.offloaded_layers, scheme.trusted_layers) == (("c",), ("a", "b"))
    assert place_on_gpu(replace_sides(placement), ("b",)) == Placement(
        tuple(replace(each, reason="named for the confidential GPU") if each.name == "b" else each
              for each in placement.layers)
    )  # fmt: skip
    with pytest.raises(SettingError, match="no such layer"):
        place_on_gpu(placement, ("z",))


def replace_sides(placement: Placement) -> Placement:
    return Placement(tuple(replace(each, side="inside") if each.name == "b" else each for each in placement.layers))


def test_a_worker_refuses_such_a_bundle_before_anything_is_sent(proved: ProvedGpu) -> None:
    """What a worker asks when it opens a bundle: the nodes that leave, with the placement as it was sealed."""
    import motte

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3, padding=1))
    graph = motte.capture_model(model.eval(), (torch.zeros(1, 3, 8, 8),), name="two").graph
    layers = Placement((Placed("0", "inside", "first"), Placed("2", "confidential-gpu", "named")))
    section = to_plan(Asymmetric(noise=None), layers)
    for ask in (lambda: split_nodes(graph, section, ()), lambda: gpu_nodes(graph, section, None)):
        with pytest.raises(AttestationError) as caught:
            ask()
        assert caught.value.check == "U-1"
    assert split_nodes(graph, section, (), gpu=proved) == ()
    (node,) = gpu_nodes(graph, section, proved)
    conv: Any = model[2]
    x = torch.randn(2, 4, 6, 6)
    weight = conv.weight.detach().clone()
    run = gpu_runners((node,), proved)[node.name]
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(run(x, weight, conv.bias, [1, 1], [1, 1]), conv(x))
            # A streamed worker overwrites it when it has run; what runs there later has its own copy.
            weight.zero_()
    with pytest.raises(AttestationError) as unproved:
        gpu_runners((node,), None)  # type: ignore[arg-type]
    assert unproved.value.check == "U-1"
    gone = to_plan(Asymmetric(noise=None), Placement((Placed("9", "confidential-gpu", "named"),)))
    with pytest.raises(MotteError) as missing:
        gpu_nodes(graph, gone, proved)
    assert missing.value.check == "M-4"


def network() -> Any:
    torch.manual_seed(3)
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    return torch.nn.Sequential(*layers)


def test_protect_runs_layers_there_and_computes_the_same(proved: ProvedGpu) -> None:
    import motte

    plain, x = network(), torch.randn(2, 3, 8, 8)
    model: Any = motte.protect(plain, ConfidentialGpu(), gpu=proved)
    assert [(each.name, each.side) for each in model.motte_layers] == [
        ("0", "confidential-gpu"),
        ("3", "confidential-gpu"),
    ]
    assert all("SIMULATED" in each.reason for each in model.motte_layers)
    assert list(model.state_dict()) == list(plain.state_dict())
    gradients = []
    for each in (plain, model):
        each.zero_grad()
        each(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in plain.parameters()])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)
    some: Any = motte.protect(network(), ConfidentialGpu(layers=("3",)), gpu=proved)
    assert [each.side for each in some.motte_layers] == ["inside", "confidential-gpu"]


def test_protect_refuses_what_is_not_proved(proved: ProvedGpu) -> None:
    import motte

    for gpu in (None, GOOD, "cuda:0", True):
        with pytest.raises(AttestationError) as caught:
            motte.protect(network(), ConfidentialGpu(), gpu=gpu)  # type: ignore[arg-type]
        assert caught.value.check == "U-1"
        with pytest.raises(AttestationError):
            require_proved(("a",), gpu, where="test")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="takes no accelerator"):
        motte.protect(network(), ConfidentialGpu(), gpu=proved, accelerator="unix:/a")
    with pytest.raises(SettingError, match="only ConfidentialGpu"):
        motte.protect(network(), motte.LowRank(), gpu=proved)
    for layers in (("1",), ("9",)):
        with pytest.raises(SettingError, match="no convolution or linear layer"):
            motte.protect(network(), ConfidentialGpu(layers=layers), gpu=proved)
    with pytest.raises(SettingError, match="sequence"):
        ConfidentialGpu(layers="3")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_a_real_gpu_the_same_comes_out(one_gpu: None) -> None:
    import motte

    gpu = ProvedGpu(verdict=GOOD, binding=BINDING, now=NOW, insecure_allow_simulated=True)
    plain, x = network(), torch.randn(2, 3, 8, 8)
    model = motte.protect(plain, ConfidentialGpu(), gpu=gpu)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_layers_of_a_bundle_on_a_real_gpu_are_computed_in_full(one_gpu: None) -> None:
    import motte
    from motte.engines.torch_engine import TorchEngine

    gpu = ProvedGpu(verdict=GOOD, binding=BINDING, now=NOW, insecure_allow_simulated=True)
    model = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(2048, 5))
    x = torch.randn(2, 32, 8, 8)
    graph = motte.capture_model(model.eval(), (x,), name="two").graph
    section = to_plan(None, choose_gpu_layers(graph, ["*"]))
    runners = gpu_runners(gpu_nodes(graph, section, gpu), gpu)
    engine = TorchEngine()
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    found = engine.compile(graph, runners=runners).run([x], weights, {dim.name: 2 for dim in graph.dims})[0]
    with torch.inference_mode():
        # TF32 would be off by a thousandth.
        torch.testing.assert_close(found, model(x), rtol=5e-5, atol=5e-5)
