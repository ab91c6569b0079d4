"""`psn convert` from and to SpikingJelly 2.0: its own classes make the files and read them; logits on real images.

Compared in float64, as in test_convert_authors.py: there no potential lies within rounding of the threshold.
"""

import json
import re

import foreign_networks as foreign
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

import psn_train.models  # noqa: F401 (registers the networks)
from psn_train.cli import main
from psn_train.neurons import Neuron, set_lambda
from psn_train.publish.convert import convert

pytest.importorskip("spikingjelly", reason="SpikingJelly 2.0 needs Python 3.11")

from spikingjelly.activation_based import functional, layer, model, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet

# ours -> SpikingJelly's class, its arguments, what the command line has to say because no tensor does
KINDS = {
    "psn": (neuron.PSN, {"T": 4}, []),
    "masked_psn": (neuron.MaskedPSN, {"k": 2, "T": 4, "lambda_init": 1.0}, []),
    "masked_psn-open": (neuron.MaskedPSN, {"k": 3, "T": 4, "lambda_init": 0.25}, []),
    "sliding_psn": (neuron.SlidingPSN, {"k": 3}, ["--T", "4"]),
    "if": (neuron.IFNode, {}, ["--neuron", "if"]),
    "lif": (neuron.LIFNode, {}, ["--neuron", "lif", "--T", "4"]),
    "lif-soft": (
        neuron.LIFNode,
        {"tau": 1.5, "decay_input": False, "v_reset": None, "v_threshold": 0.8},
        ["--neuron", "lif", *(f"--arg={word}" for word in ("tau=1.5", "decay_input=false", "v_reset=null"))]
        + ["--arg=v_threshold=0.8"],
    ),
    "plif": (neuron.ParametricLIFNode, {}, ["--T", "4"]),
    "klif": (neuron.KLIFNode, {}, []),
    "glif": (neuron.GatedLIFNode, {"T": 4}, []),
}
NEURONS = tuple({cls for cls, _, _ in KINDS.values()})


def frames(x, T=4):
    return x.unsqueeze(0).repeat(T, 1, 1, 1, 1)


def theirs(kind, x, build=sew_resnet.sew_resnet18, cnf="ADD", T=4):
    cls, arguments, words = KINDS[kind]
    torch.manual_seed(1)
    net = build(cnf=cnf, spiking_neuron=cls, **arguments)
    functional.set_step_mode(net, "m")
    foreign.wake(net, frames(x, T), NEURONS)
    return net, words


def assert_same_logits(ours, net, x):
    ours, net, x = ours.double().eval(), net.double().eval(), x.double()
    functional.reset_net(net)
    with torch.no_grad():
        a, b = ours(x, per_step=True), net(frames(x, ours.T))
    functional.reset_net(net)
    assert b.std() > 0.01, "the logits tell nothing apart"
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*lambda < 1")
@pytest.mark.parametrize("kind", KINDS)
def test_from_spikingjelly_with_every_neuron(kind, tmp_path, capsys):
    x = foreign.photographs(2, 64)
    net, words = theirs(kind, x)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "out"), *words]) == 0
    account = " ".join(capsys.readouterr().out.split())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == f"sew_resnet18_{kind.partition('-')[0]}"
    assert config["model_args"]["stem_pool"] == "max" and "SpikingJelly's SEW-ResNet" in account
    assert ("THE MASK IS NOT CLOSED" in account) == (kind == "masked_psn-open")
    assert ("WHAT ITS NEURONS WERE BUILT WITH" in account) == (kind.partition("-")[0] in ("if", "lif", "plif", "klif"))
    assert_same_logits(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), net, x)


@pytest.mark.parametrize("build", [sew_resnet.sew_resnet50, sew_resnet.sew_resnext50_32x4d], ids=lambda f: f.__name__)
def test_from_spikingjelly_with_bottlenecks(build, tmp_path):
    x = foreign.photographs(2, 32)
    net, _ = theirs("psn", x, build)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    account = convert(tmp_path / "x.pth", tmp_path / "out")
    assert f"read as {build.__name__}_psn with" in account.notes[0]
    assert_same_logits(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), net, x)


def test_the_join_is_not_in_the_file(tmp_path):
    x = foreign.photographs(2, 32)
    net, _ = theirs("psn", x, cnf="IAND")
    torch.save(net.state_dict(), tmp_path / "x.pth")
    account = convert(tmp_path / "x.pth", tmp_path / "out", arguments={"connect_function": "IAND"})
    assert any("does not hold the join" in note for note in account.notes)
    assert_same_logits(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), net, x)


def ours(name, x, folder, **arguments):
    torch.manual_seed(2)
    arguments = {"T": 4, "stem_pool": "max", "num_classes": 10, **arguments}
    net = timm.create_model(f"sew_resnet18_{name}", **arguments)
    foreign.wake(net, x, Neuron)
    save_for_hf(net, str(folder), safe_serialization=True)
    return net


def build_as_told(account):
    """The account's own words, run."""
    (note,) = [note for note in account.notes if note.startswith("build it as")]
    words = re.match(r"build it as (model\.sew_resnet\.\w+\(.*\)), then functional\.set_step_mode\(net, 'm'\)", note)
    net = eval(words[1], {"model": model, "neuron": neuron, "surrogate": surrogate, "__builtins__": {}})
    functional.set_step_mode(net, "m")
    return net


TO = {
    "psn": {},
    "masked_psn": {"k": 3},
    "sliding_psn": {"k": 2},
    "if": {"v_threshold": 0.7},
    "lif": {"tau": 1.5, "v_reset": 0.1, "surrogate": "sigmoid", "alpha": 4.0},
    "plif": {"decay_input": False},
    "klif": {"v_threshold": 0.9},
}


@pytest.mark.parametrize(("name", "suffix"), [("psn", ".safetensors"), *((name, ".pth") for name in TO)])
def test_to_spikingjelly_and_back_bit_for_bit(name, suffix, tmp_path, capsys):
    x = foreign.photographs(2, 64)
    mine = ours(name, x, tmp_path / "mine", **TO[name])
    file = tmp_path / f"sj{suffix}"
    assert main(["convert", str(tmp_path / "mine"), str(file), "--to", "spikingjelly"]) == 0
    assert "build it as model.sew_resnet.sew_resnet18(cnf='ADD', num_classes=10" in capsys.readouterr().out
    file.rename(tmp_path / f"first{suffix}")
    account = convert(tmp_path / "mine", file, to="spikingjelly")
    net = build_as_told(account)
    tensors = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    net.load_state_dict(tensors, strict=True)
    state = {key: tensor.clone() for key, tensor in mine.state_dict().items()}
    assert_same_logits(mine, net, x)
    say = {} if name in ("psn", "masked_psn") else {"T": 4}
    say |= {"neuron": name} if name in ("if", "lif") else {}
    convert(file, tmp_path / "back", **say)
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_an_average_pool_is_said_loudly_and_can_be_had(tmp_path):
    x = foreign.photographs(2, 64)
    mine = ours("psn", x, tmp_path / "mine", stem_pool="avg")
    account = convert(tmp_path / "mine" / "model.safetensors", tmp_path / "a.pth", to="spikingjelly")
    assert "SPIKINGJELLY'S STEM POOLS BY MAXIMUM" in str(account)
    account = convert(tmp_path / "mine", tmp_path / "x.pth", to="spikingjelly")
    (note,) = [note for note in account.notes if "STEM POOLS BY MAXIMUM" in note]
    net = build_as_told(account)
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    bare = torch.load(tmp_path / "a.pth", weights_only=True)
    assert bare.keys() == state.keys() and all(torch.equal(bare[key], state[key]) for key in state)
    net.load_state_dict(state, strict=True)
    exec(note.partition("until ")[2], {"net": net, "layer": layer})
    assert_same_logits(mine, net, x)


@pytest.mark.filterwarnings("ignore:.*lambda < 1")
def test_lambda_below_one_arrives_and_is_said(tmp_path):
    x = foreign.photographs(2, 32)
    mine = ours("masked_psn", x, tmp_path / "mine", k=2)
    set_lambda(mine, 0.5)
    save_for_hf(mine, str(tmp_path / "mine"), safe_serialization=True)
    account = convert(tmp_path / "mine", tmp_path / "x.pth", to="spikingjelly")
    assert any("lambda = 0.5, in _lambda_: THE MASK IS NOT CLOSED" in note for note in account.notes)
    net = build_as_told(account)
    net.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))
    assert_same_logits(mine, net, x)


def test_glif_of_channels_that_differ_and_of_alike_ones(tmp_path):
    x = foreign.photographs(2, 64)
    mine = ours("glif", x, tmp_path / "mine")
    account = convert(tmp_path / "mine", tmp_path / "x.pth", to="spikingjelly")
    (note,) = [note for note in account.notes if "GIVES ALL LAYERS ONE inplane" in note]
    channels = iter([int(number) for number in note.partition("order: ")[2].split(", ")])
    net = sew_resnet.sew_resnet18(
        cnf="ADD", num_classes=10, spiking_neuron=lambda: neuron.GatedLIFNode(4, inplane=next(channels))
    )
    functional.set_step_mode(net, "m")
    net.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
    assert_same_logits(mine, net, x)
    # a layer of SpikingJelly's has one value for all channels: there and back it stays one
    net, _ = theirs("glif", x)
    torch.save(net.state_dict(), tmp_path / "sj.pth")
    convert(tmp_path / "sj.pth", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again.pth", to="spikingjelly")
    again, first = (torch.load(tmp_path / name, weights_only=True) for name in ("again.pth", "sj.pth"))
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


def test_a_checkpoint_of_the_authors_goes_to_spikingjelly_at_once(tmp_path):
    x = foreign.photographs(2, 32)
    torch.manual_seed(0)
    net = foreign.AuthorsSEWResNet(18, 4, lambda: foreign.FullPSN(4), pe=False)
    foreign.wake(net, x, foreign.FullPSN)
    file = foreign.save_as_authors(net, tmp_path / "max.pth", T=4)
    account = convert(file, tmp_path / "sj.safetensors", to="spikingjelly")
    assert "training state" in str(account)
    made = build_as_told(account)
    made.load_state_dict(load_file(tmp_path / "sj.safetensors"), strict=True)
    made.maxpool = layer.AvgPool2d(3, 2, 1, step_mode="m")
    with torch.no_grad():
        a, b = net.double().eval()(x.double()), made.double().eval()(frames(x.double()))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("sew_resnet18_psn", {"pe": True}, "it has a time embedding pe"),
        ("sew_resnet18_psn", {"width": 32}, r"its first convolution is \[32, 3, 7, 7\]"),
        ("sew_resnet18_psn", {"in_chans": 1}, r"its first convolution is \[64, 1, 7, 7\]"),
        ("sew_resnet10_psn", {}, "it has depth=10"),
        ("sew_resnet18_lif_no_reset", {}, "its neurons are lif_no_reset"),
        ("sew_resnet50_psn", {"connect_function": "IAND", "num_classes": 1}, "joined by IAND"),
        ("sequential_net_psn", {"T": 32, "width": 4, "hidden": 8}, "it is a SequentialNet"),
    ],
)
def test_what_spikingjelly_does_not_have_is_refused(name, arguments, says, tmp_path):
    save_for_hf(timm.create_model(name, **arguments), str(tmp_path / "mine"), safe_serialization=True)
    with pytest.raises(ValueError, match=says):
        convert(tmp_path / "mine", tmp_path / "x.pth", to="spikingjelly")
    assert not (tmp_path / "x.pth").exists()
