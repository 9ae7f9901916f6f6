"""How a simulated device breaks, for tests.

What is to break is in the environment variable ``XFERD_SIMULATED_FAULTS``: words ``name=value`` between commas.

    hang=N         the process stops for good when it is to begin its Nth move
    stall=N        the Nth move never ends, while the process goes on
    crash=N        the process ends at once at its Nth move, killed
    lost=N         the Nth move ends with an error after which the device is of no more use
    fail=N         the Nth move fails, and the next one works
    oom=1          nothing can be allocated
    unusable=1     the device refuses a context
    delay=SECONDS  each move takes so much longer
    once=PATH      only the first fault strikes that can make a file of this name, of all processes
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from xferd.api.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

FAULTS = "XFERD_SIMULATED_FAULTS"


@dataclass(frozen=True, slots=True)
class Faults:
    """What breaks; see the module's docstring. Numbers count from 1, and 0 is never."""

    hang: int = 0
    stall: int = 0
    crash: int = 0
    lost: int = 0
    fail: int = 0
    oom: int = 0
    unusable: int = 0
    delay: float = 0.0
    once: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Faults:
        """Return what the variable says; nothing breaks where it is not set.

        Raises:
            ConfigError: it cannot be understood.
        """
        text = environment.get(FAULTS, "")
        kinds: dict[str, type[int | float | str]] = {
            field.name: {"delay": float, "once": str}.get(field.name, int) for field in fields(cls)
        }
        values: dict[str, int | float | str] = {}
        for word in filter(None, text.split(",")):
            name, _, value = word.partition("=")
            try:
                values[name] = kinds[name](value)
            except (KeyError, ValueError) as exc:
                raise ConfigError(
                    f"{FAULTS} has {word!r}", limit=f"name=value of {', '.join(kinds)}", remedy="correct it"
                ) from exc
        return cls(**values)  # type: ignore[arg-type]  # each value is of its field's type

    def strikes(self, name: str, count: int) -> bool:
        """Whether a fault strikes at the ``count``th time."""
        if not count or getattr(self, name) != count:
            return False
        if not self.once:
            return True
        try:
            Path(self.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
