"""What named processes use of NVIDIA GPUs, through NVML (``pip install nvidia-ml-py``, optional)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from motte.measure.energy import Absent


@dataclass(frozen=True)
class GpuReading:
    """One reading. ``percent``: of the time in which a kernel of the named processes ran, summed over the GPUs.

    ``memory_bytes``: held by the named processes. ``power_w``: of the whole GPUs on which one of them runs, since a GPU
    does not tell power by process. None: ``why`` says why.
    """

    percent: float | None
    memory_bytes: int | None
    power_w: float | None
    why: str | None


class GpuMeter:
    """Reads all GPUs that NVML shows."""

    def __init__(self, nvml: Any) -> None:
        """``nvml``: the module ``pynvml``, initialised."""
        self._nvml = nvml
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        self._since_us = [0] * len(self._devices)

    def read(self, groups: Mapping[str, Collection[int]]) -> dict[str, GpuReading]:
        """The share of each group of processes, and of nobody else; every GPU is asked once."""
        held: dict[str, list[int | None]] = {name: [] for name in groups}
        busy, watts = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0.0)
        try:
            for index, device in enumerate(self._devices):
                running = {
                    each.pid: each.usedGpuMemory for each in self._nvml.nvmlDeviceGetComputeRunningProcesses(device)
                }
                shares = self._shares(index, device)
                power = self._nvml.nvmlDeviceGetPowerUsage(device) / 1000
                for name, pids in groups.items():
                    ours = [running[pid] for pid in pids if pid in running]
                    busy[name] += sum(shares.get(pid, 0.0) for pid in pids)
                    held[name] += ours
                    watts[name] += power if ours else 0.0
        except self._nvml.NVMLError as problem:
            return dict.fromkeys(groups, GpuReading(None, None, None, f"NVML: {problem}"))
        return {name: _reading(busy[name], held[name], watts[name]) for name in groups}

    def _shares(self, index: int, device: Any) -> dict[int, float]:
        """Per cent of the time since the last call in which a kernel of each process ran."""
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(device, self._since_us[index])
        except self._nvml.NVMLError_NotFound:
            return {}  # NVML's way to say that no process did anything since
        self._since_us[index] = max([self._since_us[index], *(sample.timeStamp for sample in samples)])
        return {sample.pid: float(sample.smUtil) for sample in samples}


def _reading(busy: float, held: list[int | None], watts: float) -> GpuReading:
    if not held:
        why = "NVML lists none of these processes: they use no GPU, or it counts them in another pid namespace"
        return GpuReading(None, None, None, why)
    sizes = [size for size in held if size is not None]
    if len(sizes) != len(held):
        return GpuReading(busy, None, watts, "NVML does not tell the memory of a process here")
    return GpuReading(busy, sum(sizes), watts, None)


def find_gpu_meter() -> GpuMeter | Absent:
    """The meter of this machine's NVIDIA GPUs."""
    if find_spec("pynvml") is None:
        return Absent("nvidia-ml-py is not installed")
    nvml = import_module("pynvml")
    try:
        nvml.nvmlInit()
        meter = GpuMeter(nvml)
    except nvml.NVMLError as problem:
        return Absent(f"no NVIDIA GPU: {problem}")
    return meter
