"""The centralized baseline: the uncut network on all data, in this process."""

import dataclasses
import time
from typing import Any

from halfpass.algorithm import whole as whole_side
from halfpass.algorithm.checkpoint import load_training_state, training_state
from halfpass.arithmetic.optimizers import learning_rate, set_learning_rate
from halfpass.config import Config
from halfpass.data.batches import batch_count, test_batches, train_batches
from halfpass.data.datasets import Dataset
from halfpass.errors import RunError
from halfpass.run import setup
from halfpass.run.checkpoint import not_kept
from halfpass.run.epoch import Tally, Test, Values
from halfpass.run.memory import PeakMemory
from halfpass.run.progress import EpochProgress
from halfpass.run.records import RunFolder, Wires, peak_so_far, result, row, scores
from halfpass.run.signature import signature_of_whole, write_signature
from halfpass.tasks.task import Task
from halfpass.tree import sample_count


def train_centralized(config: Config, folder: RunFolder, data: Dataset) -> dict[str, Any]:
    """Writes the run folder; returns what `result.json` holds. Where the folder has kept the state of such a run, goes
    on with that."""
    with folder.tracked(config):
        return _train(config, folder, data)


def _train(config: Config, folder: RunFolder, data: Dataset) -> dict[str, Any]:
    task = setup.task_of(config, data)
    whole = setup.build_whole(config, data, task)
    recipe, device = config.train, whole.arithmetic.device
    data = dataclasses.replace(data, train=data.train.to(device), test=data.test.to(device))
    memory = PeakMemory(device)
    steps = batch_count(len(data.train), recipe.batch_size)
    rows = folder.load_checkpoint(
        config, lambda state: load_training_state(state, whole.optimizer, whole.model)
    )
    done = rows[-1]["epoch"] if rows else 0
    with EpochProgress(config.method, recipe.epochs, steps) as progress:
        progress.skip(done * steps)
        for epoch in range(done, recipe.epochs):
            began, tally = time.perf_counter(), Tally(device)
            batches = train_batches(data, data.train, recipe.batch_size, seed=recipe.seed, client=0, epoch=epoch)
            with tally.busy():
                for step, (x, targets) in enumerate(batches):
                    lr = learning_rate(recipe.schedule, recipe.lr, epoch * steps + step, recipe.epochs * steps)
                    set_learning_rate(whole.optimizer, lr)
                    loss = whole_side.whole_step(whole, x, targets, epoch, step)
                    tally.add(loss, sample_count(targets), lr)
                    progress.step()
            seconds = time.perf_counter() - began
            tally.peak_memory_bytes = max(memory.peak_bytes(), peak_so_far(rows, "whole"))
            values = test_whole(config, whole, data, task, epoch) if recipe.tests(epoch) else None
            new = row(epoch, "whole", tally, seconds, **scores(task, test=values))
            rows += folder.add_rows([new])
            try:
                folder.save_checkpoint(config, epoch + 1, training_state(whole.optimizer, whole.model))
            except RunError as error:
                not_kept(error)
            progress.epoch(new)
    folder.save_whole(whole, config, write_signature(signature_of_whole(config, task, data)))
    return folder.finish(result(config, task, None, rows, Wires([], None), folder.environment))


def test_whole(config: Config, whole: whole_side.Whole, data: Dataset, task: Task, epoch: int) -> Values:
    """The task's metrics of an uncut network on the test set."""
    whole.model.eval()
    test = Test(task)
    for step, (x, targets) in enumerate(test_batches(data, data.test, config.train.batch_size)):
        test.add(whole_side.evaluate(whole, x, epoch, step), targets)
    whole.model.train()
    return test.values()
