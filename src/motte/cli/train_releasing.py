"""Options of ``motte train``: a key broker, what speaks for this process, and what the processes of a run demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from motte.cli.anchoring import AnchorOptions
from motte.cli.attest_tpm import TpmOptions
from motte.cli.releasing import ReleaseOptions
from motte.errors import SettingError

if TYPE_CHECKING:
    from motte.attest.evidence import Evidence
    from motte.train.admission import BrokerRun
    from motte.train.meeting import Meeting

_BROKER = "A key broker (in place of --data-key and --checkpoint-key)"
_RANKS = "Several processes, each attested"


@dataclass(frozen=True, slots=True)
class AdmissionOptions:
    """From whom a run gets the keys of sealed data, and how its processes know each other."""

    broker: Annotated[
        str | None,
        typer.Option(
            "--broker",
            metavar="ADDRESS",
            rich_help_panel=_BROKER,
            help="The key broker that the owner of the data named: it gives the keys of the data and of checkpoints,"
            " against evidence, and counts what is released.",
        ),
    ] = None
    broker_run: Annotated[
        str | None,
        typer.Option(
            "--broker-run", metavar="RUN", rich_help_panel=_BROKER, help="The run, as `motte broker run enroll` says."
        ),
    ] = None
    evidence: Annotated[
        Literal["simulated", "tpm", "tdx", "snp", "sgx"] | None,
        typer.Option(
            "--evidence",
            rich_help_panel=_BROKER,
            help="What speaks for this process: this machine (simulated, tpm), the guest (tdx, snp) or the enclave"
            " (sgx) that it runs in.",
        ),
    ] = None
    simulated_key: Annotated[
        Path | None,
        typer.Option(
            "--simulated-key", metavar="FILE", rich_help_panel=_BROKER, help="Of --evidence simulated: who signs it."
        ),
    ] = None
    verify: Annotated[
        Path | None,
        typer.Option(
            "--verify",
            metavar="POLICY",
            rich_help_panel=_RANKS,
            help="Under torchrun: what the processes demand of each other's evidence, as the owner of the data signed"
            " it.",
        ),
    ] = None
    meet: Annotated[
        str | None,
        typer.Option(
            "--meet",
            metavar="ADDRESS",
            rich_help_panel=_RANKS,
            help="Where process 0 waits for the others: tcp:HOST:PORT or unix:PATH.",
        ),
    ] = None

    def read(self, tpm: TpmOptions, given: AnchorOptions) -> dict[str, Any]:
        """The fields ``broker`` and ``meeting`` of :class:`motte.train.settings.TrainSettings`.

        Raises:
            SettingError: options that need another one, or that nothing reads. InputError: a file that is none.
        """
        if (self.broker is None) != (self.broker_run is None):
            raise SettingError("a run has its books at a broker", expected="--broker ADDRESS and --broker-run RUN")
        if (self.verify is None) != (self.meet is None):
            raise SettingError(
                "processes meet somewhere, under a policy", expected="--verify POLICY and --meet ADDRESS"
            )
        asked = ReleaseOptions(None, self.broker, self.evidence, self.verify, self.simulated_key)
        issue = asked.issuer(tpm)
        if issue is None and (self.broker is not None or self.verify is not None):
            raise SettingError("this process has to prove itself", expected="--evidence, such as tpm")
        return {"broker": self._broker(issue), "meeting": self._meeting(asked, given, issue)}

    def _broker(self, issue: Callable[[bytes], Evidence] | None) -> BrokerRun | None:
        if self.broker is None or self.broker_run is None or issue is None:
            return None
        from motte.provision.address import BrokerAddress
        from motte.train.admission import BrokerRun, parse_run

        return BrokerRun(address=BrokerAddress.parse(self.broker), run=parse_run(self.broker_run), issue=issue)

    def _meeting(
        self, asked: ReleaseOptions, given: AnchorOptions, issue: Callable[[bytes], Evidence] | None
    ) -> Meeting | None:
        demanded = asked.verifier(given)
        if demanded is None or self.meet is None or issue is None:
            return None
        from motte.train.meeting import Meeting

        return Meeting(issue=issue, policy=demanded.policy, anchors=demanded.anchors, address=self.meet)
