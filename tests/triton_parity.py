"""The Triton backend against plain PyTorch: run by test_triton.py in a process of its own, in Triton's interpreter on
the CPU (TRITON_INTERPRET=1), or on a GPU.

Inputs and weights are multiples of powers of two so coarse that sums of their products are exact in float32, in any
order, so spikes must be equal, all of them. Gradients are compared with float64. New buffers are filled with NaN first.
"""

import os

import pytest
import torch

from psn_train.neurons import kernels
from psn_train.neurons.functional import sliding_weight
from psn_train.neurons.kernels import bits, plain, plain_norm, triton_bits, triton_launch, triton_norm, triton_psn
from psn_train.neurons.kernels.norm_operators import norm_psn, norm_psn_backward, norm_psn_sums, norm_statistics
from psn_train.neurons.kernels.operators import psn, psn_backward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPS = (1, 2, 3, 4, 5, 8, 10, 16, 31, 32, 64, 128)
# of the largest value: float32 sums in another order
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Tiles so narrow, and programs so few, that small shapes have many tiles, rounds and slices."""
    if INTERPRETED:
        tiles = {key: triton_launch.Tile(64 if key[0] == "small" else 32, 1) for key in triton_launch.TILES}
        monkeypatch.setattr(triton_launch, "TILES", tiles)
        monkeypatch.setattr(triton_norm, "_LANES", 16)
        monkeypatch.setattr(triton_norm, "_MERGED", 32)
    monkeypatch.setattr(triton_launch, "PROGRAMS", 3)


@pytest.fixture(autouse=True)
def dirty(monkeypatch):
    clean = torch.Tensor.new_empty

    def new_empty(tensor, *size, **options):
        buffer = clean(tensor, *size, **options)
        return buffer.fill_(float("nan") if buffer.is_floating_point() else 255)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def coarse(*shape, step, most, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    numbers = torch.randn(shape, generator=generator) * (most / 2)
    return numbers.clamp(-most, most).div(step).round().mul(step).to(DEVICE, dtype)


def matrix(T, J, band=0):
    weight = coarse(T, J, step=1 / 64, most=1, seed=1)
    return weight.tril().triu(1 - band) if band else weight


def column(*shape):
    return coarse(*shape, step=1 / 64, most=1, seed=2)


def close(name, found, wanted, terms=1):
    """`terms`: how many a sum has, each about 1: what cancels does not count."""
    assert found.shape == wanted.shape, name
    rounding = torch.finfo(found.dtype).eps if found.dtype.itemsize == 2 else 0.0
    bound = (TOLERANCE + rounding) * max(float(wanted.abs().max()), terms**0.5)
    error = float((found.double() - wanted).abs().max())
    # written so that NaN fails
    assert error <= bound, f"{name}: off by {error:.1e}, allowed {bound:.1e}"


def check(T, J, M, weight, bias, band, dtype, surrogate="atan", alpha=2.0):
    x = coarse(J, M, step=1 / 16, most=4, seed=3, dtype=dtype)
    grad = coarse(T, M, step=1 / 8, most=2, seed=4, dtype=dtype)
    spikes = triton_psn.forward(x, weight, bias, band)
    assert spikes.dtype == dtype
    assert torch.equal(spikes.float(), plain.forward(x.float(), weight, bias, band))
    found = triton_psn.backward(grad, x, weight, bias, band, surrogate, alpha)
    exact = [tensor.double() for tensor in (grad, x, weight, bias)]
    wanted = list(plain.backward(*exact, band, surrogate, alpha))
    if band:
        wanted[1] = wanted[1].tril().triu(1 - band)
    for name, mine, truth, like in zip(
        ("x", "weight", "bias"), found, wanted, (x, weight, bias), strict=True
    ):  # fmt: skip
        assert mine.dtype == like.dtype
        close(f"gradient of {name}", mine, truth, terms=1 if name == "x" else M * (T if mine.ndim < 2 else 1))


@pytest.mark.parametrize("M", [1, 7, 137])
@pytest.mark.parametrize("T", STEPS)
def test_psn(T, M):
    if INTERPRETED and T >= 64:
        M = min(M, 33)
    check(T, T, M, matrix(T, T), column(T), 0, DTYPES[(STEPS.index(T) + M) % 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [4, 20])
def test_psn_in_each_dtype(T, dtype):
    check(T, T, 65, matrix(T, T), column(T), 0, dtype)


@pytest.mark.parametrize("T", STEPS)
def test_same_input_at_every_step(T):
    check(T, 1, 137, matrix(T, 1), column(T), 0, DTYPES[STEPS.index(T) % 3])


@pytest.mark.parametrize("k", [*range(1, 18), 19, 40])
def test_sliding_psn(k):
    T = (5, 20, 33)[k % 3]
    check(T, T, 41, coarse(k, step=1 / 64, most=1), column(), 0, DTYPES[k % 2])


@pytest.mark.parametrize("k", [*range(1, 18), 19])
def test_masked_psn(k):
    T = (20, 33)[k % 2]
    check(T, T, 41, matrix(T, T, k), column(T), k, DTYPES[k % 3])


def test_bands_longer_than_the_others_and_than_the_sequence():
    check(128, 128, 9, coarse(17, step=1 / 64, most=1), column(), 0, torch.float32)
    check(64, 64, 9, matrix(64, 64, 8), column(64), 8, torch.bfloat16)
    check(10, 10, 9, coarse(14, step=1 / 64, most=1), column(), 0, torch.float32)
    check(6, 6, 33, matrix(6, 6, 2), column(6), 2, torch.float32)


@pytest.mark.parametrize("surrogate", ["atan", "sigmoid", "triangle", "rectangle"])
@pytest.mark.parametrize(("T", "band"), [(4, 0), (16, 0), (18, 3)])
def test_surrogates(T, band, surrogate):
    check(T, T, 40, matrix(T, T, band), column(T), band, torch.float32, surrogate, alpha=0.75)


def test_nan_goes_where_it_goes_in_plain_pytorch():
    x = torch.tensor([[float("nan"), 1.0], [2.0, 1.0]], device=DEVICE)
    weight, bias, grad = matrix(2, 2), column(2), torch.ones(2, 2, device=DEVICE)
    assert torch.equal(triton_psn.forward(x, weight, bias, 0), plain.forward(x, weight, bias, 0))
    for surrogate in ("atan", "sigmoid", "triangle", "rectangle"):
        found = triton_psn.backward(grad, x, weight, bias, 0, surrogate, 2.0)[0]
        wanted = plain.backward(grad, x, weight, bias, 0, surrogate, 2.0)[0]
        assert torch.equal(found.isnan(), wanted.isnan()), surrogate


def test_strides_of_any_kind():
    T, M = 4, 70
    wide = coarse(T, M + 9, step=1 / 16, most=4)
    inputs = {
        "rows apart": wide[:, :M],
        "the same row": wide[:1, :M].expand(T, M),
        "steps innermost": wide[:, :M].t().contiguous().t(),
        "every other": wide[:, ::2],
    }
    biases = {"own": column(T), "shared": column(1).expand(T), "apart": column(2 * T)[::2]}
    for (name, x), (_, bias) in zip(inputs.items(), [*biases.items(), ("", column())], strict=True):
        weight = matrix(T, T).t()
        assert torch.equal(triton_psn.forward(x, weight, bias, 0), plain.forward(x, weight, bias, 0)), name
        grad = torch.ones(T, x.shape[1], device=DEVICE).t().contiguous().t()
        found = triton_psn.backward(grad, x, weight, bias, 0, "atan", 2.0)
        exact = [tensor.double() for tensor in (grad, x, weight, bias)]
        for mine, truth in zip(found, plain.backward(*exact, 0, "atan", 2.0), strict=True):
            close(name, mine, truth, terms=T * M)
        assert found[0].stride() == torch.empty_like(x).stride(), name


def test_what_triton_does_not_take_goes_to_plain_pytorch():
    for T, M, dtype in ((130, 3, torch.float32), (3, 5, torch.float64), (3, 0, torch.float32)):
        x, weight, bias = coarse(T, M, step=1 / 16, most=4, dtype=dtype), matrix(T, T), column(T)
        arguments = (torch.ones_like(x), x, weight, bias, 0, "atan", 2.0)
        assert torch.equal(triton_psn.forward(*arguments[1:5]), plain.forward(*arguments[1:5]))
        for mine, truth in zip(triton_psn.backward(*arguments), plain.backward(*arguments), strict=True):
            assert torch.equal(mine, truth) and mine.dtype == truth.dtype
    with pytest.raises(ValueError, match="surrogate"):
        triton_psn.backward(*(torch.ones(1, 1, device=DEVICE),) * 3, torch.ones(1, device=DEVICE), 0, "steep", 2.0)


# ---- batch norm and PSN in one

# (T, J, band, taps) and (A, C, B): channels_last, more channels than lanes, NCHW, one of everything
NEURONS = [(1, 1, 0, 0), (4, 4, 0, 0), (5, 1, 0, 0), (8, 8, 0, 3), (10, 10, 0, 0), (20, 1, 0, 0), (18, 18, 5, 0)]
NEURONS += [(20, 20, 0, 19), (17, 17, 0, 2)]
LAYOUTS = [(1, 1, 1), (45, 3, 1), (9, 70, 1), (3, 4, 9)]


@pytest.mark.parametrize(("T", "J", "band", "taps"), NEURONS)
@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_norm_and_psn(T, J, band, taps, shape):
    if INTERPRETED and T > 8 and shape == (9, 70, 1):
        shape = (2, 70, 1)
    A, C, B = shape
    dtype = DTYPES[(T + C) % 3]
    y = coarse(J, A, C, B, step=1 / 16, most=4, dtype=dtype)
    grad = coarse(T, A, C, B, step=1 / 8, most=2, seed=1, dtype=dtype)
    add = coarse(T, A, C, B, step=1, most=3, seed=2, dtype=dtype)
    weight = coarse(taps, step=1 / 64, most=1) if taps else matrix(T, J, band)
    bias = column() if taps else column(T)
    scale, shift, of_dz, of_y, constant = (coarse(C, step=1 / 4, most=2, seed=seed) for seed in range(5))
    arguments = (y, scale, shift, weight, bias, band)
    spikes = plain_norm.norm_forward(*arguments, None)
    assert torch.equal(triton_norm.norm_forward(*arguments, None), spikes)
    assert torch.equal(triton_norm.norm_forward(*arguments, add), spikes + add)
    out, packed = triton_norm.norm_forward_bits(*arguments, add)
    assert torch.equal(out, spikes + add)
    assert torch.equal(packed, bits.pack_bits(spikes.flatten(1)))
    if T == 1:
        assert torch.equal(triton_norm.norm_forward_bits(*arguments)[0], spikes)
    arguments = (grad, *arguments, "atan", 2.0)
    exact = [argument.double() if torch.is_tensor(argument) else argument for argument in arguments]
    found, wanted = triton_norm.norm_reduce(*arguments), list(plain_norm.norm_reduce(*exact))
    if band:
        wanted[0] = wanted[0].tril().triu(1 - band)
    for name, mine, truth in zip(("weight", "bias", "sum of dz", "sum of dz y"), found, wanted, strict=True):
        close(name, mine, truth, terms=T * A * C * B)
    mine = triton_norm.norm_backward(*arguments, of_dz, of_y, constant)
    assert mine.dtype == dtype
    close("y", mine, plain_norm.norm_backward(*exact, of_dz.double(), of_y.double(), constant.double()))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 45, 3, 1), (11, 9, 20, 1), (1, 3, 4, 25), (3, 200, 1, 1)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics(shape, offset):
    """With a mean of a thousand deviations, float32 sums of squares would have no digit right."""
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) + offset
    mean, var = triton_norm.statistics(y)
    wanted_var, wanted_mean = torch.var_mean(y.double(), dim=(0, 1, 3), correction=0)
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), wanted_var, rtol=1e-5, atol=1e-6)
    assert mean.dtype == var.dtype == torch.float32
    half = y.bfloat16()
    torch.testing.assert_close(triton_norm.statistics(half), triton_norm.statistics(half.float()), rtol=0, atol=0)


@pytest.mark.parametrize("M", [1, 8, 9, 700])
def test_bits(M):
    spikes = coarse(3, M, step=1, most=1) != 0
    packed = bits.pack_bits(spikes)
    for i in (0, M // 2, M - 1):
        plane = -(-M // 8)
        assert torch.equal((packed[:, i % plane] >> (i // plane)) & 1, spikes[:, i].to(torch.uint8))
    for dtype in (*DTYPES, torch.bool, torch.uint8, torch.float64):
        assert torch.equal(triton_bits.pack_bits(spikes.to(dtype)), packed)
        for module in (triton_bits, bits):
            unpacked = module.unpack_bits(packed, M, dtype)
            assert unpacked.dtype == dtype and torch.equal(unpacked, spikes.to(dtype))


@pytest.mark.parametrize("M", [1, 63, 64, 1000])
@pytest.mark.parametrize(("C", "inner"), [(1, 1), (3, 1), (64, 1), (100, 1), (7, 49), (2, 500)])
def test_a_walk_visits_each_column_once_and_keeps_to_a_channel(M, C, inner):
    unit, lanes = C * inner, 64
    M *= unit
    steps = triton_launch.walk(M, unit, lanes)
    assert steps.period % unit == 0
    seen = torch.zeros(M, dtype=torch.int64)
    for program in range(steps.programs):
        part, position = program // steps.blocks, (program % steps.blocks) * lanes + torch.arange(lanes)
        for turn in range(part, steps.rounds, steps.slices):
            columns = turn * steps.period + position
            there = (position < steps.period) & (columns < M)
            assert torch.equal((columns // inner % C)[there], (position // inner % C)[there])
            seen[columns[there]] += 1
    assert (seen == 1).all()


# ---- as operators


@pytest.fixture
def forced():
    kernels.use_backend("triton")
    yield
    kernels.use_backend("auto")


def test_operators_keep_torch_librarys_rules():
    x, weight, bias = coarse(4, 10, step=1 / 16, most=4), matrix(4, 4), column(4)
    settings = (0, "atan", 2.0, "triton")
    torch.library.opcheck(psn.op, (*(tensor.requires_grad_() for tensor in (x, weight, bias)), *settings))
    inputs = [tensor.detach() for tensor in (torch.ones(4, 10, device=DEVICE), x, weight, bias)]
    torch.library.opcheck(psn_backward.op, (*inputs, *settings))
    y, channels = coarse(4, 5, 3, 1, step=1 / 16, most=4), [coarse(3, step=1 / 4, most=2) for _ in range(5)]
    weight, bias, grad = weight.detach(), bias.detach(), torch.ones_like(y)
    torch.library.opcheck(norm_statistics.op, (y, "triton"))
    torch.library.opcheck(norm_psn.op, (y, *channels[:2], weight, bias, 0, grad, "triton"))
    torch.library.opcheck(norm_psn_sums.op, (grad, y, *channels[:2], weight, bias, *settings))
    torch.library.opcheck(
        norm_psn_backward.op, (grad, y, *channels[:2], weight, bias, 0, "atan", 2.0, *channels[2:], "triton")
    )


def test_compiles_into_one_graph(forced):
    x, weight, bias = coarse(4, 3, 2, 5, step=1 / 16, most=4), matrix(4, 4), column(4)

    def loss(x, weight, bias):
        spikes = psn(2.0 * x.flatten(1), weight, bias, 0, "atan", 2.0, kernels.choose(x.device))
        return spikes, (spikes * x.flatten(1)).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        spikes, total = function(*inputs)
        results.append((spikes, *torch.autograd.grad(total, inputs)))
    for mine, truth in zip(results[1], results[0], strict=True):
        assert torch.equal(mine, truth)


@pytest.mark.parametrize("T", [4, 20])
def test_gradients_are_the_same_bits_in_every_run(T):
    arguments = [torch.randn(T, 3000 if DEVICE == "cuda" else 200, device=DEVICE) for _ in range(2)]
    arguments += [torch.randn(T, T, device=DEVICE), torch.randn(T, device=DEVICE)]
    first = triton_psn.backward(*arguments, 0, "atan", 2.0)
    for _ in range(3):
        for mine, again in zip(triton_psn.backward(*arguments, 0, "atan", 2.0), first, strict=True):
            assert torch.equal(mine, again)


def test_sliding_equals_the_matrix_of_its_taps():
    taps, x = coarse(4, step=1 / 64, most=1), coarse(12, 50, step=1 / 16, most=4)
    full = sliding_weight(taps, 12)
    assert torch.equal(
        triton_psn.forward(x, taps, column(), 0), triton_psn.forward(x, full, column().expand(12), 4)
    )  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="20 GB")
def test_more_numbers_than_int32_counts():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("24 GB of a GPU's memory are not free")
    M = (1 << 29) + 3
    x = coarse(4, 1 << 10, step=1 / 16, most=4, dtype=torch.bfloat16).repeat(1, (M >> 10) + 1)[:, :M].contiguous()
    weight, bias = matrix(4, 4), column(4)
    spikes = triton_psn.forward(x, weight, bias, 0)
    grad_x, _, _ = triton_psn.backward(x, x, weight, bias, 0, "atan", 2.0)
    for begin in (0, M - 1000):
        part = x[:, begin : begin + 1000]
        assert torch.equal(spikes[:, begin : begin + 1000], plain.forward(part, weight, bias, 0))
        close(
            "x", grad_x[:, begin : begin + 1000], plain.backward(part, part, weight, bias, 0, "atan", 2.0)[0].double()
        )
