"""An alarm with hysteresis: one threshold to sound, a lower one to be armed again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Alarm:
    """Sounds once when a value rises above a threshold, and not again before it has fallen below half of that.

    Example:
        >>> alarm = Alarm(1.0)
        >>> [alarm.sounds(value) for value in (0.9, 1.1, 0.8, 1.2, 0.4, 1.1)]
        [False, True, False, False, False, True]
    """

    threshold: float
    armed: bool = True

    def sounds(self, value: float) -> bool:
        """Whether it sounds at this value; a NaN is no value."""
        sounds = self.armed and value > self.threshold
        if sounds:
            self.armed = False
        elif value < self.threshold / 2:
            self.armed = True
        return sounds
