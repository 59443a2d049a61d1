"""TTA against airbench's definition, written out naively."""

import pytest
import torch
import torch.nn.functional as F

from cifar_lightning.training.tta import tta_logits


def naive_six_views(model, images):
    """airbench's `infer_mirror_translate`: half the image, half two shifted crops, each the mean with its mirror."""

    def mirrored(x):
        return 0.5 * model(x) + 0.5 * model(x.flip(-1))

    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    height, width = images.shape[2:]
    crops = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
    return 0.5 * mirrored(images) + 0.5 * torch.stack([mirrored(crop) for crop in crops]).mean(0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 6, 4)).requires_grad_(False)


def test_six_views_are_weighted_as_in_airbench(model):
    images = torch.randn(5, 3, 6, 6)
    averaged, plain = tta_logits(model, images, "six")
    torch.testing.assert_close(averaged, naive_six_views(model, images))
    torch.testing.assert_close(plain, model(images))


def test_a_mirror_image_gets_the_same_prediction(model):
    images = torch.randn(5, 3, 6, 6)
    averaged, _ = tta_logits(model, images, "mirror")
    torch.testing.assert_close(averaged, tta_logits(model, images.flip(-1), "mirror")[0])
    torch.testing.assert_close(averaged, (model(images) + model(images.flip(-1))) / 2)


def test_without_views_the_image_alone_is_asked(model):
    images = torch.randn(5, 3, 6, 6)
    averaged, plain = tta_logits(model, images, "none")
    assert averaged is plain
