"""Workloads: the same inputs on every machine, in memory before a clock runs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from motte.errors import InputError, ResourceError, SettingError
from motte.measure.compare import compare
from motte.measure.workloads import Arrays, ArraySpec, Workload, image_workload, random_workload
from motte.zoo.shipped_models import folder

SPECS = {"x": ArraySpec("float32", (2, 3, 4)), "mask": ArraySpec("int64", (2, 5)), "bias": ArraySpec("float16", (2,))}


def decode(data: bytes) -> Arrays:
    with Image.open(io.BytesIO(data)) as image:
        return {"image": np.asarray(image, dtype=np.float32)[None] / 255}


def test_a_seed_names_the_inputs() -> None:
    one, same, other = (random_workload(SPECS, seed=seed, requests=3) for seed in (7, 7, 8))
    assert one.digest == same.digest
    assert one.digest != other.digest
    # The digest of one fixed workload: another numpy, or another order of draws, would measure other inputs.
    assert (
        random_workload({"x": ArraySpec("float32", (2, 2))}, seed=0).digest
        == "bc5cc39fdeee5139d6f6d9327e830a970ab51cb03e7bfab419423d2c9c130113"
    )
    assert one.request(3) is one.requests[0]
    assert not np.array_equal(one.request(0)["x"], one.request(1)["x"])
    assert (one.request(0)["mask"] == 1).all()
    assert one.request(0)["bias"].dtype == np.float16
    assert one.parameters() == {"workload": "random", "workload_seed": 7, "workload_sha256": one.digest}


def test_a_request_cannot_be_changed_by_what_it_is_given_to() -> None:
    array = random_workload(SPECS).request(0)["x"]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_the_shipped_images_are_real_and_have_classes() -> None:
    paths = sorted(folder().glob("*.png"))
    labels = [int(path.name[0]) for path in paths]
    found = image_workload(paths, decode, batch=4, labels=labels)
    assert [request["image"].shape[0] for request in found.requests] == [4, 4]
    assert found.labels == ((0, 1, 2, 3), (4, 5, 6, 7)), "a rest that fills no batch is left out"
    assert found.digest == image_workload(paths, decode, batch=4).digest
    assert found.parameters() == {"workload": "images", "workload_sha256": found.digest}


def test_no_latency_begins_before_its_input_was_read(tmp_path: Path) -> None:
    # A clock that stands still but while a file is read or decoded: in the earlier work both were "inference time".
    now = [0]
    path = tmp_path / "image.png"
    path.write_bytes((folder() / "0_t-shirt-top.png").read_bytes())

    def slow(data: bytes) -> Arrays:
        now[0] += 10**12
        return decode(data)

    def run(index: int) -> float:
        now[0] += 1000
        return float(workload.request(index)["image"].sum())

    workload = image_workload([path], slow)
    path.unlink()  # whatever reads it from here on fails
    found = compare({"a": lambda: run(0), "b": lambda: run(1)}, warmup=1, repeats=5, now=lambda: now[0])
    assert found["a"].samples == (1e-6,) * 5
    assert now[0] == 10**12 + 12 * 1000, "decoded once, before any request"


def test_what_makes_no_workload_is_refused(tmp_path: Path) -> None:
    for make in (
        lambda: random_workload({}),
        lambda: random_workload(SPECS, seed=-1),
        lambda: random_workload(SPECS, requests=0),
        lambda: random_workload({"x": ArraySpec("text", (1,))}),
        lambda: random_workload({"x": ArraySpec("object", (1,))}),
        lambda: random_workload({"x": ArraySpec("float32", (1 << 20, 1 << 20))}),
        lambda: Workload("photos", None, ({},)),
        lambda: Workload("random", 0, ({},), labels=((1,), (2,))),
        lambda: image_workload([tmp_path], decode, labels=[1, 2]),
    ):
        with pytest.raises(SettingError):
            make()
    with pytest.raises(InputError):
        image_workload([], decode)
    with pytest.raises(ResourceError):
        image_workload([tmp_path / "nothing.png"], decode)
