"""Decisions that all ranks of a launch come to alike, before the run's folder is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def gathered(accelerator, value: Any) -> list:
    """Each rank's value, in the order of ranks; all ranks call it."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def check_all_ask(key: str, values: list) -> None:
    """Raises ValueError where only some ranks leave it to `auto`: the others would not come to the decision."""
    if "auto" in values and set(values) != {"auto"}:
        told = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values[:16]))
        raise ValueError(f"{key}: the ranks do not train the same run: {told}. Start all with the same command.")


def of_main_process(accelerator, decide: Callable[[], tuple]) -> tuple:
    """What the main process decides, which alone is sure to see the checkpoints, on all ranks; all of them call it.

    Raises:
        ValueError: on all ranks, what `decide` raised on the main one as ValueError or OSError.
    """
    answer = [None]
    if accelerator.is_main_process:
        try:
            answer = [(decide(), None)]
        except (ValueError, OSError) as error:
            # the others wait for an answer
            answer = [(None, str(error))]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(answer)
    decided, why_not = answer[0]
    if why_not is not None:
        raise ValueError(why_not)
    return decided
