"""ResNet-50 for pictures of 224×224, by torchvision's names, so that its weights can be loaded.

    halfpass train --model.name resnet50 --model.weights FILE …     # torchvision's file, or one of these names

Tests: tests/test_recipes.py.
"""

from torch import Tensor, nn

EXPANSION = 4  # of a bottleneck's width, in its output
BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut: (B, in, H, W) → (B, 4·width, H/stride, W/stride), rounded up.

    He et al. 2015 (arXiv 1512.03385), figure 5. As in torchvision, the stride is in the 3×3 convolution and not in the
    first one. No ReLU works in place: the block's output may be a cut, and is then used twice.
    """

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        same = stride == 1 and in_channels == out_channels
        self.downsample = None if same else nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))  # (B, width, H, W)
        out = self.relu(self.bn2(self.conv2(out)))  # (B, width, H/stride, W/stride)
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """The ResNet of 50 layers, He et al. 2015, table 1: (B, C, H, W) → (B, outputs).

    Cuts: `maxpool`, blocks `layer1.0` … `layer4.2` with 256, 512, 1024 and 2048 channels, `avgpool`.
    """

    def __init__(self, in_channels: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)  # (B, 64, H/4, W/4)
        self.layer1 = _stage(64, 64, BLOCKS[0], 1)  # (B, 256, H/4, W/4)
        self.layer2 = _stage(256, 128, BLOCKS[1], 2)  # (B, 512, H/8, W/8)
        self.layer3 = _stage(512, 256, BLOCKS[2], 2)  # (B, 1024, H/16, W/16)
        self.layer4 = _stage(1024, 512, BLOCKS[3], 2)  # (B, 2048, H/32, W/32)
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (B, 2048)
        self.fc = nn.Linear(2048, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # arXiv 1502.01852, section 2.2, backward case
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x))


def _stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(EXPANSION * width, width) for _ in range(blocks - 1)))
