"""VGG16 with batch norm: Simonyan and Zisserman (arXiv 1409.1556), configuration D.

Parameter names follow torchvision's `vgg16_bn` (`features.0`, `features.1`, ...,
`classifier.0`).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from resq_deploy.nets.blocks import Boundary, channels

CONFIGURATION_D = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M") + (
    512, 512, 512, "M",
)  # fmt: skip


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions with batch norm, five max poolings, classifier.

    Input (N, in_channels, image_size, image_size) pixels in [0, 1]; output (N, n_classes)
    logits. For 32x32 images the features are (N, 512, 1, 1) and the classifier is one linear
    layer (the CIFAR form in common use); for 224x224 it is the paper's: 7x7 features, two
    hidden layers of 4096 with dropout.
    """

    def __init__(
        self, *, n_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        self.input = Boundary("unit")
        layers: list[nn.Module] = []
        c_in = in_channels
        for entry in CONFIGURATION_D:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            c_out = channels(entry, width)
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
            c_in = c_out
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        if image_size == 32:
            self.classifier = nn.Sequential(nn.Linear(c_in, n_classes))
        else:
            hidden = channels(4096, width)
            self.classifier = nn.Sequential(
                nn.Linear(c_in * 49, hidden), nn.ReLU(), nn.Dropout(),
                nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
                nn.Linear(hidden, n_classes),
            )  # fmt: skip
        self.output = Boundary("signed", plain=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.classifier(self.flatten(self.features(self.input(x))))
        return cast(Tensor, self.output(x))
