"""A small U-Net for segmentation, whose skips cross the cut. Tests: tests/test_recipes.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128)  # channels of the stages, from the picture's size down to an eighth


class UNet(nn.Module):
    """Down to an eighth of the picture's size and up again, each stage up with what its like below had, Ronneberger et
    al. 2015 (arXiv 1505.04597), figure 1: (B, C, H, W) → (B, classes, H, W). With BatchNorm and padded convolutions.

    Cuts: `down_1`, `down_2`, `down_3`, `bottom`, `up_3`, `up_2`, `up_1`. Behind `down_2`, its output and that of
    `down_1` cross: the skip of the one is the value at the cut itself.
    """

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        one, two, three, four = WIDTHS
        self.down_1 = _double(in_channels, one)  # (B, 16, H, W)
        self.down_2 = _double(one, two)  # (B, 32, H/2, W/2)
        self.down_3 = _double(two, three)  # (B, 64, H/4, W/4)
        self.bottom = _double(three, four)  # (B, 128, H/8, W/8)
        self.up_3 = _double(four + three, three)
        self.up_2 = _double(three + two, two)
        self.up_1 = _double(two + one, one)
        self.classifier = nn.Conv2d(one, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down_1(x)
        two = self.down_2(F.max_pool2d(one, 2, ceil_mode=True))
        three = self.down_3(F.max_pool2d(two, 2, ceil_mode=True))
        out = self.bottom(F.max_pool2d(three, 2, ceil_mode=True))
        out = self.up_3(_beside(out, three))
        out = self.up_2(_beside(out, two))
        out = self.up_1(_beside(out, one))
        return self.classifier(out)


def _beside(x: Tensor, skip: Tensor) -> Tensor:
    """`x` as large as the skip, and the skip's channels behind its own."""
    return torch.cat([F.interpolate(x, skip.shape[2:], mode="nearest"), skip], 1)


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    """3×3 convolution, BatchNorm, ReLU, twice."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)
