"""A model may be contiguous: for models and optimizers that call `view`."""

import pytest
import torch
from fitting import NARROW, quiet_trainer, small_data
from torch import nn

from cifar_lightning import ImageClassifier
from cifar_lightning.errors import UserError
from cifar_lightning.models.memory_format import use_memory_format
from cifar_lightning.models.registry import build_model

NHWC = torch.rand(2, 16, 16, 3).permute(0, 3, 1, 2)


class Viewing(nn.Module):
    """A model as many tutorials have it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2), nn.Linear(4 * 7 * 7, 10)

    def forward(self, images):
        assert images.view(len(images), -1).shape[1] == 768
        return self.head(self.conv(images).view(len(images), -1))


class WithLbfgs(ImageClassifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.model.parameters(), lr=0.1, max_iter=2)


def fit(tmp_path, module):
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0, log_every_n_steps=1)
    trainer.fit(module, datamodule=small_data(limit=500, batch_size=100))


def test_the_default_has_channels_last_weights_and_contiguous_has_others_with_equal_logits():
    models = [build_model("smallnet", **NARROW).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    last = use_memory_format(models[0], "channels_last")
    plain = use_memory_format(models[1], "contiguous")
    assert not all(weight.is_contiguous() for weight in last.parameters())
    assert all(weight.is_contiguous() for weight in plain.parameters())
    assert list(last.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(plain(NHWC), last(NHWC))


def test_a_model_that_views_its_images_and_activations_trains_and_predicts(tmp_path):
    module = ImageClassifier(model=Viewing(), image_size=16, memory_format="contiguous")
    fit(tmp_path, module)
    logits = module(NHWC)
    assert logits.shape == (2, 10)
    assert torch.equal(logits, module(NHWC.contiguous()))


def test_lbfgs_trains_contiguous_weights_and_is_refused_for_channels_last(tmp_path):
    with pytest.raises(UserError, match=r"--model\.memory_format contiguous"):
        fit(tmp_path, WithLbfgs(image_size=16, model_kwargs=NARROW))
    module = WithLbfgs(image_size=16, model_kwargs=NARROW, memory_format="contiguous")
    before = [weight.clone() for weight in module.model.parameters()]
    fit(tmp_path, module)
    assert not all(map(torch.equal, before, module.model.parameters()))


def test_a_parameter_of_five_dimensions_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(1, 2, 3), nn.Linear(2, 2))
    assert use_memory_format(model, "channels_last") is model
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous()
