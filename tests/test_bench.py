"""`psn bench neurons`: what it prints and writes, what it refuses, and that a wrong neuron gets no figure."""

import json
import math
import re

import pytest
import torch

from psn_train.bench import neurons, timing
from psn_train.bench.neurons import PASSES, make_grid
from psn_train.cli import main
from psn_train.neurons import NEURONS, PSN, build_neuron, gate
from psn_train.neurons import functional as law

CPU = torch.device("cpu")
TINY = ("--T", "2", "3", "--N", "8", "2^5", "--repeats", "3", "--seconds", "0.1", "--device", "cpu")


@pytest.fixture
def bench(capsys, tmp_path):
    """bench("--T", 2, ...) -> (exit status, stdout, stderr); files go to tmp_path / "out"."""

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["bench", "neurons", "--out", str(tmp_path / "out"), *map(str, words)])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def mistake(bench, tmp_path):
    """mistake("--k", 9, says="...") checks what a mistake ends in: status 2, one message, no figure, no file."""

    def run(*words, says: str) -> str:
        status, out, err = bench(*words)
        assert (status, out) == (2, "")
        assert re.findall(r"^psn: ", err, re.MULTILINE) == ["psn: "] and "Traceback" not in err
        assert says in err
        assert not list(tmp_path.glob("out/*"))
        return err

    return run


def test_a_tiny_grid_from_end_to_end(bench, tmp_path):
    threads = torch.get_num_threads()
    status, out, _ = bench(*TINY, "--threads", 1)
    assert status == 0 and torch.get_num_threads() == threads
    report = json.loads((tmp_path / "out" / "neurons.json").read_text())
    assert (tmp_path / "out" / "neurons.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    names = ["psn", "masked_psn", "sliding_psn", "lif"]
    assert report["grid"] == {"neurons": names, "T": [2, 3], "N": [8, 32]} and report["k"] == {"2": 2, "3": 3}
    here = report["environment"]
    assert (here["device_type"], here["threads"], here["dtype"], here["compile"]) == ("cpu", 1, "fp32", False)
    assert here["torch"] == torch.__version__ and here["device"]
    assert [(cell["T"], cell["N"]) for cell in report["cells"]] == [(2, 8), (2, 32), (3, 8), (3, 32)]
    for cell in report["cells"]:
        assert cell["left_out"] is None
        for which in PASSES:
            assert list(cell[which]) == names
            for times in cell[which].values():
                assert 1 <= times["rounds"] <= 3 and times["calls"] >= 1
                ordered = [times[key] for key in ("min_ms", "q1_ms", "median_ms", "q3_ms")]
                assert ordered[0] > 0 and ordered == sorted(ordered) and math.isfinite(ordered[-1])
            medians = {name: times["median_ms"] for name, times in cell[which].items()}
            assert cell["lif_over_psn"][which] == medians["lif"] / medians["psn"]

    assert "forward: median" in out and "forward + backward: median" in out and "LIF / PSN" in out
    # a row of each table for each cell
    assert len(re.findall(r"^\W+[23] \W+2\^[35] ", out, re.MULTILINE)) == 8
    last = json.loads(out.rstrip().splitlines()[-1])
    assert (last["cells"], last["left_out"], last["threads"]) == (4, 0, 1)
    assert last["lif_over_psn"].keys() == {"T=2,N=8", "T=2,N=32", "T=3,N=8", "T=3,N=32"}
    assert last["json"] == str(tmp_path / "out" / "neurons.json")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_neuron_that_T_and_k_make_in_every_dtype(bench, dtype):
    status, out, err = bench(*TINY, "--neurons", *NEURONS, "--N", 8, "--k", 2, "--dtype", dtype)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["dtype"] == dtype


def test_without_lif_there_is_no_ratio(bench, tmp_path):
    status, out, _ = bench(*TINY, "--neurons", "psn", "if")
    assert status == 0 and "LIF / PSN" not in out
    report = json.loads((tmp_path / "out" / "neurons.json").read_text())
    assert report["k"] is None and not any("lif_over_psn" in cell for cell in report["cells"])


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--neurons", "psn", "lfi"), "--neurons: got lfi, wanted some of psn, masked_psn"),
        (("--k", 3), "--k: got 3, above T=2; wanted k <= T"),
        (("--k", 2, "--neurons", "psn", "lif"), "--k: got 2, but none of psn, lif has an order"),
        (("--device", "cuda:99"), "--device: got 'cuda:99', there is "),
        (("--device", "tpu9"), "--device: got 'tpu9', wanted cpu, cuda or cuda:NUMBER"),
        (("--device", "meta"), "--device: got 'meta', wanted cpu, cuda or cuda:NUMBER"),
    ],
)
def test_mistakes(mistake, words, says):
    mistake(*TINY, *words, says=says)


@pytest.mark.parametrize(
    "words", [("--N", "2^99"), ("--N", "3^2"), ("--T", "0"), ("--seconds", "0"), ("--seconds", "x")]
)
def test_numbers_that_are_none(bench, words):
    with pytest.raises(SystemExit) as end:
        bench(*words)
    assert end.value.code == 2


def test_without_matplotlib_nothing_is_timed(mistake, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr(neurons, "measure_in_turns", lambda *_: pytest.fail("timed"))
    mistake(*TINY, says="the picture needs matplotlib: pip install 'psn-train[demo]'")


def test_a_neuron_that_wants_more_than_T_and_k(mistake, monkeypatch):
    class Wide(PSN):
        def __init__(self, T, channels, surrogate, alpha):
            super().__init__(T, surrogate, alpha)

    monkeypatch.setitem(NEURONS, "wide", (Wide, ("T", "channels")))
    mistake(*TINY, "--neurons", "wide", says="wide at T=2 cannot be built from T and k alone")


# ---- memory


def test_cells_that_do_not_fit_are_left_out_by_name(bench, monkeypatch, tmp_path):
    # psn: 7 tensors of T x N float32
    monkeypatch.setattr(neurons, "free_memory", lambda device: 2 * 7 * 3 * 8 * 4)
    status, out, _ = bench(*TINY, "--neurons", "psn", "lif")
    assert status == 0
    report = json.loads((tmp_path / "out" / "neurons.json").read_text())
    assert [bool(cell["left_out"]) for cell in report["cells"]] == [False, True, False, True]
    assert "left out: T=3 N=2^5: needs 0.0 GiB" in out
    assert json.loads(out.splitlines()[-1])["left_out"] == 2


def test_no_cell_fits(mistake, monkeypatch):
    monkeypatch.setattr(neurons, "free_memory", lambda device: 0)
    mistake(*TINY, says="no cell of the grid fits the memory")


def test_running_out_of_memory_marks_the_cell(bench, monkeypatch, tmp_path):
    real = neurons.measure_in_turns

    def small_device(jobs, *rest):
        if jobs["forward", "psn"].args[1].shape[1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(jobs, *rest)

    monkeypatch.setattr(neurons, "measure_in_turns", small_device)
    status, out, _ = bench(*TINY)
    assert status == 0 and "left out: T=2 N=2^5: out of memory" in out
    report = json.loads((tmp_path / "out" / "neurons.json").read_text())
    assert [bool(cell["left_out"]) for cell in report["cells"]] == [False, True, False, True]


def test_what_autograd_keeps_is_counted():
    # a PSN keeps its input, a LIF h
    for name, tensors in {"psn": 1, "lif": 1}.items():
        assert neurons.kept_for_backward(build_neuron(name, T=4), 4, torch.float32, CPU) == 4 * tensors


def test_the_limit_of_a_container(tmp_path):
    assert timing._left_in_container(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    assert timing._left_in_container(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert timing._left_in_container(tmp_path) == math.inf


# ---- the gate


@pytest.mark.parametrize("cls", [NEURONS[name][0] for name in ("psn", "masked_psn", "sliding_psn", "lif")])
def test_wrong_spikes_get_no_figure(mistake, monkeypatch, cls):
    right = cls.parallel

    def wrong(self, x_seq):
        spike_seq = right(self, x_seq)
        # one spike of all
        flip = torch.zeros_like(spike_seq)
        flip[-1, -1] = 1.0
        return (spike_seq - flip).abs()

    monkeypatch.setattr(cls, "parallel", wrong)
    mistake(*TINY, says="does not compute what its definition says: 1 of 122 spikes differ")


def test_a_wrong_gradient_gets_no_figure(mistake, monkeypatch):
    monkeypatch.setattr(
        PSN, "parallel", lambda self, x_seq: law.psn(x_seq, self.weight, self.bias.detach(), self.surrogate, self.alpha)
    )
    mistake(
        *TINY, says="psn at T=2 does not compute what its definition says: only one of the two has a gradient of bias"
    )
    monkeypatch.setattr(
        PSN, "parallel", lambda self, x_seq: law.psn(x_seq, self.weight, self.bias, self.surrogate, 1.001 * self.alpha)
    )
    mistake(*TINY, says="psn at T=2 does not compute what its definition says: the gradient of x_seq is off by")


@pytest.mark.parametrize("T", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("name", ["psn", "masked_psn", "sliding_psn", "lif", "if"])
def test_the_gates_case_has_spikes_and_silence(name, T):
    """Else a neuron that never fires, or always, would pass."""
    torch.manual_seed(0)
    neuron = build_neuron(name, T=T, k=min(T, 8) if neurons.takes_k(name) else None)
    gate.coarsen(neuron)
    rate = gate.defined_spikes(neuron, gate.gate_case(T, torch.float32, CPU)[0]).mean().item()
    assert 0.02 < rate < 0.98


# ---- turns


def test_the_grid_is_sorted_without_repetitions():
    grid = make_grid(["psn"], [4, 2, 4], [16, 8], None)
    assert grid == [(2, 8, 2), (2, 16, 2), (4, 8, 4), (4, 16, 4)]


def test_jobs_take_turns_and_time_is_bounded(monkeypatch):
    """A clock of our own: job a takes 1 s, job b 2 s."""
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def job(name, length):
        def run():
            order.append(name)
            now[0] += length

        return run

    jobs = {"a": job("a", 1.0), "b": job("b", 2.0)}
    found = timing.measure_in_turns(jobs, CPU, repeats=20, seconds=100)
    # a warm-up each, then rounds of both, either of which may begin
    assert "".join(order[:2]) == "ab"
    assert {"".join(order[place : place + 2]) for place in range(2, 42, 2)} == {"ab", "ba"}
    assert found["b"] == timing.Times(2.0, 2.0, 2.0, 2.0, 20, 1, 2.0)
    # 3 s of warm-up and 3 s a round: 18 s hold five rounds; three are taken within tenfold time; else one
    assert timing.measure_in_turns(jobs, CPU, repeats=50, seconds=18)["a"].rounds == 5
    assert timing.measure_in_turns(jobs, CPU, repeats=50, seconds=2)["a"].rounds == 3
    assert timing.measure_in_turns(jobs, CPU, repeats=50, seconds=0.1)["a"].rounds == 1


def test_short_jobs_are_called_until_a_sample_is_long_enough(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def job():
        now[0] += 1e-5

    found = timing.measure_in_turns({"a": job}, CPU, repeats=3, seconds=1)["a"]
    assert found.calls * 1e-5 >= timing.SHORTEST_SAMPLE and found.calls < 200
    assert found.median == pytest.approx(1e-5)
