"""Generated pictures of blobs, and the class of each pixel: `data()` for segmentation.yaml.

Background 0, bright ellipses 1, dark ellipses 2; a border of 255 around each blob is not labelled, as where annotators
are not sure. Noise and a slope of light keep a threshold from being enough.
"""

import numpy as np
import torch
from torch.utils.data import TensorDataset

SIDE, TRAIN, TEST = 64, 384, 96  # pixels, pictures
UNLABELLED = 255


def data():
    pictures, masks = zip(*map(_blobs, range(TRAIN + TEST)), strict=True)
    x, y = torch.from_numpy(np.stack(pictures))[:, None], torch.from_numpy(np.stack(masks)).long()
    return TensorDataset(x[:TRAIN], y[:TRAIN]), TensorDataset(x[TRAIN:], y[TRAIN:])


def _blobs(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Gray (64, 64) uint8 and classes (64, 64) uint8 of one picture, the same for the same number."""
    draws = np.random.default_rng(number)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    angle = draws.uniform(0, 2 * np.pi)
    levels = 120 + 25 * (np.cos(angle) * rows + np.sin(angle) * columns) / SIDE
    classes = np.zeros((SIDE, SIDE), np.uint8)
    for _ in range(draws.integers(2, 6)):
        kind = draws.integers(1, 3)
        (row, column), (a, b), turn = draws.uniform(8, SIDE - 8, 2), draws.uniform(5, 13, 2), draws.uniform(0, np.pi)
        across = (rows - row) * np.cos(turn) + (columns - column) * np.sin(turn)
        along = (columns - column) * np.cos(turn) - (rows - row) * np.sin(turn)
        distance = np.hypot(across / a, along / b)  # 1 on the ellipse
        levels = np.where(distance < 1, 175 if kind == 1 else 75, levels)
        classes[distance < 1.12] = UNLABELLED
        classes[distance < 1] = kind
    noisy = levels + draws.normal(0, 30, levels.shape)
    return noisy.clip(0, 255).astype(np.uint8), classes
