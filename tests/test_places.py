"""Where the maxima of a pool are: nothing is lost in half a byte, and pools keep no more."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from psn_train.models.packed_pools import SpikeMaxPool2d
from psn_train.neurons import kernels
from psn_train.neurons.kernels.places import Window, _pack_operator, is_channels_last, pack_places, unpack_places


@pytest.fixture(params=["reference", "compiled"])
def backend(request):
    with kernels.using_backend(request.param):
        yield


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "halves"),
    [
        ((3, 3), (2, 2), (1, 1), True),
        pytest.param((2, 3), (1, 2), (0, 1), True, marks=pytest.mark.long),
        ((5, 4), (3, 1), (2, 1), False),
    ],
)
def test_indices_come_back(size, stride, padding, halves, channels_last, backend):
    for N, C, H, W in ((4, 3, 13, 9), (3, 5, 7, 7), (1, 1, 6, 5), (2, 8, 5, 16)):
        x = torch.randn(N, C, H, W).relu()
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        _, indices = F.max_pool2d(x, size, stride, padding, return_indices=True)
        window = Window(size, stride, padding, W)
        code = pack_places(indices, window)
        rows = N if is_channels_last(indices) else N * C
        assert code.dtype == torch.uint8
        assert code.numel() == indices.numel() // (2 if halves and rows % 2 == 0 else 1)
        found = unpack_places(code, window, tuple(indices.shape), is_channels_last(indices))
        assert torch.equal(found, indices) and found.stride() == indices.stride()


def test_a_pool_keeps_half_a_byte_for_each_maximum_and_has_pytorchs_gradient(backend):
    pool, kept = SpikeMaxPool2d(3, 2, 1), []
    x = (torch.rand(4, 8, 14, 14) < 0.2).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = pool(x)
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == y.numel() // 2
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1), x, grad)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_an_image_narrower_than_the_window_is_left_to_pytorch(backend):
    pool, x = SpikeMaxPool2d(5, 1, 2), torch.randn(2, 3, 4, 4, requires_grad=True)
    (found,) = torch.autograd.grad(pool(x).sum(), x)
    (expected,) = torch.autograd.grad(F.max_pool2d(x, 5, 1, 2).sum(), x)
    assert torch.equal(found, expected)


def test_operators_obey_the_rules_of_torch_library():
    _, indices = F.max_pool2d(torch.randn(2, 3, 8, 8), 3, 2, 1, return_indices=True)
    flat = [3, 3, 2, 2, 1, 1, 8]
    torch.library.opcheck(_pack_operator.op, (indices, flat, "reference"))
