"""Networks prepared for inference: one graph, the same logits, frame by frame, what is refused.

The graphs are compiled by "aot_eager", which runs them as PyTorch does, unless Inductor itself is the question.
"""

import copy
import pickle

import foreign_networks as foreign
import pytest
import timm
import torch

from psn_train.models.conv_net import SequentialNet
from psn_train.models.folding import at_rest, fold_batch_norm
from psn_train.models.inference import InferenceNetwork, prepare
from psn_train.models.packed_layers import SpikeConv2d
from psn_train.models.prepacked import PrepackedConv2d
from psn_train.models.sew_resnet import SEWResNet
from psn_train.neurons import Neuron, reset, set_lambda, spiking_neurons
from psn_train.neurons.kernels import backends

SMALL = {"depth": 10, "stem": "3x3", "width": 8, "num_classes": 5, "in_chans": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def quick(monkeypatch):
    """torch.compile without Inductor; the list of the graphs that were compiled."""
    graphs = []
    compiled = torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compile(function, *, fullgraph, dynamic, mode):
        assert fullgraph and mode == "default"
        return compiled(function, fullgraph=True, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", compile)
    yield graphs
    torch.compiler.reset()


def trained(**change) -> SEWResNet:
    model = SEWResNet(**{**SMALL, **change}).double()
    foreign.wake(model, torch.randn(4, 2, 16, 16, dtype=torch.double), Neuron)
    return model


@pytest.mark.parametrize(
    "neuron",
    ["psn", *(pytest.param(name, marks=pytest.mark.long) for name in ("masked_psn", "sliding_psn", "lif", "glif"))],
)
def test_one_graph_with_the_networks_logits(neuron, quick):
    model = trained(neuron=neuron)
    served = prepare(model)
    x = torch.randn(3, 2, 16, 16, dtype=torch.double)
    with torch.no_grad():
        want = model(x, per_step=True)
    torch.testing.assert_close(served(x, per_step=True), want)
    torch.testing.assert_close(served(x, per_step=True), want)
    assert len(quick) == 1
    targets = {str(node.target) for graph in quick for node in graph.graph.nodes}
    assert any("conv2d" in target for target in targets)
    # no batch norm, and no operator that Inductor cannot look into
    assert not any("batch_norm" in target or "psn_train" in target for target in targets)
    torch.testing.assert_close(served(x), want.mean(0))
    assert len(quick) == 2
    # they are constants of Inductor's graph
    with torch.no_grad():
        served.network.fc.bias.add_(1)
    torch.testing.assert_close(served(x), want.mean(0) + 1)
    torch.testing.assert_close(served(x), want.mean(0) + 1)
    assert len(quick) == 3


def test_other_networks_keep_their_kernels(quick):
    model = trained()
    prepare(model)(torch.randn(1, 2, 16, 16))
    assert backends._forced == "auto"
    assert all(neuron.backend is None for _, neuron in spiking_neurons(model))
    assert not model.folded and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.long
def test_two_networks_do_not_share_what_is_compiled(quick):
    pair = [prepare(trained(width=width)) for width in (8, 4)]
    x = torch.randn(1, 2, 16, 16)
    for served in (*pair, *pair):
        served(x)
    assert len(quick) == 2


@pytest.mark.parametrize(
    ("neuron", "k", "compile"),
    [
        ("masked_psn", 3, False),
        ("sliding_psn", 2, True),
        ("sliding_psn", 2, False),
        pytest.param("masked_psn", 3, True, marks=pytest.mark.long),
    ],
)
def test_frame_by_frame_equals_the_sequence(neuron, k, compile, quick):
    model = trained(neuron=neuron, k=k)
    served = prepare(model, compile=compile)
    frames = torch.randn(4, 2, 2, 16, 16, dtype=torch.double)
    with torch.no_grad():
        want = model(frames, per_step=True)
    for _ in range(2):
        got = torch.stack([served.step(frame) for frame in frames])
        torch.testing.assert_close(got, want)
        served.reset()
    assert len(quick) == compile
    # whole sequences are not disturbed by a state, nor a state by them
    first = served.step(frames[0])
    torch.testing.assert_close(served(frames, per_step=True), want)
    torch.testing.assert_close(torch.stack([first, served.step(frames[1])]), want[:2])
    served.reset()
    torch.testing.assert_close(served.step(frames[0, :1]), want[0, :1])


def onednn_takes(dtype):
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN lays out nothing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_stay_laid_out_change_no_bit(dtype):
    served = prepare(trained(neuron="sliding_psn").float(), dtype=dtype, compile=False)
    folded = at_rest(served.network)
    for module in folded.modules():
        if isinstance(module, PrepackedConv2d):
            module.__class__ = SpikeConv2d
    convolutions = [module for module in served.network.modules() if isinstance(module, PrepackedConv2d)]
    assert convolutions and all(conv._kept is None for conv in convolutions)
    for batch in (2, 2, 3, 2):
        frames = torch.randn(4, batch, 2, 16, 16).to(dtype)
        with torch.no_grad():
            want = torch.stack([folded.step(frame) for frame in frames]).float()
        assert torch.equal(torch.stack([served.step(frame) for frame in frames]), want)
        assert all(conv._kept[0].shape[0] == batch for conv in convolutions)
        # oneDNN has no convolutions in bf16 for a CPU without AVX-512
        assert any(conv._kept[1] is not None for conv in convolutions) == onednn_takes(dtype)
        served.reset()
        folded.reset()
    # other weights
    with torch.no_grad():
        for network in (served.network, folded):
            network.layer1[0].conv2.weight.mul_(-1)
        assert torch.equal(served(frames), folded(frames).float())
        assert torch.equal(served.step(frames[0]), folded.step(frames[0]).float())
    # gradients, copies, files
    x = frames.clone().requires_grad_()
    served.reset()
    copies = copy.deepcopy(served.network), pickle.loads(pickle.dumps(served.network))
    grads = [torch.autograd.grad(network(x).sum(), x)[0] for network in (folded, served.network, *copies)]
    assert grads[0].any() and all(torch.equal(grad, grads[0]) for grad in grads[1:])


@pytest.mark.parametrize("changes", [{"channels_last": False}, {"dtype": torch.float64}])
def test_weights_are_laid_out_only_for_onednn(changes):
    served = prepare(trained(neuron="sliding_psn").float(), compile=False, **changes)
    for _ in range(3):
        served.step(torch.randn(2, 2, 16, 16))
    modules = [module for module in served.network.modules() if isinstance(module, PrepackedConv2d)]
    assert all(module._kept[1] is None for module in modules)


def test_columns_of_an_image_one_by_one(quick):
    model = SequentialNet("sliding_psn", width=4, hidden=64, num_classes=5).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.double)
    foreign.wake(model, x, Neuron)
    served = prepare(model)
    with torch.no_grad():
        want = model(x, per_step=True)
    torch.testing.assert_close(served(x, per_step=True), want)
    columns = x.permute(3, 0, 1, 2)
    torch.testing.assert_close(torch.stack([served.step(column) for column in columns]), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_of_what_the_convolutions_see(dtype):
    served = prepare(trained().float(), dtype=dtype, compile=False)
    neurons = {id(p) for _, neuron in spiking_neurons(served.network) for p in neuron.parameters()}
    for name, parameter in served.network.named_parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in neurons else dtype), name
    logits = served(torch.randn(2, 2, 16, 16))
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert served.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("neuron", ["psn", "sliding_psn"])
def test_compiled_by_inductor(neuron, dtype):
    """What Inductor adds up in another order may flip a spike, here none. In float32 weights are constants."""
    model = trained(neuron=neuron).to(dtype)
    x = torch.randn(2, 2, 16, 16, dtype=dtype)
    served = prepare(model)
    with torch.no_grad():
        torch.testing.assert_close(served(x, per_step=True), model(x, per_step=True))
    state = served.network.state_dict()
    changed = model.state_dict()["fc.weight"] * 2
    served.network.load_state_dict({**state, "fc.weight": changed})
    model.fc.weight.data.copy_(changed)
    with torch.no_grad():
        torch.testing.assert_close(served(x, per_step=True), model(x, per_step=True))
    if neuron == "sliding_psn":
        frames = torch.randn(4, 2, 2, 16, 16, dtype=dtype)
        with torch.no_grad():
            want = model(frames, per_step=True)
        for _ in range(2):
            torch.testing.assert_close(torch.stack([served.step(frame) for frame in frames]), want)
            served.reset()


def test_classes_of_photographs_are_those_of_the_network(shared_data):
    x = foreign.photographs(16, 128)
    model = timm.create_model("sew_resnet18_psn", num_classes=10)
    foreign.wake(model, x, Neuron)
    served = prepare(model, compile=False)
    with torch.no_grad():
        assert (served(x).argmax(1) == model(x).argmax(1)).float().mean() >= 15 / 16


# ---- refusals


def test_what_cannot_be_prepared_is_named():
    with pytest.raises(ValueError, match="is in training mode"):
        prepare(SEWResNet(**SMALL))
    model = trained()
    with pytest.raises(ValueError, match=r"got dtype=torch\.int8, wanted one of torch\.float32"):
        prepare(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="got cuda_graph=True with compile=True on cpu"):
        prepare(model, cuda_graph=True)
    folded = fold_batch_norm(model)
    assert isinstance(prepare(folded), InferenceNetwork) and prepare(folded).network is not folded
    served = prepare(model, compile=False)
    with pytest.raises(ValueError, match="wanted floating point"):
        served(torch.zeros(1, 2, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="got an input of shape"):
        served(torch.zeros(1, 3, 16, 16))


def test_steps_that_cannot_be_taken_are_named(quick):
    frame = torch.randn(2, 2, 16, 16)
    with pytest.raises(ValueError, match=r"PSN.*cannot run step by step"):
        prepare(trained()).step(frame)
    with pytest.raises(ValueError, match="state of LIF is not kept in compiled code; take compile=False"):
        prepare(trained(neuron="lif")).step(frame)
    with pytest.raises(ValueError, match="with pe takes its steps uncompiled"):
        prepare(trained(neuron="sliding_psn", pe=True)).step(frame)
    open_mask = trained(neuron="masked_psn")
    set_lambda(open_mask, 0.5)
    with pytest.raises(ValueError, match="only with lambda=1"):
        prepare(open_mask).step(frame)
    served = prepare(trained(neuron="masked_psn"))
    for _ in range(4):
        served.step(frame)
    with pytest.raises(ValueError, match=r"step 5 of T=4; call reset\(\)"):
        served.step(frame)
    served.reset()
    served.step(frame)
    with pytest.raises(ValueError, match="the sequence began with"):
        served.step(frame[:1])
    reset(served.network)
