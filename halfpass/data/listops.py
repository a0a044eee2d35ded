"""ListOps: nested operations on digits, as text; the label is the value. Generated, not collected.

After Nangia & Bowman 2018 (arXiv 1804.06028), with shorter texts: at most three levels, two to four operands, 32 bytes.
`[+29[<47]]` is (2 + 9 + min(4, 7)) mod 10 = 5.
"""

import random
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfpass.data.samples import Dataset, Samples
from halfpass.data.source import Source

LENGTH, CLASSES = 32, 10
TRAIN_SAMPLES, TEST_SAMPLES = 20_000, 2_000
LEVELS, OPERANDS, NESTED = 3, (2, 4), 0.3  # share of the operands that are operations
OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    ">": max, "<": min, "~": statistics.median_low, "+": lambda values: sum(values) % 10,
}  # fmt: skip


def read_listops(source: Source) -> Dataset:
    train, test = generate_listops()
    return Dataset(source.name, Samples(*train), Samples(*test), CLASSES, mean=(), std=())


def generate_listops() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test set, each ((N, 32) bytes as float32, filled up with spaces; (N,) int64). No text is in both,
    and none twice; always the same."""
    draws = random.Random(0)
    values: dict[str, int] = {}
    while len(values) < TRAIN_SAMPLES + TEST_SAMPLES:
        text, value = _operation(draws, LEVELS)
        if len(text) <= LENGTH:
            values[text] = value
    inputs = torch.tensor([list(text.ljust(LENGTH).encode()) for text in values], dtype=torch.float32)
    labels = torch.tensor(list(values.values()))
    return (inputs[:TRAIN_SAMPLES], labels[:TRAIN_SAMPLES]), (inputs[TRAIN_SAMPLES:], labels[TRAIN_SAMPLES:])


def _operation(draws: random.Random, levels: int) -> tuple[str, int]:
    """A text and its value."""
    sign = draws.choice(list(OPERATIONS))
    operands = [_operand(draws, levels - 1) for _ in range(draws.randint(*OPERANDS))]
    return f"[{sign}{''.join(text for text, _ in operands)}]", OPERATIONS[sign]([value for _, value in operands])


def _operand(draws: random.Random, levels: int) -> tuple[str, int]:
    if levels > 0 and draws.random() < NESTED:
        return _operation(draws, levels)
    digit = draws.randrange(10)
    return str(digit), digit
