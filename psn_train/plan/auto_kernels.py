"""`precision.kernels: auto` -> compiled, or plain PyTorch.

Compiled kernels take a minute before the first update, and a compiler. So `auto` takes them where the run is long
enough to gain many times that, and where they compute on this very device what the neurons' definitions say. It is
decided once in a run, at its first start, and stands in the run's recipe as if it had been written there: kernels round
differently, so a later start takes it over. `auto` in a run's recipe is plain PyTorch.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from psn_train.neurons import PSN, MaskedPSN, Neuron, SlidingPSN, set_lambda, spiking_neurons
from psn_train.neurons import kernels as backends
from psn_train.neurons.gate import check_neuron, coarsen
from psn_train.neurons.kernels.inductor import writes_out
from psn_train.plan.agree import check_all_ask, gathered, of_main_process
from psn_train.plan.memory import most_steps
from psn_train.recipe import Plan, Recipe
from psn_train.training.checkpoint import last_checkpoint, read_meta
from psn_train.training.runtime import DTYPES
from psn_train.training.saving import checkpoints_place
from psn_train.training.zero_config import beyond_the_stage

KEY = "precision.kernels"
# spikes that one device makes in a run, those that are 0 included, from which compiling pays. On a core a compiled
# neuron saves some 5 ns for each (benchmarks/results/neuron.json): 500 s. On a GPU, by the bytes that are not moved
# (24 each at 3 TB/s), 80 s; that is not measured
PAYS = {"cpu": 10**11, "cuda": 10**13}
# a run of fewer samples is over before that, whatever its network
FEWEST_SAMPLES = 1_000


def with_kernels(recipe: Recipe, kernels: str) -> Recipe:
    """The recipe with another `precision.kernels`."""
    return recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"kernels": kernels})})


def spikes_of_a_sample(recipe: Recipe, model: nn.Module) -> int:
    """Outputs for one sample, over all steps, of those neurons of the network that compiled kernels are loops for.

    The others, PSNs of more than 16 steps, are matrix products with either kernels. Counted on tensors without data; 0
    where the network cannot run on them.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    side, channels = recipe.data.image_size, recipe.model.in_chans
    shape = (1, channels, side, side) if recipe.events is None else (most_steps(recipe), 1, channels, side, side)
    found = 0

    def count(neuron, _inputs, output) -> None:
        nonlocal found
        if writes_out(len(output), getattr(neuron, "k", None)):
            found += output.numel()

    for _, neuron in spiking_neurons(shadow):
        if isinstance(neuron, (PSN, MaskedPSN, SlidingPSN)):
            neuron.register_forward_hook(count)
    try:
        with torch.no_grad():
            shadow(torch.empty(shape, device="meta"), per_step=True)
    # a network of one's own may look at values, which are not there
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return 0
    return found


def pays(recipe: Recipe, model: nn.Module, plan: Plan, kind: str) -> bool:
    """Whether a run is long enough to compile kernels on devices of that kind, "cpu" or "cuda"."""
    samples = plan.total_steps * plan.global_batch_size / plan.world_size
    return samples >= FEWEST_SAMPLES and spikes_of_a_sample(recipe, model) * samples >= PAYS[kind]


def problem_of(model: nn.Module, recipe: Recipe, device: torch.device, backend: str = "compiled") -> str | None:
    """Why the network's neurons cannot be computed by a backend on a device; None: they can, and rightly.

    One neuron of each kind is held against its definition, spikes and gradients.
    """
    steps, dtype = most_steps(recipe), DTYPES[recipe.precision.dtype]
    seen = set()
    for _, neuron in spiking_neurons(model):
        if not isinstance(neuron, (PSN, MaskedPSN, SlidingPSN)) or repr(neuron) in seen:
            continue
        seen.add(repr(neuron))
        if (problem := _problem(neuron, steps, dtype, device, backend)) is not None:
            return problem
    return None


def _problem(neuron: Neuron, T: int, dtype: torch.dtype, device: torch.device, backend: str) -> str | None:
    mine = copy.deepcopy(neuron).to(device)
    mine.backend, mine.nan_check = backend, "never"
    # below 1 a masked PSN has no steps, and so no definition to be held against
    set_lambda(mine, 1.0)
    coarsen(mine)
    try:
        check_neuron(f"{type(neuron).__name__} at T={T}, {backend} kernels", mine, mine, T, dtype, device)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0]
    return None


def settle_kernels(recipe: Recipe, model: nn.Module, plan: Plan, accelerator, zero_stage: int | None) -> Recipe:
    """The recipe with what `auto` is in this run, the same on all ranks, which all call it; that backend is in use.

    Raises:
        ValueError: on all ranks: where only some of them ask for auto, or where the run was begun with compiled kernels
            and one of them cannot have them.
    """
    asked = recipe.precision.kernels
    check_all_ask(KEY, gathered(accelerator, asked))
    if asked != "auto":
        return recipe
    device = accelerator.device
    chosen, begun = of_main_process(accelerator, lambda: _decide(recipe, model, plan, device, zero_stage))
    if chosen == "compiled":
        found = gathered(accelerator, problem_of(model, recipe, device))
        rank, problem = next(((rank, text) for rank, text in enumerate(found) if text is not None), (0, None))
        if problem is not None and begun:
            raise ValueError(
                f"{KEY}: the run was begun with compiled kernels, and rank {rank} has none: {problem}. See "
                "`psn doctor`, or go on with others: precision.kernels=reference checkpoint.accept_changes=true"
            )
        if accelerator.is_main_process:
            why = "as at the run's first start" if begun else "in a run as long as this compiling pays"
            told = f"compiled, {why}" if problem is None else f"reference; compiled fails on rank {rank}: {problem}"
            print(f"{KEY}: auto is {told}", flush=True)
        chosen = "compiled" if problem is None else "auto"
    backends.use_backend(chosen)
    return with_kernels(recipe, chosen)


def _decide(
    recipe: Recipe, model: nn.Module, plan: Plan, device: torch.device, zero_stage: int | None
) -> tuple[str, bool]:
    """(the backend, whether the run was begun with it)."""
    saved = last_checkpoint(checkpoints_place(recipe))
    if saved is not None:
        # runs older than the key were trained by plain PyTorch
        begun = read_meta(saved)["recipe"].get("precision", {}).get("kernels", "auto")
        # the engine was checked before this was known
        if zero_stage is not None and (problems := beyond_the_stage(with_kernels(recipe, begun), zero_stage)):
            raise ValueError("as at the run's first start, " + "; ".join(problems))
        return begun, True
    if zero_stage is not None and beyond_the_stage(with_kernels(recipe, "compiled"), zero_stage):
        return "auto", False
    if not pays(recipe, model, plan, device.type):
        return "auto", False
    return "compiled", False
