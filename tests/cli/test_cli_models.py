"""plan, seal and run on a small model of one's own: results, refusals, purity of stdout."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import motte as motte_package
from motte.plan.text import loads as read_plan

SIMULATED = "SIMULATED: no hardware protection"


# --- plan -----------------------------------------------------------------------------------------------------------
def test_a_plan_is_shown_written_and_read_again(motte: Any, place: Any, tmp_path: Path) -> None:
    file = tmp_path / "plan.txt"
    made = motte("plan", place.model, "--parts", "3", "--objective", "weights", "--batch", "2", "-o", file)
    assert made.code == 0
    lines = made.out.splitlines()
    assert lines[0].startswith("own.net: 3 parts by weights, batch 2")
    assert lines[1].split() == ["part", "ends", "after", "ops", "weights", "peak", "act.", "FLOPs", "boundary"]
    assert max(len(line) for line in lines) <= 80
    assert "built" not in made.out, "what the model printed belongs on stderr"
    assert "built" in made.err
    assert read_plan(file.read_text()).parts == 3
    before = file.read_bytes()
    assert motte("plan", place.model, "--parts", "2", "-o", file).code == 2
    assert file.read_bytes() == before
    assert motte("plan", place.model, "--parts", "2", "-o", file, "--overwrite").code == 0
    assert read_plan(file.read_text()).parts == 2


def test_a_plan_as_json(motte: Any, place: Any) -> None:
    made = motte("plan", place.model, "--max-part-memory", "64KiB", "--json").json
    assert made["model"] == "own.net"
    assert made["weights_origin"] == "file"
    assert read_plan(made["plan"]).parts == len(made["parts"])
    assert sum(part["ops"] for part in made["parts"]) == made["totals"]["ops"]
    assert made["dims"] == {"batch": 1}


@pytest.mark.parametrize(
    "words",
    [
        ["--parts", "2", "--objective", "time"],
        ["--parts", "2", "--objective", "boundary"],
        ["--weight-memory", "64KiB"],
        ["--cut-after", "first,second"],
        ["--cut-after", "first", "--cut-after", "second"],
    ],
)
def test_every_way_to_cut(motte: Any, place: Any, words: list[str]) -> None:
    made = motte("plan", place.model, *words, "--json", "--quiet")
    assert made.code == 0, made.err
    assert made.json["parts"]


def test_random_weights_are_repeated(motte: Any, place: Any) -> None:
    made = motte("plan", place.model, "--random-weights", "--parts", "2")
    assert "RANDOM WEIGHTS" in made.out
    assert "warning: the weights are random" in made.err
    assert motte("plan", place.model, "--random-weights", "--parts", "2", "--json").json["weights_origin"] == "random"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["--parts", "2", "--cut-after", "first"], 2),
        (["--weight-memory", "1MiB", "--objective", "weights"], 2),
        (["--max-part-memory", "1MiB", "--objective", "time"], 2),
        (["--parts", "2", "--dim", "sequence=4"], 2),
        (["--cuts", "published"], 2),
        (["--parts", "2", "--weights", "nowhere.safetensors"], 2),
        (["--parts", "2", "--weights", "x", "--random-weights"], 2),
        (["--parts", "2", "--published", "A", "--random-weights"], 2),
        (["--parts", "4000"], 1),
        (["--max-part-memory", "1KiB"], 1),
        (["--cut-after", "third"], 1),
    ],
)
def test_a_plan_that_cannot_be_made(motte: Any, place: Any, words: list[str], code: int) -> None:
    refused = motte("plan", place.model, *words)
    assert refused.code == code
    assert refused.out == ""
    assert "error: " in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.parametrize(("factory", "code"), [("broken", 2), ("nothing", 2), ("sized", 1)])
def test_a_model_that_cannot_be_taken(motte: Any, place: Any, factory: str, code: int) -> None:
    refused = motte("plan", place.model.replace(":net", f":{factory}"), "--parts", "2", "--json")
    assert refused.code == code
    assert refused.json["error"]["message"]


# --- seal -----------------------------------------------------------------------------------------------------------
def test_a_seal_says_what_it_did(motte: Any, place: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "new.motte"
    words = ("--parts", "2", "--release", "5", "--public-weights", "head.bias", "-o", bundle)
    made = motte("seal", place.model, *place.seal_keys, *words)
    assert made.code == 0, made.err
    assert "check: bit for bit equal to the whole" in made.out
    assert made.out.count("part ") >= 2
    assert "run it with: motte run" in made.err
    seen = motte("inspect", bundle, "--json").json
    assert (seen["release"], seen["public_weights"], seen["parts"]) == (5, ["head.bias"], 2)
    again = motte("seal", place.model, *place.seal_keys, "--lower", "off", *words)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert "built" not in again.err, "refused before the model is built"
    replaced = motte(
        "seal",
        place.model,
        *place.seal_keys,
        "--lower",
        "off",
        *words,
        "--overwrite",
        "--skip-check",
        "--json",
        "--quiet",
    )
    assert replaced.code == 0
    assert replaced.json["check"].startswith("not compared")
    assert replaced.json["bundle_id"] != seen["bundle_id"]
    assert [path.name for path in tmp_path.iterdir()] == ["new.motte"]


def test_a_plan_file_is_used(motte: Any, place: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.txt"
    assert motte("plan", place.model, "--cut-after", "first", "-o", plan, "-q").code == 0
    made = motte(
        "seal", place.model, *place.seal_keys, "--lower", "off", "--plan", plan, "-o", tmp_path / "a.motte", "--json"
    )
    assert made.json["objective"] == "chosen"
    assert len(made.json["sections"]) == 3

    other = tmp_path / "other.py"
    other.write_text(Path(place.model.partition(":")[0]).read_text().replace("width=4", "width=5"))
    refused = motte("seal", f"{other}:net", *place.seal_keys, "--plan", plan, "-o", tmp_path / "b.motte")
    assert refused.code == 1, "a plan of another model"
    plan.write_text(plan.read_text() + "more\n")
    refused = motte(
        "seal", place.model, *place.seal_keys, "--lower", "off", "--plan", plan, "-o", tmp_path / "b.motte", "--json"
    )
    assert refused.code == 1
    assert refused.json["error"]["kind"] == "FormatError"
    gone = motte(
        "seal",
        place.model,
        *place.seal_keys,
        "--lower",
        "off",
        "--plan",
        tmp_path / "no.txt",
        "-o",
        tmp_path / "b.motte",
    )
    assert gone.code == 2
    assert not (tmp_path / "b.motte").exists()


def test_a_tiled_model_is_checked_to_its_tolerance(motte: Any, place: Any, tmp_path: Path) -> None:
    # The second convolution, 4 x 4 x 3 x 3 floats and a bias, is above a third of the bound.
    made = motte(
        "seal",
        place.model,
        *place.seal_keys,
        "--lower",
        "off",
        "--weight-memory",
        "5400B",
        "-o",
        tmp_path / "tiled.motte",
        "--json",
    )
    assert made.code == 0, made.err
    assert made.json["check"].startswith("tiled: within ")


def test_a_weight_that_is_not_there_cannot_be_public(motte: Any, place: Any, tmp_path: Path) -> None:
    words = ("--parts", "2", "--public-weights", "no.such", "-o", tmp_path / "x.motte")
    refused = motte("seal", place.model, *place.seal_keys, "--lower", "off", *words)
    assert refused.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_mismatch_writes_nothing(motte: Any, place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from motte.split import oracle

    whole = oracle.run_parts

    def lying(*arguments: Any) -> list[Any]:
        return [output + 1 for output in whole(*arguments)]

    monkeypatch.setattr(oracle, "run_parts", lying)
    refused = motte(
        "seal", place.model, *place.seal_keys, "--lower", "off", "--parts", "2", "-o", tmp_path / "x.motte", "--json"
    )
    assert refused.code == 1
    assert refused.json["error"]["kind"] == "MismatchError"
    assert list(tmp_path.iterdir()) == []


# --- run ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reference(place: Any) -> dict[str, float]:
    """The probability of each label for the photo, from the unsplit model and none of our answers' code."""
    import importlib.util

    import torch
    from PIL import Image

    spec = importlib.util.spec_from_file_location("own_for_reference", place.model.partition(":")[0])
    assert spec is not None
    assert spec.loader is not None
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    # Shorter side 12 -> 8, longer 16 -> 10 (whole pixels), then the middle 8 x 8.
    image = Image.open(place.photo).convert("RGB").resize((10, 8), Image.Resampling.BILINEAR).crop((1, 0, 9, 8))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        probabilities = own.net().eval()(((pixels - 0.5) / 0.25)[None]).softmax(1)[0]
    return dict(zip(own.labels, probabilities.tolist(), strict=True))


def test_a_run_answers_and_says_where_time_and_memory_went(motte: Any, place: Any, reference: Any) -> None:
    done = motte("run", place.bundle, *place.run_keys, "--input", place.photo, "--threads", "1", "--repeat", "3")
    assert done.code == 0, done.err
    best = max(reference, key=reference.get)
    assert f"{100 * reference[best]:.1f} %" in done.out
    assert done.out.index(best) == min(done.out.index(label) for label in reference)
    for words in ("read header", "start worker", "key release", "first inference", "median of 3 more runs", "->"):
        assert words in done.out
    assert SIMULATED in done.out
    assert done.err.count(SIMULATED) == 1, "once, and on stderr too"
    assert max(len(line) for line in done.out.splitlines()) <= 80


def test_a_run_as_json(motte: Any, place: Any, reference: Any) -> None:
    words = (
        "--input",
        place.photo,
        "--input",
        place.photo,
        "--topk",
        "2",
        "--threads",
        "1",
        "--repeat",
        "2",
        "--batch",
        "2",
    )
    done = motte("run", place.bundle, *place.run_keys, *words, "--json", "--quiet", "--verify-digests")
    assert done.code == 0, done.err
    document = done.json
    assert [answer["input"] for answer in document["answers"]] == ["photo.png", "photo.png"]
    for answer in document["answers"]:
        assert len(answer["top"]) == 2
        for ranked in answer["top"]:
            assert ranked["probability"] == pytest.approx(reference[ranked["label"]], abs=1e-4)
    assert (document["simulated"], document["protection"], document["parts"]) == (True, SIMULATED, 3)
    names = [segment["name"] for segment in document["segments"]]
    assert names[:3] == ["read header", "start worker", "key release"]
    assert names[-1] == "first inference"
    assert all(segment["since"] and segment["until"] and segment["seconds"] >= 0 for segment in document["segments"])
    assert (document["steady"]["batch"], document["steady"]["runs"]) == (2, 2)
    assert document["memory"]["weight_arena_bytes"] > 0
    assert document["activation_peak_bytes"] > 0
    assert done.err == f"warning: {SIMULATED} (enclave kind: process)\n"


@pytest.mark.slow
def test_engines_pools_and_what_they_refuse(motte: Any, place: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(3).standard_normal((1, 3, 8, 8), dtype=np.float32))
    words = ("--input", tmp_path / "x.npy", "--threads", "1", "--repeat", "0", "--json", "-q")
    torch = motte("run", place.bundle, *place.run_keys, *words, "--engine", "torch")
    auto = motte("run", place.bundle, *place.run_keys, *words)
    pooled = motte("run", place.bundle, *place.run_keys, *words, "--pool", "1")
    assert (torch.code, auto.code, pooled.code) == (0, 0, 0), torch.err + auto.err + pooled.err
    assert [each.json["engine"]["name"] for each in (torch, auto, pooled)] == ["torch", "onnxruntime", "onnxruntime"]
    assert auto.json["engine"]["difference"] < 1e-4
    assert torch.json["engine"]["difference"] is None
    assert auto.json["answers"] == pooled.json["answers"]
    names = [segment["name"] for segment in pooled.json["segments"]]
    assert "start worker" in [segment["name"] for segment in auto.json["segments"]]
    assert "start worker" not in names
    for wrong, said in (
        (("--precision", "bf16"), "only openvino computes in bf16"),
        (("--pool", "1", "--accelerator", "local"), "started without an accelerator"),
        (("--engine", "openvino", "--precision", "bf16"), "bf16"),
    ):
        refused = motte("run", place.bundle, *place.run_keys, *words, *wrong)
        assert refused.code != 0
        assert said in refused.json["error"]["message"] + str(refused.json["error"])


def test_streamed_answers_as_resident(motte: Any, place: Any, tmp_path: Path) -> None:
    array = np.random.default_rng(3).standard_normal((3, 3, 8, 8), dtype=np.float32)
    np.save(tmp_path / "x.npy", array)
    # Other engines join the parts of a resident bundle, and so round otherwise than part by part.
    words = ("--input", tmp_path / "x.npy", "--engine", "torch", "--threads", "1", "--repeat", "0", "--json", "-q")
    resident = motte("run", place.bundle, *place.run_keys, *words, "--out", tmp_path / "a.npy")
    bound = ("--mode", "streamed", "--weight-memory", "64KiB", "--batch", "3")
    streamed = motte("run", place.bundle, *place.run_keys, *words, *bound, "--out", tmp_path / "b.npy")
    assert (resident.code, streamed.code) == (0, 0), resident.err + streamed.err
    assert resident.json["answers"] == streamed.json["answers"]
    assert [answer["input"] for answer in streamed.json["answers"]] == ["x.npy[0]", "x.npy[1]", "x.npy[2]"]
    assert streamed.json["steady"] == {"batch": 3, "runs": 0, "median_seconds": None, "seconds": []}
    first, second = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert first.shape == (3, 3)
    assert np.array_equal(first, second)


@pytest.mark.slow
def test_random_weights_are_said_with_every_answer(motte: Any, place: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "random.motte"
    words = ("--random-weights", "--parts", "2", "-o", bundle)
    sealed = motte("seal", place.model, *place.seal_keys, "--lower", "off", *words)
    assert "RANDOM WEIGHTS" in sealed.out
    run = ("run", bundle, *place.run_keys, "--input", place.photo, "--threads", "1", "--repeat", "0", "-q")
    done = motte(*run)
    assert "RANDOM WEIGHTS" in done.out
    assert "warning: the weights are random" in done.err
    document = motte(*run, "--json").json
    assert document["weights_origin"] == "random"
    assert all(answer["warning"] for answer in document["answers"])


@pytest.mark.parametrize("place_of_flip", [200, -20])
def test_a_tampered_bundle_gives_no_answer(motte: Any, place: Any, tmp_path: Path, place_of_flip: int) -> None:
    bundle = tmp_path / "tampered.motte"
    data = bytearray(place.bundle.read_bytes())
    data[place_of_flip] ^= 1
    bundle.write_bytes(data)
    saved = tmp_path / "answer.npy"
    words = ("--input", place.photo, "--threads", "1", "--out", saved)
    refused = motte("run", bundle, *place.run_keys, *words, "--json")
    assert refused.code == 1
    assert set(refused.json) == {"error"}
    assert refused.json["error"]["kind"] in ("SignatureError", "DecryptError")
    assert refused.json["error"]["check"].startswith("B-")
    assert not saved.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["--min-release", "2"], 1, "RollbackError"),
        (["--mode", "streamed"], 2, "SettingError"),
        (["--mode", "streamed", "--weight-memory", "4KiB"], 1, "ResourceError"),
        (["--timeout", "0"], 2, "SettingError"),
        (["--text", "words"], 2, "SettingError"),
        (["--text", "notes.txt"], 2, "SettingError"),
        (["--input", "nowhere.png"], 2, "InputError"),
        (["--input", "CLIENT.pub"], 2, "InputError"),
    ],
)
def test_a_run_that_is_refused(motte: Any, place: Any, words: list[str], code: int, kind: str) -> None:
    words = [word.replace("CLIENT", str(place.folder / "client")) for word in words]
    refused = motte("run", place.bundle, *place.run_keys, "--input", place.photo, "--threads", "1", *words, "--json")
    assert refused.code == code, refused.err
    assert refused.json["error"]["kind"] == kind


def test_a_run_needs_an_input_and_leaves_files_alone(motte: Any, place: Any, tmp_path: Path) -> None:
    assert motte("run", place.bundle, *place.run_keys).code == 2
    kept = tmp_path / "kept.npy"
    kept.write_bytes(b"kept")
    refused = motte("run", place.bundle, *place.run_keys, "--input", place.photo, "--out", kept)
    assert refused.code == 2
    assert SIMULATED not in refused.err, "refused before a worker is started"
    assert kept.read_bytes() == b"kept"


def test_another_signer_or_recipient_is_refused(motte: Any, place: Any, tmp_path: Path) -> None:
    motte("keys", "new", "other", "--kind", "signer", "--folder", tmp_path)
    motte("keys", "new", "thief", "--folder", tmp_path)
    own = dict(zip(place.run_keys[::2], place.run_keys[1::2], strict=True))
    for change, kind in (
        (("--signer", tmp_path / "other.pub"), "SignatureError"),
        (("--key", tmp_path / "thief.key"), "KeyAccessError"),
    ):
        keys = [word for pair in {**own, change[0]: change[1]}.items() for word in pair]
        refused = motte("run", place.bundle, *keys, "--input", place.photo, "--json")
        assert refused.code == 1
        assert refused.json["error"]["kind"] == kind


@pytest.mark.slow
def test_a_folder_of_photos(motte: Any, place: Any, tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c.png"):
        shutil.copy(place.photo, tmp_path / name)
    words = ("--input", tmp_path, "--threads", "1", "--repeat", "1", "--batch", "2", "--topk", "1", "--json", "-q")
    document = motte("run", place.bundle, *place.run_keys, *words).json
    assert [answer["input"] for answer in document["answers"]] == ["a.png", "b.png", "c.png"]
    assert document["steady"]["batch"] == 2


@pytest.mark.slow
def test_ctrl_c_ends_a_run_and_its_worker(place: Any) -> None:
    words = [
        "run",
        str(place.bundle),
        *place.run_keys,
        "--input",
        str(place.photo),
        "--threads",
        "1",
        "--repeat",
        "10000",
    ]
    started = subprocess.Popen(
        [sys.executable, "-m", "motte", *words],
        env={**os.environ, "PYTHONPATH": str(Path(motte_package.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    deadline = time.monotonic() + 60
    while not (workers := children.read_text().split()):
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
    # A worker that was not told yet to end finds its link closed, and ends by itself.
    while [pid for pid in workers if running(pid)]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(pid: str) -> bool:
    """Whether the process is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
