"""One finding of the doctor, and the subject that it is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from motte.errors import SettingError

State = Literal["present", "absent", "unknown"]
STATES: Final = ("present", "absent", "unknown")


@dataclass(frozen=True)
class Subject:
    """What can be found on a machine.

    Names are worded so that *present* is the better state ("swap off", not "swap").

    Attributes:
        name: the same on every machine.
        group: the heading that it stands under.
        presence: what its presence means, and what it does not mean.
        absence: what its absence means.
    """

    name: str
    group: str
    presence: str
    absence: str

    def found(self, state: State, detail: str) -> Finding:
        """A finding about this subject."""
        return Finding(self, state, detail)


@dataclass(frozen=True)
class Finding:
    """What was found about one subject.

    Attributes:
        state: ``unknown`` where the machine does not tell; it counts as absent.
        detail: what exactly was seen on this machine.
    """

    subject: Subject
    state: State
    detail: str

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise SettingError("unknown state", where=self.name, expected=" or ".join(STATES), got=repr(self.state))

    @property
    def name(self) -> str:
        """The subject's name."""
        return self.subject.name

    @property
    def group(self) -> str:
        """The subject's heading."""
        return self.subject.group

    @property
    def meaning(self) -> str:
        """What this state means here: what presence means when present, what absence means when absent or unknown."""
        if self.state == "present":
            return self.subject.presence
        if self.state == "absent":
            return self.subject.absence
        return f"Could not be found out, so count it as absent. {self.subject.absence}"

    def to_json(self) -> dict[str, str]:
        """As an object for ``--json``."""
        return {
            "name": self.name,
            "group": self.group,
            "state": self.state,
            "detail": self.detail,
            "meaning": self.meaning,
        }
