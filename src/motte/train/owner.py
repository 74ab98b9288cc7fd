"""Whose keys protect what a training run writes: checkpoints and logs are sealed to the owner and signed in their name.

One private key is enough. A signer's key of its own may be given; without it one is derived from the opener, so that
only who can open a run's files could have written them, and a host, which knows public keys only, cannot forge one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from motte.seal import primitives
from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPrivateKey
from motte.train.settings import TrainSettings

_SIGNER_PURPOSE: Final = b"signer of training checkpoints and logs"
_NOISE_PURPOSE: Final = b"noise key of a training run"
_RUN_PURPOSE: Final = b"opener of what a training run under a key broker wrote"


@dataclass(frozen=True, slots=True)
class OwnerKeys:
    """Secret.

    Attributes:
        opener: opens what the run wrote; it is sealed to it.
        recipients: who else can open it.
        signer: signs it; whoever continues the run demands this signer.
    """

    opener: RecipientPrivateKey = field(repr=False)
    recipients: tuple[RecipientPublicKey, ...]
    signer: SignerPrivateKey = field(repr=False)

    @property
    def everybody(self) -> tuple[RecipientPublicKey, ...]:
        """Everybody who can open it, the opener first, nobody twice."""
        return tuple(dict.fromkeys((self.opener.public, *self.recipients)))

    def noise_key(self, run_id: bytes, rank: int) -> bytes:
        """32 secret bytes: the key of the noise of one process of one run.

        Derived, so that every process of a distributed run can find its own again without sending it to another.
        """
        return primitives.derived_key(self.opener.secret, _NOISE_PURPOSE + run_id + rank.to_bytes(4, "big"))


def derived_signer(opener: RecipientPrivateKey) -> SignerPrivateKey:
    """The signer that belongs to an opener for which none was given."""
    return SignerPrivateKey(primitives.derived_key(opener.secret, _SIGNER_PURPOSE))


def run_keys(data_key: bytes, run: bytes) -> OwnerKeys:
    """The keys of a run under a key broker: they follow from the data's first key, so that whoever can open the data,
    and nobody else, can open and could have written what a run on it wrote.

    Args:
        data_key: of section 0 of the sealed data, 32 bytes.
        run: the run's name at its broker, 16 bytes.
    """
    opener = RecipientPrivateKey(primitives.derived_key(data_key, _RUN_PURPOSE + run))
    return OwnerKeys(opener, (), derived_signer(opener))


def owner_keys(settings: TrainSettings) -> OwnerKeys | None:
    """The keys of a run; None where it was given none: nothing can be sealed then."""
    opener = settings.checkpoint_key or settings.data_key
    if opener is None:
        return None
    return OwnerKeys(opener, settings.checkpoint_recipients, settings.checkpoint_signer or derived_signer(opener))
