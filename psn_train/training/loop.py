"""The run, on one page: build, resume, train, evaluate, save."""

from __future__ import annotations

import time
from functools import partial

import torch

from psn_train.data.decoders import start_server
from psn_train.data.split_checks import class_count
from psn_train.plan.auto_batch import settle_micro_batch, with_bound
from psn_train.plan.auto_kernels import settle_kernels
from psn_train.recipe import Recipe, make_plan
from psn_train.training.build import build_model, check_channels_last, check_order, load_network, open_splits
from psn_train.training.engine import build_engine, check_engine
from psn_train.training.environment import note_start
from psn_train.training.evaluate import EvaluationStopped, evaluate
from psn_train.training.inputs import TrainInputs
from psn_train.training.loaders import Loaders
from psn_train.training.metrics import headline
from psn_train.training.optim import LearningRate, build_optimizer, masked_lambda
from psn_train.training.run import Run
from psn_train.training.runtime import (
    EXIT_STOPPED,
    NonFiniteLoss,
    build_accelerator,
    launched_processes,
    out_of_memory,
    seed_everything,
    set_precision,
)
from psn_train.training.saving import check_room
from psn_train.training.step import Updater
from psn_train.training.watch import Watch, record_collectives


def train(recipe: Recipe) -> int:
    """Train what the recipe says, going on from the run's last checkpoint if there is one.

    Returns:
        The exit status: 0 when the run is complete, `EXIT_STOPPED` when a signal stopped it and all is saved.

    Raises:
        ValueError: the recipe does not fit the data, the devices or an existing run (ShardError, PlanError, ...).
            Also where the memory does not suffice.
        NonFiniteLoss: the loss is infinite or NaN.

    A process that hangs, or that loses another rank, ends itself with `EXIT_HUNG` (watch.py).
    """
    with Watch(recipe) as watch:
        return _train(recipe, watch)


def _train(recipe: Recipe, watch: Watch) -> int:
    if recipe.data.workers:
        # it imports meanwhile, and is there before this process has threads
        start_server()
    # everything that can be wrong without a device
    zero_stage = check_engine(recipe)
    splits = open_splits(recipe)
    num_classes = class_count(recipe, splits.train.index)
    world_size = launched_processes()
    automatic = recipe.data.max_batch_per_device == "auto"
    plan_of = partial(make_plan, world_size=world_size, train_samples=splits.train.index.num_samples)
    # where the micro-batch follows from a device, all else is checked with the largest
    plan = plan_of(with_bound(recipe, None) if automatic else recipe)
    check_order(recipe, plan, splits)
    seed_everything(recipe.seed)
    model = build_model(recipe, num_classes)
    # moving a model keeps its parameters, so an optimiser that cannot be made is found here, too
    optimizer = build_optimizer(model, recipe)
    check_room(recipe, model)

    record_collectives(recipe)
    accelerator = build_accelerator(recipe, world_size)
    device, rank = accelerator.device, accelerator.process_index
    set_precision(recipe, device)
    # before the micro-batch: what they keep decides how many samples fit
    recipe = settle_kernels(recipe, model, plan, accelerator, zero_stage)
    recipe = settle_micro_batch(recipe, num_classes, splits, accelerator, zero_stage)
    if automatic:
        plan = plan_of(recipe)
        check_order(recipe, plan, splits)
    run = Run(recipe, plan, splits, accelerator, watch)
    if run.resumes:
        run.load_weights(model)
    elif recipe.model.init_from is not None:
        from psn_train.models.weights import load_ann

        run.say(str(load_ann(model, recipe.model.init_from)))
    if recipe.model.sync_bn and world_size > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    if recipe.precision.channels_last:
        check_channels_last(model, device, recipe.data.image_size)
        # DeepSpeed flattens the weights; images in channels_last are enough for its convolutions
        if zero_stage is None:
            model.to(memory_format=torch.channels_last)
    learning_rate = LearningRate(optimizer, recipe, plan)
    run.track(model)
    if recipe.precision.compile:
        model.compile()
    inputs = TrainInputs(recipe, num_classes, device)
    engine = build_engine(recipe, plan, model, optimizer, accelerator)
    updater = Updater(recipe, plan, engine, inputs, device, rank, watch)
    seed_everything(recipe.seed, 1 + rank)
    run.resume(updater)
    note_start(run, engine.name)
    run.say(headline(recipe, plan, device, run.step, splits.text, engine.name))

    loaders = Loaders(recipe, plan, device, rank)
    select_loader = loaders.evaluation(splits.select, splits.select_ids) if splits.select is not None else None

    def evaluate_epoch(epoch: int) -> bool:
        """True where the selected figure is the best so far."""
        begin = time.monotonic()
        watch.phase("evaluate")
        run.stop.settle()
        firing = recipe.log.firing_rates
        # hooks count the spikes, and a compiled graph would not call them
        stance = torch.compiler.set_stance("force_eager" if firing else "default")
        with stance, run.averaged_batch_norm():
            results = {
                which: evaluate(
                    network,
                    recipe,
                    select_loader,
                    device=device,
                    firing=firing,
                    stop=run.stop,
                    divided=engine.divided,
                )
                for which, network in run.networks()
            }
        return run.note_evaluation(epoch, results, time.monotonic() - begin)

    def evaluate_test() -> None:
        """The test set, looked at once: under the weights of the best and of the last checkpoint."""
        watch.phase("test")
        run.stop.settle()
        loader, figures = loaders.evaluation(splits.test), {}
        wanted = run.results.to_test(run.checkpoints, run.step)
        # the best may be the last
        for path, weights in dict.fromkeys(filter(None, wanted.values())):
            network, which = load_network(recipe, path, num_classes, weights)
            figures[path, weights] = evaluate(network.to(device), recipe, loader, device=device, stop=run.stop), which
        run.note_test({which: figures.get(chosen) for which, chosen in wanted.items()})

    final_step = min(plan.total_steps, recipe.schedule.stop_after_steps or plan.total_steps)
    loader = loaders.train(splits.train, run.step * plan.grad_accum_steps, final_step * plan.grad_accum_steps)
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
        # the test set is shown what was written
        run.check_saved()
        complete = run.step == final_step and run.owed_epoch is None
        if complete and run.test_due():
            try:
                evaluate_test()
            except EvaluationStopped:
                complete = False
        watch.phase("end")
        run.finish(complete)
        engine.close()
    except (RuntimeError, MemoryError) as error:
        watch.lost(error)
        if (text := out_of_memory(error, recipe, plan)) is not None:
            raise ValueError(text) from error
        blame = updater.guard.blame()
        if blame is not None:
            raise NonFiniteLoss(blame) from error
        raise
    finally:
        run.close()
    return 0 if complete else EXIT_STOPPED
