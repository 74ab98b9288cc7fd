"""The worker of a confidential VM gives up every file, and still has evidence: a second process makes it.

No such VM is at hand: a folder stands in for configfs, whose kernel's part this process plays, outside of what the
guest's processes may do. What they do themselves (make a folder, write, read, remove it) are the real calls.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence
from motte.attest.platforms import snp
from motte.errors import ResourceError
from motte.trusted import landlock, seccomp

NOW = datetime.now(UTC)
DATES = {"begin": NOW - timedelta(days=1), "end": NOW + timedelta(days=1)}
make: Any = importlib.import_module("attest_makers.certificate_maker")
maker: Any = importlib.import_module("attest_makers.snp_maker")


class Machine(maker.Machine):  # type: ignore[misc]
    """A made-up machine whose certificates are all of today: a worker's client takes no other time."""

    def ark(self) -> Any:
        return make.sign("ARK-Milan", make.rsa_key("guest-ark"), **DATES)

    def ask(self, ark: Any) -> Any:
        return make.sign("SEV-Milan", make.rsa_key("guest-ask"), ark, path_length=0, **DATES)


MACHINE: Any = Machine(**DATES)
GUEST = """
import os, socket, stat, sys
from pathlib import Path
from motte.attest.platforms import tsm

PLACE = sys.argv[1]

class Configfs(type(Path())):
    def tell(self, word):
        with open(f"{PLACE}/requests", "w") as out:
            out.write(f"{word} {self}\\n")
        with open(f"{PLACE}/answers") as into:
            into.readline()
    def mkdir(self, *args, **kwargs):
        super().mkdir(*args, **kwargs)
        self.tell("made")
    def write_bytes(self, data):
        count = super().write_bytes(data)
        self.tell("written")
        return count
    def rmdir(self):
        self.tell("leaves")
        super().rmdir()

tsm.TSM_ROOT = Configfs(PLACE)
from motte.trusted import guest_reports, harden
"""
LANDLOCKED = True
try:
    landlock.abi()
except OSError:
    LANDLOCKED = False
confined = pytest.mark.skipif(
    not LANDLOCKED or seccomp.unsupported() is not None, reason="this kernel has no Landlock, or no filter is known"
)


class Kernel:
    """Fills the folders that a guest makes, as configfs does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: list[str] = []
        self._ends = []
        for name in ("requests", "answers"):
            os.mkfifo(root / name)
            # Both ways, so that neither side ever waits for the other to open it.
            self._ends.append(os.open(root / name, os.O_RDWR))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        os.write(self._ends[0], b"stop now\n")
        self._thread.join(30)
        for fd in self._ends:
            os.close(fd)

    def _serve(self) -> None:
        with open(self._ends[0], closefd=False) as requests:
            while (said := requests.readline().rstrip("\n").partition(" "))[0] != "stop":
                self.seen.append(said[0])
                try:
                    self._act(said[0], Path(said[2]))
                finally:
                    os.write(self._ends[1], b"done\n")

    def _act(self, word: str, path: Path) -> None:
        leaf, ask, _ = MACHINE.chain()
        if word == "made":
            for name, data in (("provider", b"sev_guest\n"), ("generation", b"0\n"), ("inblob", b"")):
                (path / name).write_bytes(data)
        elif word == "written":
            (path.parent / "outblob").write_bytes(MACHINE.report(path.read_bytes()))
            (path.parent / "auxblob").write_bytes(table(vcek=leaf.der, ask=ask.der))
            (path.parent / "generation").write_text("1\n")
        else:
            for each in path.iterdir():
                each.unlink()


def table(**certificates: bytes) -> bytes:
    """The host's table of certificates (SEV-ES Guest-Hypervisor Communication Block, section 4.1.8.1)."""
    guids = {"vcek": "63da758de6644564adc5f4b93be8accd", "ask": "4ab7b379bbac4fe4a02f05aef327c782"}
    start = 24 * (len(certificates) + 1)
    entries, data = b"", b""
    for name, der in certificates.items():
        place = (start + len(data)).to_bytes(4, "little")
        entries += bytes.fromhex(guids[name]) + place + len(der).to_bytes(4, "little")
        data += der
    return entries + bytes(24) + data


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    root = tmp_path / "report"
    root.mkdir()
    kernel = Kernel(root)
    yield kernel
    kernel.stop()
    assert sorted(path.name for path in root.iterdir()) == ["answers", "requests"]  # every folder was removed


def guest(script: str, root: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-P", "-c", GUEST + script, str(root)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@confined
def test_a_worker_without_any_right_to_write_has_evidence_again_and_again(kernel: Kernel) -> None:
    done = guest(
        """
guest_reports.start()
found = harden.after_threads(harden.before_threads())
assert not {"Landlock", "seccomp"} & set(found.lacking), found.lacking
for data in (b"a" * 64, b"b" * 64):
    print(guest_reports.issue(data).encode().hex())
for line in ("os.mkdir(f'{sys.argv[1]}/mine')", "open(f'{sys.argv[1]}/requests', 'w')", "os.listdir(sys.argv[1])"):
    try:
        exec(line)
        print("could", line)
    except PermissionError:
        pass
""",
        kernel.root,
    )
    assert done.returncode == 0, done.stderr
    first, second = (Evidence.decode(bytes.fromhex(line)) for line in done.stdout.splitlines())
    anchors = Anchors(amd_arks=(MACHINE.chain()[2].der,))
    assert [snp.verify(each, anchors, NOW).report_data[:1] for each in (first, second)] == [b"a", b"b"]
    # TDX was asked first, and is another provider: a folder each.
    assert kernel.seen == [*["made", "leaves", "made", "written", "leaves"] * 2]


TRIES = """
def tries(report_data, root):
    from motte.errors import ResourceError
    said = []
    for line in (
        "open(root.parent / 'outside', 'w')", "os.mkdir(root.parent / 'folder')", "open(root / 'new', 'w')",
        "os.symlink('/etc', root / 'link')", "os.unlink(root / 'answers')", "os.rename(root / 'answers', root / 'b')",
        "open('/etc/hostname')", "os.listdir('/proc/' + str(os.getppid()) + '/fd')", "os.chmod(root, 0o777)",
        "harden.process_control(4, 1)",
    ):
        try:
            exec(line)
            said.append(line)
        except OSError:
            pass
    kept = 0
    for fd in range(3, 256):
        try:
            kept += stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError:
            pass
    os.mkdir(root / "folder"), os.rmdir(root / "folder")
    open(root / "requests", "w").close()
    if report_data[:1] == b"s":
        socket.socket()
    raise ResourceError(f"could {said}, has {kept}")
link, _ = socket.socketpair()
guest_reports.start(make=tries)
for data in (b"a" * 64, b"s" * 64):
    try:
        guest_reports.issue(data)
    except Exception as problem:
        print(problem.message, problem.got)
"""


@confined
def test_the_helper_writes_there_and_nowhere_else_and_knows_nobody(kernel: Kernel) -> None:
    done = guest(TRIES, kernel.root)
    assert done.returncode == 0, done.stderr
    made, gone = done.stdout.splitlines()
    # Of sockets it has its own; the worker's link is closed in it.
    assert made == "this guest makes no evidence could [], has 1"
    assert gone.startswith("the process that makes evidence of this guest is gone")


def test_without_a_device_nothing_is_started_and_evidence_refused(tmp_path: Path) -> None:
    done = guest(
        "guest_reports.start()\ntry: guest_reports.issue(bytes(64))\nexcept Exception as problem: print(problem)\n"
        "try: print(os.waitpid(-1, 0))\nexcept ChildProcessError: print('no child')",
        tmp_path / "none",
    )
    assert "no report device" in done.stdout, done.stderr
    assert done.stdout.endswith("no child\n")


POLICY = """{"format": "motte-policy-1", "policy": {"all_of": [
    {"insecure_allow_simulated": {}}, {"platform": ["snp"]}, {"not_debug": {}}, {"fresh": {"max_age_s": 120}}]}}"""
WORKER = """
import runpy
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(sys.argv[2])
listener.listen(1)
print("listening", flush=True)
connection, _ = listener.accept()
listener.close()
sys.argv[1:] = ["--fd", str(connection.detach()), "--threads", "1", "--engine", "torch", "--enclave", "vm"]
runpy.run_module("motte.trusted", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch = pytest.importorskip("torch")
    from motte.capture.export import capture
    from motte.capture.signature import Signature
    from motte.plan.planner import plan_parts
    from motte.provision.address import BrokerAddress
    from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
    from motte.seal.manifest import Manifest
    from motte.seal.package import seal_model
    from motte.seal.run_terms import terms_of

    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
    captured = capture(model, (torch.zeros(1, 8),), name="small")
    plan = plan_parts(captured.graph, parts=1, objective="memory", dims={})
    keys, signer = RecipientPrivateKey.new(), SignerPrivateKey.new()
    path = tmp_path_factory.mktemp("guest") / "small.motte"
    manifest = Manifest(captured.graph, plan, Signature("small", "random"))
    # Nobody listens there: whoever asks it is told something else.
    broker = BrokerAddress("127.0.0.1", 9, bytes(32), signer.public)
    recipients, run = [keys.public], terms_of(plan.offload, broker=str(broker))
    seal_model(path, manifest, captured.weights, release=1, recipients=recipients, signer=signer, run=run)
    return path, model, {"keys": keys, "signer": signer.public}, broker


@confined
def test_a_client_verifies_a_confined_worker_of_a_guest(sealed: Any, kernel: Kernel, tmp_path: Path) -> None:
    import torch

    import motte
    from motte.attest.policy_text import loads
    from motte.run.verified import Verifier

    path, model, keys, _ = sealed
    verifier = Verifier(loads(POLICY), Anchors(amd_arks=(MACHINE.chain()[2].der,)))
    place = tmp_path / "vm.sock"
    words = [sys.executable, "-P", "-c", GUEST + WORKER, str(kernel.root), str(place)]
    machine = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert machine.stdout is not None
        assert machine.stdout.readline() == "listening\n"
        options = {"threads": 0, "engine": "torch", "enclave": "vm", "vm": f"unix:{place}", "timeout_s": 60.0}
        x = torch.arange(8, dtype=torch.float32).reshape(1, 8)
        with motte.load(path, verifier=verifier, **keys, **options) as loaded, torch.inference_mode():
            assert torch.equal(loaded(x), model(x))
            assert loaded.verdict.claims.platform == "snp"
            assert loaded.verdict.claims.binding.public_key == loaded._worker.hello.public_key
            # All that a worker in a process gives up.
            assert (loaded.hardening.seccomp_mode, loaded.hardening.landlock_abi > 0) == (2, True)
            assert not {"Landlock", "seccomp"} & set(loaded.hardening.lacking)
        assert machine.wait(30) == 0
    finally:
        machine.kill()
        machine.communicate()


DIRECT = f"""
import os
words = ["-P", "-m", "motte.trusted", "--fd", "0", "--threads", "1", "--engine", "torch", "--enclave", "gramine"]
os.execv({sys.executable!r}, [{sys.executable!r}, *words])
"""


@pytest.mark.parametrize("asked_by", ["broker", "policy"])
def test_gramine_direct_says_that_it_has_no_evidence(
    sealed: Any, tmp_path: Path, plant_program: Callable[[str, str], Path], asked_by: str
) -> None:
    """A stand-in starts the worker as Gramine does; whoever asks for evidence gets one error, before any contact."""
    import motte
    from motte.attest.policy_text import loads
    from motte.run.verified import Verifier

    path, _, keys, broker = sealed
    plant_program("gramine-direct", DIRECT)
    image = tmp_path / "image"
    image.mkdir()
    argv = '["python3", "--engine", "torch", "--precision", "f32", "--threads", "1"]'
    (image / "worker.manifest").write_text(f"loader.argv = {argv}\n")
    asked = {"keys": broker} if asked_by == "broker" else {"verifier": Verifier(loads(POLICY), None)}
    with pytest.raises(ResourceError, match="no evidence") as caught:
        motte.load(path, enclave="gramine-direct", image=image, timeout_s=60.0, **(keys | asked))
    assert caught.value.got == "gramine-direct"
    assert "gramine-sgx" in str(caught.value.hint)
