"""The link to an accelerator: a small round trip, and large tensors over shared memory against memcpy.

    python benchmarks/bench_link.py [--repeats 15] [--mib 64] [--threads 1]

Both run against a child process over an inherited socket. *Small*, from the floor up:

- two bare Python processes that send the same number of bytes to and fro;
- the link alone: a FORWARD frame with 256 bytes is encoded, sent, received, checked strictly and answered by an ANSWER
  frame, which is received and checked strictly, without torch on the other side;
- the accelerator without a product (it answers with zeros that it made before);
- the accelerator with its product (4 rows of 16 features), everything included that a layer pays.

*Large*: a tensor of ``--mib`` MiB goes there and another comes back, through shared memory. The child answers without
computing, from what lies in the answer's place already; what is timed is the link: one copy out, one copy in with
every value checked, and the frames. It is compared with two ``memcpy`` (``torch.Tensor.copy_`` between two private
buffers) of as many bytes on as many threads.

Interleaved, after warm-up, median of ``--repeats`` rounds. On a machine that does other work too, look at the fastest
round: whoever waits for the peer waits for a core as well.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# Before torch loads OpenMP: waiting threads must sleep, two processes share the cores.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from peers import CONSOLE, arguments, report

from motte.accelerator.client import AcceleratorClient
from motte.accelerator.process import LocalAccelerator
from motte.limits import MIB
from motte.linear.operation import LinearOperation
from motte.link.calls import FROM_ACCELERATOR, Call, Op, Tensor, encode
from motte.link.wire import Deadline, FrameReader, SocketWire, Wire

SMALL = LinearOperation("linear", 16, 16)
ECHO = """
import socket, sys, torch
from motte.accelerator.calculator import Calculator, Work
from motte.accelerator.server import AcceleratorServer, Offer
from motte.link.wire import SocketWire
torch.set_num_threads(1)
class Idle(Calculator):
    zeros = {}
    def start_forward(self, layer, x, *, hold, into):
        if into[0] is not None:
            return Work(into)
        if x.shape not in self.zeros:
            self.zeros[x.shape] = torch.zeros_like(x)
        return Work([self.zeros[x.shape]])
wire = SocketWire(socket.socket(fileno=int(sys.argv[1])), peer="client")
AcceleratorServer(wire, Idle(), Offer(region_bytes=int(sys.argv[2]))).serve()
"""
FRAMES = """
import socket, sys
from motte.link.calls import TO_ACCELERATOR, Call, Op, encode
from motte.link.wire import Deadline, FrameReader, SocketWire
wire = SocketWire(socket.socket(fileno=int(sys.argv[1])), peer="client")
class Answering:
    def begin(self, call, head):
        self.call, self.body = call, memoryview(bytearray(call.inline_bytes))
        return [self.body]
    def finish(self):
        call = self.call
        reply = Call(Op.ANSWER, call.sequence, call.step, call.layer, tensors=call.places)
        wire.send([encode(reply), self.body], Deadline(60.0))
reader = FrameReader(Answering(), peer="client", allowed=TO_ACCELERATOR)
try:
    while True:
        wire.fill(reader, Deadline(None))
except Exception:
    pass
"""
BARE = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
while data := sock.recv(65536):
    sock.sendall(data)
"""


@contextmanager
def child(script: str, *options: str) -> Iterator[socket.socket]:
    """Our end of a socket whose other end ``script`` serves."""
    ours, theirs = socket.socketpair()
    with theirs, ours:
        words = [sys.executable, "-c", script, str(theirs.fileno()), *options]
        process = subprocess.Popen(words, pass_fds=(theirs.fileno(),))
        theirs.close()
        yield ours
        ours.close()
        process.wait(timeout=60)


class Frames:
    """The trusted side's half of the link alone."""

    def __init__(self, sock: socket.socket) -> None:
        self._wire = SocketWire(sock, peer="peer")
        self._reader = FrameReader(self, peer="peer", allowed=FROM_ACCELERATOR)
        self._sequence = 0
        self._answered = False
        self._tensor = (Tensor("f32", (4, 16)),)
        self._body = memoryview(bytearray(256))

    def begin(self, call: Call, head: bytes) -> Sequence[memoryview]:
        """See motte.link.wire.Receiver."""
        if (call.sequence, call.tensors) != (self._sequence, self._tensor):
            raise RuntimeError("not the answer")
        return [self._body]

    def finish(self) -> None:
        """See motte.link.wire.Receiver."""
        self._answered = True

    def run(self) -> None:
        """One round trip."""
        self._sequence += 1
        self._answered = False
        deadline = Deadline(60.0)
        head = encode(Call(Op.FORWARD, self._sequence, 1, 1, tensors=self._tensor, places=self._tensor))
        self._wire.send([head, self._body], deadline, self._reader)
        while not self._answered:
            self._wire.fill(self._reader, deadline)


@contextmanager
def idle(region_bytes: int) -> Iterator[AcceleratorClient]:
    """An accelerator that answers without computing."""
    with child(ECHO, str(region_bytes)) as ours:

        def dial(deadline: Deadline, again: bool) -> Wire:
            return SocketWire(ours, peer="idle accelerator")

        with AcceleratorClient(dial, name="idle accelerator", start_timeout_s=120) as client:
            yield client


def asking(client: AcceleratorClient, x: torch.Tensor) -> Callable[[], None]:
    """One forward request and its answer."""
    client.register("layer", SMALL)
    client.put_weight("layer", torch.ones(SMALL.weight_shape))

    def run() -> None:
        client.forward("layer", x, step=1, hold=False).result()

    return run


def small(repeats: int, threads: int, records: object) -> None:
    """The round trip of a small tensor."""
    from motte.measure.compare import compare

    x = torch.ones(4, 16)
    with (
        LocalAccelerator(threads=1) as local,
        idle(0) as echo,
        child(FRAMES) as framed,
        child(BARE) as bare,
    ):
        frames = Frames(framed)
        data = bytes(60 + 40 + x.nbytes)

        def bare_round() -> None:
            bare.sendall(data)
            bare.recv(65536)

        candidates = {
            "two bare processes": bare_round,
            "link alone": frames.run,
            "accelerator, no product": asking(echo, x),
            "accelerator": asking(local.link, x),
        }
        found = compare(candidates, warmup=2, repeats=repeats, inner=500)
    report(found, series="link, small", what="request given to answer checked", threads=threads, records=records)
    for one in found.series:
        CONSOLE.print(f"{one.name:24} {one.median * 1e6:7.1f} us (fastest round {one.minimum * 1e6:.1f})")


def large(mib: int, repeats: int, threads: int, records: object) -> None:
    """Tensors through shared memory against memcpy."""
    from motte.measure.compare import compare

    x = torch.zeros(mib * MIB // 4 // 16, 16)
    source, target = torch.zeros_like(x), torch.ones_like(x)

    def memcpy() -> None:
        target.copy_(source)
        source.copy_(target)

    with idle(3 * mib * MIB) as client:
        found = compare({"two memcpy": memcpy, "there and back": asking(client, x)}, warmup=2, repeats=repeats)
    report(
        found, series="link, large", what="request given to answer checked", threads=threads, records=records, mib=mib
    )
    for one in found.series:
        CONSOLE.print(f"{one.name:24} {2 * mib * MIB / one.median / 1e9:6.2f} GB/s")
    CONSOLE.print(f"link at {100 / found.ratio('there and back').median:.0f} % of memcpy's rate")


def main() -> None:
    """Both."""
    parser = arguments(__doc__)
    parser.add_argument("--mib", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cores = len(os.sched_getaffinity(0))
    CONSOLE.print(f"{cores} usable cores, {options.threads} threads on the trusted side, 1 in the child")
    small(options.repeats, options.threads, options.records)
    large(options.mib, options.repeats, options.threads, options.records)


if __name__ == "__main__":
    main()
