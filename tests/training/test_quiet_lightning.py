"""Only what is listed is silenced."""

import warnings
from types import SimpleNamespace

import pytest
from fitting import quiet_trainer, small_data
from lightning.pytorch.callbacks import ModelSummary

from cifar_lightning import ImageClassifier, SmallNet
from cifar_lightning.cli.fit import train
from cifar_lightning.training.quiet_lightning import quiet


def test_what_cannot_be_acted_on_is_silent_and_the_rest_is_heard():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            warnings.warn("The dirpath has changed from 'a' to 'b'", stacklevel=1)
            warnings.warn("barrier(): using the device under current context. You can specify ...", stacklevel=1)
            with pytest.raises(UserWarning, match="something else"):
                warnings.warn("something else", stacklevel=1)


@pytest.mark.parametrize(
    ("precision", "is_automatic", "is_heard"),
    [("16-mixed", True, False), ("16-mixed", False, True), ("32-true", True, True)],
)
def test_a_first_step_that_only_the_scaler_can_have_skipped_is_silent(precision, is_automatic, is_heard):
    def fit(*args, **kwargs):
        warnings.warn("Detected call of `lr_scheduler.step()` before `optimizer.step()`. In PyTorch", stacklevel=1)

    trainer, model = SimpleNamespace(precision=precision, fit=fit), SimpleNamespace(automatic_optimization=is_automatic)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        train(trainer, model, None, None, None)
    assert bool(heard) is is_heard


def test_a_model_summary_does_not_warn_of_mixed_precision_whose_weights_are_in_float32(tmp_path):
    model = ImageClassifier(model=SmallNet(10, widths=(2, 2, 2)), num_classes=10)
    trainer = quiet_trainer(
        tmp_path, max_steps=1, limit_val_batches=0, precision="bf16-mixed", callbacks=[ModelSummary()]
    )
    with quiet():  # the tests turn a warning into an error
        trainer.fit(model, small_data())
    assert trainer.global_step == 1
