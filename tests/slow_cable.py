"""`python slow_cable.py TAP TAP DELAY_MS LOSS_PERCENT`: a cable between two tap devices that is slow and loses frames.

What `tc qdisc ... netem delay loss` does, for kernels that were built without it. The devices are made here and go with
this process. Which frames are lost is drawn from a seeded generator.
"""

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
LONGEST_FRAME = 65_600


def open_tap(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def carry(ends: tuple[int, int], delay: float, loss: float) -> None:
    """Pass frames both ways, each `delay` seconds after it came, but for a share `loss` of them."""
    rng = random.Random(0)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    # in the order in which they came, and so in that in which they leave
    under_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = None if not under_way else max(0.0, under_way[0][0] - time.monotonic())
        readable, _, _ = select.select(ends, [], [], wait)
        now = time.monotonic()
        for end in readable:
            frame = os.read(end, LONGEST_FRAME)
            if rng.random() >= loss:
                under_way.append((now + delay, other[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            try:
                os.write(end, frame)
            except OSError:
                # a full queue, or a device that is not up: such a frame is lost
                continue


if __name__ == "__main__":
    taps = open_tap(sys.argv[1]), open_tap(sys.argv[2])
    print("up", flush=True)
    carry(taps, float(sys.argv[3]) / 1000, float(sys.argv[4]) / 100)
