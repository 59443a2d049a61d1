"""SmallNet: parameters, shapes, dropout."""

import torch
from torch import nn

from cifar_lightning.models.smallnet import SmallNet


def test_smallnet_has_the_published_number_of_parameters():
    # Filters 9 * (3*64 + 64*64 + 64*128 + 128*128 + 128*256 + 256*256), two per BatchNorm channel, 256*10 + 10.
    filters = 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
    assert sum(p.numel() for p in SmallNet().parameters()) == filters + 2 * 2 * (64 + 128 + 256) + 2570 == 1_148_874


def test_smallnet_gives_raw_logits_of_any_square_size():
    model = SmallNet(num_classes=7, widths=(4, 8, 16)).eval()
    for size in (8, 32, 48):
        logits = model(torch.randn(2, 3, size, size))
        assert logits.shape == (2, 7)
        assert not torch.allclose(logits.sum(1), torch.ones(2))


def test_smallnet_halves_the_image_between_stages_and_averages_by_mean():
    model = SmallNet(widths=(4, 8, 16), dropout=0.0).eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.features(images)
    assert features.shape == (2, 16, 8, 8)
    expected = nn.functional.linear(features.mean((2, 3)), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(images), expected)


def test_dropout_works_in_training_alone():
    model = SmallNet(widths=(4, 8, 16), dropout=0.5)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(images), model(images))
    model.features.eval()
    model.dropout.train()
    assert not torch.equal(model(images), model(images))
