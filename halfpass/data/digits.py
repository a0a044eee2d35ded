"""Scikit-learn's 1,797 handwritten digits of 8×8 pixels in 0..16: always the same fifth of every class is test."""

import numpy as np
import torch

from halfpass.data.samples import Dataset, Samples, with_statistics
from halfpass.data.source import Source


def read_digits(source: Source) -> Dataset:
    from sklearn.datasets import load_digits  # here, because the import takes a second that other data need not pay
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    inputs = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)  # (N, 1, 8, 8)
    everything = Samples(inputs, torch.from_numpy(labels).to(torch.int64))
    split = [everything.take(torch.from_numpy(part)) for part in (train, test)]
    return with_statistics(source.name, split[0], split[1], classes=10)
