"""``motte bench infer`` and ``motte compare`` on a tiny net: real workers, a real accelerator, real files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from motte.bench.accuracy import accuracy
from motte.bench.results import Results, read_results
from motte.capture.signature import Signature

Bench = Callable[..., Any]


@pytest.fixture(scope="module")
def measured(net: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every mode of the net in 3 parts, and 24 parts, which it does not have; written and read back."""
    from motte.bench.infer import bench_infer
    from motte.bench.interleave import Silent
    from motte.bench.request import Request
    from motte.bench.results import write_results

    request = Request(
        verb="infer",
        models=(net,),
        modes=("native", "resident", "streamed", "asymmetric"),
        parts=(3, 24),
        batches=(2,),
        repeats=5,
        warmup=1,
        bundles=tmp_path_factory.mktemp("bundles"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("motte.bench.tracing.STEADY_S", 0.2)
        found = bench_infer(request, Silent())
    assert found.results is not None
    assert not found.failed, found.refused
    folder = tmp_path_factory.mktemp("out") / "results"
    write_results(folder, found.results)
    return read_results(folder)


def by_mode(results: Results) -> dict[str, Any]:
    return {result.case.mode: result for result in results.cases}


def test_every_mode_is_measured_in_the_same_rounds(measured: Results) -> None:
    found = by_mode(measured)
    assert set(found) == {"native", "resident", "streamed", "asymmetric"}
    assert {len(each.seconds.samples) for each in found.values()} == {5}
    assert found["native"].ratio is None
    for mode in ("resident", "streamed", "asymmetric"):
        ratio = found[mode].ratio
        assert ratio.baseline == str(found["native"].case)
        assert ratio.low <= ratio.median <= ratio.high
    assert [each.case.parts for each in measured.cases if each.case.mode in ("resident", "streamed")] == [3, 3]


def test_only_the_trusted_side_is_called_simulated(measured: Results) -> None:
    assert {mode: each.simulated for mode, each in by_mode(measured).items()} == {
        "native": False, "resident": True, "streamed": True, "asymmetric": True,
    }  # fmt: skip
    assert measured.run.caveats[0].startswith("SIMULATED")


def test_what_left_and_where_the_arithmetic_was(measured: Results) -> None:
    found = by_mode(measured)
    for mode in ("resident", "streamed"):
        assert (found[mode].exposed, found[mode].bytes_out, found[mode].outside_flops) == (0.0, 0, 0)
        assert found[mode].trusted_flops == found["native"].outside_flops
    split = found["asymmetric"]
    assert 0 < split.exposed < 1 == found["native"].exposed
    # One layer runs split: (2, 8, 8, 8) floats cross as its residual, and as many come back.
    assert split.bytes_out == split.bytes_in == 2 * 8 * 8 * 8 * 4
    assert split.outside_flops == 2 * 2 * 8 * 8 * 8 * 8 * 9
    [layer] = measured.layers
    assert (layer.case, layer.layer) == (split.case, "second")
    assert (layer.bytes_out, layer.bytes_in) == (split.bytes_out, split.bytes_in)


def test_memory_segments_and_traces(measured: Results) -> None:
    found = by_mode(measured)
    assert found["streamed"].memory_bound_bytes >= found["streamed"].weight_memory_bytes
    assert found["resident"].missing["memory_bound_bytes"]
    for mode, result in found.items():
        assert result.peak_memory_bytes >= result.mean_memory_bytes > 0
        assert result.cpu_percent >= 0
        assert {"start", "load", "first", "steady"} <= set(result.segments)
        assert ("open" in result.segments) == (mode in ("resident", "streamed", "asymmetric"))
        assert {point.segment for point in measured.trace(result.case)} >= {"first", "steady"}
    for mode in ("resident", "streamed", "asymmetric"):
        trace = measured.trace(found[mode].case)
        assert {point.segment for point in trace} == {"start", "open", "first", "steady"}
        # The counter rises with every answer: at least an input each, and where layers leave what crosses there too.
        crossed = [point.link_bytes for point in trace]
        assert crossed == sorted(crossed)
        first = [point.link_bytes for point in trace if point.segment == "first"]
        image = 2 * 3 * 8 * 8 * 4 if mode != "asymmetric" else 2 * 3 * 8 * 8 * 4 + found[mode].bytes_out * 2
        assert image < first[-1] - first[0] < image + 64 * 1024
        assert crossed[-1] - first[-1] >= 3 * (first[-1] - first[0]) // 2
    for point in measured.trace(found["native"].case):
        assert point.link_bytes is None
        assert point.missing["link_bytes"]


def test_a_plan_that_cannot_be_is_a_reason_and_no_crash(measured: Results) -> None:
    missing = measured.run.asked["missing_cases"]
    assert {each["case"].split("-")[1] for each in missing} == {"resident", "streamed", "asymmetric"}
    assert all("24" in each["why"] and not each["failed"] for each in missing)
    assert {plan.objective for plan in measured.plans.values()} == {"weights", "whole"}
    sides = {slug.split("-")[1]: [part.outside for part in plan.parts] for slug, plan in measured.plans.items()}
    assert len(sides["resident"]) == 3
    assert [name for part in sides["asymmetric"] for name in part] == ["second"]


def test_records_name_what_was_measured(measured: Results) -> None:
    latency = [record for record in measured.records if record.series == "infer, latency"]
    assert {record.parameters["mode"] for record in latency} == set(by_mode(measured))
    assert len({record.parameters["workload_sha256"] for record in latency}) == 1
    assert len({record.digests.model for record in latency}) == 1
    sealed = {record.parameters["mode"]: record.digests.bundle for record in latency}
    assert sealed["native"] is None
    assert sealed["resident"] == sealed["streamed"] != sealed["asymmetric"]


def test_accuracy_is_of_labelled_images_of_the_shipped_model_alone(measured: Results) -> None:
    from motte.bench.accuracy import labelled_images, why_no_accuracy
    from motte.zoo.shipped_models import NAME, build
    from motte.zoo.weights import WeightsChoice

    assert {each.accuracy for each in measured.cases} == {None}
    signature = build(WeightsChoice()).signature
    assert why_no_accuracy(signature) is None
    assert why_no_accuracy(Signature(NAME, "random", signature.preprocessing)) is not None
    images, labels = labelled_images(signature)
    batches: list[int] = []

    def answer(inputs: Any) -> Any:
        import numpy as np

        batches.append(len(inputs["x"]))
        # Right for every image of an even class: found again by its bytes.
        rows = [next(i for i, known in enumerate(images) if (known == image).all()) for image in inputs["x"]]
        return [np.eye(10)[[labels[i] if labels[i] % 2 == 0 else 1 - labels[i] for i in rows]]]

    assert accuracy(answer, signature, 4, "x") == 0.5
    assert batches == [4, 4, 4]


def test_compare_chooses_and_says_how(
    run_bench: Bench, net: str, measured: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motte.bench import infer
    from motte.bench.outcome import Outcome
    from motte.bench.request import Request

    asked: list[Request] = []

    def already_measured(request: Request, progress: object) -> Outcome:
        asked.append(request)
        return Outcome(measured, ())

    monkeypatch.setattr(infer, "bench_infer", already_measured)
    ran = run_bench("compare", net, "--engine", "torch", "--parts", "3", "--batch", "2", "--json")
    assert ran.code == 0, ran.err
    assert (asked[0].parts, asked[0].batches, asked[0].engines) == ((3,), (2,), ("torch",))
    assert set(asked[0].modes) == {*by_mode(measured), "accelerator"}
    found = ran.json
    assert found["chosen"].split("-")[1] in ("resident", "streamed")
    assert found["commands"][0].startswith(f"motte seal {net} --parts 3")
    judged = {each["case"].split("-")[1]: each["out"] for each in found["judged"]}
    assert judged["resident"] == judged["streamed"] == []
    assert "leaves" in judged["asymmetric"][0]
    ran = run_bench("compare", net, "--engine", "torch", "--max-memory", "1MiB")
    assert ran.code == 1
    assert "no scheme keeps the bounds" in ran.err


def test_wrong_use_is_refused_before_anything_is_built(run_bench: Bench, net: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert run_bench("bench", "infer", "--model", net, "--out", tmp_path).code == 2
    assert run_bench("bench", "infer", "--model", net, "--modes", "native,fast").code == 2
    assert run_bench("bench", "infer", "--model", net, "--parts", "1,x").code == 2
    assert run_bench("bench", "infer").code == 2
    assert run_bench("bench", "infer", "--suite", "classic", "--parts", "4").code == 2
    assert run_bench("bench", "infer", "--model", net, "--bound", "1.1").code == 2
    ran = run_bench("bench", "train", "--model", net, "--modes", "native,", "--json")
    assert ran.code == 2
    assert "built" not in ran.err  # what the model prints when it is made


def test_what_crosses_to_an_accelerator_that_runs_everything(net: str) -> None:
    import numpy as np

    from motte.bench.peer_process import TorchWork

    spec = {
        "model": net, "weights": {"file": None, "random_seed": None}, "input_shape": None, "device": "cpu",
        "outside": True,
    }  # fmt: skip
    x = np.ones((2, 3, 8, 8), dtype=np.float32)
    work = TorchWork(spec, {"x": x})
    work.run()
    assert work.books() == {"input_bytes": x.nbytes, "output_bytes": 2 * 3 * 4}
    assert work.answer({"x": x})[0].shape == (2, 3)


@pytest.fixture
def running(net: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A bench in a process of its own, that would take minutes."""
    words = [
        net,
        "--modes",
        "resident",
        "--repeats",
        "1000",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--no-trace",
    ]
    code = "import sys, typer; from motte.cli import bench; from motte.cli.verb import Terminated\n"
    code += "sys.exit(typer.main.get_command(bench.app).main(sys.argv[1:], 'bench', standalone_mode=False))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "infer", "--model", *words],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_no_file(running: subprocess.Popen[str], tmp_path: Path) -> None:
    bench = psutil.Process(running.pid)
    deadline = time.monotonic() + 300
    while not (children := bench.children(recursive=True)):
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 130, output
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == len(children)
    assert alive == []
    # torch itself makes an empty folder for a compiler's cache, once it gets as far as exporting.
    assert [path for path in tmp_path.rglob("*") if not path.name.startswith("torchinductor_")] == []
