"""What every step does with a loss, whichever side makes it: computes it, and holds back a step that is not finite."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from halfpass.errors import InputError, RunError, reason
from halfpass.tree import leaves, map_leaves, prediction

Loss = Callable[[Tensor, Any], Tensor]  # of outputs (B, ...) and targets: their mean, or a value per sample


def probabilities(outputs: Tensor) -> Tensor:
    """Of classes, (B, classes)."""
    return outputs.softmax(1)


def mean_loss(loss: Loss, output: Any, targets: Any) -> Tensor:
    """The loss of what a network returned, in float32, over the samples. Raises InputError where it cannot be computed,
    or is neither a mean nor a value per sample."""
    outputs = prediction(output)
    samples = len(leaves(targets)[0])
    try:
        value = loss(outputs.float(), targets)
    except (torch.OutOfMemoryError, InputError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        expected = f"one that takes outputs {_said(outputs)} and targets {_said(targets)}"
        remedy = "give targets as the loss wants them, such as int64 class numbers, or another loss"
        raise InputError("the loss", expected, reason(error), remedy) from error
    if not isinstance(value, Tensor) or value.shape not in ((), (samples,)):
        raise InputError("the loss", f"a mean, or {samples} values, one per sample", _said(value), "reduce it")
    return value.mean() if value.ndim else value


def _said(tree: Any) -> str:
    try:
        return str(map_leaves(lambda t: f"{tuple(t.shape)} of {str(t.dtype).removeprefix('torch.')}", tree))
    except (AttributeError, TypeError):
        return type(tree).__name__


def check_targets(inputs: Any, targets: Any) -> None:
    """Raises InputError where they are no tensors of as many samples as the inputs."""
    expected = "a tensor of targets, or a tuple or dict of them"
    try:
        found = leaves(targets)
    except TypeError:
        found = []
    if not found or not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in found):
        raise InputError("targets", expected, f"a {type(targets).__name__}", "make a tensor of them: torch.tensor(…)")
    samples = len(leaves(inputs)[0])
    for leaf in found:
        if len(leaf) != samples:
            raise InputError("targets", f"those of {samples} samples", f"{len(leaf)}", "give one per sample")


def check_optimizer(place: str, optimizer: torch.optim.Optimizer) -> None:
    """Raises InputError for one of Accelerate's that leaves steps out: gradients it has not used would be cleared."""
    steps = getattr(getattr(optimizer, "gradient_state", None), "num_steps", 1)
    if steps > 1:
        expected, remedy = "an optimizer that makes every step", "give parts of a batch instead, by before= and after="
        raise InputError(place, expected, f"Accelerate's, with gradient_accumulation_steps={steps}", remedy)


def check_step(
    side: str, epoch: int, step: int, loss: Tensor | None, tensors: Sequence[Tensor] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> float:  # fmt: skip
    """The loss as a number, NaN without one. Raises RunError where it, what crosses the cut or, of an optimizer, a
    gradient is not finite: to be asked before that makes its step, so that no weight is touched.

    The first value that crosses must be finite; others may be masks of infinities, and only not NaN. One number is made
    of each and all are read at once: a GPU is waited for once, as it was for the loss alone.
    """
    sizes = {} if loss is None else {"loss": loss.detach().float()}
    sizes |= {f"value {i} that crosses": _size(i, t) for i, t in enumerate(tensors) if t.is_floating_point()}
    if optimizer is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        sizes["gradients"] = getattr(norm, "full_tensor", lambda: norm)().float()  # of what is spread over processes
    numbers = torch.stack([size.to(next(iter(sizes.values())).device) for size in sizes.values()]).tolist()
    for what, number in zip(sizes, numbers, strict=True):
        if not math.isfinite(number):
            place = f"{side}, epoch {epoch + 1}, step {step + 1}"
            if what == "loss":
                raise RunError(place, "a finite loss", f"{number}", "lower train.lr")
            raise RunError(f"{place}, {what}", "finite numbers", "NaN or infinity", "lower train.lr")
    return math.nan if loss is None else float(numbers[0])


def _size(i: int, tensor: Tensor) -> Tensor:
    """A number that is not finite where the tensor is not, or goes beyond 10¹⁹; of later ones, where there is NaN."""
    if i == 0:
        dtype = torch.float32 if tensor.element_size() < 4 else None
        return torch.linalg.vector_norm(tensor.detach(), dtype=dtype).float()
    total = tensor.detach().sum(dtype=torch.float32)
    return torch.where(total.isnan(), total, 0.0)


def check_outputs(side: str, epoch: int, step: int, *outputs: Tensor | None) -> None:
    """Raises RunError where a test's outputs are not finite: a NaN would count as the first class."""
    for output in outputs:
        if output is not None and int((~output.isfinite()).sum()):
            place = f"{side}, test after epoch {epoch + 1}, step {step + 1}"
            raise RunError(place, "finite outputs", "NaN or infinity", "lower train.lr, or check the network")
