"""A sequential network as its owner would write it; nothing in here knows this package."""

from torch import nn


def make_net(n_classes=10, width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU6(),
        nn.Dropout(0.1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, n_classes),
        nn.LogSoftmax(dim=1),
    )


def few():
    return make_net(n_classes=3)
