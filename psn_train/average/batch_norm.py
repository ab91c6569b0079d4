"""Batch norm's running statistics taken anew: those of an average of weights are not the average of theirs.

As in stochastic weight averaging (Izmailov et al., UAI 2018, arXiv 1803.05407): the weights stand still, and each
statistic becomes the plain mean over the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from psn_train.data.index import ShardError
from psn_train.data.stream import Batch
from psn_train.recipe import Recipe
from psn_train.training.evaluate import check_bad
from psn_train.training.inputs import EvalInputs
from psn_train.training.runtime import autocast

_BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Those that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@torch.no_grad()
def estimate_batch_norm(
    model: nn.Module,
    recipe: Recipe,
    loader: Iterable[Batch],
    *,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda count: None,
) -> int:
    """Running statistics of all batch norms from these batches, each batch alike, so they should be of one size.

    Everything else is in eval mode, and the images are prepared as in evaluation. In eval mode afterwards. Of
    recordings of different lengths the steps that fill a batch up count, as they do in training.

    Returns:
        How many samples it were.

    Raises:
        ShardError: more unreadable samples than `data.max_bad_samples`, or none that can be read.
    """
    norms = batch_norms(model)
    model.eval()
    if not norms:
        return 0
    inputs, bad, seen = EvalInputs(recipe, device), [], 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        # the mean of all batches so far
        norm.momentum = None
        norm.train()
    try:
        for batch in loader:
            bad += batch.bad
            check_bad(bad, recipe)
            x, _ = inputs(batch)
            good = (batch.targets >= 0).nonzero().flatten().to(device)
            if len(good):
                with autocast(recipe.precision.eval_dtype, device):
                    model(x.index_select(x.ndim - 4, good))
            seen += len(good)
            on_batch(len(good))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    if not seen:
        raise ShardError("batch norm: there is no training sample that can be read; see `psn shards verify`")
    return seen
