"""State dicts in files of other programs: where they are, prefixes of wrappers, and tensors that do not fit a model."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cifar_lightning.formatting import clipped, first_of

# Prepended to all names by torch.compile, data parallelism and other LightningModules.
_WRAPPERS = ("module.", "model.", "net.", "network.", "_orig_mod.")
# Where training scripts, timm and Lightning keep the state dict of a checkpoint.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
_AVERAGED = "n_averaged"  # counter of torch's AveragedModel, next to the names with its prefix


def find_weights(content: object, depth: int = 3) -> dict[str, Tensor]:
    """Return the tensors by name of a checkpoint: those under the first of `CONTAINERS` that has some, else its own."""
    if not isinstance(content, Mapping) or not depth:
        return {}
    inside = (find_weights(content.get(key), depth - 1) for key in CONTAINERS)
    own = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return next(filter(None, inside), own)


def named(keys: Iterable[object], most: int = 3) -> str:
    """Return the first of some keys and how many more there are; "nothing" of none."""
    return first_of([clipped(str(key)) for key in keys], most) or "nothing"


def without_wrappers(theirs: dict[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors without wrapper prefixes, which all names of the file have and not all of the model's."""
    if _AVERAGED not in ours:
        theirs = {name: tensor for name, tensor in theirs.items() if name != _AVERAGED}
    while theirs and theirs.keys() != ours.keys():
        prefix = next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in theirs)), None)
        if prefix is None or all(name.startswith(prefix) for name in ours):
            break
        theirs = {name.removeprefix(prefix): tensor for name, tensor in theirs.items()}
    return theirs


def describe_misfits(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], num_named: int = 1) -> str:
    """Return the tensors of a file that do not fit a model, with both kinds and shapes; empty if all fit."""
    if ours and theirs.keys().isdisjoint(ours):
        return f"it has {named(theirs)}; expected {named(ours)}"
    wrong = [name for name in {**ours, **theirs} if _shape(theirs, name) != _shape(ours, name)]
    shapes = [f"{name} is {_shape(theirs, name)} in it and {_shape(ours, name)} here" for name in wrong]
    return first_of(shapes, num_named)


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    if name not in state:
        return "missing"
    tensor = state[name]
    shape = "x".join(map(str, tensor.shape)) or "a number"
    kinds = {"sparse": tensor.layout != torch.strided, "meta": tensor.is_meta, "quantized": tensor.is_quantized}
    kinds |= {"complex": tensor.is_complex(), "bool": tensor.dtype == torch.bool}
    kinds |= {"integer": tensor.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32)}  # counters are int64
    return " ".join([shape, *(f"({kind})" for kind, is_so in kinds.items() if is_so)])


def has_other_classes(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> bool:
    """Whether only the number of classes of one layer and the filter size of the first convolution differ."""
    if theirs.keys() != ours.keys():
        return False
    pairs = {name: (theirs[name].shape, ours[name].shape) for name in ours if theirs[name].shape != ours[name].shape}
    heads = {name.rpartition(".")[0] for name, (other, own) in pairs.items() if other[1:] == own[1:]}
    stems = [name for name, (other, own) in pairs.items() if other[:2] == own[:2] and own[1:2] == (3,)]
    return bool(pairs) and len(heads) <= 1 and all(name.rpartition(".")[0] in heads or name in stems for name in pairs)
