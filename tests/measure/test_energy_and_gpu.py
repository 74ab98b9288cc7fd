"""Energy and GPU meters: arithmetic on stand-ins that follow the libraries' interfaces, and absence with its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from motte.measure import energy, gpu
from motte.measure.energy import Absent, EnergyMeter, find_energy_meter, meter_of
from motte.measure.gpu import GpuMeter, GpuReading, find_gpu_meter


@dataclass
class PlantedZone:
    """A zone as ``zeus.device.cpu`` has them; the counters are millijoules."""

    name: str
    readings: list[tuple[float, float | None]]

    @property
    def rapl_file(self) -> Any:
        return SimpleNamespace(name=self.name)

    def get_total_energy_consumption(self) -> Any:
        cpu_mj, dram_mj = self.readings.pop(0)
        return SimpleNamespace(cpu_mj=cpu_mj, dram_mj=dram_mj)


def test_packages_and_their_memory_are_added_up_in_joules() -> None:
    zones = [
        PlantedZone("package-0", [(1000.0, 500.0)]),
        PlantedZone("package-1", [(2000.0, None)]),
        PlantedZone("psys", []),  # holds both once more: counted, it would double them
    ]
    meter = meter_of(zones)
    assert isinstance(meter, EnergyMeter)
    assert meter.read_j() == 3.5


def test_an_overflow_is_no_figure_and_never_a_negative_one() -> None:
    meter = EnergyMeter([PlantedZone("package-0", [(900.0, None), (5.0, None), (1005.0, None)])])
    assert meter.read_j() == 0.9
    assert isinstance(meter.read_j(), Absent)
    assert meter.read_j() == 1.005


def test_a_counter_that_cannot_be_read_says_so() -> None:
    class Locked:
        def get_total_energy_consumption(self) -> Any:
            raise PermissionError(13, "Permission denied")

    assert "Permission denied" in str(EnergyMeter([Locked()]).read_j())


def test_without_packages_there_is_no_meter() -> None:
    assert isinstance(meter_of([]), Absent)
    assert isinstance(meter_of([PlantedZone("psys", [])]), Absent)


def test_absence_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_RAPL", ())
    found = find_energy_meter()
    assert isinstance(found, Absent)
    assert "no RAPL" in found.why
    monkeypatch.setattr(energy, "_RAPL", ("/",))
    monkeypatch.setattr(energy, "find_spec", lambda name: None)
    found = find_energy_meter()
    assert isinstance(found, Absent)
    assert "zeus is not installed" in found.why
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert find_gpu_meter() == Absent("nvidia-ml-py is not installed")


def test_what_zeus_raises_becomes_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def get_cpus() -> Any:
        print("a library that prints")
        raise Exception("RAPL unavailable")

    monkeypatch.setattr(energy, "_RAPL", ("/",))
    monkeypatch.setattr(energy, "find_spec", lambda name: object())
    monkeypatch.setattr(energy, "import_module", lambda name: SimpleNamespace(get_cpus=get_cpus))
    assert find_energy_meter() == Absent("no RAPL: RAPL unavailable")
    assert capsys.readouterr().out == "", "the sampler's output is its protocol"


class PlantedNvml:
    """The calls of ``pynvml`` that are used, of two GPUs."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    def __init__(self) -> None:
        self.running: list[list[tuple[int, int | None]]] = [[(10, 1000), (99, 5_000_000)], [(11, 200)]]
        self.busy: list[list[tuple[int, int, int]] | None] = [[(10, 30, 5), (99, 60, 5)], None]
        self.asked_since: list[int] = []

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.running[device]]

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:
        return 70_000 + device

    def nvmlDeviceGetProcessUtilization(self, device: int, since: int) -> list[Any]:
        self.asked_since.append(since)
        samples = self.busy[device]
        if samples is None:
            raise self.NVMLError_NotFound
        return [SimpleNamespace(pid=pid, smUtil=share, timeStamp=at) for pid, share, at in samples]


def test_a_gpu_is_read_for_the_named_processes_and_nobody_else() -> None:
    nvml = PlantedNvml()
    meter = GpuMeter(nvml)
    found = meter.read({"a": [10], "b": [11], "c": [os.getpid()]})
    assert found["a"] == GpuReading(30.0, 1000, 70.0, None)
    assert found["b"] == GpuReading(0.0, 200, 70.001, None)
    assert found["c"].memory_bytes is None
    assert "none of these processes" in (found["c"].why or "")
    meter.read({"a": [10]})
    assert nvml.asked_since == [0, 0, 5, 0]


def test_what_nvml_does_not_tell_is_no_zero() -> None:
    nvml = PlantedNvml()
    nvml.running[0] = [(10, None)]
    assert GpuMeter(nvml).read({"a": [10]})["a"].memory_bytes is None

    def fails(device: int) -> int:
        raise PlantedNvml.NVMLError("Not Supported")

    nvml.nvmlDeviceGetPowerUsage = fails  # type: ignore[method-assign]
    assert GpuMeter(nvml).read({"a": [10]})["a"] == GpuReading(None, None, None, "NVML: Not Supported")
