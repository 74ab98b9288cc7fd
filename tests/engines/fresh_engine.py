"""Run in a process of its own: ``fresh_engine.py MODE ENGINE FOLDER``; prints what it saw as JSON.

``watch``: import, load and run one engine, and tell what appeared since numpy was imported: threads, open files,
children, files in the folder, network and process calls of Python code, modules. ``plant`` makes one of each by itself.
``memory``: what the engine takes of anonymous memory. FOLDER is the home directory and the current one, and holds
lowered programs as files (a name and one of the three messages).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
CANARY = 1.2345678e-7
CALLS: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event.startswith(("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.exec", "urllib.", "http.")):
        CALLS.append(event)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def open_files() -> set[str]:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return {os.readlink(link) for link in links if os.path.islink(link)}


def children() -> list[str]:
    found: list[str] = []
    for path in Path("/proc/self/task").glob("*/children"):
        # A thread may end between the listing and the reading.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += path.read_text().split()
    return found


def watch(engine_name: str, folder: Path) -> dict[str, Any]:
    import numpy as np

    before = (threads(), open_files(), set(folder.rglob("*")), set(sys.modules))
    sys.addaudithook(_audit)
    if engine_name == "plant":
        import socket
        import subprocess

        kept = (socket.socket(), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
        (folder / "planted").mkdir()
    else:
        from motte.engines.select import make_engine

        engine, graph, program, weight = make_engine(engine_name, threads=1), *_one(folder, "gemm")
        held = {"w": engine.weight(graph, "w", memoryview(weight))}
        bound = engine.load(graph, held, lowered=program)
        for run in (bound.run, lambda x, dims: engine.compile(graph, lowered=program).run(x, held, dims)):
            (found,) = run([np.ones((1, 2048), np.float32)], {"batch": 1})
            assert found.shape == (1, 2048)
        kept = (bound,)
    time.sleep(0.2)
    seen = {
        "threads": threads() - before[0],
        "open files": sorted(open_files() - before[1]),
        "children": children(),
        "files": sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*")) - before[2]),
        "calls": sorted(set(CALLS)),
        "packages": sorted({name.split(".")[0] for name in set(sys.modules) - before[3] if sys.modules[name]}),
        "stages": sorted({name.split(".")[1] for name in sys.modules if name.startswith("motte.")}),
    }
    if engine_name == "plant":
        kept[1].communicate(b"\n")
    return seen


def _one(folder: Path, kind: str) -> tuple[Any, Any, bytearray]:
    """A graph with the weight ``w`` of 16 MiB, its program, and the weight's bytes: all ones."""
    import numpy as np

    from motte.capture.graph import Dim, Graph, Node, Ref, Size, TensorType, Value, Weight, WeightRef
    from motte.engines.interface import OnnxProgram

    shape = {"gemm": (2048, 2048), "gather": (65536, 64), "wide": (4,)}[kind]
    x = {"gemm": ("f32", (Size("batch"), 2048)), "gather": ("i64", (Size("batch"),))}.get(
        kind, ("f32", (Size("batch"),))
    )
    y = {"gemm": (Size("batch"), 2048), "gather": (Size("batch"), 64), "wide": (Size("batch"), 4)}[kind]
    node = Node("y", "aten.some.op", (Ref("x"), WeightRef("w")), {}, (Value("y", TensorType("f32", y)),))
    graph = Graph(
        kind, (Dim("batch", 1, 1 << 30),), (Value("x", TensorType(*x)),),
        {"w": Weight("w", "f32", shape, tuple(range(len(shape))))}, (node,), ("y",), ("y",),
    )  # fmt: skip
    names = ("core", "weight_inputs", "weight_initializers")
    program = OnnxProgram(*((folder / f"{kind}.{name}").read_bytes() for name in names))
    return graph, program, bytearray(np.ones(shape, np.float32).tobytes())


def canaries_outside(array: Any) -> int:
    """How many elements of this process's private memory, ``array`` left out, are the canary."""
    import numpy as np

    own = range(array.ctypes.data, array.ctypes.data + array.nbytes)
    count = 0
    with open("/proc/self/mem", "rb", buffering=0) as memory_file:
        for line in Path("/proc/self/maps").read_text().splitlines():
            words = line.split()
            start, end = (int(word, 16) for word in words[0].split("-"))
            if words[1] != "rw-p" or words[-1].startswith("/") or words[-1] in ("[vvar]", "[vsyscall]"):
                continue
            # The array itself is not read, or what this makes of it would be found further on.
            for low, high in ((start, min(end, own.start)), (max(start, own.stop), end)):
                for place in range(low, high, MIB):
                    memory_file.seek(place)
                    piece = np.frombuffer(memory_file.read(min(MIB, high - place) // 4 * 4), np.float32)
                    count += int((piece == np.float32(CANARY)).sum())
    return count


def least(before: int) -> int:
    """By how much memory has grown, once what an engine gives back from a thread of its own has been given back."""
    from motte.engines.settled import settled_bytes

    growth = settled_bytes() - before
    for _ in range(20):
        if growth <= 0:
            break
        time.sleep(0.05)
        growth = min(growth, settled_bytes() - before)
    return growth


def memory(engine_name: str, folder: Path) -> dict[str, Any]:
    import numpy as np

    from motte.engines.select import make_engine
    from motte.engines.settled import settled_bytes

    engine = make_engine(engine_name, threads=1)
    found: dict[str, Any] = {}
    # First of all: what a model of before gives back late would be counted against this one, or for it.
    graph, program, weight = _one(folder, "gemm")
    array = engine.weight(graph, "w", memoryview(weight))
    array[:] = CANARY
    start = before = settled_bytes()
    streamed = engine.compile(graph, lowered=program)
    for turn in range(100):
        streamed.run([np.ones((turn % 8 + 1, 2048), np.float32)], {"w": array}, {"batch": turn % 8 + 1})
        if turn == 16:
            before = settled_bytes()
    found["growth"] = least(before) / MIB
    found["held"] = least(start) / MIB
    found["left"] = canaries_outside(array) * 4 / MIB
    planted = array.copy()
    found["planted"] = canaries_outside(array) * 4 / MIB
    del planted, streamed
    gc.collect()
    for kind in ("gather", "gemm"):
        graph, program, weight = _one(folder, kind)
        array = engine.weight(graph, "w", memoryview(weight))
        for turn in ("first", "again"):
            bound = engine.load(graph, {"w": array}, lowered=program)
            found[f"{kind} {turn}"] = (bound.copy_bytes or 0) / MIB
            x = np.zeros(1, np.int64) if kind == "gather" else np.ones((1, 2048), np.float32)
            (one,) = bound.run([x], {"batch": 1})
            weight[:4] = np.float32(5).tobytes()
            (two,) = bound.run([x], {"batch": 1})
            found[f"{kind} in place"] = bool(one.flat[0] != two.flat[0])
            weight[:4] = np.float32(1).tobytes()
            del bound, one, two
            gc.collect()
    graph, program, weight = _one(folder, "wide")
    held, chain = {"w": engine.weight(graph, "w", memoryview(weight))}, []
    before = settled_bytes()
    for _ in range(6):
        chain.append(engine.compile(graph, lowered=program))
        chain[-1].run([np.ones(MIB // 2, np.float32)], held, {"batch": MIB // 2})
    found["chain"] = (settled_bytes() - before) / MIB
    return found


if __name__ == "__main__":
    mode, name, place = sys.argv[1:]
    print(json.dumps({"watch": watch, "memory": memory}[mode](name, Path(place))))
