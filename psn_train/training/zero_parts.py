"""Where DeepSpeed keeps what of a parameter: whole tensors out of the ranks' parts, and back.

What is used of DeepSpeed's optimisers:

    stages 1, 2   bit16_groups, single_partition_of_fp32_groups, averaged_gradients, _hp_mapping of a parameter
    stage 3       fp16_groups, fp32_partitioned_groups_flat, averaged_gradients, grad_position, get_param_id,
                  ds_shape of a parameter
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from psn_train.training.optimizer_state import divided_keys
from psn_train.training.zero_config import EngineError


class Part(NamedTuple):
    """A rank's part of a parameter: `size` numbers from `in_flat` of a flat tensor, `in_whole` of the parameter."""

    in_flat: int
    in_whole: int
    size: int


class ZeroParts:
    """The flat tensors of a rank, one for each group of parameters, and what lies where in them."""

    def __init__(self, optimizer, stage: int):
        self.optimizer, self.stage = optimizer, stage
        if stage == 3:
            self.groups, self.flats = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat
        else:
            self.groups, self.flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()

    def gradients(self) -> list[torch.Tensor]:
        """This rank's parts of the joined gradients, after the last micro-batch; padding is zeros."""
        found = self.optimizer.averaged_gradients
        return [gradient for number in range(len(self.groups)) for gradient in found[number] if gradient is not None]

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape if self.stage == 3 else parameter.shape

    def _part(self, parameter: nn.Parameter) -> Part | None:
        if self.stage == 3:
            _, in_flat, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            in_whole = self.rank * size
            size = min(size, self._shape(parameter).numel() - in_whole)
            return Part(in_flat, in_whole, size) if size > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        of_whole = mapping.lp_fragment_address
        return Part(mapping.hp_fragment_address.start, of_whole.start, of_whole.numel)

    def _whole(self, parameter: nn.Parameter, flat: torch.Tensor) -> torch.Tensor:
        """The parameter's numbers out of all ranks' tensors like `flat`, in the host's memory of rank 0 alone.

        So a device has room for one parameter more, not for a whole optimiser.
        """
        shape, part = self._shape(parameter), self._part(parameter)
        whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=flat.device)
        if part is not None:
            whole[part.in_whole : part.in_whole + part.size] = flat.detach()[part.in_flat : part.in_flat + part.size]
        # one rank has each of them, the others zeros
        if self.world_size > 1:
            dist.all_reduce(whole)
        return whole.view(shape).cpu() if self.rank == 0 else whole.new_empty(0)

    def whole_parameters(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        for group, flat in zip(self.groups, self.flats, strict=True):
            for parameter in group:
                yield parameter, self._whole(parameter, flat)

    def whole_states(self, inner: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict]]:
        """Each parameter's state as the optimiser would have it on one rank; see `_whole`."""
        for group, flat in zip(self.groups, self.flats, strict=True):
            # all ranks in one order: that in which a file's tensors are read is each process's own
            state = sorted(inner.state.get(flat, {}).items())
            for parameter in group if state else ():
                yield (
                    parameter,
                    {key: self._whole(parameter, value) if is_flat(value, flat) else value for key, value in state},
                )

    def load_states(self, inner: torch.optim.Optimizer, owners: dict[str, dict], names: dict[int, str]) -> None:
        """Put back what `whole_states` gave, by name; every rank takes its parts."""
        divided = divided_keys(owners)
        for group, flat in zip(self.groups, self.flats, strict=True):
            state: dict = {}
            for parameter in group:
                part = self._part(parameter)
                for key, value in owners.get(names[id(parameter)], {}).items():
                    if key not in divided:
                        state[key] = value.clone() if isinstance(value, torch.Tensor) else value
                        continue
                    if key not in state:
                        state[key] = torch.zeros_like(flat, requires_grad=False)
                    if part is not None:
                        whole = value.to(flat.device, flat.dtype).flatten()
                        here = slice(part.in_whole, part.in_whole + part.size)
                        state[key][part.in_flat : part.in_flat + part.size] = whole[here]
            if state:
                inner.state[flat] = state


def is_flat(value, flat: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == flat.shape


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that does not treat each number by itself: on flattened parameters it computes another thing.

    Two updates of two small tensors are compared with those of one that holds both.

    Raises:
        EngineError: they differ, or the optimiser cannot be tried.
    """
    generator = torch.Generator().manual_seed(0)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    shapes = ((3, 4), (5, 2))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)]
    try:
        with torch.random.fork_rng(devices=[]):
            apart = [nn.Parameter(value.clone()) for value in values]
            flat = [nn.Parameter(torch.cat([value.flatten() for value in values]))]
            for parameters, flattened in ((apart, False), (flat, True)):
                tried = type(optimizer)([{**group, "params": parameters}], lr=group["lr"])
                for step in gradients:
                    given = [torch.cat([gradient.flatten() for gradient in step])] if flattened else step
                    for parameter, gradient in zip(parameters, given, strict=True):
                        parameter.grad = gradient.clone()
                    tried.step()
        start = torch.cat([value.flatten() for value in values])
        # in double precision, since an update may be small beside the weight
        moved, wanted = flat[0] - start, torch.cat([parameter.flatten() for parameter in apart]) - start
        same = torch.allclose(moved, wanted, rtol=1e-6, atol=1e-9 * float(wanted.detach().abs().max()))
        why = "it looks at whole tensors, and ZeRO flattens them"
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        same, why = False, f"it could not be tried on flattened parameters ({error})"
    if not same:
        raise EngineError(
            f"optim.name: {type(optimizer).__name__} under DeepSpeed: {why}. Use sgd, adamw or another optimiser that "
            "treats each number by itself, or launch without DeepSpeed."
        )
