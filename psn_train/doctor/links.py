"""What the processes send each other: sums that are known, how fast, over which links, and their clocks.

Every function is called by all ranks at once, in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

# elements of the tensors that are summed
SIZES = (1, 1000, 1_000_003)
DTYPES = (torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.float16)
# of these each rank adds 1 to so many places at most that half precision counts them exactly
EXACT_IN_HALF = 200
REPEATS = 5
# bytes that a pair of ranks sends each other
PAIR_BYTES = 4 << 20
# a link so many times slower than the fastest of its kind is named; among fewer links nobody is the odd one
SLOW, FEWEST_LINKS = 8.0, 3
# all pairs of so many ranks are measured; of more, only neighbours
ALL_PAIRS = 8
# clocks may differ by so many seconds; NTP keeps them within milliseconds
CLOCK_TOLERANCE = 1.0
now = time.time


def wrong_sums(device: torch.device) -> list[str]:
    """All-reduces whose result is known, over sizes and dtypes: those that came out wrong on this rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    wrong = []
    for dtype in DTYPES:
        for size in SIZES:
            place = torch.arange(size, device=device)
            half = dtype in (torch.bfloat16, torch.float16)
            if half:
                tensor = ((place + rank) % world_size < EXACT_IN_HALF).to(dtype)
                expected = torch.full((size,), min(world_size, EXACT_IN_HALF), dtype=dtype, device=device)
            else:
                tensor = ((place % 7 + 1) * (rank + 1)).to(dtype)
                expected = ((place % 7 + 1) * (world_size * (world_size + 1) // 2)).to(dtype)
            dist.all_reduce(tensor)
            if not torch.equal(tensor, expected):
                differing = int((tensor != expected).sum())
                wrong.append(f"{differing:,} of {size:,} sums in {str(dtype).removeprefix('torch.')}")
    return wrong


def wrong_contributors(device: torch.device) -> list[int]:
    """Each rank fills a row of its own in a sum: the ranks whose row came out wrong on this one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = torch.zeros(world_size, 1024, device=device)
    rows[rank] = torch.arange(1024, device=device) + rank + 1.0
    dist.all_reduce(rows)
    expected = torch.arange(1024, device=device) + torch.arange(world_size, device=device).unsqueeze(1) + 1.0
    return (rows != expected).any(1).nonzero().flatten().tolist()


def all_reduce_gbps(device: torch.device, megabytes: float) -> float:
    """10^9 bits that each rank sends in a second of an all-reduce in float32, the best of some."""
    world_size = dist.get_world_size()
    tensor = torch.zeros(int(megabytes * 1e6 / 4), device=device)
    best = min(_seconds(lambda: dist.all_reduce(tensor), device) for _ in range(REPEATS))
    return 2 * (world_size - 1) / world_size * tensor.numel() * 4 * 8 / best / 1e9


def pairs(hosts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of ranks whose links are measured: all of few; of many each rank and the next one of its host, and the
    first ranks of every two hosts that follow each other."""
    ranks = range(len(hosts))
    if len(hosts) <= ALL_PAIRS:
        return [(a, b) for a in ranks for b in ranks if a < b]
    firsts = [rank for rank in ranks if hosts.index(hosts[rank]) == rank]
    within = [(a, a + 1) for a in ranks[:-1] if hosts[a] == hosts[a + 1]]
    around = zip(firsts, firsts[1:] + firsts[:1], strict=True)
    return within + sorted({(min(a, b), max(a, b)) for a, b in around if a != b})


def pair_gbps(device: torch.device, hosts: Sequence[str]) -> list[float]:
    """10^9 bits a second between every pair of `pairs`, one after the other, as this rank saw it; 0 for others'."""
    rank, found = dist.get_rank(), []
    tensor = torch.zeros(PAIR_BYTES // 4, device=device)
    for a, b in pairs(hosts):
        dist.barrier()
        if rank not in (a, b):
            found.append(0.0)
            continue

        def there_and_back(a=a, b=b) -> None:
            if rank == a:
                dist.send(tensor, b)
                dist.recv(tensor, b)
            else:
                dist.recv(tensor, a)
                dist.send(tensor, a)

        best = min(_seconds(there_and_back, device) for _ in range(REPEATS))
        found.append(2 * PAIR_BYTES * 8 / best / 1e9)
    return found


def slow_links(
    measured: Sequence[tuple[int, int, float]], hosts: Sequence[str], name: Callable[[int], str]
) -> list[str]:
    """Links far slower than others of their kind, within a host or between hosts; and ranks that have no others.

    Args:
        measured: (rank, rank, 10^9 bits a second).
    """
    problems = []
    for between in (False, True):
        kind = [link for link in measured if (hosts[link[0]] != hosts[link[1]]) == between]
        if len(kind) < FEWEST_LINKS:
            continue
        fastest = max(speed for *_, speed in kind)
        slow = [link for link in kind if link[2] * SLOW < fastest]
        problems += [
            f"the link between {name(a)} and {name(b)} is slow: {speed:.3g} Gbit/s, others up to {fastest:.3g}"
            for a, b, speed in slow
        ]
        for rank in sorted({rank for link in slow for rank in link[:2]}):
            own = [link for link in kind if rank in link[:2]]
            if len(own) > 1 and all(link in slow for link in own):
                problems.append(f"{name(rank)} is slow on all of its {len(own)} links")
    return problems


def clock_offsets(device: torch.device) -> tuple[float, float]:
    """(seconds by which this rank's clock is ahead of rank 0's, half the round trip: how far that may be wrong)."""
    rank, best = dist.get_rank(), (0.0, float("inf"))
    stamp = torch.zeros(1, dtype=torch.float64, device=device)
    for other in range(1, dist.get_world_size()):
        dist.barrier()
        for _ in range(2 * REPEATS):
            if rank == 0:
                dist.recv(stamp, other)
                stamp[0] = now()
                dist.send(stamp, other)
            elif rank == other:
                begin, asked = time.perf_counter(), now()
                dist.send(stamp, 0)
                dist.recv(stamp, 0)
                there = float(stamp)
                half = (time.perf_counter() - begin) / 2
                if half < best[1]:
                    best = asked + half - there, half
    return (0.0, 0.0) if rank == 0 else best


def _seconds(job: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
