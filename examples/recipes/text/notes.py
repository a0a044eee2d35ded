"""Generated notes of a few words, of different length: `data()` for text.yaml.

A note says of two things whether they are well, such as `today the leg seems swollen , while the arm seems fine`; the
class is what it says of the leg: 0 well, 1 ill. So which words there are is not enough: half of the notes say both.
Words are numbered, behind them the notes are padded, and the mask says where.
"""

import random

import torch
from torch.utils.data import Dataset

TRAIN, TEST, LENGTH = 2048, 512, 20  # notes, words
THINGS, ILL, WELL = ("leg", "arm"), ("swollen", "broken", "sore"), ("fine", "healed", "strong")
FILLERS = ("today", "again", "so far", "as before", "after lunch")
VERBS = ("is", "seems", "looks")
WORDS = ("[pad]", "[cls]", *THINGS, *ILL, *WELL, *VERBS, *" ".join(FILLERS).split(), "the", ",", "while")
NUMBERS = {word: number for number, word in enumerate(WORDS)}


class Notes(Dataset):
    classes = ("well", "ill")

    def __init__(self, first: int, count: int) -> None:
        self.items = [_note(first + i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        return self.items[index]


def data():
    return Notes(0, TRAIN), Notes(TRAIN, TEST)


def _note(number: int) -> tuple[dict[str, torch.Tensor], int]:
    draws = random.Random(number)
    things = draws.sample(THINGS, 2)
    words, label = ["[cls]"], 0
    for place, thing in enumerate(things):
        ill = draws.random() < 0.5
        label = int(ill) if thing == "leg" else label
        words += [",", "while"] if place else []
        words += draws.choice(FILLERS).split() if draws.random() < 0.5 else []
        words += ["the", thing, draws.choice(VERBS), draws.choice(ILL if ill else WELL)]
    numbers = torch.zeros(LENGTH, dtype=torch.int64)
    numbers[: len(words)] = torch.tensor([NUMBERS[word] for word in words])
    return {"input_ids": numbers, "attention_mask": (torch.arange(LENGTH) < len(words)).long()}, label


def network(sample_shape, outputs):
    """BERT of four small layers with random weights, from transformers."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=LENGTH, num_labels=outputs,
    ))  # fmt: skip
