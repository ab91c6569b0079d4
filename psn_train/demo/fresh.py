"""The fresh process of a demo: timm loads what was published, answers the held-out samples, and some are drawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch

from psn_train.data.events.codec import decode_events
from psn_train.data.frames import integrate
from psn_train.data.images import decode_image
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.demo.pictures import draw_events, draw_images
from psn_train.neurons import spiking_neurons

# of the evaluation: the same sums, the same answers
BATCH = 64


@dataclass(frozen=True)
class Answers:
    """What a network says of n samples of K classes.

    Attributes:
        labels: int [n].
        probabilities: [n, K].
        rates: spikes a neuron and time-step, all layers' mean [n].
        steps: probabilities after each step alone [T, n, K].
        spikes: share of the channels of the first layer of neurons that fire [T, n, H, W].
    """

    labels: np.ndarray
    probabilities: np.ndarray
    rates: np.ndarray
    steps: np.ndarray
    spikes: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        return self.probabilities.argmax(1)

    def shown(self, count: int, wrong: int) -> list[int]:
        """At most `count` samples to draw: right ones, then `wrong` wrong ones, or more where right ones are few."""
        is_wrong = self.predicted != self.labels
        right = np.flatnonzero(~is_wrong).tolist()
        last = np.flatnonzero(is_wrong)[: max(wrong, count - len(right))].tolist()
        # one of each digit as long as there are digits
        first = {int(self.labels[number]): number for number in right[::-1]}
        order = [first[digit] for digit in sorted(first)] + [
            number for number in right if number not in set(first.values())
        ]
        return order[: count - len(last)] + last


def load_and_draw(published: str, shards: str, picture: str) -> None:
    """Plain timm on the published folder, its answers counted, some of them drawn; prints one line of JSON."""
    model = timm.create_model(f"local-dir:{published}", pretrained=True).eval()
    reader = SampleReader(load_index(shards))
    samples = [reader.read(number) for number in range(reader.index.num_samples)]
    labels = np.array([int(sample["cls"]) for sample in samples])
    if reader.index.kind == "events":
        shown = frames = _frames(samples, published, model.T)
        # [n, T, 2, H, W] -> [T, N, 2, H, W]
        answers = answer(model, torch.from_numpy(frames).float(), labels, lambda batch: batch.transpose(0, 1))
        draw = draw_events
    else:
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        shown = [decode_image(sample, 1) for sample in samples]
        answers = answer(model, torch.stack([transform(image) for image in shown]), labels)
        draw = draw_images
    draw(shown, answers, Path(picture))
    print(json.dumps({"correct": int((answers.predicted == labels).sum()), "count": len(labels)}))


def _frames(samples: list[dict], published: str, T: int) -> np.ndarray:
    """Counts int32 [n, T, 2, H, W] of recordings, as the published recipe makes frames of them."""
    config = json.loads((Path(published) / "config.json").read_text(encoding="utf-8"))
    events = config["psn_train"]["recipe"]["events"]
    return np.stack(
        [
            integrate(decode_events(sample["events"]), T, by=events["frames"], rounding=events["rounding"])
            for sample in samples
        ]
    )


def answer(model: torch.nn.Module, inputs: torch.Tensor, labels: np.ndarray, lay_out=lambda batch: batch) -> Answers:
    """The network's answers to inputs [n, ...], in batches that `lay_out` makes the network's input of."""
    rates: list[torch.Tensor] = []
    first: list[torch.Tensor] = []

    def watch(_module, _inputs, out: torch.Tensor) -> None:
        # [T, N, C, H, W] -> one rate a sample
        rates.append(out.float().mean(dim=(0, 2, 3, 4)))
        if len(rates) == 1:
            first.append(out.float().mean(dim=2))

    hooks = [neuron.register_forward_hook(watch) for _, neuron in spiking_neurons(model)]
    steps, probabilities, firing = [], [], []
    try:
        with torch.no_grad():
            for begin in range(0, len(inputs), BATCH):
                rates.clear()
                logits = model(lay_out(inputs[begin : begin + BATCH]), per_step=True)
                probabilities.append(logits.mean(0).softmax(1))
                steps.append(logits.softmax(2))
                firing.append(torch.stack(rates).mean(0))
    finally:
        for hook in hooks:
            hook.remove()
    return Answers(
        labels,
        torch.cat(probabilities).numpy(),
        torch.cat(firing).numpy(),
        torch.cat(steps, dim=1).numpy(),
        torch.cat(first, dim=1).numpy(),
    )
