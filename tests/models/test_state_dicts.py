"""Names and shapes of a file's tensors against a model's."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from cifar_lightning.models.smallnet import SmallNet
from cifar_lightning.models.state_dicts import describe_misfits, has_other_classes, without_wrappers


@pytest.mark.parametrize("prefix", ["module.", "model.", "network.", "_orig_mod.", "_orig_mod.module."])
def test_a_prefix_of_all_names_is_removed(prefix):
    ours = SmallNet(3, widths=(2, 4, 4)).state_dict()
    wrapped = {f"{prefix}{name}": tensor for name, tensor in ours.items()}
    assert without_wrappers(wrapped, ours) == ours


def test_a_prefix_is_removed_also_where_a_layer_has_that_name():
    ours = nn.Sequential(OrderedDict(model=nn.Linear(2, 2), head=nn.Linear(2, 2))).state_dict()
    wrapped = {f"model.{name}": tensor for name, tensor in ours.items()}
    assert without_wrappers(wrapped, ours) == ours


def test_a_models_own_name_is_no_prefix():
    ours = nn.Sequential(OrderedDict(model=nn.Linear(2, 2))).state_dict()
    assert without_wrappers(dict(ours), ours) == ours


def test_misfits_are_named_with_both_shapes():
    ours = {"a": torch.ones(2, 3), "b": torch.tensor(1), "c": torch.ones(1)}
    assert describe_misfits(ours, ours) == ""
    theirs = {"a": torch.ones(3, 3), "c": torch.ones(2)}
    described = describe_misfits(theirs, ours)
    assert "3x3" in described
    assert "2x3" in described
    assert "2 more" in described
    assert "missing" in describe_misfits(theirs, ours, num_named=2)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(2, 3).to_sparse(), "sparse"),
        (torch.ones(2, 3, device="meta"), "meta"),
        (torch.ones(2, 3, dtype=torch.complex64), "complex"),
        (torch.ones(2, 3, dtype=torch.bool), "bool"),
        (torch.ones(2, 3, dtype=torch.int8), "integer"),
    ],
)
def test_a_tensor_that_is_no_dense_one_of_real_numbers_does_not_fit(tensor, kind):
    ours = {"a": torch.ones(2, 3)}
    assert describe_misfits({"a": tensor}, ours) == f"a is 2x3 ({kind}) in it and 2x3 here"
    assert not has_other_classes({"a": tensor}, ours)
    assert describe_misfits({"a": torch.ones(2, 3, dtype=torch.bfloat16)}, ours) == ""
