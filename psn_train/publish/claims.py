"""What a run claims of the weights that are published, and the shards on which it has to come out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psn_train.data.index import NoShards, ShardIndex, load_index
from psn_train.publish.naming import PublishError
from psn_train.recipe import Recipe, make_plan
from psn_train.training.results import SAMPLES


@dataclass(frozen=True)
class Claim:
    """Figures of the published weights, in percent, on `count` samples.

    Attributes:
        part: `test`, `val` or `held out`, see `training.results`.
        shards: the fingerprint of the shards.
        selecting: whether the best epoch was chosen on these samples.
        hold_out, seed: of `held out`: so many samples of the training shards are meant, chosen by this seed.
    """

    part: str
    top1: float
    top5: float
    loss: float
    count: int
    shards: str
    selecting: bool
    hold_out: int = 0
    seed: int = 0

    @property
    def key(self) -> str:
        """The recipe's key that names the shards."""
        return "data.train" if self.part == "held out" else f"data.{self.part}"

    @property
    def samples(self) -> str:
        """On what, in words."""
        return f"{self.count:,} {SAMPLES[self.part]}"

    @property
    def correct(self) -> tuple[int, int]:
        """How many answers were right, and how many had the right one among the first five."""
        return round(self.top1 * self.count / 100), round(self.top5 * self.count / 100)


def read_claims(meta: dict, results: dict) -> list[Claim]:
    """What the run has written down of exactly these weights; the figure that the card is headed by comes first.

    Args:
        meta: state.json as `load_run` gives it.
        results: see `results_of_checkpoint`.

    Raises:
        PublishError: there is no figure of these weights.
    """
    claims, split, weights = [], meta.get("split") or {}, meta["weights"]
    for which in results["weights_of"]:
        figures = (results["test"] or {}).get(which)
        if figures is not None and figures["weights"] == weights and not claims:
            kept = {key: figures[key] for key in ("top1", "top5", "loss", "count", "shards")}
            claims.append(Claim("test", selecting=results["selected_on"] == "test", **kept))
    own = meta["results"]
    records = [record for record in (own["last"], own["best"]) if record is not None and record["step"] == meta["step"]]
    part = own.get("selected_on")
    if records and part in SAMPLES and not (part == "test" and claims):
        record, prefix = records[0], "ema_" if weights == "ema" else ""
        held_out = {"hold_out": split["held_out"], "seed": split["hold_out_seed"]} if part == "held out" else {}
        kept = {key: record[prefix + key] for key in ("top1", "top5", "loss")}
        kept |= {"count": record["count"], "shards": split["selecting_shards"], "selecting": True}
        claims.append(Claim(part, **kept, **held_out))
    if not claims:
        raise PublishError(
            f"{meta['path']}: the run has no figure of these weights, so nothing can be held against them. Publish the "
            "best or the last checkpoint of a run that evaluates (--which, and data.val, data.hold_out or data.test)"
        )
    return claims


def find_shards(
    claims: Sequence[Claim], recipe: Recipe, given: Sequence[str]
) -> tuple[list[tuple[Claim, ShardIndex]], list[tuple[Claim, str]]]:
    """Where the claims can be held against samples, and why some cannot.

    Shards are known by what is in them: those of `given` may lie elsewhere than the recipe says.

    Returns:
        [(claim, index of its shards)], beginning with the first claim; [(claim, reason)] of the others.

    Raises:
        ShardError: `given` names no shards.
        PublishError: nothing is claimed on some of `given`, or the shards of the first claim are not there.
    """
    indices = [load_index(where) for where in given]
    wanted = {claim.shards for claim in claims}
    for index in indices:
        if index.fingerprint not in wanted:
            told = "; ".join(f"{claim.samples}, shards {claim.shards}" for claim in claims)
            raise PublishError(
                f"--shards {index.place}: shards {index.fingerprint}, on which the run claims nothing of these "
                f"weights; it does on: {told}"
            )
    found, missing = [], []
    for claim in claims:
        index = next((index for index in indices if index.fingerprint == claim.shards), None)
        reason = ""
        if index is None:
            where = getattr(recipe.data, claim.key.partition(".")[2])
            try:
                index = load_index(where)
            except NoShards as error:
                index, reason = None, f"{claim.key}: {error}"
            if index is not None and index.fingerprint != claim.shards:
                reason = f"{claim.key}: the shards in {index.place} are {index.fingerprint}, the run's {claim.shards}"
                index = None
        if index is not None:
            found.append((claim, index))
        elif not found:
            raise PublishError(
                f"the {claim.top1:.2f} % on {claim.samples} cannot be taken again, and nothing is published unless it "
                f"comes out again. {reason}\nSay where the shards are: --shards DIR"
            )
        else:
            missing.append((claim, reason))
    return found, missing


def batch_of_run(meta: dict, recipe: Recipe) -> int:
    """Samples of a batch in which the run evaluated on a device; 64 where it did not write down what follows it."""
    if recipe.data.eval_batch_per_device is not None:
        return recipe.data.eval_batch_per_device
    split = meta.get("split") or {}
    if "world_size" not in meta or "samples" not in split or recipe.data.max_batch_per_device == "auto":
        return 64
    return make_plan(recipe, world_size=meta["world_size"], train_samples=split["samples"]).micro_batch_size
