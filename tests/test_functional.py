"""functional.py against its equations: surrogates, gradients, layout, precision."""

import pytest
import torch
from torch.autograd import gradcheck

from psn_train.neurons import functional as fn
from psn_train.neurons.layout import from_rows, to_images, to_rows, to_sequence

ALPHAS = {"atan": 2.0, "sigmoid": 4.0, "triangle": 1.0, "rectangle": 1.0}


def double(*shape, scale=1.0):
    return (torch.randn(shape, dtype=torch.double) * scale).requires_grad_()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- surrogates


@pytest.mark.parametrize("name", fn.SURROGATES)
@pytest.mark.parametrize("alpha", [0.7, 2.0])
def test_surrogate_is_the_derivative_of_its_primitive(name, alpha):
    h = torch.linspace(-3.0, 3.0, 601, dtype=torch.double).add(1e-4).requires_grad_()
    (true,) = torch.autograd.grad(fn.fire(h, name, alpha, smooth=True).sum(), h)
    (surrogate,) = torch.autograd.grad(fn.fire(h, name, alpha).sum(), h)
    torch.testing.assert_close(surrogate, true)


@pytest.mark.parametrize("name", fn.SURROGATES)
def test_primitive_rises_from_0_to_1_through_a_half(name):
    primitive = fn.get_surrogate(name).primitive
    ends = primitive(torch.tensor([-1e6, 0.0, 1e6], dtype=torch.double), ALPHAS[name])
    torch.testing.assert_close(ends, torch.tensor([0.0, 0.5, 1.0], dtype=torch.double), atol=1e-6, rtol=0)


def test_atan_values_of_the_paper():
    slope = fn.SURROGATES["atan"].derivative(torch.tensor([0.0, 0.5, 1.0]), 2.0)
    torch.testing.assert_close(slope, torch.tensor([1.0, 0.28840, 0.09200]), atol=1e-5, rtol=0)


def test_triangle_and_rectangle_at_alpha_1_are_those_of_the_baselines():
    h = torch.tensor([-1.5, -0.75, -0.25, 0.0, 0.4, 0.9])
    assert fn.SURROGATES["triangle"].derivative(h, 1.0).tolist() == pytest.approx([0, 0.25, 0.75, 1, 0.6, 0.1])
    assert fn.SURROGATES["rectangle"].derivative(h, 1.0).tolist() == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_heaviside_of_every_number_there_is(dtype):
    nan, inf, tiny = float("nan"), float("inf"), torch.finfo(torch.float32).smallest_normal / 8
    h = torch.tensor([[nan, -inf, -1.0, -tiny, -0.0], [0.0, tiny, 1.0, inf, nan]])
    before = h.clone()
    for view in (h, h.t(), h[:, ::2], h[:, :1].expand(2, 5)):
        want = torch.where(view >= 0, 1.0, 0.0).to(dtype)
        spikes = fn.fire(view, dtype=dtype)
        assert spikes.dtype == dtype and torch.equal(spikes, want)
    assert torch.equal(h.nan_to_num(7.0), before.nan_to_num(7.0)), "h is needed for the surrogate's slope"


def test_heaviside_fires_at_zero_in_the_dtype_asked_for():
    h = torch.tensor([-1e-30, -0.0, 0.0, 1e-30])
    spike = fn.fire(h, dtype=torch.bfloat16)
    assert spike.dtype == torch.bfloat16 and spike.tolist() == [0, 1, 1, 1]


def test_unknown_surrogate_lists_the_choices():
    with pytest.raises(ValueError, match=r"'relu', wanted one of atan, sigmoid, triangle, rectangle"):
        fn.fire(torch.zeros(1), "relu")


# ---- gradients of the smooth twins, in float64

SMOOTH = ["atan", "sigmoid"]  # the other two have corners; their slope is tested above


@pytest.mark.parametrize("surrogate", SMOOTH)
def test_gradcheck_psn(surrogate):
    x, w, b = double(3, 2, 4), double(3, 3), double(3)
    assert gradcheck(lambda x, w, b: fn.psn(x, w, b, surrogate, smooth=True), (x, w, b))
    assert gradcheck(lambda x, w, b: fn.psn_static(x, w, b, surrogate, smooth=True), (double(2, 4), w, b))


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
def test_gradcheck_masked_psn(lambda_):
    x, w, b, blend = double(4, 3), double(4, 4), double(4), torch.tensor(lambda_)
    assert gradcheck(lambda x, w, b: fn.masked_psn(x, w, b, 2, blend, smooth=True), (x, w, b))
    assert gradcheck(lambda x, w, b: fn.masked_psn_static(x, w, b, 2, blend, smooth=True), (double(3), w, b))


@pytest.mark.parametrize("k", [1, 2, 6])
def test_gradcheck_sliding_psn(k):
    x, w, b = double(4, 3), double(k), double()
    assert gradcheck(lambda x, w, b: fn.sliding_psn(x, w, b, smooth=True), (x, w, b))
    assert gradcheck(lambda x, w, b: fn.sliding_psn_static(x, 4, w, b, smooth=True), (double(3), w, b))


def test_gradcheck_steps():
    queue = torch.randn(2, 3, dtype=torch.double)
    w, b = double(4, 4), double(4)
    assert gradcheck(lambda x, q, w, b: fn.masked_psn_step(x, 2, q, w, b, smooth=True)[0], (double(3), queue, w, b))
    w, b = double(2), double()
    assert gradcheck(lambda x, q, w, b: fn.sliding_psn_step(x, q, w, b, smooth=True)[0], (double(3), queue, w, b))


@pytest.mark.parametrize("v_reset", [None, 0.0, -0.2])
@pytest.mark.parametrize("decay_input", [True, False])
def test_gradcheck_serial(v_reset, decay_input):
    x = double(4, 3, scale=2.0)
    # a detached reset is not the gradient of anything
    options = {"v_reset": v_reset, "detach_reset": False, "smooth": True}
    assert gradcheck(lambda x: fn.lif(x, 2.0, decay_input, **options), (x,))
    assert gradcheck(lambda x: fn.if_neuron(x, **options), (x,))


@pytest.mark.parametrize("surrogate", fn.SURROGATES)
def test_surrogate_gradient_of_a_psn_equals_the_gradient_of_its_twin(surrogate):
    x, w, b = double(4, 5), double(4, 4), double(4)
    weights = torch.randn(4, 5, dtype=torch.double)
    grads = [
        torch.autograd.grad((fn.psn(x, w, b, surrogate, smooth=smooth) * weights).sum(), (x, w, b))
        for smooth in (False, True)
    ]
    for spiking, smooth in zip(*grads, strict=True):
        torch.testing.assert_close(spiking, smooth)


# ---- equations, by plain loops


@pytest.mark.parametrize("T", [1, 3, 4, 32])
def test_psn_is_a_loop_over_time(T):
    x, w, b = double(T, 3, 5), double(T, T), double(T)
    loop = torch.stack([sum(w[t, j] * x[j] for j in range(T)) + b[t] for t in range(T)])
    torch.testing.assert_close(fn.psn_h(x, w, b), loop)
    assert torch.equal(fn.psn(x, w, b), (loop >= 0).double())


@pytest.mark.parametrize(("T", "k"), [(1, 1), (4, 1), (4, 2), (4, 4), (7, 3)])
@pytest.mark.parametrize("lambda_", [0.0, 0.25, 1.0])
def test_mask_is_a_causal_band(T, k, lambda_):
    w = torch.randn(T, T)
    band = torch.tensor([[float(j <= i <= j + k - 1) for j in range(T)] for i in range(T)])
    expected = w * (lambda_ * band + (1 - lambda_))
    torch.testing.assert_close(fn.masked_weight(w, k, lambda_), expected)
    torch.testing.assert_close(fn.masked_weight(w, k, torch.tensor(lambda_)), expected)


def test_mask_is_exact_at_its_ends():
    w = torch.randn(5, 5)
    assert torch.equal(fn.masked_weight(w, 2, torch.tensor(0.0)), w)
    assert torch.equal(fn.masked_weight(w, 2, torch.tensor(1.0)), w.tril().triu(-1))


@pytest.mark.parametrize(("T", "k"), [(1, 1), (1, 4), (4, 1), (4, 2), (3, 7), (32, 5)])
def test_sliding_psn_is_a_causal_filter(T, k):
    x, w, b = double(T, 3), double(k), double()
    loop = torch.stack([sum(w[i] * x[t - k + 1 + i] for i in range(k) if t - k + 1 + i >= 0) + b for t in range(T)])
    torch.testing.assert_close(fn.sliding_psn_h(x, w, b), loop)


def test_lif_by_hand():
    # tau 2, decayed input, soft reset: h = v + (x - v) / 2
    x = torch.tensor([1.0, 2.0, 3.0, 0.0]).unsqueeze(1)
    out = fn.charge_fire_reset(x, fn.lif_charge, return_h=True)
    assert out.h_seq.flatten().tolist() == [0.5, 1.25, 1.625, 0.3125]
    assert out.spike_seq.flatten().tolist() == [0, 1, 1, 0] and out.v.tolist() == [0.3125]
    hard = fn.charge_fire_reset(x, fn.if_charge, v_reset=-0.5, return_h=True)
    assert hard.h_seq.flatten().tolist() == [0.5, 2.5, 2.5, -0.5]
    assert hard.v.tolist() == [-0.5]


@pytest.mark.parametrize("T", [1, 4])
def test_static_input_is_the_same_input_at_every_step(T):
    x = torch.randn(2, 3, dtype=torch.double)
    x_seq, w, b = x.expand(T, 2, 3), torch.randn(T, T, dtype=torch.double), torch.randn(T, dtype=torch.double)
    torch.testing.assert_close(fn.psn_h_static(x, w, b), fn.psn_h(x_seq, w, b))
    assert torch.equal(fn.masked_psn_static(x, w, b, 1, 0.5), fn.masked_psn(x_seq, w, b, 1, 0.5))
    assert torch.equal(fn.sliding_psn_static(x, T, w[0], b[0]), fn.sliding_psn(x_seq, w[0], b[0]))
    serial = fn.charge_fire_reset(x, fn.lif_charge, static_steps=T).spike_seq
    assert torch.equal(serial, fn.lif(x_seq))


def test_static_forms_save_one_copy_of_x_whatever_T():
    x, T = torch.randn(1000, requires_grad=True), 16
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn.psn_h_static(x, torch.randn(T, T, requires_grad=True), torch.zeros(T))
    assert sum(saved.values()) < 2 * x.nbytes


# ---- layout


def strides(x):
    """Those that matter: an axis of one element has none."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 3, 5, 6, 7),
    "channels_last": lambda: torch.randn(12, 5, 6, 7).to(memory_format=torch.channels_last).unflatten(0, (4, 3)),
    "one image": lambda: torch.randn(4, 5, 6, 7).to(memory_format=torch.channels_last).unflatten(0, (4, 1)),
    "one channel": lambda: torch.randn(12, 1, 6, 7).to(memory_format=torch.channels_last).unflatten(0, (4, 3)),
    "one step": lambda: torch.randn(3, 5, 6, 7).to(memory_format=torch.channels_last).unsqueeze(0),
    "time second": lambda: torch.randn(3, 4, 5, 6).transpose(0, 1),
    "time last": lambda: torch.randn(3, 5, 4).permute(2, 0, 1),
    "vectors": lambda: torch.randn(4, 9),
    "matrix of time last": lambda: torch.randn(9, 4).t(),
}
TIME_FIRST = ["contiguous", "channels_last", "one image", "one channel", "one step", "vectors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_has_the_layout_of_the_input(layout):
    x = LAYOUTS[layout]().requires_grad_()
    T = x.shape[0]
    w, b = torch.randn(T, T), torch.randn(T)
    flat = x.detach().contiguous()
    for run in (
        lambda x: fn.psn(x, w, b),
        lambda x: fn.masked_psn(x, w, b, 1),
        lambda x: fn.sliding_psn(x, w[0], b[0]),
        fn.lif,
    ):
        out = run(x)
        assert strides(out) == strides(x)
        assert torch.equal(out, run(flat))
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("layout", TIME_FIRST)
def test_rows_are_a_view_both_ways(layout):
    x = LAYOUTS[layout]()
    rows, way_back = to_rows(x)
    assert rows.data_ptr() == x.data_ptr() and rows.is_contiguous()
    back = from_rows(rows, way_back)
    assert back.data_ptr() == x.data_ptr() and torch.equal(back, x) and strides(back) == strides(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_a_sequence_and_back(layout):
    x = LAYOUTS[layout]()
    images = to_images(x)
    assert torch.equal(images, x.flatten(0, 1))
    assert torch.equal(to_sequence(images, x.shape[:2]), x)


def test_an_image_that_is_alone_is_told_as_channels_last():
    image = torch.randn(1, 5, 6, 7).to(memory_format=torch.channels_last)
    assert to_images(to_sequence(image, (1, 1))).stride() == image.stride()


def test_channels_last_gradients_stay_channels_last():
    x = LAYOUTS["channels_last"]().requires_grad_()
    fn.psn(x, torch.randn(4, 4), torch.randn(4)).sum().backward()
    assert x.grad.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [lambda x: x[::2], lambda x: x[..., ::2], lambda x: x[:1].expand(4, 3, 5, 6, 7)])
def test_other_strides_are_taken_too(make):
    x = make(torch.randn(4, 3, 5, 6, 7))
    w, b = torch.randn(x.shape[0], x.shape[0]), torch.randn(x.shape[0])
    assert torch.equal(fn.psn(x, w, b), fn.psn(x.contiguous(), w, b))


# ---- steps


@pytest.mark.parametrize("k", [1, 2, 4])
def test_taps_of_a_step_by_a_number_and_by_a_tensor(k):
    w, b, x = torch.randn(4, 4), torch.randn(4), torch.randn(3)
    for t in range(4):
        taps, bias = fn.masked_taps(x, t, k, w, b)
        other_taps, other_bias = fn.masked_taps(x, torch.tensor(t), k, w, b)
        assert taps.shape == (1, k) and torch.equal(taps, other_taps) and torch.equal(bias, other_bias)
    with pytest.raises(RuntimeError):
        fn.masked_taps(x, 4, k, w, b)


def test_steps_without_gradients_write_over_nothing_that_is_kept():
    w, b, x, queue = torch.randn(4, 4), torch.randn(4), torch.randn(50), torch.randn(2, 50)
    before = x.clone(), queue.clone()
    for step in (
        lambda: fn.masked_psn_step(x, 2, queue, w.requires_grad_(), b),
        lambda: fn.sliding_psn_step(x, queue, w[0, :2].requires_grad_(), b[0]),
    ):
        spikes, after = step()
        with torch.no_grad():
            bare, bare_after = step()
        assert spikes.requires_grad and torch.equal(bare, spikes)
        assert torch.equal(after, torch.stack([before[1][1], x])) and torch.equal(bare_after, after)
    assert torch.equal(x, before[0]) and torch.equal(queue, before[1])


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_gives_exactly_the_spikes_of_float32(dtype):
    x = torch.randn(4, 4096).to(dtype)
    w, b = torch.randn(4, 4), torch.randn(4)
    cases = {
        "psn": lambda x: fn.psn(x, w, b),
        "static": lambda x: fn.psn_static(x[0], w, b),
        "masked": lambda x: fn.masked_psn(x, w, b, 2, torch.tensor(0.5)),
        "sliding": lambda x: fn.sliding_psn(x, w[0, :2], b[0]),
        "sliding step": lambda x: fn.sliding_psn_step(x[1], x[:2], w[0, :2], b[0])[0],
        "masked step": lambda x: fn.masked_psn_step(x[1], 1, x[:2], w, b)[0],
        "lif": fn.lif,
    }
    for name, run in cases.items():
        with torch.autocast("cpu", dtype):
            spikes = run(x)
        assert spikes.dtype == dtype, name
        assert torch.equal(spikes.float(), run(x.float())), name


def test_potential_is_float32_under_autocast_and_gradients_have_their_dtypes():
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    w, b = torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        h = fn.psn_h(x, w, b)
        fn.psn(x, w, b).sum().backward()
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, w @ x.float() + b[:, None], rtol=1e-6, atol=1e-6)
    assert (x.grad.dtype, w.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_bfloat16_parameters_compute_in_float32_and_float64_stays():
    x, w, b = torch.randn(4, 8), torch.randn(4, 4), torch.randn(4)
    half = fn.psn_h(x.bfloat16(), w.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32
    assert fn.psn_h(x.double(), w.double(), b.double()).dtype == torch.float64
    assert fn.psn(x, w.double(), b.double()).dtype == torch.float32
