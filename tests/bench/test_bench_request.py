"""What is refused before anything is built, and which cases are wanted; no model is built here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from motte.bench.case import Case
from motte.bench.inputs import InputSpec, make_inputs
from motte.bench.request import Request, cases_of
from motte.errors import InputError, MotteError, SettingError


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"modes": ("native", "fast")}, "--modes"),
        ({"modes": ()}, "--modes"),
        ({"models": ()}, "--model"),
        ({"models": ("resnet20", "resnet20-fashion-mnist")}, "--model"),
        ({"parts": (1, 0)}, "--parts"),
        ({"parts": (4, 4)}, "--parts"),
        ({"batches": (0,)}, "--batch"),
        ({"engines": ("tensorflow",)}, "--engine"),
        ({"enclaves": ("castle",)}, "--enclave"),
        ({"enclaves": ("gramine-direct",)}, "--image"),
        ({"vm": "unix:/run/vm.sock"}, "--vm"),
        ({"cuts": "evenly"}, "--cuts"),
        ({"repeats": 4}, "--repeats"),
        ({"threads": 0}, "--threads"),
        ({"seed": -1}, "--seed"),
        ({"noise": "loud"}, "noise"),
        ({"rank": "fixed:many"}, "rank"),
        ({"integrity": "on"}, "--integrity"),
        ({"layers": ("",)}, "--layers"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], where: str) -> None:
    with pytest.raises(SettingError) as found:
        Request(**{"verb": "infer", "models": ("resnet20",), **wrong})
    assert found.value.where == where


@pytest.mark.parametrize("name", ["no_such_model", "/no/such/file.py:net"])
def test_an_unknown_model_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        Request(verb="infer", models=("alexnet", name))


def test_the_cases_of_a_request_and_those_that_cannot_be() -> None:
    request = Request(
        verb="infer",
        models=("alexnet",),
        modes=("asymmetric", "streamed", "native", "resident", "accelerator"),
        parts=(1, 12, 6),
        engines=("torch", "onnxruntime"),
        cuts="published",
    )
    wanted, refused = cases_of(request, "alexnet", 8)
    # Native and accelerator are never cut, and nothing trusted runs there.
    whole = [case for case in wanted if case.mode in ("native", "accelerator")]
    assert {(case.parts, case.enclave) for case in whole} == {(1, "none")}
    assert wanted[0] == Case(model="alexnet", mode="native", parts=1, batch=8, engine="torch", enclave="none")
    assert [case.parts for case in wanted if (case.mode, case.engine) == ("resident", "torch")] == [1, 12]
    assert all(case.engine == "torch" for case in wanted if case.mode in ("asymmetric", "accelerator"))
    why = {(each.case.mode, each.case.parts, each.case.engine): each.why for each in refused}
    assert "12 parts" in why["resident", 6, "torch"]
    assert "resident" in why["streamed", 1, "torch"]
    assert "torch" in why["asymmetric", 12, "onnxruntime"]
    assert "torch" in why["accelerator", 1, "onnxruntime"]
    every = [*wanted, *(each.case for each in refused)]
    assert len(set(every)) == len(every) == 2 * (1 + 3 + 3 + 3 + 1)


def test_inputs_are_the_same_everywhere() -> None:
    specs = (InputSpec("x", "f32", (2, 3)), InputSpec("mask", "i64", (2, 4)))
    one, two, other = make_inputs(specs, 5), make_inputs(specs, 5), make_inputs(specs, 6)
    assert one["x"].tobytes() == two["x"].tobytes() != other["x"].tobytes()
    assert one["x"].dtype == "float32"
    assert one["mask"].tolist() == [[1] * 4] * 2
    one["x"][0, 0] = 1.0  # engines want memory that may be written to


def test_bundles_are_never_mixed_up(tmp_path: Path) -> None:
    """Whatever a bundle is made from is in its name."""
    from motte.bench.bundles import Bundles

    def names(**others: Any) -> str:
        request = Request(**{"verb": "infer", "models": ("alexnet",), "bundles": tmp_path, **others})
        with Bundles(request) as bundles:
            return bundles._digest("alexnet", 4, "asymmetric")

    base = names()
    assert names() == base
    ways: list[dict[str, Any]] = [
        {"random_weights": True},
        {"cuts": "memory"},
        {"engines": ("onnxruntime",)},
        {"rank": "fixed:2"},
        {"layers": ("features.3",)},
        {"integrity": "off"},
        {"noise": "gaussian:1.0,0.5"},
    ]
    assert len({base, *(names(**way) for way in ways)}) == 1 + len(ways)


def test_the_keys_of_kept_bundles_are_private_and_stay(tmp_path: Path) -> None:
    from motte.bench.bundles import Bundles

    request = Request(verb="infer", models=("alexnet",), bundles=tmp_path / "kept")
    with Bundles(request):
        key = tmp_path / "kept" / "bench-recipient.key"
        first = key.read_bytes()
        assert key.stat().st_mode & 0o077 == 0
    with Bundles(request):
        assert key.read_bytes() == first
    key.chmod(0o644)
    with pytest.raises(MotteError):
        Bundles(request)
