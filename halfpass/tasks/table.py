"""The tasks by name, and the user's own as `module:function`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from halfpass.errors import InputError, choice_error
from halfpass.plugin import call_plugin
from halfpass.tasks import classification, multilabel, regression, segmentation, tokens
from halfpass.tasks.task import CLASS_NUMBERS, Options, Spec, Task, count_classes, spec_of
from halfpass.tree import Tree, leaves


@dataclass(frozen=True)
class Row:
    count: Callable[[str, Sequence[Tree], Options], int]  # how many outputs these targets need; refuses others
    build: Callable[[int, Spec, Options], Task]
    metrics: tuple[str, ...]  # those that can lead, the usual one first
    options: tuple[str, ...] = ()  # of Options, those that this task has beside the common ones


TASKS: dict[str, Row] = {
    "classification": Row(
        classification.count, classification.build, ("accuracy", "top_5_accuracy", "f1_macro", "auroc_macro"),
        ("class_weights", "ignore_index", "label_smoothing"),
    ),
    "multilabel": Row(
        multilabel.count, multilabel.build, ("auroc_macro", "map", "f1_macro"),
        ("class_weights", "positive_weights", "label_smoothing"),
    ),
    "regression": Row(regression.count, regression.build, ("r2", "mae", "rmse"), ("loss", "class_weights")),
    "segmentation": Row(
        segmentation.count, segmentation.build, ("mean_iou", "dice", "pixel_accuracy"),
        ("class_weights", "ignore_index", "label_smoothing"),
    ),
    "tokens": Row(
        tokens.count, tokens.build, ("accuracy", "perplexity"), ("class_weights", "ignore_index", "label_smoothing")
    ),
}  # fmt: skip
LOWER = ("mae", "rmse", "perplexity")  # metrics of which less is better
NO_SHARE = ("r2", *LOWER)  # metrics that are not from 0 to 1


def check_name(name: str, options: Options) -> None:
    """Raises InputError for a task that there is not, and for an option that it has not."""
    if ":" in name:
        return
    if name not in TASKS:
        raise choice_error("task.name", [*TASKS, "module:function"], name)
    row = TASKS[name]
    for field in dataclasses.fields(Options):
        value = getattr(options, field.name)
        known = ("outputs", "metric", "names", *row.options)
        if field.name not in known and value != field.default:
            place = "train.label_smoothing" if field.name == "label_smoothing" else f"task.{field.name}"
            raise InputError(place, f"its default in task {name}", str(value), "leave it out")
    if options.metric is not None and options.metric not in row.metrics:
        raise choice_error("task.metric", row.metrics, options.metric)
    if options.positive_weights is not None and any(weight <= 0 for weight in options.positive_weights):
        raise InputError("task.positive_weights", "numbers above 0", str(options.positive_weights), "change them")


def count_outputs(
    name: str, options: Options, train_targets: Tree, test_targets: Any = None, *, place: str | None = None
) -> int:
    """How many outputs a network needs to learn these targets; raises InputError where they are not the task's."""
    check_name(name, options)
    place = place or f"targets for task {name}"
    splits = [targets for targets in (train_targets, test_targets) if targets is not None]
    specs = [spec_of(split) for split in splits]
    for other in specs[1:]:
        if other != specs[0]:
            raise InputError(place, f"test targets like the training's, {specs[0]}", f"{other}", "convert both alike")
    count = _count_own if ":" in name else TASKS[name].count
    found = count(place, splits, options)
    if options.outputs is not None and found != options.outputs:
        raise InputError("data.classes", f"{found}, as the targets have", str(options.outputs), "leave it out")
    return found


def build_task(name: str, outputs: int, targets: Spec, options: Options) -> Task:
    """The task of that name, or of a function of (outputs) that returns a Task, or (loss, metrics) and perhaps the name
    of the leading metric."""
    check_name(name, options)
    if ":" in name:
        task = _own(name, outputs)
        return dataclasses.replace(task, targets=task.targets or targets, names=tuple(options.names))
    task = TASKS[name].build(outputs, targets, options)
    lead = options.metric or task.lead
    return dataclasses.replace(
        task, lead=lead, higher_is_better=lead not in LOWER, unit="" if lead in NO_SHARE else "%", targets=targets,
        names=tuple(options.names),
    )  # fmt: skip


def classes(outputs: int, label_smoothing: float = 0.0) -> Task:
    """Plain classification of so many classes."""
    return build_task("classification", outputs, CLASS_NUMBERS, Options(label_smoothing=label_smoothing))


def _count_own(place: str, splits: Sequence[Tree], options: Options) -> int:
    """Of one's own task: classes of whole numbers, else the columns of the first tensor."""
    if options.outputs is not None or options.names:
        return options.outputs or len(options.names)
    first = [leaves(split)[0] for split in splits]
    if not first[0].is_floating_point():
        return count_classes(place, [tensor.clamp(min=-1) for tensor in first], options, -1)
    return first[0].shape[1] if first[0].ndim > 1 else 1


def _own(name: str, outputs: int) -> Task:
    place = f"task.name {name!r}"
    made = call_plugin(place, name, outputs)
    if isinstance(made, Task):
        return made
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        expected = "a Task, or (loss, metrics) and perhaps the leading metric's name"
        raise InputError(place, expected, type(made).__name__, "return one of those")
    from halfpass.tasks import metrics

    try:
        collection = metrics.collection(made[1])
        names = list(map(str, collection.keys()))
    except (TypeError, ValueError, AttributeError):
        names = []
    if not names:
        expected, remedy = "at least one metric of torchmetrics", "return a metric, a list or a dict of them"
        raise InputError(f"{place}, metrics", expected, repr(made[1])[:80], remedy)
    lead = made[2] if len(made) == 3 else names[0]
    if lead not in names:
        raise choice_error(f"{place}, leading metric", names, lead)
    higher = collection[lead].higher_is_better is not False
    return Task(name, outputs, made[0], collection.clone, lead, higher)
