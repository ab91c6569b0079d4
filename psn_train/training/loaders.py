"""The batches of a run: from shards through decoding processes, or from a set that lives on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader

from psn_train.data.reader import SampleReader
from psn_train.data.resident import ResidentEvalStream, ResidentImages, ResidentLoader, ResidentTrainStream
from psn_train.data.stream import TrainStream, make_loader
from psn_train.recipe import Plan, Recipe
from psn_train.training.evaluate import make_eval_loader


class Loaders:
    """Makes the loaders of one process. Under `data.resident` each set of shards is decoded once, at its first use."""

    def __init__(self, recipe: Recipe, plan: Plan, device: torch.device, rank: int):
        self.recipe, self.plan, self.device, self.rank = recipe, plan, device, rank
        self._resident: dict[tuple[int, bool], ResidentImages] = {}

    def train(self, reader: SampleReader, start: int, stop: int) -> DataLoader | ResidentLoader:
        """Micro-batches start to stop - 1 of this rank."""
        recipe, plan = self.recipe, self.plan
        if recipe.data.resident:
            stream = ResidentTrainStream(recipe, plan, self._images(reader, evaluation=False), self.rank)
            return ResidentLoader(stream, start=start, stop=stop)
        return make_loader(
            TrainStream(recipe, plan, reader, self.rank),
            start=start,
            stop=stop,
            workers=recipe.data.workers,
            pin_memory=self.device.type == "cuda",
        )

    def evaluation(self, reader: SampleReader, ids: np.ndarray | None = None) -> DataLoader | ResidentLoader:
        """This rank's batches of an evaluation, for any number of evaluations. ids: the samples; None: all."""
        recipe, plan = self.recipe, self.plan
        batch_size = recipe.data.eval_batch_per_device or plan.micro_batch_size
        if recipe.data.resident:
            images = self._images(reader, evaluation=True)
            stream = ResidentEvalStream(recipe, images, batch_size, self.rank, plan.world_size, ids)
            return ResidentLoader(stream, start=0, stop=len(stream))
        return make_eval_loader(
            recipe,
            reader,
            ids=ids,
            batch_size=batch_size,
            device=self.device,
            rank=self.rank,
            world_size=plan.world_size,
        )

    def _images(self, reader: SampleReader, evaluation: bool) -> ResidentImages:
        # held-out samples come out of the training shards, which are then decoded already
        key = id(reader), evaluation and self.recipe.augment.eval_resize is not None
        if key not in self._resident:
            self._resident[key] = ResidentImages(reader, self.recipe, self.device, evaluation=key[1])
        return self._resident[key]
