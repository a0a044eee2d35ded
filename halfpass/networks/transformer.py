"""A small transformer that classifies text, byte by byte."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


class TextTransformer(nn.Module):
    """(B, T) bytes → (B, classes): an encoder of pre-norm blocks (Vaswani et al. 2017, arXiv 1706.03762; Xiong et al.
    2020, arXiv 2002.04745), and the mean over all places.

    Its input may be of any dtype, for `halfpass.split` tries shapes with floating point zeros. Cuts: `embedding`,
    blocks `blocks.0` … , each (T, width); `pool`.
    """

    def __init__(self, length: int, classes: int, width: int = 64, blocks: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding = Embedding(length, width)  # (B, T, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.pool = nn.Sequential(nn.LayerNorm(width), MeanOverPlaces())  # (B, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.embedding(x))))


class Embedding(nn.Module):
    """A vector for the byte and one for its place: (B, T) → (B, T, width)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.bytes(x.long()) + self.places


class Block(nn.Module):
    """Attention of every place to every place, then two layers at each place: (B, T, width) → the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        apart = self.into(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)  # (B, 3 heads, T, width / heads)
        query, key, value = apart.chunk(3, 1)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MeanOverPlaces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
