"""Finished training images a second with TrivialAugmentWide: whole batches against torchvision image by image.

    python -m benchmarks.speed.policies                    2,000 random 32x32 images, 3 rounds
    python -m benchmarks.speed.policies --policy rand      RandAugment on both sides
    python -m benchmarks.speed.policies --size 224 --num 200

Both transform the same uint8 images to normalized floats in this process, with the same number of threads, in batches
of 500: ours draws the tables of an epoch and augments whole batches; torchvision.transforms.v2 transforms each image as
a CHW tensor, with its default nearest-neighbour interpolation, and stacks a batch. Who runs first alternates; the two
are compared within a round, after a warm-up round. The cores must be free. The last line is ours over torchvision.
"""

import argparse
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed.results import print_rates, spread, write_results
from benchmarks.speed.transforms import Epoch, compare
from cifar_lightning.transforms.augmentation import Augmentation
from cifar_lightning.transforms.pipeline import Pipeline, augment, rows_of
from cifar_lightning.transforms.policies import Policy

BATCH_SIZE = 500
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's


def our_epochs(images: Tensor, policy: Policy) -> Epoch:
    """Return a function that runs an epoch of whole batches."""
    pipeline = Pipeline(Augmentation(crop_padding_px=0, flip="none", policy=policy))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    shape = {"num_images": len(images), "image_size": images.shape[1]}

    def epoch(number: int) -> Iterable[Tensor]:
        _, draws = pipeline.draw(seed=0, epoch=number, device=images.device, **shape)
        for indices in torch.arange(len(images)).split(BATCH_SIZE):
            yield augment(images[indices], rows_of(draws, indices), mean=mean, std=std)

    return epoch


def torchvision_epochs(images: Tensor, policy: Policy) -> Epoch:
    """Return a function that runs an epoch image by image."""
    change = v2.TrivialAugmentWide() if policy == "trivial" else v2.RandAugment()
    transform = v2.Compose([change, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    planes = images.permute(0, 3, 1, 2).contiguous()

    def epoch(_: int) -> Iterable[Tensor]:
        for indices in torch.arange(len(planes)).split(BATCH_SIZE):
            yield torch.stack([transform(planes[k]) for k in indices.tolist()])

    return epoch


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=["trivial", "rand"], default="trivial", help="default trivial")
    parser.add_argument("--num", type=int, default=2_000, help="random images (default 2,000)")
    parser.add_argument("--size", type=int, default=32, help="image size in pixels (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each (default 2)")
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.num, args.size, args.size, 3), dtype=torch.uint8)
    ways = {"ours": our_epochs(images, args.policy), "torchvision": torchvision_epochs(images, args.policy)}
    rates = compare(ways, args.rounds)
    device = f"{hardware_name()}, {args.threads} threads"
    print(f"{args.num:,} random images, {args.size}x{args.size}, policy {args.policy}, images/s:")
    print_rates(rates)
    ratios = [ours / peer for ours, peer in zip(rates["ours"], rates["torchvision"], strict=True)]
    asked = {"policy": args.policy, "num": args.num, "size": args.size}
    write_results(args.json, num_threads=args.threads, **asked, images_per_s=rates, ratios=ratios)
    print(f"ours over torchvision, {len(ratios)} rounds of an epoch, {device}: {spread(ratios)}")
    print(f"ratio={statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
