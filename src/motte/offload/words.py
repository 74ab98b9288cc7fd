"""The words in which a command line says a rank rule and a noise, for every verb that takes them.

    --rank   fixed:8 | schedule | schedule:START,FACTOR,CAP | energy:SHARE[,CAP] | entropy[:CAP]
    --noise  none | gaussian:residual=CLIP/MULTIPLIER[,gradient=...][,update=...][,adjacency=replace|add-remove]

``gaussian:CLIP,MULTIPLIER`` is short for residuals alone; the adjacency is ``replace`` if not given. CLIP is the L2
norm to which every sample's tensor is scaled down; each value gets noise of standard deviation MULTIPLIER * CLIP.
Nothing here imports torch.
"""

from __future__ import annotations

import re
from typing import Final, get_args

from motte.errors import SettingError
from motte.offload.settings import Adjacency, Energy, Entropy, Fixed, Gaussian, Mechanism, Rank, Schedule

_NUMBER: Final = r"[0-9]{1,20}(?:\.[0-9]{1,30})?(?:e[+-]?[0-9]{1,3})?"
_MECHANISM: Final = re.compile(rf"({_NUMBER})/({_NUMBER})")
_SHORT: Final = re.compile(rf"({_NUMBER}),({_NUMBER})")
_SHARE: Final = re.compile(_NUMBER)
_WHOLE: Final = re.compile(r"[0-9]{1,9}")
NOISE_FORM: Final = "none, or gaussian:residual=CLIP/MULTIPLIER[,gradient=CLIP/MULTIPLIER][,update=CLIP/MULTIPLIER]"
RANK_FORM: Final = "fixed:8, schedule, schedule:2,2,32, energy:0.9 or entropy"


def parse_rank(text: str) -> Rank:
    """``fixed:8``, ``schedule``, ``schedule:2,2,32``, ``energy:0.9``, ``energy:0.9,32``, ``entropy``, ``entropy:32``.

    Raises:
        SettingError: anything else.
    """
    rule, colon, rest = text.partition(":")
    words = rest.split(",") if colon else []
    if rule == "fixed" and len(words) == 1:
        return Fixed(_whole_word(words[0], text))
    if rule == "schedule" and len(words) in (0, 3):
        return Schedule(*(_whole_word(word, text) for word in words))
    if rule == "energy" and len(words) in (1, 2) and _SHARE.fullmatch(words[0]):
        return Energy(float(words[0]), *(_whole_word(word, text) for word in words[1:]))
    if rule == "entropy" and len(words) in (0, 1):
        return Entropy(*(_whole_word(word, text) for word in words))
    raise _not_a_rank(text)


def rank_text(rank: Rank) -> str:
    """The word of a rank rule; :func:`parse_rank` reads it back."""
    if isinstance(rank, Fixed):
        return f"fixed:{rank.rank}"
    if isinstance(rank, Schedule):
        return f"schedule:{rank.start},{rank.factor},{rank.cap}"
    if isinstance(rank, Energy):
        return f"energy:{rank.share!r},{rank.cap}"
    return f"entropy:{rank.cap}"


def parse_noise(text: str) -> Gaussian | None:
    """``none``, or ``gaussian:`` and mechanisms; the grammar stands above.

    Raises:
        SettingError: anything else, a mechanism given twice, or none for residuals.
    """
    if text == "none":
        return None
    name, colon, rest = text.partition(":")
    if name != "gaussian" or not colon:
        raise SettingError("not a kind of noise", where="noise", expected=NOISE_FORM, got=repr(text)[:120])
    short = _SHORT.fullmatch(rest)
    if short is not None:
        return Gaussian(residual=Mechanism(float(short[1]), float(short[2])))
    found: dict[str, str] = {}
    for word in rest.split(","):
        key, equals, value = word.partition("=")
        if not equals or key not in ("residual", "gradient", "update", "adjacency"):
            raise SettingError("unknown word of the noise", where="noise", expected=NOISE_FORM, got=repr(word)[:120])
        if key in found:
            raise SettingError("given twice", where="noise", got=key)
        found[key] = value
    if "residual" not in found:
        raise SettingError(
            "no clip and multiplier for residuals", where="noise", expected=NOISE_FORM, got=repr(text)[:120]
        )
    adjacency = found.pop("adjacency", "replace")
    if adjacency not in get_args(Adjacency):
        expected = " or ".join(get_args(Adjacency))
        raise SettingError("unknown adjacency", where="noise", expected=expected, got=repr(adjacency)[:80])
    mechanisms = {key: _mechanism(key, value) for key, value in found.items()}
    return Gaussian(
        residual=mechanisms["residual"],
        gradient=mechanisms.get("gradient"),
        update=mechanisms.get("update"),
        adjacency="replace" if adjacency == "replace" else "add-remove",
    )


def noise_text(noise: Gaussian | None) -> str:
    """The word of a noise; :func:`parse_noise` reads it back."""
    if noise is None:
        return "none"
    named = (("residual", noise.residual), ("gradient", noise.gradient), ("update", noise.update))
    words = [f"{name}={each.clip!r}/{each.noise_multiplier!r}" for name, each in named if each is not None]
    return "gaussian:" + ",".join([*words, f"adjacency={noise.adjacency}"])


def _mechanism(name: str, text: str) -> Mechanism:
    found = _MECHANISM.fullmatch(text)
    if found is None:
        raise SettingError(
            "not a clip and a noise multiplier",
            where=f"noise {name}",
            expected="CLIP/MULTIPLIER, such as 1.0/0.5",
            got=text,
        )
    return Mechanism(float(found[1]), float(found[2]))


def _whole_word(word: str, text: str) -> int:
    if _WHOLE.fullmatch(word) is None:
        raise _not_a_rank(text)
    return int(word)


def _not_a_rank(text: str) -> SettingError:
    return SettingError("not a rank rule", where="rank", expected=RANK_FORM, got=repr(text)[:120])
