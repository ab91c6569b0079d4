"""Batch norm and PSN in one against the two one after the other: spikes, every gradient, the running statistics."""

import copy
import re

import pytest
import timm
import torch
from torch import nn
from torch._inductor import utils

import psn_train  # noqa: F401
from psn_train.neurons import PSN, MaskedPSN, SlidingPSN, functional, kernels
from psn_train.neurons.kernels import inductor_norm
from psn_train.neurons.kernels.batch_norm import norm_psn_sequence
from psn_train.neurons.kernels.compiling import compile_once
from psn_train.neurons.kernels.inductor import terms
from psn_train.neurons.kernels.inductor_norm import _groups
from psn_train.neurons.kernels.norm_operators import norm_statistics

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5}


@pytest.fixture(params=["reference", pytest.param("compiled", marks=pytest.mark.slow)])
def backend(request):
    kernels.use_backend(request.param)
    yield request.param
    kernels.use_backend("auto")


def make_norm(channels: int, dtype: torch.dtype) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def images(count: int, channels: int, side: int, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    y = (2 * torch.randn(count, channels, side, side) + 0.5).to(dtype)
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y


def one_after_the_other(y, norm, weight, bias, static_steps, add):
    T = bias.shape[0] if bias.ndim else static_steps or y.shape[0]
    full = functional.sliding_weight(weight, T) if weight.ndim == 1 else weight
    if static_steps is None:
        z = norm(y.flatten(0, 1).to(norm.weight.dtype)).unflatten(0, y.shape[:2])
        h = functional.psn_h(z, full, bias.expand(T))
    else:
        h = functional.psn_h_static(norm(y.to(norm.weight.dtype)), full, bias.expand(T))
    spikes = functional.fire(h, dtype=y.dtype)
    return spikes if add is None else add + spikes


def compare(y, norm, weight, bias, static_steps=None, add=None):
    """Both ways on the same tensors; bfloat16 is rounded once, where one after the other would round twice."""
    results, norms = [], []
    for joined in (True, False):
        norms.append(copy.deepcopy(norm))
        given = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (y, weight, bias, add)]
        inputs = {
            "y": given[0],
            "gamma": norms[-1].weight,
            "beta": norms[-1].bias,
            "weight": given[1],
            "bias": given[2],
        }
        if add is not None:
            inputs["add"] = given[3]
        if joined:
            out = norm_psn_sequence(given[0], norms[-1], given[1], given[2], static_steps=static_steps, add=given[3])
        else:
            out = one_after_the_other(given[0], norms[-1], given[1], given[2], static_steps, given[3])
        torch.manual_seed(5)
        grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
        results.append((out.detach(), dict(zip(inputs, torch.autograd.grad(out, inputs.values(), grad), strict=True))))
    (found, gradients), (wanted, wanted_gradients) = results
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    # the stride of an axis of one says nothing
    strides = [[step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (found, wanted)]
    assert strides[0] == strides[1]
    # a potential at the threshold may round to either side
    assert int((found != wanted).sum()) <= found.numel() // 20_000
    assert wanted.min() < wanted.max() or wanted.numel() < 100
    for name, truth in wanted_gradients.items():
        mine = gradients[name]
        assert mine.shape == truth.shape and mine.dtype == truth.dtype, name
        bound = TOLERANCE[y.dtype] + (torch.finfo(mine.dtype).eps if mine.dtype.itemsize == 2 else 0.0)
        error = (mine - truth).double().abs().max() / truth.double().abs().max()
        assert error <= bound, f"{name}: {error}"
    for name, value in norms[1].named_buffers():
        torch.testing.assert_close(dict(norms[0].named_buffers())[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("T, N, C, side", [(4, 2, 5, 7), (4, 3, 8, 33), (1, 1, 3, 4), (10, 1, 70, 9)])
def test_equals_the_two_in_training(backend, T, N, C, side, dtype, channels_last):
    if backend == "compiled" and (side != 7 or dtype == torch.float64 or (dtype == torch.bfloat16) != channels_last):
        pytest.skip("each kind is compiled for seconds")
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    y = images(T * N, C, side, dtype, channels_last).unflatten(0, (T, N))
    compare(y, make_norm(C, kind), torch.randn(T, T, dtype=kind), -torch.rand(T, dtype=kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.long)])
def test_sums_of_many_steps_are_made_some_at_a_time(shared, dtype):
    """T = 7: 49 products, or 25 of k = 5; groups that differ in size, the last one smaller."""
    y = images(7 * 3, 5, 6, dtype, True).unflatten(0, (7, 3))
    weight, bias = (torch.randn(5), torch.tensor(-0.5)) if shared else (torch.randn(7, 7), -torch.rand(7))
    assert len(_groups(terms(y.flatten(2), weight, 0), 16)) > 1
    kernels.use_backend("compiled")
    try:
        compare(y, make_norm(5, torch.float32), weight, bias)
    finally:
        kernels.use_backend("auto")


@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_the_two_in_evaluation_behind_a_sum_and_of_one_image(channels_last):
    norm = make_norm(6, torch.float64)
    y = images(8, 6, 9, torch.float64, channels_last)
    add = torch.randint(0, 3, y.shape).to(y)
    if channels_last:
        add = add.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 4).double(), -torch.rand(4).double()
    compare(y.unflatten(0, (4, 2)), norm, weight, bias, add=add.unflatten(0, (4, 2)))
    compare(y, norm, weight, bias, static_steps=4)
    compare(y.unflatten(0, (4, 2)), norm, torch.randn(3).double(), torch.tensor(-0.5).double())
    norm.eval()
    compare(y.unflatten(0, (4, 2)), norm, weight, bias, add=add.unflatten(0, (4, 2)))
    compare(y, norm, torch.randn(3).double(), torch.tensor(-0.5).double(), static_steps=5)
    norm.momentum = None
    norm.train()
    compare(y.unflatten(0, (4, 2)), norm, weight, bias)


def test_only_the_convolutions_output_is_kept():
    y = images(8, 16, 12, torch.float32, True).unflatten(0, (4, 2)).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        spikes = norm_psn_sequence(y, nn.BatchNorm2d(16), torch.randn(4, 4), -torch.ones(4))
    size = y.untyped_storage().nbytes()
    assert kept.pop(y.untyped_storage().data_ptr()) == size and sum(kept.values()) < size / 20
    del spikes


@pytest.mark.parametrize("layer", [PSN(4), MaskedPSN(2, 4), SlidingPSN(2)], ids=["psn", "masked_psn", "sliding_psn"])
def test_hooks_see_what_is_between(layer, monkeypatch):
    """A batch norm that someone looks at runs by itself; so does one of another kind."""
    monkeypatch.setattr(layer, "backend", "compiled")
    seen, norm = [], nn.BatchNorm2d(3)
    norm.register_forward_hook(lambda module, given, out: seen.append(out))
    y = torch.randn(8, 3, 5, 5).unflatten(0, (4, 2))
    assert layer.joins(nn.BatchNorm2d(3), y)
    assert not layer.joins(norm, y) and not layer.joins(nn.Identity(), y)
    monkeypatch.undo()
    assert not layer.joins(nn.BatchNorm2d(3), y)
    spikes = layer(y, norm=norm)
    assert len(seen) == 1 and torch.equal(spikes, layer(seen[0].unflatten(0, (4, 2))))


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_of_numbers_far_from_zero_and_from_each_other(dtype, channels_last, backend):
    """A large mean, one channel that is constant, one with a far number first; axes of 1,056 and of a prime."""
    for count in (1056, 1039):
        torch.manual_seed(0)
        y = torch.randn(4, count, 3) + torch.tensor([300.0, 0.0, -1.0])
        y[..., 1], y[0, 0, 2] = -7.25, 1e4
        blocks = y.to(dtype).unsqueeze(3) if channels_last else y.to(dtype).transpose(1, 2).unsqueeze(1).contiguous()
        mean, var = norm_statistics(blocks, backend)
        exact = blocks.double().movedim(2, 0).flatten(1)
        assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        most = 1e-14 if dtype == torch.float64 else 3e-6
        off = (mean.double() - exact.mean(1)).abs() / (exact.mean(1).abs() + exact.std(1))
        assert off.max() < most
        torch.testing.assert_close(var.double(), exact.var(1, correction=0), rtol=10 * most, atol=0)
        assert var[1] == 0


def test_statistics_of_a_single_value_are_refused_and_spoil_nothing():
    norm, y = nn.BatchNorm2d(3), torch.randn(1, 1, 3, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(y[0])
    before = copy.deepcopy(norm.state_dict())
    norm.num_batches_tracked.zero_()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm_psn_sequence(y, norm, torch.randn(1, 1), -torch.ones(1))
    assert torch.equal(norm.running_var, before["running_var"]) and norm.num_batches_tracked == 0


def test_a_potential_is_looked_at_for_nan_once(monkeypatch):
    """Where batch norm and neuron are not one, only what the neuron sees is looked at."""
    layer, looked = PSN(4), []
    monkeypatch.setattr(layer, "_check", lambda x, name: looked.append(name))
    layer(torch.randn(4, 2, 3, 5, 5), norm=nn.BatchNorm2d(3))
    assert len(looked) == 1


@pytest.mark.long
def test_a_compiled_network_takes_the_compiled_kernels_without_a_break(monkeypatch):
    model = timm.create_model("sew_resnet10_psn", num_classes=7, T=2, stem="3x3", width=8)
    x = torch.randn(2, 3, 12, 12)
    wanted = model(x)
    torch.compiler.reset()
    kernels.use_backend("compiled")
    try:
        found = torch.compile(model, fullgraph=True)(x)
        found.sum().backward()
    finally:
        kernels.use_backend("auto")
    # running statistics have moved, the batch's are the same
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
def test_a_network_has_the_same_gradients_joined_or_not():
    """In float64, so that no spike differs by rounding."""
    torch.manual_seed(0)
    model = timm.create_model("sew_resnet10_psn", num_classes=7, T=3, stem="3x3", width=8).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.double)
    gradients = {}
    for name in ("reference", "compiled"):
        kernels.use_backend(name)
        model.zero_grad()
        model(x, per_step=True).square().sum().backward()
        gradients[name] = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    kernels.use_backend("auto")
    for key, wanted in gradients["reference"].items():
        torch.testing.assert_close(gradients["compiled"][key], wanted, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_compiled_code_writes_nothing_but_its_result():
    """Inductor writes what is summed of many numbers to memory, in float32, unless told not to."""
    T, shape = 8, (8, 24, 32, 1)
    y, grad = torch.randn(2, *shape).bfloat16().unbind()
    weight, bias, number = torch.randn(T, T), torch.full((T,), -1.0), torch.ones(shape[2])
    # as in a process that has compiled nothing
    compile_once.cache_clear()
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, (code,) = utils.run_and_get_code(
            lambda: inductor_norm.norm_backward(
                grad, y, number, number, weight, bias, 0, "atan", 2.0, number, number, number
            )
        )
    (written,) = re.findall(r"empty_strided_cpu\(.*\)", code)
    assert written.endswith("torch.bfloat16)")
