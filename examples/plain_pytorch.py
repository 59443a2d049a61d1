"""ImageDataModule in a plain PyTorch loop: python examples/plain_pytorch.py [--dataset cifar10 --epochs 10]."""

import argparse

import torch
from torch import nn

from cifar_lightning import ImageDataModule


def main() -> None:
    """Train a small model and print its test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic", choices=["synthetic", "cifar10", "cifar100", "folder"])
    parser.add_argument("--root", default="data", help="folder of the images; downloads go there")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = ImageDataModule(args.dataset, args.root, batch_size=64, device=device)
    data.prepare_data()
    data.setup()
    filters = [(3, 16, 5, 2), (16, 32, 3, 1), (32, 64, 3, 2)]  # channels in and out, size, stride
    stages = [nn.Sequential(nn.Conv2d(*sizes), nn.BatchNorm2d(sizes[1]), nn.ReLU()) for sizes in filters]
    model = nn.Sequential(*stages, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, data.num_classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train_loader = data.train_dataloader()  # each pass over it is the next epoch
    for _ in range(args.epochs):
        for images, labels in train_loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.test_dataloader())
    print("test accuracy", correct / data.num_images("test"))


if __name__ == "__main__":
    main()
