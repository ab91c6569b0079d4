"""A network's answers to files, in batches: step by step and over all steps.

Legend: T time-steps, N batch, K classes, C, H, W of the network's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from psn_train.data.events import Recording
from psn_train.data.frames.batched import PackedEvents
from psn_train.data.stream import Batch
from psn_train.models.network import SpikingNetwork
from psn_train.neurons import PSN, get_lambda, spiking_neurons
from psn_train.predict.files import STDIN
from psn_train.predict.reading import ImageFiles, RecordingFiles, Unreadable
from psn_train.publish.hub import choose_device
from psn_train.recipe import Recipe
from psn_train.training.inputs import EvalInputs
from psn_train.training.losses import mean_over_time
from psn_train.training.runtime import autocast


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Prediction:
    """What the network says of a file.

    Attributes:
        logits: float32 [K], the mean over the file's own steps as evaluation takes it.
        steps: float32 [T, K], logits of each of them.
        seen: what the network saw, where that is wanted: an image uint8 [C, H, W], or frames float32 [T, C, H, W].
    """

    file: str
    logits: np.ndarray
    steps: np.ndarray
    seen: np.ndarray | None = None

    @cached_property
    def final(self) -> np.ndarray:
        """Probabilities float64 [K]: softmax of `logits`."""
        return softmax(self.logits)

    @cached_property
    def running(self) -> np.ndarray:
        """Probabilities float64 [T, K]: softmax of the mean of the logits up to each step; of the last, `final`."""
        count = np.arange(1, len(self.steps) + 1)[:, None]
        found = softmax(np.cumsum(self.steps, axis=0, dtype=np.float64) / count)
        found[-1] = self.final
        return found

    @cached_property
    def alone(self) -> np.ndarray:
        """Probabilities float64 [T, K]: softmax of the logits of each step."""
        return softmax(self.steps)


def best(probabilities: np.ndarray, top: int) -> list[int]:
    """The `top` classes [K] of the highest probability, the highest first; of equal ones the lower number."""
    return np.argsort(-probabilities, kind="stable")[:top].tolist()


def is_causal(model: SpikingNetwork) -> bool:
    """Whether the logits of a step depend on no later one: not with PSN, nor with a masked PSN while lambda < 1."""
    lambda_ = get_lambda(model)
    dense = any(isinstance(neuron, PSN) for _, neuron in spiking_neurons(model))
    return not dense and (lambda_ is None or lambda_ >= 1)


class Predictor:
    """A network, with what reads files for it.

    Args:
        model: in eval mode; it is moved to the device with the first call.
        device: its name; None: a GPU if there is one.
        batch_size: files that go through the network at once.
        workers: threads that read and decode.
    """

    def __init__(
        self,
        model: SpikingNetwork,
        recipe: Recipe,
        reading: ImageFiles | RecordingFiles,
        device: str | None,
        batch_size: int,
        workers: int,
    ):
        self.model, self.recipe, self.reading, self.device_name = model, recipe, reading, device
        self.batch_size, self.workers = batch_size, workers

    def __call__(
        self, files: Sequence[str], seen: int = 0, piped: bytes | None = None
    ) -> Iterator[Prediction | Unreadable]:
        """An answer to each file, in their order; while the network is at a batch, the next one is read.

        Args:
            seen: answers that come with what the network saw; the first ones.
            piped: what stands in the file `-`.

        Raises:
            ValueError: the network's logits are not finite, or the device is not to be had.
        """
        self.device = choose_device(self.device_name)
        self.model.to(self.device)
        self.inputs = EvalInputs(self.recipe, self.device)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="psn predict")
        try:
            ahead: list[tuple[str, Future]] | None = None
            # one round more than there are batches: the last is answered in it
            for start in range(0, len(files) + self.batch_size, self.batch_size):
                names = files[start : start + self.batch_size]
                data = {STDIN: piped}
                begun = [(name, pool.submit(_attempt, self.reading, name, data.get(name))) for name in names]
                for one in self._answer(ahead or (), seen):
                    seen -= isinstance(one, Prediction)
                    yield one
                ahead = begun
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, begun: Sequence[tuple[str, Future]], seen: int) -> list[Prediction | Unreadable]:
        names = [name for name, _ in begun]
        answers = [future.result() for _, future in begun]
        # frames of different sensors do not stack
        groups: dict[tuple | None, list[int]] = {}
        for place, one in enumerate(answers):
            if not isinstance(one, Unreadable):
                groups.setdefault(getattr(one, "sensor", None), []).append(place)
        for places in groups.values():
            found = self._run([names[place] for place in places], [answers[place] for place in places], seen > 0)
            for place, one in zip(places, found, strict=True):
                answers[place] = one
        return answers

    def _run(self, names: list[str], samples: list, seen: bool) -> list[Prediction | Unreadable]:
        """Answers to samples of one sensor."""
        ids = np.zeros(len(samples), dtype=np.int64)
        batch = Batch(self._stack(samples), torch.zeros(len(samples), dtype=torch.int64), ids, ids)
        try:
            x, mask = self.inputs(batch)
        except ValueError as error:
            # too many frames for a batch may be few enough one by one
            if len(samples) > 1:
                alone = (self._run([name], [sample], seen) for name, sample in zip(names, samples, strict=True))
                return [one for found in alone for one in found]
            return [Unreadable(names[0], str(error))]
        with torch.no_grad(), autocast(self.recipe.precision.eval_dtype, self.device):
            steps = self.model(x, per_step=True)
            # as the network takes it where nobody asks for steps
            logits = steps.mean(0) if mask is None else None
        steps = steps.float()
        logits = mean_over_time(steps, mask) if logits is None else logits.float()
        steps, logits = steps.cpu().numpy(), logits.cpu().numpy()
        own = np.full(len(samples), len(steps)) if mask is None else mask.sum(0).cpu().numpy()
        frames = x.cpu().numpy() if seen and x.ndim == 5 else None
        answers = []
        for n, (name, sample) in enumerate(zip(names, samples, strict=True)):
            if not np.isfinite(steps[: own[n], n]).all():
                raise ValueError(
                    f"{name}: the network's logits are not finite, so there are no probabilities. If it is so with "
                    "other files, too, the weights are damaged, or precision.eval_dtype is too narrow for them"
                )
            shown = None
            if seen:
                shown = sample if frames is None else frames[: own[n], n].copy()
            answers.append(Prediction(name, logits[n].copy(), steps[: own[n], n].copy(), shown))
        return answers

    def _stack(self, samples: list[np.ndarray] | list[Recording]) -> torch.Tensor | PackedEvents:
        if self.recipe.events is None:
            return torch.from_numpy(np.stack(samples))
        return PackedEvents.pack(samples, with_time=self.recipe.events.frames != "number")


def _attempt(read: Callable, name: str, data: bytes | None):
    """What is read, or why it is not."""
    try:
        return read(name, data)
    except Unreadable as error:
        return error
