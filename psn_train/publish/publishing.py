"""`psn publish`: a run -> a folder in timm's hub format, checked in a fresh process, and on to the hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from psn_train.publish.card import Card, card_text
from psn_train.publish.check import Checked, check_folder
from psn_train.publish.claims import batch_of_run, find_shards, read_claims
from psn_train.publish.folder import FILES, Source, check_folder_is_free, folder_aside, open_source, write_folder
from psn_train.publish.hub import weights_text
from psn_train.publish.naming import License, PublishError, name_of_folder, split_repo
from psn_train.publish.push import open_target, push
from psn_train.training.checkpoint import last_checkpoint, read_meta
from psn_train.training.storage import place


@dataclass(frozen=True)
class Published:
    """What `publish` did.

    Attributes:
        name: ARCHITECTURE.TAG.
        weights: which checkpoint and weights they are, in words.
        load: what `timm.create_model` takes.
        checked: what the fresh process found.
        url: of the commit, where it went to the hub.
        entry: what `models.published.PUBLISHED` has of it, where it went to the hub.
    """

    name: str
    weights: str
    load: str
    checked: Checked
    url: str | None = None
    entry: dict | None = None


def publish(
    where: str | os.PathLike,
    *,
    license_: License,
    to: str | None = None,
    to_folder: str | os.PathLike | None = None,
    shards: Sequence[str] = (),
    prefer: str = "best",
    revision: str | None = None,
    overwrite: bool = False,
    private: bool = False,
    dataset: str | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    device: str | None = None,
) -> Published:
    """Publish a run's checkpoint to the hub or to a folder, if what it claims comes out again.

    Args:
        where: a run, or a folder step_XXXXXXXX; local, or a URL.
        to: org/ARCHITECTURE.TAG. One of `to` and `to_folder` is given.
        shards: those that the claims are about, where they are not at the recipe's data.test, data.val or data.train.
        prefer: `best` or `last` checkpoint of a run.
        revision, overwrite: see `push.open_target`.
        private: of a new repository.
        dataset: the hub's name of the data set, for the card.
        batch_size: of the evaluation; None: the run's own.
        workers: decoding processes.
        device: such as "cuda:1"; by default a GPU if there is one.

    Raises:
        PublishError, CheckpointError, ShardError: nothing is published; what is there stays as it was.
    """
    if (to is None) == (to_folder is None):
        raise PublishError("wanted one of --to org/ARCHITECTURE.TAG and --to-folder DIR")
    if to is None and (revision is not None or overwrite or private):
        raise PublishError("--revision, --overwrite and --private are of the hub: they go with --to")
    if to is not None:
        split_repo(to)
    else:
        check_folder_is_free(Path(to_folder))
    source = open_source(where, prefer)
    if to is not None:
        target = open_target(to, source.architecture, revision=revision, overwrite=overwrite)
        name = to.partition("/")[2]
        tag = name.partition(".")[2]
        load = f"hf-hub:{to}" + (f"@{revision}" if revision is not None else "")
    else:
        name, tag = name_of_folder(Path(to_folder), source.architecture, source.recipe.name)
        load = f"local-dir:{to_folder}"
    claims = read_claims(source.meta, source.results)
    found, missing = find_shards(claims, source.recipe, shards)
    with _staging(to_folder) as folder:
        write_folder(source, folder, tag=tag, license_=license_)
        checked = check_folder(
            folder,
            found,
            trained_on=source.device,
            deterministic=source.recipe.precision.deterministic,
            batch_size=batch_size or batch_of_run(source.meta, source.recipe),
            threads=source.meta.get("threads"),
            workers=workers,
            device=device,
            cache_dir=source.recipe.data.cache_dir,
        )
        # where the folder lies on this machine is nobody's business
        own = load if to is not None else f"local-dir:{Path(to_folder).absolute().name}"
        card = Card(name, own, source, license_, checked, missing, _last(source), dataset)
        (folder / "README.md").write_text(card_text(card), encoding="utf-8")
        if others := sorted({path.name for path in folder.iterdir()} - set(FILES)):
            raise PublishError(
                f"{', '.join(others)} would be published beside {', '.join(FILES)}, and might hold pickled code: this "
                "timm writes more than is known here. Nothing is published"
            )
        weights = weights_text(where, source.meta, prefer)
        if to is None:
            return Published(name, weights, load, checked)
        url = push(folder, target, message=f"{name}: {weights}", private=private)
        return Published(name, weights, load, checked, url, _entry(folder, to, revision))


@contextmanager
def _staging(to_folder: str | os.PathLike | None) -> Iterator[Path]:
    """A folder aside, which becomes `to_folder`, or which is gone afterwards."""
    if to_folder is None:
        with tempfile.TemporaryDirectory(prefix="psn_publish_") as folder:
            yield Path(folder)
    else:
        with folder_aside(Path(to_folder)) as folder:
            yield folder


def _last(source: Source) -> dict:
    """state.json of the run's newest checkpoint, which knows how long it took."""
    last = last_checkpoint(place(source.meta["path"]).parent)
    if last is None:
        return source.meta
    meta = read_meta(last)
    same = meta["recipe_hash"] == source.meta["recipe_hash"] and meta["step"] >= source.meta["step"]
    return meta if same else source.meta


def _entry(folder: Path, repo: str, revision: str | None) -> dict:
    """Arguments of `register_pretrained`: what the architecture's own configuration does not say."""
    from timm.models import get_pretrained_cfg

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain = get_pretrained_cfg(config["architecture"]).to_dict()
    cfg = {
        key: value
        for key, value in config["pretrained_cfg"].items()
        if key not in ("tag", "architecture") and json.dumps(plain.get(key)) != json.dumps(value)
    }
    hub_id = repo + (f"@{revision}" if revision is not None else "")
    return {"hf_hub_id": hub_id, "model_args": config["model_args"], "pretrained_cfg": cfg}
