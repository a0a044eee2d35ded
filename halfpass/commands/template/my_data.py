"""Your data: halfpass calls `data()` and takes what it returns, a training set and a test set of PyTorch."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset


class Samples(Dataset):
    """Handwritten digits of 8×8 pixels, which come with scikit-learn: every fifth is for the test."""

    classes = [str(digit) for digit in range(10)]  # names for the reports; may be left out

    def __init__(self, test):
        # ---- YOUR OWN DATA: read it here. Then make `__getitem__` return (input, target), and `classes` name yours.
        pictures, labels = load_digits(return_X_y=True)
        chosen = [i for i in range(len(labels)) if (i % 5 == 0) == test]
        self.pictures = torch.tensor(pictures[chosen]).float().view(-1, 1, 8, 8) / 16  # (N, 1, 8, 8), from 0 to 1
        self.labels = torch.tensor(labels[chosen])  # (N,)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.pictures[i], self.labels[i]


def data():  # or data(path): then it gets `data.path` of run.yaml, the folder of your files
    return Samples(test=False), Samples(test=True)
