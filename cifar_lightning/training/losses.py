"""Losses of one's own, by import path or as objects, and their trial on a few images before training."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cifar_lightning.checkpoints.rng_state import rng_state_kept
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, reason_of, suggest
from cifar_lightning.settings.import_path import import_object, is_import_path

DEFAULT_LOSS = "cross_entropy"
Loss = Callable[..., Tensor]
"""Function of raw logits (batch, classes) and labels (batch,), int64; or an nn.Module."""


def make_loss(loss: Any, kwargs: Mapping[str, Any] | None) -> Loss | None:
    """Return a loss from its import path, class, function or module; None of the default.

    Args:
        loss: `DEFAULT_LOSS`, an import path, or what an import path leads to: a class of modules, or a function.
        kwargs: Arguments of the class, or further arguments of the function.

    Raises:
        UserError: It cannot be imported or made, or is no loss.
    """
    kwargs, typed = dict(kwargs or {}), f"--model.loss {clipped(name_of(loss))}"
    if loss is None:
        raise UserError("this checkpoint is of a loss of one's own: give loss=... again.")
    if isinstance(loss, str):
        if loss == DEFAULT_LOSS and kwargs:
            raise UserError(f"--model.loss_kwargs {kwargs}: {DEFAULT_LOSS} takes none; see --model.label_smoothing.")
        if loss == DEFAULT_LOSS:
            return None
        if not is_import_path(loss):
            known = {name: f"torch.nn.{name}" for name in dir(nn) if name.endswith("Loss")}
            hint = suggest(loss, {DEFAULT_LOSS: DEFAULT_LOSS, **known})
            raise UserError(f"{typed}: {DEFAULT_LOSS}, or package.module:name.{hint}")
        loss = import_object(loss, "--model.loss")
    with_kwargs = f"{typed}{f' with --model.loss_kwargs {kwargs}' if kwargs else ''}"
    if isinstance(loss, type):
        try:
            loss = loss(**kwargs)
        except Exception as error:  # code of one's own raises anything
            raise UserError(f"{with_kwargs}: cannot be made ({type(error).__name__}: {reason_of(error)}).") from error
    elif kwargs and isinstance(loss, nn.Module):
        raise UserError(f"{with_kwargs}: an object, which has its arguments already.")
    elif kwargs:
        loss = functools.partial(loss, **kwargs)
    if not callable(loss):
        raise UserError(f"{typed}: a {type(loss).__name__}; give an nn.Module or a function of (logits, labels).")
    made: Loss = loss
    return made


def name_of(loss: Any) -> str:
    """Return the import path of a class or function that has one, else <NAME>, as config.yaml has it."""
    if isinstance(loss, str | None):
        return str(loss)
    path = f"{getattr(loss, '__module__', '')}:{getattr(loss, '__qualname__', '')}"
    is_bound = inspect.ismethod(loss) and not isinstance(loss.__self__, type)
    of_object = isinstance(loss, nn.Module) or is_bound  # which its path alone does not make
    is_importable = is_import_path(path) and not path.startswith("__main__:") and not of_object
    return path if is_importable else f"<{getattr(loss, '__name__', type(loss).__name__)}>"


def takes_log_probs(loss: Loss | None) -> bool:
    """Return whether a loss is PyTorch's `NLLLoss` or `nll_loss`; of raw logits it has no lower bound."""
    function = loss.func if isinstance(loss, functools.partial) else loss
    return function is nn.functional.nll_loss or getattr(type(function), "forward", None) is nn.NLLLoss.forward


def logits_dtype(loss: Loss, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits to evaluate a loss of one's own with, in a module of `dtype`.

    It is at least float32, but `dtype` where the loss has weights or buffers, which `nn.CrossEntropyLoss` wants of the
    same dtype.
    """
    tensors = [*loss.parameters(), *loss.buffers()] if isinstance(loss, nn.Module) else []
    has_own = any(tensor.is_floating_point() for tensor in tensors)
    return dtype if has_own else torch.promote_types(dtype, torch.float32)


def check_loss(
    loss: Loss,
    name: str,
    num_classes: int,
    device: torch.device,
    *,
    takes_probs: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Try a loss on logits and labels of a few images, without changing it or the random state.

    Args:
        loss: Of one's own.
        name: For messages.
        num_classes: Number of logits.
        device: Where the loss is.
        takes_probs: Also try it on probabilities in place of labels, as MixUp makes them.
        dtype: Of the logits in training.

    Raises:
        UserError: It fails, or returns something else than one finite number with a gradient.
    """
    labels = torch.arange(2 * num_classes, device=device) % num_classes
    probs = nn.functional.one_hot(labels, num_classes).float() * 0.8 + 0.2 / num_classes  # of float32, as MixUp's
    for targets, kind in [(labels, "labels"), *([(probs, "probabilities")] if takes_probs else [])]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(len(labels), num_classes, generator=generator)
        logits = logits.to(device, dtype).requires_grad_()
        given = f"--model.loss {clipped(name)}: for logits {tuple(logits.shape)} and {kind} {tuple(targets.shape)} it"
        hint = ";\nleave --model.mixup and --model.cutmix out" if kind == "probabilities" else ""
        try:
            with rng_state_kept(device), torch.enable_grad():
                tried = copy.deepcopy(loss)
                value = tried(logits, targets)
        except Exception as error:  # code of one's own raises anything
            raise UserError(f"{given} fails ({type(error).__name__}: {reason_of(error)}){hint}.") from error
        if not isinstance(value, Tensor) or value.ndim:
            shape = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{given} returns {shape}; return one number, the mean over the images{hint}.")
        if not value.isfinite():
            raise UserError(f"{given} is {value.item()}{hint}.")
        if not value.requires_grad or torch.autograd.grad(value, logits, allow_unused=True)[0] is None:
            raise UserError(f"{given} has no gradient; compute it from the logits by differentiable functions{hint}.")
