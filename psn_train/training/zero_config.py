"""DeepSpeed's configuration: what the launcher's file says, held against what the trainer decides itself."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from psn_train.recipe import Recipe


class EngineError(ValueError):
    """What the launcher asks for is not there, or cannot be had together with the recipe."""


# what a file may not say, and why
_REFUSED = {
    "optimizer": "the recipe's optim section is the optimiser",
    "scheduler": "the recipe's schedule section is the learning rate",
    "amp": "the recipe's precision.dtype is the precision",
}
_OFFLOAD = ("offload_optimizer", "offload_param", "zenflow")


def _from_file(path: str) -> dict:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"deepspeed_config_file {path}: it cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise EngineError(f"deepspeed_config_file {path}: no object zero_optimization in it; see launch/deepspeed/")
    return config


def zero_config(recipe: Recipe) -> dict:
    """The configuration that the launcher names, without what the trainer sets; checked against the recipe.

    Raises:
        EngineError: DeepSpeed is not installed; the file cannot be read, or says what the recipe decides; the recipe
            asks for what the stage cannot do. All that is wrong is told at once.
    """
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file not in ("none", ""):
        where, config = f"deepspeed_config_file {file}", _from_file(file)
    else:
        where = "accelerate launch --use_deepspeed"
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        config = {"zero_optimization": {"stage": stage}}
    zero, problems = config["zero_optimization"], []
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        problems.append(
            f"zero_optimization.stage: got {stage!r}, wanted 1, 2 or 3; without stages launch without DeepSpeed"
        )
    problems += [f"{key}: leave it out; {why}" for key, why in _REFUSED.items() if key in config]
    for key in ("fp16", "bf16", "torch_autocast"):
        if (config.get(key) or {}).get("enabled") not in (None, False):
            problems.append(
                f"{key}.enabled: set it to false; the recipe's precision.dtype = {recipe.precision.dtype} decides, and "
                "the trainer turns on what belongs to it"
            )
    clipping = config.get("gradient_clipping", 0.0)
    if clipping not in (0, "auto", recipe.optim.clip_grad_norm):
        problems.append(
            f"gradient_clipping: got {clipping}, and optim.clip_grad_norm is {recipe.optim.clip_grad_norm}; set it to "
            "0.0, the trainer clips as the recipe says"
        )
    for key in _OFFLOAD:
        device = (zero.get(key) or {}).get("device", "none")
        if zero.get(key) and device != "none":
            problems.append(
                f"zero_optimization.{key}: not supported; the optimiser's state of these networks is 50 to 500 MB, "
                "and their activations are what takes memory (model.memory, model.grad_checkpointing)"
            )
    problems += beyond_the_stage(recipe, stage)
    if importlib.util.find_spec("deepspeed") is None:
        problems.append("deepspeed is not installed: pip install 'psn-train[deepspeed]'")
    if problems:
        raise EngineError(f"{where}:\n  " + "\n  ".join(problems))
    return config


def beyond_the_stage(recipe: Recipe, stage: int) -> list[str]:
    """What a stage cannot do for the recipe."""
    problems = []
    if stage == 3 and recipe.ema.decay is not None:
        problems.append("ema.decay: under ZeRO-3 no rank has all weights to average; use ZeRO-2, or leave it out")
    if stage == 3 and recipe.precision.compile:
        problems.append("precision.compile: the hooks that gather ZeRO-3's weights break the graph; use ZeRO-2")
    if stage == 3 and recipe.model.memory == "lean":
        problems.append(
            "model.memory: lean computes layers again when ZeRO-3 has given their weights away; use ZeRO-2, or packed"
        )
    if stage == 3 and recipe.precision.kernels in ("compiled", "triton"):
        problems.append(
            f"precision.kernels: {recipe.precision.kernels} computes batch norm outside of its module, whose hook "
            "gathers ZeRO-3's weights; use ZeRO-2, or reference"
        )
    return problems


def complete_config(config: dict, recipe: Recipe, plan) -> dict:
    """The whole configuration for `deepspeed.initialize`.

    Clipping and fp16's loss scale are the trainer's own, the same under every engine, and in the checkpoint. Under bf16
    DeepSpeed opens torch's autocast, with no module whose gradients would travel as bf16.
    """
    config = {key: value for key, value in config.items() if key not in ("train_batch_size", "fp16", "bf16")}
    # DeepSpeed wants whole numbers that multiply; it does not look at the batches themselves
    zero = dict(config["zero_optimization"])
    if zero["stage"] == 3:
        # its linear layer rounds otherwise under autocast
        zero["memory_efficient_linear"] = False
    return {
        **config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "torch_autocast": {
            "enabled": recipe.precision.dtype == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        # a line of its own for every step that it counts
        "steps_per_print": 10**9,
    }
