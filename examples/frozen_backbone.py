"""A torchvision backbone that is not trained, under a head that is: python examples/frozen_backbone.py [WEIGHTS].

WEIGHTS is a name such as DEFAULT, which downloads ImageNet's; without it the weights are random.
"""

import sys

import torchvision
from torch import nn

from cifar_lightning import ImageClassifier, ImageDataModule, fit

if __name__ == "__main__":
    data = ImageDataModule("synthetic", batch_size=64, limit=2000)
    model = torchvision.models.resnet18(weights=sys.argv[1] if sys.argv[1:] else None)
    model.fc = nn.Linear(model.fc.in_features, data.num_classes)
    classifier = ImageClassifier(model=model, num_classes=data.num_classes, freeze="backbone", lr=0.05)
    run = fit(classifier, data, epochs=3)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    print("trained", *trained)
    print("test accuracy", run.metrics["accuracy"])
