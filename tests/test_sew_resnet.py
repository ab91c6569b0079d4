"""The network: size, names, joins, static images and frames, streaming, batch statistics, parity with SpikingJelly."""

import copy

import pytest
import torch
from torch import nn

from psn_train.models.blocks import per_image
from psn_train.models.packed_layers import Join
from psn_train.models.sew_resnet import ARCHITECTURES, DEPTHS, SEWResNet
from psn_train.neurons import NEURONS, PSN, spiking_neurons

SMALL = {"depth": 10, "stem": "3x3", "width": 8, "num_classes": 5, "in_chans": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lively(model):
    """Batch norms lifted, so that a fresh network fires in every layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.7)
    return model


def small(**kwargs):
    return lively(SEWResNet(**{**SMALL, **kwargs}))


# ---- size and names

# what the authors' code has, with pe, by facts measured on it; the others follow from the ANN plus 20 a neuron layer
AUTHORS = {18: (11_689_916, 20), 34: (21_798_396, 36), 50: (25_558_096, 53)}
TORCHVISION = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@pytest.mark.parametrize("depth", AUTHORS)
def test_parameter_counts_equal_the_authors_networks(depth):
    with torch.device("meta"):
        with_pe, without = SEWResNet(depth, pe=True), SEWResNet(depth)
    count, layers = AUTHORS[depth]
    assert sum(p.numel() for p in with_pe.parameters()) == count
    assert sum(p.numel() for p in without.parameters()) == count - 4
    assert len(list(spiking_neurons(without))) == layers


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if "resnext" in name or "wide" in name])
def test_names_and_shapes_of_wider_networks_are_torchvisions(architecture):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        ours = SEWResNet(neuron="lif", **ARCHITECTURES[architecture]).state_dict()
        ann = getattr(models, architecture.removeprefix("sew_"))().state_dict()
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in ann.items()}


@pytest.mark.parametrize("depth", TORCHVISION)
def test_parameter_counts_are_the_ann_plus_the_neurons(depth):
    with torch.device("meta"):
        model = SEWResNet(depth)
    neurons = len(list(spiking_neurons(model)))
    assert sum(p.numel() for p in model.parameters()) == TORCHVISION[depth] + 20 * neurons


@pytest.mark.parametrize(("depth", "count"), [(18, 163), (34, 291), (50, 427)])
def test_names_are_those_of_the_authors_after_mapping(depth, count):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        ours, ann = SEWResNet(depth, pe=True).state_dict(), getattr(models, f"resnet{depth}")().state_dict()
    # the authors' neurons hold an nn.Linear called fc
    theirs = [name if "sn" not in name else name.replace(".weight", ".fc.weight") for name in ours]
    assert len(ours) == count
    foreign = [name for name in ours if name != "pe" and ".sn" not in f".{name}" and "downsample_sn" not in name]
    assert foreign == list(ann)
    assert all(ours[name].shape == ann[name].shape for name in foreign)
    assert {"pe", "sn1.fc.weight", "layer1.0.sn2.fc.weight", "layer2.0.downsample_sn.fc.weight"} <= set(theirs)


def test_arguments_are_refused_with_their_choices():
    for kwargs, message in [
        ({"depth": 20}, "depth=20, wanted one of 10, 18, 34, 50, 101, 152"),
        ({"neuron": "relu"}, "neuron='relu', wanted one of 'psn', 'masked_psn'"),
        ({"connect_function": "add"}, "connect_function='add', wanted one of 'ADD', 'AND', 'IAND'"),
        ({"stem": "5x5"}, "stem='5x5', wanted one of '7x7', '3x3'"),
        ({"stem_pool": "sum"}, "stem_pool='sum', wanted one of 'avg', 'max'"),
        ({"global_pool": "token"}, "global_pool='token', wanted one of 'avg', 'max', ''"),
        ({"global_pool": ""}, "global_pool='' and num_classes=5"),
        ({"surrogate": "relu"}, "'relu', wanted one of atan"),
        ({"T": 0}, "got T=0"),
        ({"neuron": "masked_psn", "k": 5}, "got k=5 and T=4"),
        ({"neuron": "sliding_psn", "k": 0}, "SlidingPSN: got k=0"),
        ({"neuron": "psn", "k": 2}, "psn: got k, which it does not take"),
        ({"neuron": "lif", "tau": 0.5}, "tau=0.5"),
    ]:
        with pytest.raises(ValueError) as error:
            SEWResNet(**{**SMALL, **kwargs})
        assert message in str(error.value)
    # what was trained at a longer T runs at a shorter one
    assert SEWResNet(**{**SMALL, "neuron": "sliding_psn", "k": 5})(torch.randn(1, 2, 12, 12)).shape == (1, 5)


def test_inputs_are_refused_in_words():
    model = small()
    for x, message in [
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), "dtype torch.uint8, wanted floating point; scale by 1/255"),
        (torch.zeros(2, 3, 8, 8), "shape (2, 3, 8, 8), wanted [N, 2, H, W] or [4, N, 2, H, W]"),
        (torch.zeros(2, 8, 8), "shape (2, 8, 8)"),
        (torch.zeros(0, 2, 8, 8), "empty batch"),
        (torch.zeros(3, 1, 2, 8, 8), "got 3 time-steps, wanted T=4"),
        (torch.full((1, 2, 8, 8), float("nan")), "are NaN"),
    ]:
        with pytest.raises(ValueError) as error:
            model(x)
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"got 3 frames, wanted T=4, as pe"):
        small(pe=True)(torch.zeros(3, 1, 2, 8, 8))


def test_defaults_are_the_papers():
    model = SEWResNet()
    assert (model.T, model.connect_function, model.pe, model.num_features) == (4, "ADD", None, 512)
    assert isinstance(model.stem_pool, nn.AvgPool2d) and isinstance(model.sn1, PSN)
    assert isinstance(SEWResNet(stem_pool="max").stem_pool, nn.MaxPool2d)
    assert SEWResNet(depth=10, neuron="sliding_psn").k == 2 and SEWResNet(depth=10, neuron="masked_psn", T=1).k == 1
    lif = SEWResNet(depth=10, neuron="lif", tau=3.0, v_threshold=0.5, v_reset=0.0, detach_reset=False).sn1
    assert (lif.tau, lif.v_threshold, lif.v_reset, lif.detach_reset) == (3.0, 0.5, 0.0, False)


# ---- the join, by hand


@pytest.mark.parametrize("depth", [10, 50])
@pytest.mark.parametrize(("connect", "table"), [("ADD", [0, 1, 1, 2]), ("AND", [0, 0, 0, 1]), ("IAND", [0, 0, 1, 0])])
def test_join_in_one_operand_order_in_every_block(depth, connect, table):
    identity, out = torch.tensor([0.0, 0, 1, 1]), torch.tensor([0.0, 1, 0, 1])
    assert Join(connect)(identity, out).tolist() == table
    model = small(depth=depth, connect_function=connect, neuron="lif", v_threshold=0.3).eval()
    for block in (model.layer1[0], model.layer2[0]):
        x = (torch.rand(4, 2, block.conv1.in_channels, 6, 6) < 0.5).float()
        shortcut = x
        if block.downsample is not None:
            shortcut = block.downsample_sn(per_image(x, block.downsample))
        branch = block.sn1(per_image(x, block.conv1, block.bn1))
        branch = block.sn2(per_image(branch, block.conv2, block.bn2))
        if depth == 50:
            branch = block.sn3(per_image(branch, block.conv3, block.bn3))
        assert 0 < branch.mean() < 1
        expected = {"ADD": shortcut + branch, "AND": shortcut * branch, "IAND": shortcut * (1 - branch)}[connect]
        assert torch.equal(block(x), expected)


# ---- static images and frames


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("pe", [False, True])
def test_static_image_equals_the_same_image_at_every_step(neuron, pe):
    model = small(neuron=neuron, pe=pe).double().eval()
    x = torch.randn(2, 2, 12, 12, dtype=torch.double)
    static, frames = model(x, per_step=True), model(x.expand(4, -1, -1, -1, -1), per_step=True)
    torch.testing.assert_close(static, frames)
    torch.testing.assert_close(model(x), static.mean(0))
    assert static.shape == (4, 2, 5) and static.std() > 0


@pytest.mark.parametrize("T", [1, 4, 8])
def test_stem_of_a_static_image_runs_once_whatever_T(T):
    model = small(T=T)
    seen = []
    for module in (model.conv1, model.bn1):
        module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    model(torch.randn(3, 2, 12, 12))
    assert seen == [(3, 2, 12, 12), (3, 8, 12, 12)]
    assert model(torch.randn(T, 3, 2, 12, 12)).shape == (3, 5)
    assert seen[2] == (3 * T, 2, 12, 12)


def test_pe_is_added_to_the_image_at_each_step():
    model = small(pe=True).eval()
    assert model.pe.shape == (4,) and 0 < model.pe.abs().max() < 0.1
    x = torch.randn(2, 2, 12, 12)
    plain = copy.deepcopy(model)
    plain.pe = None
    frames = torch.stack([x + model.pe[t] for t in range(4)])
    assert torch.equal(model(x, per_step=True), plain(frames, per_step=True))


def test_sliding_and_serial_networks_take_any_number_of_frames():
    for neuron in ("sliding_psn", "lif", "if"):
        assert small(neuron=neuron)(torch.randn(7, 2, 2, 12, 12), per_step=True).shape == (7, 2, 5)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (4, 2, 3, 64, 64)])
def test_channels_last_stays_channels_last(shape):
    model = SEWResNet(18, pe=len(shape) == 4).to(memory_format=torch.channels_last)
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if len(shape) == 4 else x
    bad = []

    def check(module, args):
        if not args[0].is_contiguous(memory_format=torch.channels_last):
            bad.append(module)

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and name != "conv1":
            module.register_forward_pre_hook(check)
    out = model.forward_features(x)
    assert not bad and out.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


# ---- streaming


@pytest.mark.parametrize("neuron", ["masked_psn", "sliding_psn", "lif", "if"])
@pytest.mark.parametrize("pe", [False, True])
def test_streaming_equals_the_parallel_form(neuron, pe):
    model = small(neuron=neuron, pe=pe).double().eval()
    frames = torch.randn(4, 2, 2, 12, 12, dtype=torch.double)
    parallel = model(frames, per_step=True)
    for _ in range(2):
        steps = torch.stack([model.step(frame) for frame in frames])
        torch.testing.assert_close(steps, parallel)
        model.reset()
    torch.testing.assert_close(model(frames, per_step=True), parallel)


def test_streaming_is_refused_where_it_cannot_be():
    frame = torch.randn(1, 2, 12, 12)
    with pytest.raises(ValueError, match="cannot run step by step"):
        small().eval().step(frame)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        small(neuron="lif").step(frame)
    model = small(neuron="sliding_psn", pe=True).eval()
    for _ in range(4):
        model.step(frame)
    with pytest.raises(ValueError, match="step 5 of T=4"):
        model.step(frame)
    with pytest.raises(ValueError, match=r"frame of shape \(4, 1, 2, 12, 12\)"):
        model.step(frame.expand(4, 1, 2, 12, 12))
    model.sn1.step_mode = "s"
    with pytest.raises(ValueError, match="step_mode 's'"):
        model(frame)


# ---- gradients


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("connect", ["ADD", "AND", "IAND"])
def test_every_parameter_gets_a_gradient(neuron, connect):
    model = small(neuron=neuron, connect_function=connect, pe=True)
    for _, layer in spiking_neurons(model):
        if hasattr(layer, "bias"):
            # high rates, or AND's spikes die out
            nn.init.constant_(layer.bias, 0.2 if connect == "AND" else -0.3)
    model(torch.randn(4, 2, 24, 24), per_step=True).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing
    zero = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert not zero


def test_grad_checkpointing_changes_nothing_but_recomputes():
    plain = small(depth=18)
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing()
    calls = []
    model.layer3.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 2, 16, 16)
    outputs = []
    for net in (plain, model):
        for _ in range(2):
            outputs.append(net(x, per_step=True))
            outputs[-1].square().mean().backward()
    assert len(calls) == 4
    for one, other in zip(outputs[:2], outputs[2:], strict=True):
        assert torch.equal(one, other)
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    # running statistics too: a recomputation is no new batch
    for (name, one), other in zip(plain.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(one, other), name
    model.set_grad_checkpointing(False)
    model(x)
    assert len(calls) == 5


def test_batch_statistics_are_over_all_steps():
    model = small(neuron="lif")
    inputs = []
    model.layer1[0].bn1.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(torch.randn(3, 2, 12, 12))
    seen = inputs[0]  # [T * N, C, H, W]
    assert seen.shape[0] == 4 * 3
    bn = model.layer1[0].bn1
    torch.testing.assert_close(bn.running_mean, 0.1 * seen.mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_var, 0.9 + 0.1 * seen.transpose(0, 1).flatten(1).var(1))


def test_network_compiles_as_one_graph():
    model = small().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 12, 12)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_with_spikes_in_the_half_type(dtype):
    model = small()
    dtypes = []
    for _, layer in spiking_neurons(model):
        layer.register_forward_hook(lambda _, args, out: dtypes.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype):
        loss = model(torch.randn(2, 2, 12, 12), per_step=True).float().square().mean()
    loss.backward()
    # hooks see every layer, that of the static stem too
    assert dtypes == [(dtype, dtype)] * len(list(spiking_neurons(model)))
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


# ---- parity with SpikingJelly


@pytest.mark.parametrize(
    ("architecture", "neuron", "connect"),
    [
        *(("sew_resnet18", neuron, connect) for neuron in ("psn", "lif") for connect in ("ADD", "AND", "IAND")),
        ("sew_resnext50_32x4d", "psn", "ADD"),
        pytest.param("sew_wide_resnet50_2", "psn", "ADD", marks=pytest.mark.long),
    ],
)
def test_sew_resnet_equals_spikingjelly(architecture, neuron, connect):
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, surrogate
    from spikingjelly.activation_based import neuron as sj
    from spikingjelly.activation_based.model import sew_resnet

    kinds = {
        "psn": (sj.PSN, {"T": 4, "surrogate_function": surrogate.ATan()}),
        "lif": (sj.LIFNode, {"v_reset": None, "detach_reset": True, "surrogate_function": surrogate.ATan()}),
    }
    kind, kwargs = kinds[neuron]
    theirs = getattr(sew_resnet, architecture)(cnf=connect, spiking_neuron=kind, num_classes=7, **kwargs)
    functional.set_step_mode(theirs, "m")
    arguments = ARCHITECTURES[architecture]
    ours = lively(SEWResNet(neuron=neuron, connect_function=connect, stem_pool="max", num_classes=7, **arguments))
    own = ours.state_dict()
    assert set(own) == set(theirs.state_dict())
    theirs.load_state_dict({name: own[name].view(p.shape) for name, p in theirs.state_dict().items()})
    ours, theirs = ours.double(), theirs.double()
    x = torch.randn(4, 2, 3, 32, 32, dtype=torch.double)
    for train in (True, False):
        ours.train(train), theirs.train(train)
        functional.reset_net(theirs)
        outputs = ours(x, per_step=True), theirs(x)
        torch.testing.assert_close(*outputs)
        assert outputs[0].std() > 0
    weights = torch.randn_like(outputs[0])
    for out in outputs:
        (out * weights).sum().backward()
    reference = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, reference[name].grad.view_as(p), msg=lambda m, n=name: f"{n}: {m}")


def test_every_depth_runs():
    for depth in DEPTHS:
        model = SEWResNet(depth, width=4, stem="3x3", num_classes=2).eval()
        assert model(torch.randn(1, 3, 8, 8)).shape == (1, 2)
