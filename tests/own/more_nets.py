"""What else people write: dense, pre-activated, squeeze-and-excitation, MobileNetV3, GELU."""

import torch
import torch.nn.functional as F
from torch import nn


class DenseLayer(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding="same", bias=False)

    def forward(self, x):
        return torch.cat((x, self.conv(F.relu(self.bn(x)))), 1)


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.dense = nn.Sequential(DenseLayer(8, 4), DenseLayer(12, 4))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.avg_pool2d(self.dense(self.stem(x)), 2)
        x = F.adaptive_avg_pool2d(F.relu(x, inplace=True), (1, 1)).squeeze(-1).squeeze(-1)
        return self.fc(x)


class PreActivated(nn.Module):
    """Its shortcut starts behind the batch norm of nothing; no linear layer at the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out += x
        return self.head(out).mean((-2, -1))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3)
        self.gate = nn.Sequential(
            nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid()
        )
        self.scale = nn.Parameter(torch.full((1, 1, 1), 0.7))
        self.fc = nn.Linear(channels * 4, 4)

    def forward(self, x):
        x = self.stem(self.scale * (x * 2 - 1))
        n, c, _, _ = x.size()
        y = self.gate(x.mean((2, 3))).view(n, c, 1, 1)
        x = F.relu6(x * y.expand_as(x))
        x = F.adaptive_avg_pool2d(x, 2).view(-1, c * 4)
        return F.softmax(self.fc(x), dim=-1)


class TwoReaders(nn.Module):
    """A convolution that is read with and without its ReLU, and ReLUs of clashing names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.relu, self.relu_1 = nn.ReLU(), nn.ReLU6()
        self.fc = nn.Linear(4 * 16 * 16, 3)

    def forward(self, x):
        y = self.conv(x)
        y = torch.relu(self.relu(y) + y)
        return self.fc(self.relu_1(self.relu(20 * y)).reshape(x.shape[0], -1))


class HardBlock(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection: MobileNetV3's."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(inplace=True),
        )
        self.fc1, self.fc2 = nn.Conv2d(hidden, 8, 1), nn.Conv2d(8, hidden, 1)
        self.project = nn.Sequential(
            nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        scale = F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(y, 1)))))
        return self.project(scale * y) + x


class MobileNetV3(nn.Module):
    """Two of its blocks; the head without Hardswish on vectors, which is refused."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.blocks = nn.Sequential(HardBlock(8, 16), HardBlock(8, 24))
        self.head = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.hardswish(self.head(self.blocks(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Perceptron(nn.Module):
    """What stays in float between the layers: GELU and LayerNorm; PReLU with one slope."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.prelu = nn.PReLU()
        self.fc1, self.fc2 = nn.Linear(256, 32), nn.Linear(32, 32)
        self.norm, self.fc3 = nn.LayerNorm(32), nn.Linear(32, 5, bias=False)

    def forward(self, x):
        x = F.gelu(self.fc1(self.prelu(self.conv(x)).flatten(1)))
        return self.fc3(F.gelu(self.norm(self.fc2(x))))
