"""The options of ``motte train``, in the groups in which its help shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from motte.cli.options import parse_size, private_key, public_key
from motte.limits import MAX_RELEASE

if TYPE_CHECKING:
    from motte.train.settings import TrainSettings

_WHAT, _RECIPE, _SCHEME = "Model and data", "Recipe (default: published, by model and data)", "Scheme"
# Their options have no type column (metavar ""): beside it their names would be cut off at 80 columns.
_WHERE, _KEPT, _LOGS, _INSECURE = (
    "Where it runs",
    "Checkpoints",
    "Logs and records",
    "Insecure: only where everybody may see it",
)


@dataclass(frozen=True, slots=True)
class SubjectOptions:
    """What is trained on what."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODEL",
            rich_help_panel=_WHAT,
            help="resnet18|34|50|101|152, resnet20|32, vgg11|13|16|19 (also _bn), or path/to/module.py:factory.",
        ),
    ]
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DATA",
            rich_help_panel=_WHAT,
            help="fashion-mnist, mnist, cifar10, cifar100, imagenet:PATH, folder:PATH or sealed:FILE. Folders are for "
            "public data only.",
        ),
    ]
    width: Annotated[
        float, typer.Option("--width", metavar="X", rich_help_panel=_WHAT, help="Channels of the model times this.")
    ] = 1.0
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            metavar="DIR",
            rich_help_panel=_WHAT,
            help="Where the files of a public set lie; nothing is downloaded then.",
        ),
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", metavar="N", rich_help_panel=_WHAT, help="Side of the images. (default: own)"),
    ] = None
    subset: Annotated[
        int | None,
        typer.Option(
            "--subset", metavar="N", rich_help_panel=_WHAT, help="Only N records of each split, chosen by the seed."
        ),
    ] = None
    data_key: Annotated[
        Path | None,
        typer.Option("--data-key", metavar="FILE", rich_help_panel=_WHAT, help="Private key that opens sealed data."),
    ] = None
    data_signer: Annotated[
        str | None,
        typer.Option(
            "--data-signer",
            metavar="KEY",
            rich_help_panel=_WHAT,
            help="Demanded signer of sealed data: motte-signer-1-..., or a .pub file.",
        ),
    ] = None
    data_min_release: Annotated[
        int,
        typer.Option(
            "--data-min-release",
            metavar="N",
            min=0,
            max=MAX_RELEASE,
            rich_help_panel=_WHAT,
            help="Refuse sealed data of a lower release.",
        ),
    ] = 0
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            metavar="N",
            min=0,
            max=256,
            rich_help_panel=_WHAT,
            help="Threads that prepare batches ahead; 0 inside an enclave.",
        ),
    ] = 0
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            rich_help_panel=_WHAT,
            help="Of initial weights, order, augmentation, dropout. Noise and checks never come from it.",
        ),
    ] = 0

    def read(self) -> dict[str, Any]:
        """Fields of :class:`TrainSettings`, keys opened."""
        from motte.seal.keys import RecipientPrivateKey, SignerPublicKey

        opener, signer = self.data_key, self.data_signer
        return {
            **{name: getattr(self, name) for name in ("model", "data", "width", "data_dir", "image_size", "subset")},
            **{name: getattr(self, name) for name in ("data_min_release", "workers", "seed")},
            "data_key": None if opener is None else private_key(opener, RecipientPrivateKey, option="--data-key"),
            "data_signer": None if signer is None else public_key(signer, SignerPublicKey, option="--data-signer"),
        }


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """How it is trained."""

    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", rich_help_panel=_RECIPE, help="All processes together.")
    ] = None
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", rich_help_panel=_RECIPE, help="Epochs.")] = None
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="X", rich_help_panel=_RECIPE, help="Initial learning rate.")
    ] = None
    scheduler: Annotated[
        Literal["cos", "step"] | None,
        typer.Option("--scheduler", rich_help_panel=_RECIPE, help="Cosine to zero, or a step every so many epochs."),
    ] = None
    lr_decay: Annotated[
        float | None,
        typer.Option("--lr-decay", metavar="X", rich_help_panel=_RECIPE, help="Factor of each step."),
    ] = None
    decay_period: Annotated[
        int | None,
        typer.Option("--decay-period", metavar="N", rich_help_panel=_RECIPE, help="Epochs between steps."),
    ] = None
    momentum: Annotated[
        float | None, typer.Option("--momentum", metavar="X", rich_help_panel=_RECIPE, help="Of SGD.")
    ] = None
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", metavar="X", rich_help_panel=_RECIPE, help="Of SGD.")
    ] = None
    max_steps: Annotated[
        int | None,
        typer.Option("--max-steps", metavar="N", rich_help_panel=_RECIPE, help="End after N steps in all."),
    ] = None

    def read(self) -> dict[str, Any]:
        """Fields of :class:`TrainSettings`."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class ProtectionOptions:
    """What may leave, and how."""

    scheme: Annotated[
        Literal["asymmetric", "trusted", "accelerator", "lowrank", "residual"],
        typer.Option(
            "--scheme",
            rich_help_panel=_SCHEME,
            help="asymmetric: split with an accelerator. trusted: all inside. accelerator: all outside, NOTHING "
            "protected. lowrank, residual: research, only that half of each activation is used; nothing leaves.",
        ),
    ] = "asymmetric"
    noise: Annotated[
        str | None,
        typer.Option(
            "--noise",
            metavar="NOISE",
            rich_help_panel=_SCHEME,
            help="none, or gaussian:residual=CLIP/MULTIPLIER[,gradient=CLIP/MULTIPLIER][,update=CLIP/MULTIPLIER]"
            "[,adjacency=replace|add-remove]. Needed by asymmetric and residual; `motte privacy` says its worth.",
        ),
    ] = None
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            metavar="RULE",
            rich_help_panel=_SCHEME,
            help="Principal channels that stay inside: fixed:R, schedule[:START,FACTOR,CAP], energy:SHARE[,CAP] or "
            "entropy[:CAP]. (default: schedule:2,2,32)",
        ),
    ] = None
    iterations: Annotated[
        int, typer.Option("--iterations", metavar="N", rich_help_panel=_SCHEME, help="Of the decomposition, 1 to 16.")
    ] = 3
    decomposition: Annotated[
        Literal["als", "range-finder"], typer.Option("--decomposition", rich_help_panel=_SCHEME, help="How.")
    ] = "range-finder"
    residual_dtype: Annotated[
        Literal["same", "float32", "bfloat16"],
        typer.Option("--residual-dtype", rich_help_panel=_SCHEME, help="Element type of what leaves."),
    ] = "same"
    integrity: Annotated[
        Literal["freivalds", "off"],
        typer.Option(
            "--integrity", rich_help_panel=_SCHEME, help="off only for an accelerator that is curious but honest."
        ),
    ] = "freivalds"
    trusted_layers: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-layers",
            metavar="NAME",
            rich_help_panel=_SCHEME,
            help="A layer that stays inside; repeat it. (default: the first and the last)",
        ),
    ] = None
    offload_layers: Annotated[
        list[str] | None,
        typer.Option(
            "--offload-layers",
            metavar="NAME",
            rich_help_panel=_SCHEME,
            help="A layer that may leave; repeat it. (default: every convolution and linear layer that is not trusted)",
        ),
    ] = None

    def read(self) -> dict[str, Any]:
        """Fields of :class:`TrainSettings`, words parsed.

        Raises:
            SettingError: a word that is none.
        """
        from motte.offload.words import parse_noise, parse_rank
        from motte.train.settings import PUBLISHED_RANK, UNSET

        plain = ("scheme", "iterations", "decomposition", "residual_dtype", "integrity")
        return {
            **{name: getattr(self, name) for name in plain},
            "noise": UNSET if self.noise is None else parse_noise(self.noise),
            "rank": PUBLISHED_RANK if self.rank is None else parse_rank(self.rank),
            "trusted_layers": None if self.trusted_layers is None else tuple(self.trusted_layers),
            "offload_layers": None if self.offload_layers is None else tuple(self.offload_layers),
        }


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How it is judged, and what is added to the images: nothing of what may leave depends on it."""

    evaluate: Annotated[
        Literal["inside", "split"],
        typer.Option(
            "--evaluate",
            rich_help_panel=_SCHEME,
            help="The test split: inside, so that nothing of it leaves, or split as in training.",
        ),
    ] = "inside"
    delta: Annotated[
        float | None,
        typer.Option("--delta", metavar="X", rich_help_panel=_SCHEME, help="Of the reported epsilon. (default: 1e-5)"),
    ] = None
    input_noise: Annotated[
        float,
        typer.Option(
            "--input-noise",
            metavar="X",
            rich_help_panel=_SCHEME,
            help="Standard deviation of noise on training images; no accounting counts it.",
        ),
    ] = 0.0

    def read(self) -> dict[str, Any]:
        """Fields of :class:`TrainSettings`."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class PlaceOptions:
    """Where it runs."""

    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            rich_help_panel=_WHERE,
            help="Of the accelerator process that is started: cpu, cuda or cuda:N.",
        ),
    ] = "cpu"
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator",
            metavar="ADDR",
            rich_help_panel=_WHERE,
            help="One that runs already: unix:PATH or tcp:HOST:PORT; {rank} stands for the process under torchrun.",
        ),
    ] = None
    accelerator_pin: Annotated[
        str | None,
        typer.Option(
            "--accelerator-pin", metavar="PIN", rich_help_panel=_WHERE, help="sha256:... of its public key, for TLS."
        ),
    ] = None
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(
            "--dtype",
            rich_help_panel=_WHERE,
            help="bf16: autocast. (default: bf16 for --scheme trusted where the CPU has AMX, else fp32)",
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", rich_help_panel=_WHERE, help="Of this process. (default: all cores)"),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            rich_help_panel=_WHERE,
            help="Refuse before the start what does not fit, such as 4GiB.",
        ),
    ] = None
    insecure_plaintext_collectives: Annotated[
        bool,
        typer.Option(
            "--insecure-plaintext-collectives",
            metavar="",
            rich_help_panel=_INSECURE,
            help="Under torchrun: gradients between trusted processes cross the network unencrypted.",
        ),
    ] = False

    def read(self) -> dict[str, Any]:
        """Fields of :class:`TrainSettings`."""
        names = ("device", "accelerator", "accelerator_pin", "dtype", "threads", "insecure_plaintext_collectives")
        return {
            **{name: getattr(self, name) for name in names},
            "memory_bytes": None if self.memory is None else parse_size(self.memory),
        }


@dataclass(frozen=True, slots=True)
class KeptOptions:
    """What is kept of the run."""

    checkpoint_dir: Annotated[
        Path | None,
        typer.Option("--checkpoint-dir", metavar="DIR", rich_help_panel=_KEPT, help="Of `last` and `best`."),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            "--checkpoint-every", metavar="STEPS", rich_help_panel=_KEPT, help="Beside the end of each epoch."
        ),
    ] = None
    checkpoint_key: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint-key",
            metavar="FILE",
            rich_help_panel=_KEPT,
            help="Private key of a recipient: checkpoints and logs are sealed to it. (default: --data-key)",
        ),
    ] = None
    checkpoint_recipient: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint-recipient", metavar="KEY", rich_help_panel=_KEPT, help="Who else can open them; repeat it."
        ),
    ] = None
    checkpoint_signer: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint-signer",
            metavar="FILE",
            rich_help_panel=_KEPT,
            help="Private key that signs them. (default: one derived from --checkpoint-key)",
        ),
    ] = None
    insecure_plaintext_checkpoint: Annotated[
        bool,
        typer.Option(
            "--insecure-plaintext-checkpoint",
            metavar="",
            rich_help_panel=_INSECURE,
            help="Neither encrypted nor signed: for public data without noise.",
        ),
    ] = False
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=_KEPT, help="Continue from `last` in --checkpoint-dir.")
    ] = False
    min_release: Annotated[
        int,
        typer.Option(
            "--min-release",
            metavar="N",
            min=0,
            max=MAX_RELEASE,
            rich_help_panel=_KEPT,
            help="Refuse to continue from an older checkpoint.",
        ),
    ] = 0
    log_dir: Annotated[
        Path | None,
        typer.Option(
            "--log-dir",
            metavar="DIR",
            rich_help_panel=_LOGS,
            help="Scalars by step: TensorBoard for public data, a sealed log for private data (motte train-log).",
        ),
    ] = None
    insecure_plaintext_log: Annotated[
        bool,
        typer.Option(
            "--insecure-plaintext-log",
            metavar="",
            rich_help_panel=_INSECURE,
            help="Loss and accuracy on private data may be seen by the host.",
        ),
    ] = False
    profile: Annotated[
        bool,
        typer.Option("--profile", rich_help_panel=_LOGS, help="Each split layer's timeline and link counts too."),
    ] = False
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", rich_help_panel=_LOGS, help="Add the results to a file of records."),
    ] = None

    def read(self) -> dict[str, Any]:
        """Fields of :class:`TrainSettings`, keys opened."""
        from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPrivateKey

        plain = ("checkpoint_dir", "checkpoint_every", "insecure_plaintext_checkpoint", "resume", "min_release")
        logs = ("log_dir", "insecure_plaintext_log", "profile", "record")
        opener, signer = self.checkpoint_key, self.checkpoint_signer
        option = "--checkpoint-recipient"
        return {
            **{name: getattr(self, name) for name in (*plain, *logs)},
            "checkpoint_key": None
            if opener is None
            else private_key(opener, RecipientPrivateKey, option="--checkpoint-key"),
            "checkpoint_signer": None
            if signer is None
            else private_key(signer, SignerPrivateKey, option="--checkpoint-signer"),
            "checkpoint_recipients": tuple(
                public_key(text, RecipientPublicKey, option=option) for text in self.checkpoint_recipient or ()
            ),
        }


def settings_of(
    subject: SubjectOptions,
    recipe: RecipeOptions,
    protection: ProtectionOptions,
    evaluation: EvaluationOptions,
    place: PlaceOptions,
    kept: KeptOptions,
    **more: Any,
) -> TrainSettings:
    """The settings that the options say, with further fields of :class:`TrainSettings`.

    Raises:
        SettingError: a value out of range, or options that contradict each other.
    """
    from motte.train.settings import TrainSettings

    groups = (subject, recipe, protection, evaluation, place, kept)
    return TrainSettings(**{name: value for group in groups for name, value in group.read().items()}, **more)
