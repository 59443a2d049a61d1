"""The metrics of a stage against plain arithmetic over all images at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_lightning.training.eval_metrics import ConfusionMatrix, evaluation_metrics, update_evaluation


def test_uneven_batches_count_image_by_image():
    torch.manual_seed(0)
    logits, plain, targets = torch.randn(50, 4), torch.randn(50, 4), torch.randint(0, 4, (50,))
    metrics = evaluation_metrics(4)
    for part in (slice(0, 32), slice(32, 47), slice(47, 50)):
        update_evaluation(metrics, logits[part], plain[part], targets[part], F.cross_entropy)
    values = metrics.compute()
    assert values["loss"].item() == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-6)
    assert values["acc_no_tta"].item() == pytest.approx((plain.argmax(1) == targets).float().mean().item(), abs=1e-6)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for target, pred in zip(targets, logits.argmax(1), strict=True):
        expected[target, pred] += 1
    assert torch.equal(values["confusion"], expected)


def test_a_batch_whose_loss_is_nan_makes_the_loss_of_the_stage_nan():
    logits, targets, metrics = torch.randn(6, 4), torch.randint(0, 4, (6,)), evaluation_metrics(4)
    for part in (logits[:4], logits[4:] * math.nan):
        update_evaluation(metrics, part, part, targets[: len(part)], F.cross_entropy)
    assert math.isnan(metrics.compute()["loss"])


def test_float_labels_of_a_loss_of_ones_own_count_as_classes():
    logits, targets = torch.randn(30, 12), torch.arange(30) % 12
    of_ints, of_floats = evaluation_metrics(12), evaluation_metrics(12)
    update_evaluation(of_ints, logits, logits, targets, F.cross_entropy)
    update_evaluation(of_floats, logits, logits, targets.float(), lambda outputs, y: F.cross_entropy(outputs, y.long()))
    expected, values = of_ints.compute(), of_floats.compute()
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)


class LargestOutput(TorchDispatchMode):
    """Records the most elements that an operation returns in memory of its own."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.num_elements = kept.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.kept:
                self.num_elements = max(self.num_elements, tensor.numel())
        return output


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_the_confusion_matrix_is_updated_without_a_second_one(is_deterministic):
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    preds, targets = torch.randint(0, 50, (2, 300)).unbind()
    metric = ConfusionMatrix(50, validate_args=False)
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        with torch.inference_mode(), LargestOutput(metric.confmat) as largest:
            for part in (slice(0, 256), slice(256, 300), slice(300, 300)):
                metric.update(preds[part], targets[part])
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    assert largest.num_elements == 256
    assert metric.compute().tolist() == confusion_matrix(targets, preds, labels=range(50)).tolist()
