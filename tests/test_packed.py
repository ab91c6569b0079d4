"""Inputs of few values kept packed: nothing is lost, the gradients are PyTorch's to the bit, and less is kept."""

import copy

import pytest
import timm
import torch
from conftest import merged
from torch import nn
from torch.nn.functional import avg_pool2d

import psn_train.models  # noqa: F401
from psn_train.models.lean import run_again
from psn_train.models.packed_layers import Join, SpikeConv2d, set_memory
from psn_train.models.packed_pools import SpikeAvgPool1d, SpikeAvgPool2d, SpikeMaxPool2d
from psn_train.neurons import kernels
from psn_train.neurons.kernels import bits
from psn_train.neurons.kernels.packing import SPIKES, Levels, can_tell_apart, pack, table

NINTHS = Levels(36, 9)


@pytest.fixture(params=["reference", "compiled"])
def backend(request):
    kernels.use_backend(request.param)
    yield request.param
    kernels.use_backend("auto")


def spikes(*shape, dtype=torch.float32, rate=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < rate).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (4, 16, 8, 8), (1, 1, 1, 3), (2, 8, 6), (2, 4, 3)])
def test_nothing_is_lost(backend, shape, dtype):
    fired = spikes(*shape, dtype=dtype)
    sums = fired + spikes(*shape, dtype=dtype, seed=1) + spikes(*shape, dtype=dtype, seed=2)
    for x, levels, size in ((fired, SPIKES, -(-fired.numel() // 8)), (sums, Levels(3), fired.numel())):
        layouts = [x, x.transpose(0, 1).contiguous().transpose(0, 1)]
        layouts += [x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 else []
        for laid in layouts:
            packed = pack(laid, levels)
            assert packed.code.dtype == torch.uint8 and packed.code.shape == (size,)
            back = packed.unpack()
            assert back.dtype == dtype and torch.equal(back, laid)
            assert back.stride() == laid.stride() or min(shape) == 1


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_byte_is_made_as_bit_by_bit(dtype, half):
    """Eight spikes a byte by a matrix product, autocast or not; and whole numbers."""
    numbers = torch.arange(256)
    planes = torch.stack([(numbers >> place) & 1 for place in range(8)])
    spikes = planes.to(dtype).flatten()
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        made = bits.pack_zeros_and_ones(spikes)
    assert torch.equal(made, numbers.to(torch.uint8))
    assert torch.equal(made, bits.pack_bits(spikes.view(1, -1))[0])
    assert torch.equal(bits.to_bytes(numbers.to(dtype)), numbers.to(torch.uint8))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_averages_and_their_sums_are_known_again(backend, dtype, channels_last):
    """As many joins as the first stage of a SEW-ResNet of 34 layers has, each rounded in the network's dtype."""
    images = spikes(4, 16, 32, 32, dtype=dtype, rate=0.5)
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    x = avg_pool2d(images, 3, 2, 1)
    for seed in range(3):
        x = x + spikes(*x.shape, dtype=dtype, rate=0.7, seed=seed)
        assert torch.equal(pack(x, NINTHS).unpack(), x)
    assert len(x.unique()) > 20


def test_levels_that_a_dtype_cannot_tell_apart_are_refused():
    assert can_tell_apart(NINTHS, torch.bfloat16) and not can_tell_apart(Levels(255, 9), torch.bfloat16)
    assert can_tell_apart(Levels(255), torch.bfloat16) and not can_tell_apart(Levels(256), torch.float32)
    with pytest.raises(ValueError, match="up to 255 parts of 1 / 9: too many"):
        pack(table(Levels(255, 9), torch.bfloat16), Levels(255, 9))
    # a layer then keeps its input as it is
    layer = SpikeConv2d(2, 3, 1)
    layer.levels = Levels(255, 9)
    assert layer.pack(spikes(1, 2, 3, 3, dtype=torch.bfloat16)) is None
    assert layer.pack(spikes(1, 2, 3, 3)) is not None


NETWORKS = [
    ("sew_resnet18_psn", {"width": 16}, (3, 3, 64, 64)),
    ("sew_resnet10_psn", {"width": 16, "connect_function": "AND"}, (3, 3, 64, 64)),
    ("sew_resnet10_sliding_psn", {"width": 16, "connect_function": "IAND", "stem_pool": "max"}, (3, 3, 64, 64)),
    ("sew_resnet50_masked_psn", {"width": 8}, (2, 3, 32, 32)),
    ("sew_resnet10_lif", {"width": 16, "stem": "3x3"}, (3, 3, 16, 16)),
    ("cifar_net_psn", {"width": 8, "hidden": 16}, (3, 3, 32, 32)),
    ("sequential_net_sliding_psn", {"width": 8, "hidden": 16}, (3, 3, 32, 32)),
    ("vgg_snn_sliding_psn", {"width": 8}, (4, 3, 2, 48, 48)),
]


@pytest.mark.parametrize("name, arguments, shape", NETWORKS, ids=lambda value: str(value))
def test_gradients_are_the_same_to_the_bit(name, arguments, shape):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).train()
    x = torch.randn(shape)
    for dtype, channels_last in ((torch.float32, False), (torch.bfloat16, True)):
        if channels_last and len(shape) == 4 and "sequential" not in name:
            model = model.to(memory_format=torch.channels_last)
        plain = after_backward(model, x, dtype, "plain")
        for memory in ("packed", "lean"):
            found = after_backward(model, x, dtype, memory)
            assert plain.keys() == found.keys()
            for key, value in plain.items():
                assert torch.equal(found[key], value), f"{memory} {dtype}: {key}"


@pytest.mark.parametrize("memory", ["packed", "lean"])
def test_gradients_are_the_same_where_batch_norm_and_neuron_are_one(memory):
    """Of the compiled backend, whose order of sums does not depend on what is kept."""
    torch.manual_seed(0)
    model = timm.create_model("sew_resnet10_psn", num_classes=5, width=16, T=2).train()
    kernels.use_backend("compiled")
    try:
        x = torch.randn(3, 3, 64, 64)
        plain, found = (after_backward(model, x, torch.bfloat16, kind) for kind in ("plain", memory))
    finally:
        kernels.use_backend("auto")
    for key in ("layer1.0.conv1.weight", "layer4.0.bn2.weight"):
        assert plain[key].abs().max() > 0
    del plain["logits"], found["logits"]
    for key, value in plain.items():
        scale = value.abs().max() + 1e-12
        assert (found[key] - value).abs().max() <= 1e-5 * scale, key


def after_backward(model, x, dtype, memory):
    """Logits, gradients and buffers after one step from the same state, each by its name."""
    model = copy.deepcopy(model)
    set_memory(model, memory)
    # of the dropout before the classifier
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(x)
    logits.float().square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**found, **dict(model.named_buffers()), "logits": logits.detach()}


def kept_bytes(model, x):
    """What autograd keeps, parameters, buffers and x left out, by shape of the storages' first tensors."""
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), x)}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(x)
    del logits
    return sum(storage.nbytes() for storage in held.values())


def test_what_is_kept():
    """A SEW-ResNet of ten layers, counted by hand, with the kernels that keep the convolutions' outputs alone."""
    N, T, side = 2, 4, 64
    model = timm.create_model("sew_resnet10_psn", num_classes=5, width=16, T=T).train()
    x = torch.randn(N, 3, side, side)
    stem, first = 16 * 32 * 32, 16 * 16 * 16
    # channels double and the sides halve from stage to stage
    sizes = [first // 2**stage for stage in range(4)]
    outputs = N * stem + T * N * (sum(2 * size for size in sizes) + sum(sizes[1:]))
    # what enters the blocks, and what is between their two convolutions
    codes = T * N * (first + sum(sizes[:3]) + sum(sizes) // 8)
    kernels.use_backend("compiled")
    try:
        found = {}
        for memory in ("packed", "lean"):
            set_memory(model, memory)
            found[memory] = kept_bytes(model, x)
    finally:
        kernels.use_backend("auto")
    # mean, deviation, scale and shift of each channel, and what enters the classifier
    channels = 16 + sum((2 + (stage > 0)) * 16 * 2**stage for stage in range(4))
    rest = 4 * (4 * channels + T * N * 128)
    # a few single numbers are left
    assert 0 <= found["packed"] - (4 * outputs + codes + rest) < 64
    assert 0 <= found["lean"] - (4 * N * stem + codes + rest) < 64
    # plain kernels: the stem's batch norm and neuron, which run once for all steps, keep both their inputs
    set_memory(model, "packed")
    rest = 4 * (N * stem + 2 * 16 + T * N * 128)
    assert 0 <= kept_bytes(model, x) - (4 * outputs + codes + rest) < 64


@pytest.mark.parametrize("freeze", ["evaluation", "of the batch", "norms", "below"])
def test_batch_norms_that_are_computed_again(freeze):
    """With statistics that stand still, with none of their own, and with gradients that nobody wants."""
    torch.manual_seed(0)
    model = timm.create_model("sew_resnet10_psn", num_classes=5, width=16, T=2).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    if freeze == "evaluation":
        model.eval()
    for norm in norms if freeze == "of the batch" else ():
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    frozen = [norm.weight for norm in norms] if freeze == "norms" else [*model.conv1.parameters()]
    frozen += [*model.layer1.parameters(), *model.layer2[0].conv1.parameters()] if freeze == "below" else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    x = torch.randn(2, 3, 64, 64, requires_grad=freeze == "norms")
    plain, found = (after_backward(model, x, torch.float32, memory) for memory in ("plain", "packed"))
    assert plain.keys() == found.keys() and found["layer4.0.conv1.weight"].abs().max() > 0
    for key, value in plain.items():
        assert (found[key] is None) == (value is None) and (value is None or torch.equal(found[key], value)), key


def test_pools_keep_nothing_but_codes_and_have_pytorchs_gradients():
    x = spikes(2, 4, 9, 9)
    cases = [(SpikeAvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), x), (SpikeMaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1), x)]
    cases += [(SpikeAvgPool1d(2), nn.AvgPool1d(2), x[:, :, 0])]
    for ours, theirs, images in cases:
        ours.levels = SPIKES
        for laid in (images, images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images):
            mine, other = (laid.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
            with torch.autograd.graph.saved_tensors_hooks(only_codes, lambda kept: kept):
                out = ours(mine)
            expected = theirs(other)
            assert torch.equal(out, expected)
            grad = torch.randn_like(out)
            out.backward(grad)
            expected.backward(grad)
            assert torch.equal(mine.grad, other.grad)


def only_codes(kept):
    assert kept.dtype == torch.uint8
    return kept


@pytest.mark.parametrize("memory", ["packed", "lean"])
def test_neurons_that_were_replaced_are_noticed(memory):
    model = timm.create_model("sew_resnet10_psn", num_classes=5, width=16).train()
    set_memory(model, memory)
    model.layer1[0].downsample_sn = model.layer1[0].sn1 = Halved(model.layer1[0].sn1)
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(
        ValueError, match=r"SpikeConv2d\(.*is to be spikes, 0 or 1, and is not.*set_memory\(model, 'plain'\)"
    ):
        model(x)
    set_memory(model, "plain")
    model(x).sum().backward()
    set_memory(model, memory)
    # nothing is kept without a gradient
    with torch.no_grad():
        model(x)


class Halved(nn.Module):
    """Half spikes."""

    def __init__(self, neuron):
        super().__init__()
        self.neuron = neuron

    def joins(self, norm, device):
        return False

    def forward(self, *arguments, **keywords):
        return self.neuron(*arguments, **keywords) / 2


@pytest.mark.parametrize("name", ["reference", pytest.param("compiled", marks=pytest.mark.long)])
@pytest.mark.parametrize("memory", ["packed", "lean"])
def test_a_network_stays_one_graph(memory, name):
    torch.manual_seed(0)
    model = timm.create_model("sew_resnet10_psn", num_classes=5, width=16, T=2).train()
    set_memory(model, memory)
    x = torch.randn(2, 3, 32, 32)
    kernels.use_backend(name)
    try:
        expected = after_backward(model, x, torch.float32, memory)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x).square().sum().backward()
    finally:
        kernels.use_backend("auto")
    for key, parameter in model.named_parameters():
        scale = expected[key].abs().max() + 1e-12
        assert (parameter.grad - expected[key]).abs().max() <= 1e-4 * scale, key


def test_a_batch_norm_that_is_looked_at_runs_once():
    model = timm.create_model("sew_resnet10_psn", num_classes=5, width=16).train()
    seen = []
    model.layer1[0].bn2.register_forward_hook(lambda module, args, out: seen.append(out))
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert len(seen) == 1 and seen[0].requires_grad
    counts = {int(module.num_batches_tracked) for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert counts == {1}


def test_hooks_see_spikes_and_run_once():
    model = timm.create_model("sew_resnet10_psn", num_classes=5, width=16).train()
    set_memory(model, "lean")
    seen = []
    block = model.layer1[0]
    block.sn2.register_forward_hook(lambda module, args, out: seen.append(out))
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert len(seen) == 1 and set(seen[0].unique().tolist()) <= {0.0, 1.0}


def test_joins_of_sums_and_products():
    identity, out = spikes(2, 3, 4, seed=1), spikes(2, 3, 4, seed=2)
    for name, expected in (("ADD", identity + out), ("AND", identity * out), ("IAND", identity * (1 - out))):
        join = Join(name)
        join.levels = SPIKES
        mine = [identity.clone().requires_grad_(), out.clone().requires_grad_()]
        result = join(*mine)
        assert torch.equal(result, expected)
        result.sum().backward()
        other = [identity.clone().requires_grad_(), out.clone().requires_grad_()]
        {"ADD": other[0] + other[1], "AND": other[0] * other[1], "IAND": other[0] * (1 - other[1])}[
            name
        ].sum().backward()
        for one, two in zip(mine, other, strict=True):
            assert torch.equal(one.grad, two.grad)


def test_frozen_layers_have_no_gradient():
    layer, norm = SpikeConv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)
    layer.levels = SPIKES
    layer.weight.requires_grad_(False)
    x = spikes(2, 2, 3, 3).requires_grad_()
    packed = layer.pack(x)
    run_again(lambda images: norm(layer(images, packed)), x, packed, (layer, norm)).square().sum().backward()
    assert layer.weight.grad is None and norm.weight.grad is not None and x.grad is not None


def test_unknown_ways_are_refused():
    with pytest.raises(ValueError, match="got 'tiny', wanted one of plain, packed, lean"):
        set_memory(nn.Identity(), "tiny")


def test_recipe_key(tmp_path):
    from psn_train.recipe import Recipe, recipe_hash
    from psn_train.training.build import build_model
    from psn_train.training.zero_config import beyond_the_stage

    base = {
        "name": "x",
        "model": {"name": "sew_resnet10_psn", "args": {"stem": "3x3", "width": 16}},
        "data": {"train": "t", "global_batch_size": 4, "image_size": 32},
        "optim": {"lr": 0.1},
        "schedule": {"steps": 1},
    }
    recipes = {memory: Recipe(**merged(base, {"model": {"memory": memory}})) for memory in ("plain", "packed", "lean")}
    assert len({recipe_hash(recipe) for recipe in (*recipes.values(), Recipe(**base))}) == 1
    for memory, recipe in recipes.items():
        assert build_model(recipe, 5).layer1[0].conv1.memory == memory
        assert any("model.memory" in problem for problem in beyond_the_stage(recipe, 3)) == (memory == "lean")
        assert not beyond_the_stage(recipe, 2)
