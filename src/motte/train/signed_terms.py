"""The terms of a training run, as the owner of sealed data signs them, and the settings that a host gave against them.

They stand in the signed header of the sealed data (docs/spec/data.md), in clear: evidence of a run is bound to their
digest, and its keys are released only against that evidence. So whoever starts a run must have said the same **before
evidence is made**; the first difference is named.

Not among them are the recipe, the seed and which records are used: the host chooses them. What bounds what it can learn
that way is the noise, which is signed, and the number of releases, which the key broker counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from motte.attest.configuration import RunConfiguration
from motte.digests import sha256
from motte.errors import FormatError, SettingError
from motte.limits import MAX_NAME_BYTES
from motte.offload.settings import Asymmetric
from motte.offload.words import noise_text, rank_text
from motte.seal.header import BundleHeader
from motte.seal.run_terms import TRUSTED, RunTerms
from motte.strict_json import canonical, parse
from motte.zoo.own_models import is_path

if TYPE_CHECKING:
    from motte.train.settings import TrainSettings

LOCAL: Final = "local"
"""The word for an accelerator process that the trusted side starts itself."""
SIGNED_SCHEMES: Final = ("asymmetric", TRUSTED)
"""Schemes that an owner can sign: the others protect nothing, or are research."""
_MAX_LAYERS_BYTES: Final = 80
_UNCHECKED: Final = "off"


def training_terms(
    *,
    scheme: str,
    model: str,
    width: float = 1.0,
    protection: Asymmetric | None = None,
    broker: str = "",
    accelerators: tuple[str, ...] = (),
    ranks: int = 1,
    ranks_policy: str = "",
) -> RunTerms:
    """The terms that these words mean, for the header of sealed data.

    Args:
        protection: every setting of ``asymmetric``; None under ``trusted``.
        accelerators: which may be used, each the address that a run is given, followed by ``#`` and its pin where TLS
            pins it, or :data:`LOCAL`; none: any.
        ranks_policy: :func:`motte.train.meeting.ranks_word` where there are several processes.

    Raises:
        SettingError: a scheme or a model that cannot be signed. InputError: a word is too long.
    """
    if scheme not in SIGNED_SCHEMES:
        expected = " or ".join(SIGNED_SCHEMES)
        raise SettingError("no owner signs this scheme", where="scheme", expected=expected, got=scheme)
    if is_path(model):
        raise SettingError(
            "the code of a model of one's own would run inside, and no signature or measurement covers it",
            where="model",
            expected="a model known by name",
            got=model[:200],
        )
    if (protection is None) != (scheme == TRUSTED):
        raise SettingError("the settings of another scheme", where="scheme", got=scheme)
    if protection is None and accelerators:
        raise SettingError("nothing leaves under this scheme", where="accelerator", got=f"scheme {scheme}")
    placement: dict[str, Any] = {"model": model, "width": float(width)}
    if protection is not None:
        placement |= {
            "decomposition": protection.decomposition,
            "iterations": protection.iterations,
            "offload_layers": _names(protection.offloaded_layers),
            "rank": rank_text(protection.rank),
            "residual_dtype": protection.residual_dtype,
            "trusted_layers": _names(protection.trusted_layers),
        }
    noise = None if protection is None or protection.noise is None else noise_text(protection.noise)
    return RunTerms(
        broker=broker,
        scheme=scheme,
        placement=canonical(placement).decode("ascii"),
        noise=noise,
        integrity=_UNCHECKED if protection is None else protection.integrity,
        peers=accelerators,
        ranks=ranks,
        ranks_policy=ranks_policy,
    )


def check_settings(settings: TrainSettings, header: BundleHeader, processes: int) -> RunConfiguration | None:
    """Compare what a host said with what the owner signed in the **verified** ``header``; the signed configuration.

    Args:
        processes: how many the host says there are.

    Returns:
        None: the owner signed no terms, and nobody demands any.

    Raises:
        SettingError: names the first setting that differs. InputError: a key broker is given, and no terms were signed.
    """
    if header.run is None:
        if settings.broker is None and settings.meeting is None:
            return None
        return RunConfiguration.of(header)  # says that nothing was signed
    signed = header.run
    _same("scheme", signed.scheme, settings.scheme)
    scheme = settings.offload_scheme()
    protection = scheme if isinstance(scheme, Asymmetric) else None
    given = training_terms(
        scheme=settings.scheme,
        model=settings.model,
        width=settings.width,
        protection=protection,
        broker=signed.broker,
        accelerators=signed.peers,
        ranks=signed.ranks,
        ranks_policy=signed.ranks_policy,
    )
    configuration = RunConfiguration.of(header)
    if settings.broker is not None:
        _same("broker", str(configuration.broker_key()), str(settings.broker.address.key))
    _same("noise", signed.noise or "none", given.noise or "none")
    _same("integrity", signed.integrity, given.integrity)
    if protection is not None and signed.peers:
        _check_accelerator(signed.peers, settings)
    _same("ranks", str(signed.ranks), str(processes))
    _check_placement(signed.placement, given.placement)
    if signed.ranks > 1:
        if settings.meeting is None:
            raise SettingError(
                "the owner of the data signed several processes that prove themselves to each other",
                where="meeting",
                expected=f"{signed.ranks} processes, each with evidence and the signed policy",
                hint="--verify POLICY --meet ADDRESS, and evidence",
            )
        _same("the policy that processes demand of each other", signed.ranks_policy, settings.meeting.word())
    return configuration


def accelerator_word(settings: TrainSettings) -> str:
    """The accelerator of a run as signed terms spell it."""
    if settings.accelerator is None:
        return LOCAL
    return settings.accelerator + ("" if settings.accelerator_pin is None else f"#{settings.accelerator_pin}")


def _check_accelerator(signed: tuple[str, ...], settings: TrainSettings) -> None:
    word = accelerator_word(settings)
    if word not in signed:
        raise _differs("accelerator", " or ".join(signed), word)


def _check_placement(signed: str, given: str) -> None:
    if signed == given:
        return
    try:
        value = parse(signed, max_bytes=MAX_NAME_BYTES, what="placement")
    except FormatError:
        value = None
    wanted: dict[str, Any] = value if isinstance(value, dict) else {}
    found: dict[str, Any] = parse(given, max_bytes=MAX_NAME_BYTES, what="placement")
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise _differs(name, str(wanted.get(name)), str(found.get(name)))
    raise _differs("placement", signed, given)


def _same(name: str, signed: str, given: str) -> None:
    if signed != given:
        raise _differs(name, signed, given)


def _differs(name: str, signed: str, given: str) -> SettingError:
    return SettingError(
        "the owner of the data signed another setting",
        where=name,
        expected=signed[:300],
        got=given[:300],
        hint="give the signed one, or let the owner seal the data again",
    )


def _names(layers: tuple[str, ...] | None) -> str | None:
    """The names as one word; of many their digest, since a header has room for little."""
    if layers is None:
        return None
    text = ",".join(layers)
    return text if len(text.encode()) <= _MAX_LAYERS_BYTES else f"sha256:{sha256(text.encode()).hex()}"
