"""`psn bench memory`: its figures are those of the update that is counted, and what it refuses."""

import json

import pytest

from psn_train.bench.memory import kept_per_image, memory_recipe, peak_per_image
from psn_train.cli import main
from psn_train.training.memory import count_update

SMALL = ("--image-size", "32", "--T", "2", "--batch", "2")


def test_the_table_and_its_json(capsys):
    models = ("sew_resnet10_psn", "sew_resnet10_sliding_psn")
    assert main(["bench", "memory", "--models", *models, *SMALL, "--kernels", "compiled", "--dtype", "bf16"]) == 0
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert "packed, kept" in shown and "lean, peak" in shown
    assert [row["model"] for row in result["rows"]] == list(models)
    for row in result["rows"]:
        kept = [row["modes"][mode]["kept"] for mode in ("plain", "packed", "lean")]
        assert kept[0] > kept[1] > kept[2] > 0
        assert all(of["peak"] > of["kept"] for of in row["modes"].values())
    recipe = memory_recipe(models[0], T=2, image_size=32, dtype="bf16", memory="packed", backend="compiled", batch=2)
    update = count_update(recipe, 1000, 2)
    found = result["rows"][0]["modes"]["packed"]
    assert found == {"kept": kept_per_image(update), "peak": peak_per_image(update)}
    assert found["kept"] == (update.saved - update.casts) / 2 and update.casts > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--models", "resnet18"], "--models: got resnet18, wanted some of "),
        (["--models", "sew_resnet10_psn", "--k", "2"], "--k: got 2, but none of sew_resnet10_psn has an order"),
        (["--models", "sew_resnet10_masked_psn", "--k", "3"], "model.k: got 3, which is more than T = 2"),
        (["--models", "cifar_net_psn", "--image-size", "48"], "data.image_size: got 48, and cifar_net_psn is made for"),
    ],
)
def test_mistakes_are_told(words, told, capsys):
    assert main(["bench", "memory", *SMALL, *words]) == 2
    assert told in capsys.readouterr().err
