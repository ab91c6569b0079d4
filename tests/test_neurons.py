"""Neuron modules: SpikingJelly as the reference, initialisation, step modes, lambda, compile, and every refusal."""

import copy
import math
import warnings

import pytest
import torch
from neuron_parity import assert_same_spikes_and_gradients

from psn_train import neurons
from psn_train.neurons import IF, LIF, PSN, MaskedPSN, SlidingPSN, build_neuron

SHAPES = [(7,), (2, 3), (3, 5, 7, 1), (1, 2, 3, 3)]
STEPS = [1, 3, 4, 32]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def every_kind(T=4):
    return [build_neuron(name, T, min(2, T) if "k" in neurons.NEURONS[name][1] else None) for name in neurons.NEURONS]


# ---- parity with SpikingJelly


@pytest.fixture(scope="module")
def sj():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import neuron, surrogate

    class Reference:
        PSN, MaskedPSN, SlidingPSN = neuron.PSN, neuron.MaskedPSN, neuron.SlidingPSN
        IFNode, LIFNode, ATan, Sigmoid = neuron.IFNode, neuron.LIFNode, surrogate.ATan, surrogate.Sigmoid

    return Reference


def assert_same(ours, theirs, shape, names=("weight", "bias")):
    """Outputs, and gradients of the input and of every parameter by name, in float64."""
    ours, theirs = ours.double(), theirs.double()
    if names:
        # spikes enough to compare at any size
        torch.nn.init.normal_(ours.bias, std=0.5)
    for name in names:
        with torch.no_grad():
            getattr(theirs, name).copy_(getattr(ours, name).view_as(getattr(theirs, name)))
    spikes = assert_same_spikes_and_gradients(ours, theirs, {name: name for name in names}, shape)
    assert 0 < spikes.mean() < 1 or shape[0] == 1 or spikes.numel() < 70


@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_psn_equals_spikingjelly(sj, T, shape):
    assert_same(PSN(T), sj.PSN(T, sj.ATan()), (T, *shape))


@pytest.mark.parametrize(("T", "k"), [(1, 1), (3, 2), (4, 1), (4, 4), (32, 8)])
@pytest.mark.parametrize("lambda_", [0.0, 0.31, 0.9725, 1.0])
def test_masked_psn_equals_spikingjelly(sj, T, k, lambda_):
    ours = MaskedPSN(k, T, lambda_)
    assert_same(ours, sj.MaskedPSN(k, T, float(ours.lambda_), sj.ATan(), step_mode="m"), (T, 3, 5))


@pytest.mark.parametrize(("T", "k"), [(1, 1), (1, 4), (3, 2), (4, 7), (32, 8)])
@pytest.mark.parametrize("exp_init", [True, False])
def test_sliding_psn_equals_spikingjelly(sj, T, k, exp_init):
    assert_same(
        SlidingPSN(k, "exp" if exp_init else "uniform"), sj.SlidingPSN(k, exp_init, sj.ATan(), step_mode="m"), (T, 3, 5)
    )


@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_if_and_lif_equal_spikingjelly(sj, T, v_reset, detach_reset):
    theirs = {"v_reset": v_reset, "detach_reset": detach_reset, "surrogate_function": sj.ATan(), "step_mode": "m"}
    ours = {"v_reset": v_reset, "detach_reset": detach_reset}
    assert_same(IF(**ours), sj.IFNode(**theirs), (T, 3, 5), ())
    for decay_input in (True, False):
        for tau in (2.0, 1.25):
            reference = sj.LIFNode(tau, decay_input, **theirs)
            assert_same(LIF(tau, decay_input, **ours), reference, (T, 3, 5), ())


def test_sigmoid_surrogate_equals_spikingjelly(sj):
    assert_same(PSN(4, surrogate="sigmoid", alpha=4.0), sj.PSN(4, sj.Sigmoid(4.0)), (4, 9))


def test_float32_spikes_differ_only_where_the_potential_is_at_the_threshold(sj):
    ours, theirs = PSN(8), sj.PSN(8, sj.ATan())
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    x = torch.randn(8, 20000)
    h = torch.addmm(ours.bias.double()[:, None], ours.weight.double(), x.double())
    clear = h.abs() > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(ours(x)[clear], theirs(x)[clear])


# ---- initialisation


@pytest.mark.parametrize("T", [1, 4, 32])
def test_initial_weights_are_uniform_and_biases_minus_one(T):
    layers = [PSN(T) for _ in range(max(2, 4000 // T**2))]
    weights = torch.stack([layer.weight.detach() for layer in layers])
    bound = 1 / math.sqrt(T)
    assert weights.abs().max() <= bound and weights.abs().max() > 0.98 * bound
    assert weights.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert all((layer.bias == -1).all() for layer in layers)
    assert MaskedPSN(1, T).weight.abs().max() <= bound and (MaskedPSN(1, T).bias == -1).all()


def test_sliding_psn_starts_uniform_or_exponential():
    weights = torch.cat([SlidingPSN(4).weight.detach() for _ in range(1000)])
    assert 0.49 < weights.abs().max() <= 0.5 and weights.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.05)
    exponential = SlidingPSN(4, init="exp")
    assert exponential.weight.tolist() == [0.125, 0.25, 0.5, 1.0] and exponential.bias.item() == -1.0


def test_initial_firing_rates_are_those_measured_on_the_authors_code():
    rates = [PSN(4)(torch.randn(4, 4000)).mean() for _ in range(300)]
    assert torch.stack(rates).mean().item() == pytest.approx(0.042, abs=0.005)
    x = torch.randn(8, 50000)
    # steps with a full history of two taps
    assert SlidingPSN(2, init="exp")(x)[1:].mean().item() == pytest.approx(0.1855, abs=0.005)


def test_parameters_and_state_by_name():
    assert {n: tuple(p.shape) for n, p in PSN(4).named_parameters()} == {"weight": (4, 4), "bias": (4,)}
    assert {n: tuple(p.shape) for n, p in SlidingPSN(3).named_parameters()} == {"weight": (3,), "bias": ()}
    assert set(MaskedPSN(2, 4).state_dict()) == {"weight", "bias", "lambda_", "order"}
    assert not LIF().state_dict()


# ---- step by step


@pytest.mark.parametrize("name", ["masked_psn", "sliding_psn", "lif", "if"])
@pytest.mark.parametrize("T", [1, 4, 9])
@pytest.mark.parametrize("channels_last", [True, False])
def test_step_by_step_equals_parallel(name, T, channels_last):
    layer = build_neuron(name, T, min(3, T) if "psn" in name else None).double()
    x = torch.randn(T * 2, 3, 4, 5, dtype=torch.double) * 2
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x = x.unflatten(0, (T, 2))
    parallel = layer(x)
    layer.step_mode = "s"
    for _ in range(2):  # the second time after a reset
        steps = [layer(frame) for frame in x]
        assert torch.equal(torch.stack(steps), parallel)
        assert all(step.is_contiguous(memory_format=torch.channels_last) == channels_last for step in steps)
        layer.reset()


def test_state_is_k_inputs_and_survives_a_change_of_layout():
    layer = SlidingPSN(3)
    x = torch.randn(10, 2, 3, 4, 5)
    parallel = layer(x)
    layer.step_mode = "s"
    for t, frame in enumerate(x):
        frame = frame.to(memory_format=torch.channels_last) if t % 2 else frame
        assert torch.equal(layer(frame), parallel[t])
        assert layer._queue.shape == (3, 2, 3, 4, 5)


def test_stepping_carries_gradients_through_time():
    layer = SlidingPSN(2).double()
    x = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    (parallel,) = torch.autograd.grad(layer(x).sum(), x)
    layer.step_mode = "s"
    (steps,) = torch.autograd.grad(torch.stack([layer(frame) for frame in x]).sum(), x)
    torch.testing.assert_close(steps, parallel)


def test_static_input_needs_whole_sequences():
    layer = LIF()
    layer.step_mode = "s"
    with pytest.raises(ValueError, match="forward_static needs step_mode 'm'"):
        layer.forward_static(torch.zeros(2, 3), 4)


def test_a_sequence_starts_from_rest_each_time():
    for layer in every_kind():
        x = torch.randn(4, 50)
        assert torch.equal(layer(x), layer(x))


def test_psn_refuses_to_step_and_nothing_is_left_half_changed():
    model = torch.nn.Sequential(LIF(), PSN(4))
    with pytest.raises(ValueError, match=r"PSN\(T=4.*each output step needs all 4 inputs"):
        neurons.set_step_mode(model, "s")
    assert model[0].step_mode == "m"
    with pytest.raises(ValueError, match="'x', wanted one of m, s"):
        neurons.set_step_mode(model, "x")


def test_masked_psn_steps_only_behind_a_closed_mask_and_only_T_times():
    layer = MaskedPSN(2, 3, lambda_=0.5)
    with pytest.raises(ValueError, match=r"lambda=0\.5.*only with lambda=1"):
        layer.step_mode = "s"
    layer.set_lambda(1.0)
    layer.step_mode = "s"
    for _ in range(3):
        layer(torch.randn(2, 5))
    with pytest.raises(ValueError, match="step 4 of T=3"):
        layer(torch.randn(2, 5))
    layer.reset()
    layer(torch.randn(2, 5))
    layer.set_lambda(0.9)
    with pytest.raises(ValueError, match="only with lambda=1"):
        layer(torch.randn(2, 5))


# ---- lambda


def test_lambda_is_set_read_saved_and_restored():
    model = torch.nn.Sequential(MaskedPSN(2, 4), PSN(4), MaskedPSN(1, 4))
    assert neurons.get_lambda(model) == 1.0 and neurons.get_lambda(PSN(4)) is None
    neurons.set_lambda(model, 0.25)
    assert neurons.get_lambda(model) == 0.25
    fresh = torch.nn.Sequential(MaskedPSN(2, 4), PSN(4), MaskedPSN(1, 4))
    fresh.load_state_dict(model.state_dict())
    assert neurons.get_lambda(fresh) == 0.25 and "lambda=0.25" in repr(fresh)
    fresh[0].lambda_.fill_(0.75)  # as an average of models does
    fresh.eval()
    assert fresh[0]._host_lambda == 0.75
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="wanted a number from 0 to 1"):
            neurons.set_lambda(model, value)


def test_evaluating_an_unmasked_psn_warns_once_a_module():
    layer, x = MaskedPSN(2, 4, lambda_=0.5), torch.randn(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    layer.eval()
    with pytest.warns(UserWarning, match=r"lambda=0\.5.*lambda < 1"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        MaskedPSN(2, 4).eval()(x)
    with pytest.warns(UserWarning, match="lambda < 1"):
        MaskedPSN(2, 4, lambda_=0.0).eval().forward_static(x[0])


def test_weights_of_another_order_are_refused():
    with pytest.raises(RuntimeError, match=r"order: the weights are of order k=3, the model has k=2"):
        MaskedPSN(2, 4).load_state_dict(MaskedPSN(3, 4).state_dict())


# ---- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PSN(0), "got T=0, wanted a whole number of at least 1"),
        (lambda: PSN(4.0), "got T=4.0"),
        (lambda: PSN(4, surrogate="relu"), "'relu', wanted one of atan"),
        (lambda: PSN(4, alpha=0.0), "alpha=0.0, wanted a number above 0"),
        (lambda: MaskedPSN(0, 4), "got k=0"),
        (lambda: MaskedPSN(5, 4), "got k=5 and T=4, wanted k <= T"),
        (lambda: MaskedPSN(2, 4, lambda_=2.0), "lambda=2.0"),
        (lambda: SlidingPSN(0), "got k=0"),
        (lambda: LIF(tau=1.0), "tau=1.0, wanted a number above 1"),
        (lambda: build_neuron("plastic", 4), "'plastic', wanted one of psn, masked_psn, sliding_psn, if, lif"),
        (lambda: build_neuron("masked_psn", 4), "got k=None and T=4, wanted an order k from 1 to T"),
        (lambda: build_neuron("masked_psn", 4, 5), "got k=5 and T=4"),
        (lambda: build_neuron("sliding_psn", 4, 0), "got k=0"),
        (lambda: build_neuron("psn", 4, 2), "got k, which it does not take"),
        (lambda: build_neuron("if", 4, tau=2.0), "got tau, which it does not take; it takes v_threshold"),
        (lambda: PSN(4).forward_static(torch.zeros(2, 3), 5), "got 5 time-steps, wanted T=4"),
        (lambda: LIF().forward_static(torch.zeros(2, 3)), "got T=None"),
        (lambda: neurons.set_nan_check(PSN(4), "sometimes"), "wanted one of cpu, always, never"),
    ],
)
def test_wrong_numbers_are_named(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(".", r"\.")):
        make()


@pytest.mark.parametrize("name", neurons.NEURONS)
def test_wrong_inputs_are_named(name):
    layer = build_neuron(name, 4, 2 if "k" in neurons.NEURONS[name][1] else None)
    x = torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match=r"empty batch, x_seq of shape \(4, 0, 5\)"):
        layer(x[:, :0])
    with pytest.raises(ValueError, match=r"dtype torch\.uint8, wanted floating point"):
        layer(torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \(4,\), wanted \[T, N, \.\.\.\]"):
        layer(x[:, 0, 0])
    x[2, 1, 3] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 60 values of x_seq \(4, 3, 5\) are NaN"):
        layer(x)
    with pytest.raises(ValueError, match=r"1 of 15 values of x \(3, 5\) are NaN"):
        layer.forward_static(x[2], 4)
    for half in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"1 of 60 values of x_seq \(4, 3, 5\) are NaN"):
            layer(x.to(half))
    neurons.set_nan_check(layer, "never")
    layer(x)


@pytest.mark.parametrize("name", ["psn", "masked_psn"])
def test_wrong_T_is_named(name):
    layer = build_neuron(name, 4, 2 if name == "masked_psn" else None)
    with pytest.raises(ValueError, match=r"got 5 time-steps, wanted T=4"):
        layer(torch.randn(5, 2))


def test_infinite_and_huge_inputs_are_not_taken_for_nan():
    layer = PSN(2)
    layer(torch.tensor([[3e38, 3e38], [1.0, float("inf")]]))
    layer(torch.full((2, 70000), 1.0, dtype=torch.float16))


# ---- compile


@pytest.mark.parametrize("name", neurons.NEURONS)
def test_compiles_as_one_graph_with_the_same_result(name):
    layer = build_neuron(name, 4, 2 if "k" in neurons.NEURONS[name][1] else None)
    if name == "masked_psn":
        layer.set_lambda(0.5)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last).unflatten(0, (4, 2)).requires_grad_()
    eager = layer(x)
    (grad,) = torch.autograd.grad(eager.sum(), x)
    out = compiled(x)
    (compiled_grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, eager) and out.stride() == eager.stride()
    torch.testing.assert_close(compiled_grad, grad)


def test_lambda_moves_without_recompiling():
    layer = MaskedPSN(1, 4)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(4, 500)
    outputs = []
    for value in (0.0, 0.5, 1.0):
        layer.set_lambda(value)
        outputs.append(compiled(x))
        assert torch.equal(outputs[-1], layer(x))
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[2])


def test_copies_and_pickles():
    for layer in every_kind():
        twin = copy.deepcopy(layer)
        x = torch.randn(4, 30)
        assert torch.equal(layer(x), twin(x))
