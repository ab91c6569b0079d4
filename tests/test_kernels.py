"""The operators of the PSN family against the law in functional/: spikes and every gradient, by name."""

import pytest
import torch

from psn_train.neurons import PSN, MaskedPSN, SlidingPSN, functional, kernels
from psn_train.neurons.kernels.sequence import psn_sequence, psn_static_sequence

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.fixture(params=["reference", pytest.param("compiled", marks=pytest.mark.slow)])
def backend(request):
    kernels.use_backend(request.param)
    yield request.param
    kernels.use_backend("auto")


def coarse(*shape: int, step: float = 1 / 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Multiples of a power of two, so that sums of products are exact in any order."""
    return (2 * torch.randn(*shape)).clamp(-8, 8).div(step).round().mul(step).to(dtype)


def compare(ours, law, tensors: dict[str, torch.Tensor], grad: torch.Tensor, dtype: torch.dtype) -> None:
    """Two functions of the named tensors: equal spikes, gradients to the rounding of float32 sums."""
    results = []
    for function in (ours, law):
        given = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        spikes = function(**given)
        results.append((spikes.detach(), torch.autograd.grad(spikes, given.values(), grad)))
    (spikes, gradients), (wanted, wanted_gradients) = results
    assert spikes.dtype == wanted.dtype and spikes.stride() == wanted.stride()
    assert torch.equal(spikes, wanted)
    assert 0 < spikes.double().mean() < 1 or spikes.shape[0] == 1
    for name, mine, truth in zip(tensors, gradients, wanted_gradients, strict=True):
        assert mine.shape == truth.shape and mine.dtype == truth.dtype == tensors[name].dtype, name
        bound = TOLERANCE[dtype] + (torch.finfo(mine.dtype).eps if mine.dtype.itemsize == 2 else 0.0)
        error = (mine - truth).double().abs().max() / truth.double().abs().max().clamp(min=1e-30)
        assert error <= bound, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("T, M", [(1, 1), (2, 7), (4, 4099), (10, 65), (32, 129)])
def test_psn_is_the_law(backend, T, M, dtype):
    if backend == "compiled" and (T, dtype) not in {(2, torch.float32), (4, torch.bfloat16), (32, torch.float32)}:
        pytest.skip("each kind is compiled for seconds")
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "x": coarse(T, M, dtype=dtype),
        "weight": coarse(T, T, step=1 / 256, dtype=kind),
        "bias": -torch.ones(T, dtype=kind),
    }
    compare(
        lambda x, weight, bias: psn_sequence(x, weight, bias),
        lambda x, weight, bias: functional.psn(x, weight, bias),
        tensors,
        coarse(T, M, step=1 / 8, dtype=dtype),
        dtype,
    )


@pytest.mark.parametrize("surrogate, alpha", [("atan", 1.5), ("sigmoid", 4.0), ("triangle", 0.5), ("rectangle", 0.7)])
def test_every_surrogate_has_its_slope(surrogate, alpha):
    compare(
        lambda x, weight, bias: psn_sequence(x, weight, bias, 0, surrogate, alpha),
        lambda x, weight, bias: functional.psn(x, weight, bias, surrogate, alpha),
        {"x": coarse(4, 300), "weight": coarse(4, 4, step=1 / 256), "bias": -torch.ones(4)},
        coarse(4, 300),
        torch.float32,
    )


@pytest.mark.parametrize("T, k", [(1, 1), (5, 3), (5, 5), (20, 2)])
def test_masked_psn_is_the_law_also_inside_the_band(backend, T, k):
    if backend == "compiled" and (T, k) != (5, 3):
        pytest.skip("each kind is compiled for seconds")
    tensors = {"x": coarse(T, 131), "weight": coarse(T, T, step=1 / 256), "bias": -torch.ones(T)}
    compare(
        lambda x, weight, bias: psn_sequence(x, functional.masked_weight(weight, k), bias, k),
        lambda x, weight, bias: functional.masked_psn(x, weight, bias, k),
        tensors,
        coarse(T, 131),
        torch.float32,
    )


@pytest.mark.parametrize("T, k", [(1, 1), (5, 3), (3, 5), (40, 2)])
def test_sliding_psn_is_the_law_with_more_taps_than_steps_too(backend, T, k):
    if backend == "compiled" and (T, k) != (5, 3):
        pytest.skip("each kind is compiled for seconds")
    compare(
        lambda x, weight, bias: psn_sequence(x, weight, bias),
        lambda x, weight, bias: functional.sliding_psn(x, weight, bias),
        {"x": coarse(T, 131), "weight": coarse(k, step=1 / 256), "bias": torch.tensor(-1.0)},
        coarse(T, 131),
        torch.float32,
    )


def test_static_inputs_are_the_law():
    weight, bias = coarse(4, 4, step=1 / 256), -torch.ones(4)
    compare(
        lambda x, weight, bias: psn_static_sequence(x, 4, weight, bias),
        lambda x, weight, bias: functional.psn_static(x, weight, bias),
        {"x": coarse(2, 3, 5), "weight": weight, "bias": bias},
        coarse(4, 2, 3, 5),
        torch.float32,
    )
    compare(
        lambda x, weight, bias: psn_static_sequence(x, 6, weight, bias),
        lambda x, weight, bias: functional.sliding_psn_static(x, 6, weight, bias),
        {"x": coarse(2, 3, 5), "weight": coarse(3, step=1 / 256), "bias": torch.tensor(-1.0)},
        coarse(6, 2, 3, 5),
        torch.float32,
    )


@pytest.mark.parametrize("layer", [PSN(4), MaskedPSN(2, 4), SlidingPSN(2)], ids=["psn", "masked_psn", "sliding_psn"])
def test_nothing_but_x_is_kept(layer):
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(4, 1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        spikes = layer(x)
    # and weights
    assert kept[x.untyped_storage().data_ptr()] == 16_000
    assert sum(kept.values()) < 16_000 + 1_000
    del spikes


@pytest.mark.parametrize("weight", [torch.randn(4, 4), torch.randn(3)], ids=["matrix", "taps"])
def test_operators_obey_the_rules_of_torch_library(weight):
    bias = torch.full((4,) if weight.ndim == 2 else (), -1.0).requires_grad_()
    x, weight = torch.randn(4, 9, requires_grad=True), weight.requires_grad_()
    arguments = (weight, bias, 0, "atan", 2.0, "reference")
    torch.library.opcheck(kernels.psn.op, (x, *arguments))
    detached = [argument.detach() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    torch.library.opcheck(kernels.psn_backward.op, (torch.randn(4, 9), x.detach(), *detached))


@pytest.mark.filterwarnings("error")
def test_gradients_by_sample_through_torch_func():
    layer, batch = PSN(4), torch.randn(6, 4, 5)
    # it would read a number back
    layer.nan_check = "never"

    def loss(parameters, x):
        return (torch.func.functional_call(layer, parameters, (x,)) * torch.arange(5.0)).sum()

    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
    for index, x in enumerate(batch):
        layer.zero_grad()
        loss(dict(layer.named_parameters()), x).backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_autocast_changes_nothing():
    layer, x = PSN(4), torch.randn(4, 500).bfloat16().requires_grad_()
    wanted = layer(x)
    wanted_gradient = torch.autograd.grad(wanted.sum(), layer.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        spikes = layer(x)
        (gradient,) = torch.autograd.grad(spikes.sum(), layer.weight)
    assert spikes.dtype == torch.bfloat16 and torch.equal(spikes, wanted)
    assert torch.equal(gradient, wanted_gradient)


def test_backends_are_forced_by_name_and_named_when_wrong():
    with pytest.raises(ValueError, match="kernels: got 'cuda', wanted auto, reference, compiled, triton"):
        kernels.use_backend("cuda")
    kernels.use_backend("compiled")
    assert kernels.choose(torch.device("cpu")) == "compiled"
    kernels.use_backend("triton")
    with pytest.raises(ValueError, match=r"got 'triton' and a CPU, .* take auto or compiled"):
        kernels.choose(torch.device("cpu"))
    kernels.use_backend("auto")
    assert kernels.choose(torch.device("cpu")) == "reference"


def test_checkpointed_layers_have_the_same_gradients():
    layer, x = PSN(4), torch.randn(4, 500, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for mine, truth in zip(torch.autograd.grad(again.square().sum(), [x, layer.weight]), plain, strict=True):
        assert torch.equal(mine, truth)
