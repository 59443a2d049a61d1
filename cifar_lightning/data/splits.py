"""Which images are for what: a validation split or a subset with every class's share, class weights, imbalance."""

import torch
from jaxtyping import Int64
from torch import Tensor

from cifar_lightning.errors import UserError
from cifar_lightning.transforms.augmentation import seeded_generator

_SPLIT, _SUBSET = 1_000_003, 1_000_033  # purposes of the generators; an epoch's purposes are far below
_UNEVEN = 1.5  # times as many images in the largest class as in the smallest, from which it is worth a word


def stratified_split(
    targets: Int64[Tensor, " images"],
    val_fraction: float,
    *,
    seed: int,
    class_names: tuple[str, ...],
    limit: int | None = None,
) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " val"]]:
    """Hold out exactly `round(val_fraction * n)` images, shared among the classes by largest remainder.

    Args:
        targets: Of all images.
        val_fraction: 0 holds out none.
        seed: Which images of a class are held out.
        class_names: For the error.
        limit: Split a `stratified_subset` of so many images; None is all.

    Returns:
        Sorted indices of training and validation.

    Raises:
        UserError: A class would get no validation or no training image; names a value that works.
    """
    counts = torch.bincount(targets, minlength=len(class_names))
    held_out = _shares(counts, val_fraction)
    scarce = _scarcest(counts, _lacking(counts, val_fraction)) if val_fraction else None
    if scarce is not None:
        num = int(counts[scarce])
        near = _working_fraction(counts, val_fraction)
        way_out = "add images, or 0 trains on all" if near is None else f"{near} works, and 0 trains on all"
        raise UserError(
            f"--data.val_fraction {val_fraction}: of the {num} training image{'' if num == 1 else 's'} of class "
            f"{class_names[scarce]}, {int(held_out[scarce])} would be for validation.\n"
            f"Every class needs one for training and one for validation: {way_out}."
        )
    chosen = stratified_subset(targets, limit, val_fraction, seed=seed, class_names=class_names)
    if val_fraction == 0:
        return chosen, chosen[:0]
    targets = targets[chosen]
    held_out = _shares(torch.bincount(targets, minlength=len(class_names)), val_fraction)
    is_val = _picked(targets, held_out, seeded_generator(seed, 0, _SPLIT))
    return chosen[~is_val], chosen[is_val]


def stratified_subset(
    targets: Int64[Tensor, " images"],
    limit: int | None,
    val_fraction: float = 0.0,
    *,
    seed: int,
    class_names: tuple[str, ...],
) -> Int64[Tensor, " subset"]:
    """Return the sorted indices of exactly `limit` images, shared among the classes by largest remainder.

    Args:
        targets: Of all images.
        limit: None, as many as there are, or more, are all.
        val_fraction: What will be held out of them.
        seed: Which images of a class are taken.
        class_names: For the error.

    Raises:
        UserError: A class would get no image, or too few to hold some out; names a limit that works, where all
            images are enough.
    """
    if limit is None or limit >= len(targets):
        return torch.arange(len(targets))
    counts = torch.bincount(targets, minlength=len(class_names))
    taken = _shares(counts, limit / len(targets))
    if (scarce := _scarcest(taken, _lacking(taken, val_fraction))) is not None:
        needs = f"one for training and one for --data.val_fraction {val_fraction}" if val_fraction else "one picture"
        near = _working_fraction(taken, val_fraction) if val_fraction else None
        other = "" if near is None else f", or --data.val_fraction {near}"
        raise UserError(
            f"--data.limit {limit}: too few. Class {class_names[scarce]}, {int(counts[scarce]):,} of {len(targets):,} "
            f"images, would get {int(taken[scarce])}.\n"
            f"Every class needs {needs}: {_working_limit(counts, limit, val_fraction)} is enough{other}."
        )
    return _picked(targets, taken, seeded_generator(seed, 0, _SUBSET)).nonzero().flatten()


def balanced_weights(counts: Int64[Tensor, " classes"]) -> list[float]:
    """Return each class's weight in the loss: n / (classes * count), so that every class counts the same in all.

    Args:
        counts: Training images of each class, 1 or more.
    """
    weights: list[float] = (counts.sum() / (len(counts) * counts.double())).tolist()
    return weights


def balanced_order(targets: Int64[Tensor, " images"], generator: torch.Generator) -> Int64[Tensor, " images"]:
    """Return an epoch's order in which every class has the same number of places, to within one.

    A class with fewer images than places has each of them equally often, to within one; of one with more, some are
    left out, others each time.

    Args:
        targets: Of the images that the order's numbers point at.
        generator: Which images, and their order.
    """
    classes = torch.unique(targets)
    first, more = divmod(len(targets), len(classes))
    lucky = torch.randperm(len(classes), generator=generator)[:more]
    places = torch.full((len(classes),), first)
    places[lucky] += 1
    chosen = []
    for label, num in zip(classes, places.tolist(), strict=True):
        own = (targets == label).nonzero().flatten()
        rounds = [own[torch.randperm(len(own), generator=generator)] for _ in range(-(-num // len(own)))]
        chosen.append(torch.cat(rounds)[:num] if rounds else own[:0])
    together = torch.cat(chosen)
    return together[torch.randperm(len(together), generator=generator)]


def describe_imbalance(counts: Int64[Tensor, " classes"], class_names: tuple[str, ...]) -> str | None:
    """Return in words how uneven the classes are; None where they are nearly even."""
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] < _UNEVEN * counts[least]:
        return None
    return (
        f"Uneven classes: {class_names[most]} has {int(counts[most]):,} training images, {class_names[least]} "
        f"{int(counts[least]):,}"
    )


def _shares(counts: Tensor, share: float) -> Tensor:
    """Divide a share of all images, rounded once, among the classes by largest remainder."""
    quota = counts.double() * share
    shares = quota.floor().long()
    missing = round(share * int(counts.sum())) - int(shares.sum())
    # Stable: equal remainders go to the first classes, on every machine.
    shares[(quota - shares).argsort(descending=True, stable=True)[:missing]] += 1
    return shares


def _lacking(counts: Tensor, val_fraction: float) -> Tensor:
    """Mark the classes without an image for training, or for validation where there is one."""
    if val_fraction == 0:
        return counts < 1
    held_out = _shares(counts, val_fraction)
    return (held_out < 1) | (held_out >= counts)


def _scarcest(counts: Tensor, is_lacking: Tensor) -> int | None:
    """Return the smallest of the marked classes; None where there is none."""
    return int(counts.where(is_lacking, counts.max() + 1).argmin()) if is_lacking.any() else None


def _working_fraction(counts: Tensor, val_fraction: float) -> float | None:
    """Return the share nearest to `val_fraction`, in as few digits as can be, that gives every class of both."""
    if counts.min() < 2:
        return None
    for steps in (100, 10_000):
        for fraction in sorted((k / steps for k in range(1, steps)), key=lambda share: abs(share - val_fraction)):
            if not _lacking(counts, fraction).any():
                return fraction
    return None


def _working_limit(counts: Tensor, too_few: int, val_fraction: float) -> int:
    """Return a limit that gives every class enough; all images must. Nearly always the smallest one."""
    total = int(counts.sum())
    low, high = too_few, total  # `high` always works
    while high - low > 1:
        middle = (low + high) // 2
        if _lacking(_shares(counts, middle / total), val_fraction).any():
            low = middle
        else:
            high = middle
    return high


def _picked(targets: Tensor, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Mark that many images of each class, drawn at random."""
    shuffled = torch.randperm(len(targets), generator=generator)
    is_picked = torch.zeros(len(targets), dtype=torch.bool)
    for label, num in enumerate(numbers.tolist()):
        of_class = shuffled[targets[shuffled] == label]
        is_picked[of_class[:num]] = True
    return is_picked
