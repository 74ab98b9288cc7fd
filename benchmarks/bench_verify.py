"""How long a verification of evidence takes, from its bytes to the verdict; and a bare call of ``dcap-qvl`` beside it.

    python benchmarks/bench_verify.py [--repeats 30] [--inner 5] [--samples DIR] [--records records/verify.jsonl]

Evidence is decoded, verified and asked about with a policy of seven conditions; collateral comes with it, and nothing
is cached between calls. Without ``--samples`` the quotes are made here, under a root of our own, by the maker of the
tests; with it they are the real ones in that folder (``sgx_quote.bin``, ``sgx_quote_collateral.json``, and for tdx), as
of 2025-06-20. The bare call takes collateral that is parsed already and reads nothing from its answer. One thread. The
target is 10 ms.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import dcap_qvl
from rich.console import Console
from rich.table import Table

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence
from motte.attest.platforms import simulated
from motte.attest.platforms.dcap_collateral import Collateral
from motte.attest.policy import (
    AllOf,
    InsecureAllowSimulated,
    Measurement,
    NotDebug,
    Platform,
    PlatformInstance,
    TcbStatus,
)
from motte.attest.verify import verify
from motte.measure.compare import compare
from motte.measure.record import UNPROTECTED, Setting, state
from motte.measure.record_file import append
from motte.seal.primitives import new_ed25519

SETTING = Setting(threads=1, dtype="none", device="cpu", engine="none", enclave=UNPROTECTED)
SAMPLES_AT = datetime(2025, 6, 20, tzinfo=UTC)
Case = tuple[str, Evidence, Anchors, datetime]


def maker() -> ModuleType:
    """The maker of synthetic quotes, from the folder of the tests."""
    path = Path(__file__).parents[1] / "tests/attest/dcap_maker.py"
    spec = importlib.util.spec_from_file_location("dcap_maker", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"no maker of quotes at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def quotes(samples: Path | None) -> list[Case]:
    """SGX and TDX: made here, or real."""
    found: list[Case] = []
    made = maker() if samples is None else None
    for platform in ("sgx", "tdx"):
        if samples is not None:
            quote = (samples / f"{platform}_quote.bin").read_bytes()
            collateral = (samples / f"{platform}_quote_collateral.json").read_bytes()
            evidence = Evidence(platform, {"quote": quote, "collateral": collateral})
            found.append((f"{platform}, real", evidence, Anchors(), SAMPLES_AT))
        elif made is not None:
            one = made.Maker(platform=platform)
            found.append((f"{platform}, synthetic", one.evidence(), one.anchors(), made.AT))
    return found


def door(evidence: Evidence, anchors: Anchors, now: datetime) -> Callable[[], object]:
    """The whole way, with a policy that the evidence satisfies."""
    data = evidence.encode()
    any_word = frozenset({"UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded"})
    plain = AllOf(InsecureAllowSimulated(), NotDebug())
    claims = verify(evidence, plain, now, anchors=anchors).claims
    policy = AllOf(
        InsecureAllowSimulated(),
        NotDebug(),
        Platform(frozenset({evidence.platform})),
        Measurement(frozenset(list(claims.measurements.values())[:1])),
        TcbStatus(any_word),
        PlatformInstance(frozenset({claims.instance or "00"})),
        AllOf(NotDebug()),
    )
    return lambda: verify(Evidence.decode(data), policy, now, anchors=anchors)


def bare(evidence: Evidence, anchors: Anchors, now: datetime) -> Callable[[], object]:
    """``dcap-qvl`` alone."""
    quote, now_s = evidence.documents["quote"], int(now.timestamp())
    collateral = Collateral.decode(evidence.documents["collateral"], check="G-2").for_library()
    if anchors.intel_root is None:
        return lambda: dcap_qvl.verify(quote, collateral, now_s)
    return lambda: dcap_qvl.verify_with_root_ca(quote, collateral, anchors.intel_root, now_s)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="rounds after the warm-up")
    parser.add_argument("--inner", type=int, default=5, help="calls in one sample")
    parser.add_argument("--samples", type=Path, help="folder of real quotes and collateral")
    parser.add_argument("--records", type=Path, help="append one record a figure to this file")
    options = parser.parse_args()
    private, public = new_ed25519()
    candidates: dict[str, Callable[[], Any]] = {}
    for name, evidence, anchors, now in quotes(options.samples):
        candidates[f"{name}: evidence to verdict"] = door(evidence, anchors, now)
        candidates[f"{name}: dcap-qvl alone"] = bare(evidence, anchors, now)
    development = simulated.issue(bytes(64), private=private)
    candidates["simulated: evidence to verdict"] = door(development, Anchors(simulated_signers=(public,)), SAMPLES_AT)
    found = compare(candidates, repeats=options.repeats, inner=options.inner)
    table = Table("what", "n", "median ms", "min", "max", title="verification, one thread")
    for row, series in zip(found.rows(), found.series, strict=True):
        figures = (f"{1e3 * row[name]:.2f}" for name in ("median", "min", "max"))
        table.add_row(row["name"], str(row["repeats"]), *figures)
        if options.records:
            record = state(
                series="verify",
                what=str(row["name"]),
                value=row["median"],
                unit="s",
                setting=SETTING,
                statistic="median",
                samples=series.samples,
                parameters={"inner": options.inner},
            )
            append(options.records, record)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
