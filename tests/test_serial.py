"""The serial neurons: SpikingJelly as the reference, true gradients, an LIF as a PSN, surrogates, layouts."""

import math

import pytest
import torch
from neuron_parity import assert_same_spikes_and_gradients
from torch.autograd import gradcheck

from psn_train import neurons
from psn_train.neurons import GLIF, IF, KLIF, LIF, PLIF, PSN, LIFNoReset, MaskedPSN, SlidingPSN, build_neuron
from psn_train.neurons import functional as fn
from psn_train.neurons.serial import GLIF_START

SERIAL = ("if", "lif", "lif_no_reset", "plif", "klif", "glif")
RESETS = [None, 0.0, -0.3]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def sj():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import neuron, surrogate

    neuron.ATan, neuron.Sigmoid = surrogate.ATan, surrogate.Sigmoid
    return neuron


def double(*shape, scale=1.0):
    return (torch.randn(shape, dtype=torch.double) * scale).requires_grad_()


def assert_same(ours, theirs, names: dict[str, str], shape=(6, 2, 3, 4, 5)):
    """Spikes, and gradients of the input and of every parameter (our name -> theirs), in float64."""
    ours, theirs = ours.double(), theirs.double()
    assert {name for name, _ in ours.named_parameters()} == set(names)
    for mine, other in names.items():
        with torch.no_grad():
            parameter = getattr(ours, mine)
            # away from where it starts, so that no term of the equation is silent
            parameter += 0.3 * torch.randn_like(parameter)
            getattr(theirs, other).copy_(parameter)
    spikes = assert_same_spikes_and_gradients(ours, theirs, names, shape)
    assert 0.02 < spikes.mean() < 0.98


# ---- parity with SpikingJelly


@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("decay_input", [True, False])
def test_plif_equals_spikingjelly(sj, v_reset, detach_reset, decay_input):
    reset = {"v_reset": v_reset, "detach_reset": detach_reset}
    theirs = sj.ParametricLIFNode(2.5, decay_input, surrogate_function=sj.ATan(), step_mode="m", **reset)
    assert_same(PLIF(2.5, decay_input, **reset), theirs, {"w": "w"})


@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("decay_input", [True, False])
def test_klif_equals_spikingjelly(sj, v_reset, detach_reset, decay_input):
    reset = {"v_reset": v_reset, "detach_reset": detach_reset}
    theirs = sj.KLIFNode(False, 2.5, decay_input, surrogate_function=sj.ATan(), step_mode="m", **reset)
    assert_same(KLIF(2.5, decay_input, **reset), theirs, {"k": "k"})


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("surrogate", ["atan", "sigmoid"])
def test_glif_equals_spikingjelly(sj, channels, surrogate):
    function = {"atan": sj.ATan(2.0), "sigmoid": sj.Sigmoid(2.0)}[surrogate]
    names = {name: name.removeprefix("gate_") for name in GLIF_START}
    theirs = sj.GatedLIFNode(6, channels, surrogate_function=function)
    assert_same(GLIF(6, channels, surrogate=surrogate), theirs, names)


@pytest.mark.parametrize("decay_input", [True, False])
def test_lif_without_reset_equals_spikingjellys_lif_that_cannot_fire(sj, decay_input):
    # the potential of an LIF with an unreachable threshold is that of one without reset
    theirs = sj.LIFNode(2.0, decay_input, 1e9, surrogate_function=sj.ATan(), step_mode="m", store_v_seq=True)
    x = torch.randn(9, 4, 7) * 3
    theirs(x)
    h_seq = fn.charge_fire_reset(
        x, lambda x, v: fn.lif_charge(x, v, 2.0, decay_input), reset=False, return_h=True
    ).h_seq
    torch.testing.assert_close(h_seq, theirs.v_seq)
    clear = (h_seq - 1).abs() > 1e-5
    assert torch.equal(LIFNoReset(2.0, decay_input)(x)[clear], (theirs.v_seq >= 1).float()[clear])


# ---- the paper's baselines


def test_constants_are_those_of_the_paper():
    assert (LIF().tau, LIF().v_threshold, LIF().v_reset, LIF().detach_reset) == (2.0, 1.0, None, True)
    assert 1 / PLIF().w.detach().sigmoid() == pytest.approx(2.0) and PLIF().detach_reset
    assert KLIF().k == 1.0 and KLIF().tau == 2.0 and not KLIF().detach_reset and KLIF().v_reset is None
    assert (LIFNoReset().tau, LIFNoReset().v_threshold) == (2.0, 1.0)
    gates = GLIF(32, 3).gates()
    for value, wanted in zip(gates, (0.6, 0.8, 0.6, 0.25, 0.5, 0.0625, 0.5, 0.5), strict=True):
        torch.testing.assert_close(value, torch.full_like(value, wanted))
    assert gates.conduct.shape == (32, 3) and gates.tau.shape == (3,)


# ---- gradients


@pytest.mark.parametrize("surrogate", fn.SURROGATES)
@pytest.mark.parametrize("v_reset", [None, -0.2])
def test_gradcheck_of_the_smooth_twins(surrogate, v_reset):
    x, p = double(4, 3, scale=2.0), torch.tensor(0.7, dtype=torch.double, requires_grad=True)
    # a detached reset is not the gradient of anything
    options = {"v_reset": v_reset, "detach_reset": False, "smooth": True, "surrogate": surrogate, "alpha": 1.3}
    assert gradcheck(lambda x, w: fn.plif(x, w, **options), (x, p))
    assert gradcheck(lambda x, k: fn.klif(x, k, **options), (x, p))
    assert gradcheck(lambda x: fn.lif_no_reset(x, smooth=True, surrogate=surrogate, alpha=1.3), (x,))


@pytest.mark.parametrize("surrogate", fn.SURROGATES)
@pytest.mark.parametrize("channels", [(), (2,)])
def test_gradcheck_of_glif(surrogate, channels):
    logits = [double(*channels) for _ in range(7)] + [double(4, *channels)]

    def run(x, *logits):
        return fn.glif(x, fn.Gates(*(p.sigmoid() for p in logits)), surrogate, 1.3, smooth=True)

    assert gradcheck(run, (double(4, 3, 2, scale=2.0), *logits))


@pytest.mark.parametrize("name", SERIAL)
@pytest.mark.parametrize("surrogate", fn.SURROGATES)
def test_every_neuron_takes_every_surrogate(name, surrogate):
    layer = build_neuron(name, 4, surrogate=surrogate, alpha=1.0, channels=5)
    x = torch.randn(4, 3, 5).mul(2).requires_grad_()
    spikes = layer(x)
    spikes.sum().backward()
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert x.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in layer.parameters())


# ---- an LIF is a PSN between its resets


@pytest.mark.parametrize("tau", [1.25, 2.0, 8.0])
@pytest.mark.parametrize("T", [1, 4, 32])
@pytest.mark.parametrize("decay_input", [True, False])
def test_psn_weight_from_lif_is_the_serial_neuron(tau, T, decay_input):
    x = torch.randn(T, 50, dtype=torch.double) * 3
    weight = neurons.psn_weight_from_lif(tau, T, decay_input, dtype=torch.double)
    serial = fn.charge_fire_reset(x, lambda x, v: fn.lif_charge(x, v, tau, decay_input), reset=False, return_h=True)
    bias = torch.full((T,), -1.0, dtype=torch.double)
    torch.testing.assert_close(fn.psn_h(x, weight, bias), serial.h_seq - 1.0)
    assert torch.equal(fn.psn(x, weight, bias), serial.spike_seq)
    # by hand, as the paper has it
    i = T // 2
    expected = (1 - 1 / tau) ** (T - 1 - i) / (tau if decay_input else 1)
    assert weight[T - 1, i] == pytest.approx(expected)


def test_an_if_and_an_lif_that_do_not_fire_are_a_psn_weight():
    T = 9
    x = torch.randn(T, 40, dtype=torch.double).abs() / 20
    for ours, weight in (
        (IF(v_threshold=5.0), neurons.psn_weight_from_lif(math.inf, T, decay_input=False, dtype=torch.double)),
        (LIF(v_threshold=5.0), neurons.psn_weight_from_lif(2.0, T, dtype=torch.double)),
    ):
        assert ours(x).sum() == 0
        h_seq = fn.charge_fire_reset(x, ours.charge, ours.v_threshold, return_h=True).h_seq
        torch.testing.assert_close(weight @ x, h_seq)
    assert torch.equal(neurons.psn_weight_from_lif(math.inf, 3, decay_input=False), torch.ones(3, 3).tril())


@pytest.mark.parametrize("init_tau", [1.5, 2.0])
def test_an_lif_is_a_start_for_every_psn(init_tau):
    x = torch.randn(8, 300, dtype=torch.double) * 3
    serial = LIFNoReset(init_tau).double()(x)
    psn = PSN(8, init="lif", init_tau=init_tau).double()
    # parameters are made in float32
    clear = (fn.psn_h(x, psn.weight, psn.bias)).abs() > 1e-5
    assert torch.equal(psn(x)[clear], serial[clear]) and 0 < serial.mean() < 1
    for layer in (
        MaskedPSN(8, 8, init="lif", init_tau=init_tau),
        SlidingPSN(8, init="lif", init_tau=init_tau),
    ):
        assert torch.equal(layer.double()(x)[clear], serial[clear])
    banded = MaskedPSN(3, 8, init="lif", init_tau=init_tau)
    sliding = SlidingPSN(3, init="lif", init_tau=init_tau)
    torch.testing.assert_close(fn.masked_weight(banded.weight, 3), fn.sliding_weight(sliding.weight, 8))


# ---- the call


@pytest.mark.parametrize("name", SERIAL)
@pytest.mark.parametrize("channels_last", [False, True])
def test_sequence_static_and_steps_agree_in_every_layout(name, channels_last):
    layer = build_neuron(name, 5, channels=4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(15, 4, 3, 2) * 2
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x_seq = x.unflatten(0, (5, 3))
    out = layer(x_seq)
    assert out.stride() == x_seq.stride()
    layer.step_mode = "s"
    assert torch.equal(torch.stack([layer(x) for x in x_seq]), out)
    layer.step_mode = "m"
    assert torch.equal(layer.forward_static(x_seq[0], 5), layer(x_seq[:1].expand(5, -1, -1, -1, -1)))
    half = layer(x_seq.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SERIAL)
def test_streaming_is_the_sequence(name):
    layer = build_neuron(name, 5, channels=4)
    x_seq = torch.randn(5, 2, 4) * 2
    with neurons.streaming(layer):
        frames = [layer(x_seq[t : t + 1]) for t in range(5)]
    assert torch.equal(torch.cat(frames), layer(x_seq))
    neurons.reset(layer)
    with pytest.raises(ValueError, match="cannot run step by step"), neurons.streaming(PSN(4)):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PLIF(1.0), "PLIF: got init_tau=1.0, wanted a number above 1"),
        (lambda: KLIF(0.5), "KLIF: got tau=0.5, wanted a number above 1"),
        (lambda: GLIF(0), "GLIF: got T=0 and channels=None, wanted at least 1"),
        (lambda: GLIF(4, 3)(torch.zeros(4, 2, 5)), r"got 5 channels \(axis 2\), wanted 3"),
        (lambda: GLIF(4, 3)(torch.zeros(5, 2, 3)), "got 5 time-steps, wanted T=4"),
        (lambda: PSN(4, init="exp"), "PSN: got init='exp', wanted one of uniform, lif"),
        (lambda: SlidingPSN(4, init="lf"), "SlidingPSN: got init='lf', wanted one of uniform, lif, exp"),
        (lambda: neurons.psn_weight_from_lif(1.0, 4), "got tau=1.0 and T=4, wanted tau above 1"),
        (lambda: neurons.psn_weight_from_lif(2.0, 0), "got tau=2.0 and T=0"),
        (lambda: neurons.psn_weight_from_lif(math.inf, 4), "whose weights are all 0"),
        (lambda: build_neuron("lif_no_reset", 4, v_reset=0.0), "got v_reset, which it does not take"),
        (lambda: setattr(PSN(4), "step_mode", "s"), "cannot run step by step"),
        (lambda: setattr(LIF(), "step_mode", "x"), "got step_mode='x', wanted one of m, s"),
    ],
)
def test_wrong_numbers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_glif_ends_after_T_steps():
    layer = GLIF(2, 3)
    layer.step_mode = "s"
    layer(torch.randn(1, 3)), layer(torch.randn(1, 3))
    with pytest.raises(ValueError, match="step 3 of T=2; call reset"):
        layer(torch.randn(1, 3))
    layer.reset()
    assert layer(torch.randn(1, 3)).shape == (1, 3)
