"""`psn export` on runs of real digits: other programs give the network's logits, for any batch, frame by frame."""

import contextlib
import json

import numpy as np
import pytest
import torch
from conftest import merged, small_document, train_here
from foreign_networks import wake

from psn_train.cli import main
from psn_train.neurons import Neuron
from psn_train.publish.hub import load_any
from psn_train.training.step import Updater


@contextlib.contextmanager
def woken():
    """The last of three updates leaves random weights under which every layer fires.

    Few neurons of a network that is hardly trained fire, and a silent network proves nothing.
    """
    run = Updater.run

    def waking(self, batches, step):
        used = run(self, batches, step)
        if step == 2:
            x = torch.randn(8, self.model.in_chans, 16, 16, generator=torch.Generator().manual_seed(1))
            rates = wake(self.model, x, Neuron)
            assert min(rates.values()) > 1e-3
        return used

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "run", waking)
        yield


def maker_of_runs(shards, folder, steps: int, around=contextlib.nullcontext):
    """make(network, **of the section model) -> the folder of a run of `steps` updates; each is trained once."""
    made = {}

    def make(name: str, **model) -> str:
        key = json.dumps([name, model], sort_keys=True)
        if key not in made:
            changes = {"schedule": {"epochs": None, "steps": steps}, "model": {"name": name, **model}}
            document = merged(small_document(shards, folder / str(len(made))), changes)
            with around():
                assert train_here(document) == 0
            made[key] = document["run_dir"]
        return made[key]

    return make


@pytest.fixture(scope="module")
def run_of(digit_shards, tmp_path_factory):
    return maker_of_runs(digit_shards, tmp_path_factory.mktemp("export"), 3, woken)


@pytest.fixture
def export(capsys):
    """export(run, "--to", ...) -> what was printed."""

    def run(where, *words) -> str:
        capsys.readouterr()
        status = main(["export", str(where), "--which", "last", *map(str, words)])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run


def network_and(where, count: int = 5):
    """The network as it was trained, batch norms and all, and inputs."""
    model, recipe, _ = load_any(where, prefer="last")
    side, channels = recipe.data.image_size, recipe.model.in_chans
    return model, torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def session_of(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def same(found, wanted: torch.Tensor) -> None:
    """Logits that are not all alike, within rounding."""
    assert wanted.std() > 1e-2
    np.testing.assert_allclose(np.asarray(found), wanted.numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))


# ---- whole sequences


@pytest.mark.slow
def test_onnxruntime_gives_the_networks_logits_for_any_batch(run_of, export, tmp_path, digit_shards):
    onnx = pytest.importorskip("onnx")
    run, out = run_of("sew_resnet10_psn"), tmp_path / "digits.onnx"
    printed = export(run, "--to", "onnx", "--out", out, "--shards", digit_shards / "val", "--workers", 0)
    assert "compared on 16 images" in printed and f"written: {out}" in printed and "16 the same class" in printed
    model = onnx.load(str(out))
    onnx.checker.check_model(model, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    (given,), (logits,) = model.graph.input, model.graph.output
    shapes = [[dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in (given, logits)]
    assert shapes == [["N", 1, 16, 16], ["N", 10]] and (given.name, logits.name) == ("input", "logits")
    session, (network, x) = session_of(out), network_and(run)
    with torch.no_grad():
        for part in (x, x[:1], x[:3]):
            same(session.run(None, {"input": part.numpy()})[0], network(part))
    kept = {entry.key: entry.value for entry in model.metadata_props}
    assert (kept["architecture"], kept["T"], kept["neuron"], kept["num_classes"]) == (
        "sew_resnet10_psn",
        "2",
        "psn",
        "10",
    )
    assert json.loads(kept["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(kept["preprocessing"])["mean"] == [0.13] and str(tmp_path) not in str(kept)
    assert kept["weights"].startswith("the best and last checkpoint, step_00000003 (step 3, epoch 1)")


@pytest.mark.slow
def test_a_fixed_batch_steps_and_bytes(run_of, export, tmp_path):
    """--batch, --per-step and --with-normalization, also together."""
    run, out = run_of("sew_resnet10_psn"), tmp_path / "digits.onnx"
    export(run, "--to", "onnx", "--out", out, "--batch", 4, "--per-step")
    session, (network, x) = session_of(out), network_and(run, 4)
    assert session.get_inputs()[0].shape == [4, 1, 16, 16] and session.get_outputs()[0].shape == [2, 4, 10]
    with torch.no_grad():
        same(session.run(None, {"input": x.numpy()})[0], network(x, per_step=True))
    with pytest.raises(Exception, match="Got: 3 Expected: 4"):
        session.run(None, {"input": x[:3].numpy()})
    export(run, "--to", "onnx", "--out", out, "--with-normalization", "--overwrite")
    session = session_of(out)
    assert session.get_inputs()[0].type == "tensor(uint8)"
    raw = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same(session.run(None, {"input": raw.numpy()})[0], network((raw / 255.0 - 0.13) / 0.31))


def test_torch_loads_what_was_exported_for_it(run_of, export, tmp_path):
    run, out = run_of("sew_resnet10_psn"), tmp_path / "digits.pt2"
    export(run, "--to", "torch-export", "--out", out, "--per-step")
    network, x = network_and(run)
    extra = {"metadata.json": ""}
    loaded = torch.export.load(str(out), extra_files=extra).module()
    # operators of torch alone, and Python's on sizes: nobody needs this package to run it
    targets = {node.target for node in loaded.graph.nodes if node.op == "call_function"}
    libraries = {getattr(target, "namespace", target.__module__) for target in targets}
    assert len(targets) > 5 and "aten" in libraries and libraries <= {"aten", "_operator"}, targets
    with torch.no_grad():
        for part in (x, x[:1]):
            same(loaded(part), network(part, per_step=True))
    assert json.loads(extra["metadata.json"])["architecture"] == "sew_resnet10_psn"


def test_recordings_are_exported_as_frames(small_events, export, dot_shards, tmp_path):
    document = small_events(schedule={"epochs": None, "steps": 3})
    assert train_here(document) == 0
    out, words = tmp_path / "dots.onnx", ("--to", "onnx", "--shards", dot_shards / "test", "--workers", 0)
    assert "compared on 16 recordings" in export(document["run_dir"], *words, "--out", out)
    shape = session_of(out).get_inputs()[0].shape
    assert shape[:2] == [document["model"]["T"], "N"]


# ---- steps

STEPS = {
    "sliding_psn": {"k": 2, "T": 3},
    "masked_psn": {"k": 2, "T": 3, "args": {"pe": True}},
    "lif": {"T": 3, "args": {"v_reset": -0.1}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("neuron", "to"),
    [
        ("masked_psn", "onnx"),
        ("sliding_psn", "torch-export"),
        pytest.param("sliding_psn", "onnx", marks=pytest.mark.long),
        pytest.param("lif", "torch-export", marks=pytest.mark.long),
    ],
)
def test_a_step_after_another_is_the_sequence(run_of, export, tmp_path, neuron, to):
    """The state is in the caller's hands: at rest in the beginning, as the file says, and handed on."""
    run = run_of(f"sew_resnet10_{neuron}", **STEPS[neuron])
    out = tmp_path / f"step.{'onnx' if to == 'onnx' else 'pt2'}"
    export(run, "--to", to, "--step", "--out", out)
    network, x = network_and(run, 5)
    frames = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = network(frames, per_step=True)
    step, told = runner_of(out)
    assert ("state.step" in [state["input"] for state in told]) == (neuron == "masked_psn")
    for N in (5, 1):
        states = []
        for state in told:
            shape = [N if size == "N" else size for size in state["shape"]]
            states.append(torch.full(shape, state["at_rest"], dtype=getattr(torch, state["dtype"])))
        for t, frame in enumerate(frames[:, :N]):
            logits, *states = step(frame.contiguous(), states)
            same(logits, wanted[t, :N])
    assert neuron != "masked_psn" or int(states[0]) == 3


def runner_of(path):
    """(step(frame, states) -> [logits, *states], what the file says of its states)."""
    if path.suffix == ".pt2":
        extra = {"metadata.json": ""}
        loaded = torch.export.load(str(path), extra_files=extra).module()
        return lambda frame, states: list(loaded(frame, states)), json.loads(
            json.loads(extra["metadata.json"])["states"]
        )
    session = session_of(path)
    told = json.loads(session.get_modelmeta().custom_metadata_map["states"])
    assert [one.name for one in session.get_inputs()] == ["frame", *(state["input"] for state in told)]
    assert [one.name for one in session.get_outputs()] == ["logits", *(state["output"] for state in told)]

    def step(frame, states):
        names = [one.name for one in session.get_inputs()]
        given = dict(zip(names, [one.numpy() for one in (frame, *states)], strict=True))
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return step, told


# ---- NIR

BASELINES = [("if", {"v_reset": 0.0}), ("lif", {"v_reset": 0.0}), ("lif", {"v_reset": 0.0, "decay_input": False})]


@pytest.mark.parametrize(("neuron", "args"), BASELINES)
def test_nir_is_read_back_by_spikingjelly(run_of, export, tmp_path, neuron, args):
    """Another reader than ours, step by step."""
    nir = pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    run, out = run_of(f"sew_resnet10_{neuron}", T=3, args=args), tmp_path / "digits.nir"
    assert "same class" in export(run, "--to", "nir", "--out", out)
    kinds = {type(node).__name__ for node in nir.read(str(out)).nodes.values()}
    assert kinds == {"Input", "Output", "Conv2d", "AvgPool2d", "Flatten", "Affine", neuron.upper()}
    theirs = exchange.import_from_nir(str(out)).eval()
    network, x = network_and(run, 3)
    frames = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(2))
    state = None
    with torch.no_grad():
        for frame, wanted in zip(frames, network(frames, per_step=True), strict=True):
            logits, state = theirs(frame, state)
            same(logits, wanted)


def test_nir_of_a_leak_without_reset(run_of, export, tmp_path):
    """A leaky integrator and a threshold: SpikingJelly reads no such nodes, so ours alone holds it."""
    nir = pytest.importorskip("nir")
    run, out = run_of("sew_resnet10_lif_no_reset"), tmp_path / "digits.nir"
    assert "same class" in export(run, "--to", "nir", "--out", out)
    assert {"LI", "Threshold"} <= {type(node).__name__ for node in nir.read(str(out)).nodes.values()}
