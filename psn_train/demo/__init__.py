"""`psn demo`: the whole road on real digits, with the commands that a user would type."""

from __future__ import annotations

from psn_train.demo.digits import load_digits

__all__ = ["DEMOS", "load_digits", "run_demo"]

# what it shows -> where it writes, if not told otherwise
DEMOS = {"images": "runs/demo", "events": "runs/demo_events"}


def run_demo(kind: str = "images", out: str | None = None) -> int:
    """Write shards, train through `accelerate launch`, evaluate, publish to a folder, load it anew, draw.

    Args:
        kind: "images" of digits, or "events" of a simulated event camera that sees them move.
        out: folder for everything; what an earlier demo left there is replaced. None: the kind's own in `runs`.
    """
    if kind == "events":
        from psn_train.demo.events import run
    else:
        from psn_train.demo.images import run

    return run(out or DEMOS[kind])
