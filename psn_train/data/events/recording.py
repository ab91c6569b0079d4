"""What a recording of an event camera is, however its file is written.

Conventions, for every reader: `t` in microseconds, int64, never falling; `x` from 0 at the left to width - 1, `y` from
0 at the top to height - 1 as the format defines left and top; `p` 1 where it became brighter (ON) and 0 where it became
darker (OFF). The one exception is stated at `aedat2.read_dvs128`: x and y change places.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# 16 bytes an event; t first and aligned
EVENT_DTYPE = np.dtype({"names": ["t", "x", "y", "p"], "formats": ["<i8", "<i2", "<i2", "u1"], "itemsize": 16})


class EventError(ValueError):
    """A recording cannot be read. The message says where, what was found, what was wanted and what to do."""


@dataclass(frozen=True)
class Recording:
    """The events of one recording, checked: every address is on the sensor and time never falls.

    Attributes:
        events: EVENT_DTYPE [E], in the order of the file.
        sensor: (width, height) in pixels.
        repairs: what was not as the format wants it and was put right or left out, by name, with the number of events
            or bytes; empty for a sound file. The names are explained in `REPAIRS`.
    """

    events: np.ndarray
    sensor: tuple[int, int]
    repairs: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.events)

    @property
    def duration_us(self) -> int:
        """From the first event to the last; 0 for fewer than two."""
        return int(self.events["t"][-1]) - int(self.events["t"][0]) if len(self.events) else 0


@dataclass(frozen=True)
class FlatRecording:
    """A recording's events by their places in a frame, which take a quarter to a half of the memory.

    Attributes:
        address: int32 [E], (p * H + y) * W + x.
        t: int32 or int64 [E], us since the first event.
        sensor: (width, height) in pixels.
    """

    address: np.ndarray
    t: np.ndarray
    sensor: tuple[int, int]

    def __len__(self) -> int:
        return len(self.address)


# every repair there is; a reader makes no other
REPAIRS = {
    "wraps": "times when the camera's clock started anew; what follows was moved on by its range",
    "sorted": "events that came before an earlier one and were put in their place (stable sort by time)",
    "cut_bytes": "bytes at the end that are less than one event and were left out",
    "not_polarity": "words of other kinds (APS, IMU, special events), which are no events of the sensor",
    "not_valid": "places of AEDAT 3 packets that are marked as not valid, or hold nothing",
    "no_base": "EVT2 and EVT3 events before the first word that says their time or their row; left out",
    "other_streams": "events of a further camera in the same file (AEDAT 3 and 4), which were left out",
}


def make_events(t, x, y, p) -> np.ndarray:
    """Columns [E] each -> EVENT_DTYPE [E]."""
    events = np.zeros(len(t), EVENT_DTYPE)
    events["t"], events["x"], events["y"], events["p"] = t, x, y, p
    return events
