"""The `.bin` of N-MNIST and N-Caltech101: 5 bytes an event, no header.

x, y, then p in the highest bit and 23 bits of time in us, big-endian (Orchard et al., 2015, their Read_Ndataset).
"""

from __future__ import annotations

import numpy as np

from psn_train.data.events.checks import checked, unwrap, whole_events
from psn_train.data.events.recording import EventError, Recording

EVENT_BYTES = 5
CLOCK_BITS = 23
NMNIST_SENSOR = (34, 34)
NCALTECH101_SENSOR = (240, 180)
# a word with this y is no event: the ATIS's clock of 13 bits has run over, as the datasets' Python reader has it
_OVERFLOW_Y = 240
_OVERFLOW_US = 1 << 13


def read_bin(data: bytes, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """N-MNIST's and N-Caltech101's files: x from the left, y from the top, p 1 = ON, as they are in the file.

    Args:
        sensor: (width, height). None: N-MNIST's 34 x 34 if every address is on it, else N-Caltech101's 240 x 180. No
            recording of N-Caltech101 is within 34 x 34: its images were shown with their longer side filling the
            sensor. But a damaged file of N-MNIST may pass for one of N-Caltech101, so give the sensor if you know it.

    Words with y = 240 say that the camera's clock has run over: they are counted as `not_polarity`, and what follows
    is 8192 us later.

    Raises:
        EventError: no bytes at all, or an address off the sensor.
    """
    if not data:
        raise EventError(f"{where}: no bytes; a download or a copy that was broken off? Get the file anew")
    repairs: dict[str, int] = {}
    count = whole_events(len(data), EVENT_BYTES, repairs)
    words = np.frombuffer(data, np.uint8, EVENT_BYTES * count).reshape(count, EVENT_BYTES)
    x, y, p = words[:, 0], words[:, 1], words[:, 2] >> 7
    # y, p and time are one big-endian number of 32 bits
    ticks = words[:, 1:].view(">u4")[:, 0].astype(np.uint32)
    ticks &= (1 << CLOCK_BITS) - 1
    t, repairs["wraps"] = unwrap(ticks, CLOCK_BITS)
    overflow = y == _OVERFLOW_Y
    if overflow.any():
        t = t + np.cumsum(overflow) * _OVERFLOW_US
        repairs["not_polarity"] = int(overflow.sum())
        t, x, y, p = t[~overflow], x[~overflow], y[~overflow], p[~overflow]
    if sensor is None:
        small = not count or (len(x) and x.max() < NMNIST_SENSOR[0] and y.max() < NMNIST_SENSOR[1])
        sensor = NMNIST_SENSOR if small else NCALTECH101_SENSOR
    return checked(where, t, x, y, p, sensor, repairs)
