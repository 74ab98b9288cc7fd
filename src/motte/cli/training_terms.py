"""Options of ``motte seal-data``: the terms of every run on the data, signed into its header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motte.cli.anchoring import AnchorOptions, read_small
from motte.cli.train_options import ProtectionOptions
from motte.errors import SettingError
from motte.limits import MAX_POLICY_TEXT_BYTES

if TYPE_CHECKING:
    from motte.seal.run_terms import RunTerms

_TERMS = "Terms of every run on it, signed"


@dataclass(frozen=True, slots=True)
class TermsOptions:
    """What is trained, where, by how many."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            rich_help_panel=_TERMS,
            help="What may be trained on it, a name that `motte train` knows: with it, and with --scheme and --noise,"
            " the terms are signed. Needed with --broker.",
        ),
    ] = None
    width: Annotated[
        float, typer.Option("--width", metavar="X", rich_help_panel=_TERMS, help="Channels of the model times this.")
    ] = 1.0
    accelerator: Annotated[
        list[str] | None,
        typer.Option(
            "--accelerator",
            metavar="ADDR",
            rich_help_panel=_TERMS,
            help="One that may be used, as `motte train` gets it, with #PIN where TLS pins it; local: one that the run"
            " starts itself. Repeat it. (default: any, since none is believed)",
        ),
    ] = None
    ranks: Annotated[
        int, typer.Option("--ranks", metavar="N", min=1, rich_help_panel=_TERMS, help="Trusted processes of a run.")
    ] = 1
    verify: Annotated[
        Path | None,
        typer.Option(
            "--verify",
            metavar="POLICY",
            rich_help_panel=_TERMS,
            help="What several processes demand of each other's evidence, with the roots that are given here.",
        ),
    ] = None

    def make(self, protection: ProtectionOptions, given: AnchorOptions, *, broker: str) -> RunTerms | None:
        """The terms; None: none are signed.

        Raises:
            SettingError: terms without a model, or words that contradict each other. InputError: not a policy.
        """
        if self.model is None:
            if self != TermsOptions() or protection != ProtectionOptions() or given != AnchorOptions():
                raise SettingError("terms of runs need the model that is trained", expected="--model MODEL")
            if broker:
                raise SettingError(
                    "a broker gives keys to runs whose terms are signed",
                    expected="--model MODEL, --scheme SCHEME and, for asymmetric, --noise NOISE",
                )
            return None
        if (self.ranks > 1) != (self.verify is not None) or (self.verify is None and given != AnchorOptions()):
            raise SettingError("several processes demand evidence of each other", expected="--ranks N --verify POLICY")
        from motte.offload.settings import Asymmetric
        from motte.train.models import model_names
        from motte.train.settings import TrainSettings
        from motte.train.signed_terms import training_terms

        if self.model not in model_names() and ".py" not in self.model:
            raise SettingError("no model of that name to train", where="--model", got=self.model[:200])
        # Made as a run makes them, so that what no run could say is refused here.
        settings = TrainSettings(model=self.model, data="fashion-mnist", width=self.width, **protection.read())
        scheme = settings.offload_scheme()
        return training_terms(
            scheme=settings.scheme,
            model=self.model,
            width=self.width,
            protection=scheme if isinstance(scheme, Asymmetric) else None,
            broker=broker,
            accelerators=tuple(self.accelerator or ()),
            ranks=self.ranks,
            ranks_policy=self._policy(given),
        )

    def _policy(self, given: AnchorOptions) -> str:
        if self.verify is None:
            return ""
        from motte.attest.policy_text import loads
        from motte.train.meeting import ranks_word

        return ranks_word(loads(read_small(self.verify, MAX_POLICY_TEXT_BYTES)), given.anchors())
