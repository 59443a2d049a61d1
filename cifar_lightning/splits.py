"""Which pictures are for what: a validation split or a subset with every class's share, class weights, imbalance."""

import torch
from jaxtyping import Int64
from torch import Tensor

from cifar_lightning.augment import seeded_generator
from cifar_lightning.errors import UserError

_SPLIT, _SUBSET = 1_000_003, 1_000_033  # purposes of the generators; an epoch's purposes are far below
_UNEVEN = 1.5  # times as many pictures in the largest class as in the smallest, from which it is worth a word


def stratified_split(
    targets: Int64[Tensor, " pictures"], val_fraction: float, *, seed: int, class_names: tuple[str, ...]
) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " val"]]:
    """Hold out exactly `round(val_fraction * n)` pictures, shared among the classes by largest remainder.

    Args:
        targets: Of all pictures.
        val_fraction: 0 holds out none.
        seed: Which pictures of a class are held out.
        class_names: For the error.

    Returns:
        Sorted indices of training and validation.

    Raises:
        UserError: A class would get no validation or no training picture.
    """
    if val_fraction == 0:
        return torch.arange(len(targets)), torch.empty(0, dtype=torch.int64)
    counts = torch.bincount(targets, minlength=len(class_names))
    held_out = _shares(counts, val_fraction)
    for name, count, val in zip(class_names, counts.tolist(), held_out.tolist(), strict=True):
        if val < 1 or val >= count:
            raise UserError(
                f"--data.val_fraction {val_fraction}: class {name} has {count} training pictures, of which {val} would "
                "be for validation.\nEvery class needs one of each: change it, add pictures, or 0 to train on all."
            )
    is_val = _picked(targets, held_out, seeded_generator(seed, 0, _SPLIT))
    return (~is_val).nonzero().flatten(), is_val.nonzero().flatten()


def stratified_subset(
    targets: Int64[Tensor, " pictures"], limit: int, *, seed: int, class_names: tuple[str, ...]
) -> Int64[Tensor, " subset"]:
    """Return the sorted indices of exactly `limit` pictures, shared among the classes by largest remainder.

    Args:
        targets: Of all pictures.
        limit: As many as there are, or more, are all.
        seed: Which pictures of a class are taken.
        class_names: For the error.

    Raises:
        UserError: A class would get no picture.
    """
    if limit >= len(targets):
        return torch.arange(len(targets))
    counts = torch.bincount(targets, minlength=len(class_names))
    taken = _shares(counts, limit / len(targets))
    for name, count, num in zip(class_names, counts.tolist(), taken.tolist(), strict=True):
        if num < 1:
            raise UserError(
                f"--data.limit {limit}: class {name} with {count} of {len(targets):,} pictures would get none; "
                "every class needs one: give more."
            )
    return _picked(targets, taken, seeded_generator(seed, 0, _SUBSET)).nonzero().flatten()


def balanced_weights(counts: Int64[Tensor, " classes"]) -> list[float]:
    """Return each class's weight in the loss: n / (classes * count), so that every class counts the same in all.

    Args:
        counts: Training pictures of each class, 1 or more.
    """
    weights: list[float] = (counts.sum() / (len(counts) * counts.double())).tolist()
    return weights


def balanced_order(targets: Int64[Tensor, " pictures"], generator: torch.Generator) -> Int64[Tensor, " pictures"]:
    """Return an epoch's order in which every class has the same number of places, to within one.

    A class with fewer pictures than places has each of them equally often, to within one; of one with more, some are
    left out, others each time.

    Args:
        targets: Of the pictures that the order's numbers point at.
        generator: Which pictures, and their order.
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
        f"Uneven classes: {class_names[most]} has {int(counts[most]):,} training pictures, {class_names[least]} "
        f"{int(counts[least]):,}"
    )


def _shares(counts: Tensor, share: float) -> Tensor:
    """Divide a share of all pictures, rounded once, among the classes by largest remainder."""
    quota = counts.double() * share
    shares = quota.floor().long()
    missing = round(share * int(counts.sum())) - int(shares.sum())
    # Stable: equal remainders go to the first classes, on every machine.
    shares[(quota - shares).argsort(descending=True, stable=True)[:missing]] += 1
    return shares


def _picked(targets: Tensor, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Mark that many pictures of each class, drawn at random."""
    shuffled = torch.randperm(len(targets), generator=generator)
    is_picked = torch.zeros(len(targets), dtype=torch.bool)
    for label, num in enumerate(numbers.tolist()):
        of_class = shuffled[targets[shuffled] == label]
        is_picked[of_class[:num]] = True
    return is_picked
