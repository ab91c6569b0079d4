"""The run, on one page: build, resume, train, evaluate, save."""

from __future__ import annotations

import time

import torch

from psn_train.data.resident import ResidentEvalStream, ResidentImages, ResidentLoader, ResidentTrainStream
from psn_train.data.stream import TrainStream, make_loader
from psn_train.recipe import Recipe, make_plan
from psn_train.training.build import build_model, check_channels_last, class_count, open_shards, same_classes
from psn_train.training.evaluate import EvaluationStopped, evaluate, make_eval_loader
from psn_train.training.optim import LearningRate, build_optimizer, masked_lambda
from psn_train.training.run import Run
from psn_train.training.runtime import (
    EXIT_STOPPED,
    NonFiniteLoss,
    build_accelerator,
    launched_processes,
    seed_everything,
    set_precision,
)
from psn_train.training.step import DeviceAugment, Updater


def train(recipe: Recipe) -> int:
    """Train what the recipe says, going on from the run's last checkpoint if there is one.

    Returns:
        The exit status: 0 when the run is complete, `EXIT_STOPPED` when a signal stopped it and all is saved.

    Raises:
        ValueError: the recipe does not fit the data, the devices or an existing run (ShardError, PlanError, ...).
        NonFiniteLoss: the loss is infinite or NaN.
    """
    # everything that can be wrong without a device
    train_reader = open_shards(recipe, "train")
    val_reader = open_shards(recipe, "val") if recipe.data.val is not None else None
    num_classes = class_count(recipe, train_reader.index)
    if val_reader is not None:
        same_classes(train_reader.index, val_reader.index)
    world_size = launched_processes()
    plan = make_plan(recipe, world_size=world_size, train_samples=train_reader.index.num_samples)
    seed_everything(recipe.seed)
    model = build_model(recipe, num_classes)
    # moving a model keeps its parameters, so an optimiser that cannot be made is found here, too
    optimizer = build_optimizer(model, recipe)

    accelerator = build_accelerator(recipe, world_size)
    device, rank = accelerator.device, accelerator.process_index
    set_precision(recipe, device)
    run = Run(recipe, plan, accelerator)
    if recipe.model.init_from is not None and not run.resumes:
        from psn_train.models.weights import load_ann

        run.say(str(load_ann(model, recipe.model.init_from)))
    if recipe.model.sync_bn and world_size > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    if recipe.precision.channels_last:
        check_channels_last(model, device)
        model.to(memory_format=torch.channels_last)
    learning_rate = LearningRate(optimizer, recipe, plan)
    run.track(model)
    if recipe.precision.compile:
        model.compile()
    augment = DeviceAugment(recipe, num_classes, device)
    updater = Updater(recipe, plan, accelerator.prepare(model), optimizer, augment, device, rank)
    seed_everything(recipe.seed, 1 + rank)
    run.resume(updater)
    run.say(run.headline())

    eval_loader = None
    if val_reader is not None:
        eval_batch = recipe.data.eval_batch_per_device or plan.micro_batch_size
        if recipe.data.resident:
            images = ResidentImages(val_reader, recipe, device, evaluation=True)
            stream = ResidentEvalStream(recipe, images, eval_batch, rank, world_size)
            eval_loader = ResidentLoader(stream, start=0, stop=len(stream))
        else:
            eval_loader = make_eval_loader(
                recipe, val_reader, batch_size=eval_batch, device=device, rank=rank, world_size=world_size
            )

    def evaluate_epoch(epoch: int) -> bool:
        """True where the selected figure is the best so far."""
        begin = time.monotonic()
        run.average_batch_norm()
        firing = recipe.log.firing_rates
        # hooks count the spikes, and a compiled graph would not call them
        with torch.compiler.set_stance("force_eager" if firing else "default"):
            results = {
                which: evaluate(network, recipe, eval_loader, device=device, firing=firing, stop=run.stop)
                for which, network in run.networks()
            }
        return run.note_evaluation(epoch, results, time.monotonic() - begin)

    final_step = min(plan.total_steps, recipe.schedule.stop_after_steps or plan.total_steps)
    part = {"start": run.step * plan.grad_accum_steps, "stop": final_step * plan.grad_accum_steps}
    if recipe.data.resident:
        images = ResidentImages(train_reader, recipe, device)
        loader = ResidentLoader(ResidentTrainStream(recipe, plan, images, rank), **part)
    else:
        stream = TrainStream(recipe, plan, train_reader, rank)
        loader = make_loader(stream, **part, workers=recipe.data.workers, pin_memory=device.type == "cuda")
    batches = run.waiting_for(loader)
    run.restore_rank(updater)
    stopping = False
    try:
        while not stopping and (run.step < final_step or run.owed_epoch is not None):
            ended = run.owed_epoch
            if ended is None:
                learning_rate.set(run.step)
                run.set_lambda(masked_lambda(recipe, plan, plan.epoch_of(run.step)))
                used = updater.run(batches, run.step)
                run.after_update(updater, used, log_now=run.step + 1 == final_step)
                ended = plan.epoch_ended_by(run.step)
                if ended is None and run.step == final_step:
                    ended = plan.epoch_of(run.step - 1)
                if run.evaluation_due(ended, last=run.step == final_step):
                    run.owed_epoch = ended
            stopping = run.stop.poll()
            improved = False
            if run.owed_epoch is not None and not stopping:
                try:
                    improved = evaluate_epoch(run.owed_epoch)
                    run.owed_epoch = None
                except EvaluationStopped:
                    stopping = True
            if stopping or improved or run.save_due(ended, last=run.step == final_step):
                run.save(updater, improved)
        complete = run.step == final_step and run.owed_epoch is None
        run.finish(complete)
    except RuntimeError as error:
        blame = updater.guard.blame()
        if blame is not None:
            raise NonFiniteLoss(blame) from error
        raise
    finally:
        run.close()
    return 0 if complete else EXIT_STOPPED
