"""How many steps a run has; what Lightning estimates is compared in test_module.py."""

from types import SimpleNamespace

import pytest
from fitting import fake_data

from cifar_lightning.errors import UserError
from cifar_lightning.training.step_count import check_evaluation, check_train_batches, count_steps


def trainer(**changed):
    settings = {
        "datamodule": fake_data(num_train_batches=lambda num_ranks: 9 // num_ranks),
        "world_size": 1,
        "limit_train_batches": 1.0,
        "accumulate_grad_batches": 1,
        "max_epochs": 3,
        "max_steps": -1,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "limit_val_batches": 1.0,
        "min_steps": None,
        "overfit_batches": 0,
        "train_dataloader": None,
        "ckpt_path": None,
        "num_training_batches": 9,
    }
    return SimpleNamespace(**(settings | changed))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 27),
        ({"world_size": 3}, 9),
        ({"accumulate_grad_batches": 2}, 15),
        ({"limit_train_batches": 4}, 12),
        ({"limit_train_batches": 0.5}, 12),
        ({"max_steps": 10}, 10),
        ({"max_epochs": -1, "max_steps": 10}, 10),
    ],
)
def test_steps_follow_from_lengths(changed, expected):
    assert count_steps(trainer(**changed)) == expected


def test_a_resumed_run_counts_what_it_took_before():
    assert count_steps(trainer(accumulate_grad_batches=2), epochs_done=1, steps_done=9) == 9 + 2 * 5


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"max_epochs": -1}, "needs an end"),
        ({"limit_train_batches": 0.0}, r"--trainer\.limit_train_batches 0\.0: leaves no step to train"),
        ({"limit_train_batches": 0.1}, r"--trainer\.limit_train_batches 0\.1: leaves no step"),
        ({"limit_train_batches": 0.1, "overfit_batches": 0.1}, r"--trainer\.overfit_batches 0\.1: leaves no step"),
        ({"min_steps": 28}, r"--trainer\.min_steps 28: the run has 27 steps"),
        ({"min_steps": 11, "max_steps": 10}, r"--trainer\.min_steps 11: the run has 10 steps"),
        ({"val_check_interval": 28, "check_val_every_n_epoch": None}, r"val_check_interval 28: the run has 27 batches"),
        ({"val_check_interval": 8, "max_steps": 3}, r"val_check_interval 8: the run has 3 batches"),
        ({"val_check_interval": 8, "max_steps": 3, "accumulate_grad_batches": 2}, r"the run has 6 batches"),
        (
            {"val_check_interval": 20, "max_steps": 12, "max_epochs": -1, "check_val_every_n_epoch": None},
            r"val_check_interval 20: the run has 12 batches",
        ),
        ({"max_epochs": 0}, r"--epochs 0: leaves no step"),
        ({"max_steps": 0}, r"--trainer\.max_steps 0: leaves no step"),
        (
            {"world_size": 10, "drops": True},
            r"--data\.drop_last true .*--batch_size 50 on 10 processes: leaves no",
        ),
    ],
)
def test_a_run_without_an_end_or_a_step_is_refused(changed, text):
    made = trainer(**changed)
    made.datamodule.drop_last, made.datamodule.batch_size = "drops" in changed, 50
    with pytest.raises(UserError, match=text):
        count_steps(made)


def test_a_validation_after_more_batches_than_an_epoch_has_is_refused_unless_it_counts_over_epochs():
    with pytest.raises(UserError, match=r"val_check_interval 10: an epoch has 9 batches"):
        count_steps(trainer(val_check_interval=10))
    assert count_steps(trainer(val_check_interval=9)) == 27
    assert count_steps(trainer(val_check_interval=10, check_val_every_n_epoch=None)) == 27


@pytest.mark.parametrize(
    ("max_steps", "changed", "is_refused"),
    [
        (17, {}, True),
        (18, {}, False),
        (13, {"val_check_interval": 0.5}, False),
        (12, {"val_check_interval": 0.5}, True),
        (11, {"val_check_interval": 2}, False),
        (10, {"val_check_interval": 2}, True),
        (9, {"accumulate_grad_batches": 2}, True),
        (10, {"accumulate_grad_batches": 2}, False),
        (17, {"limit_val_batches": 0}, False),
        (17, {"num_val": 0}, False),
        (17, {"max_epochs": 1}, False),  # of the epochs, which the command line refuses
        (-1, {}, False),
    ],
)
def test_steps_that_end_before_the_first_epoch_that_validates_are_refused(max_steps, changed, is_refused):
    made = trainer(**{"check_val_every_n_epoch": 2, "max_steps": max_steps, **changed})
    made.datamodule.num_images = lambda split: changed.get("num_val", 20)
    if not is_refused:
        count_steps(made)
        return
    with pytest.raises(UserError, match=r"--trainer\.check_val_every_n_epoch 2: .*nothing would be validated"):
        count_steps(made)
    count_steps(made, epochs_done=1, steps_done=9)  # which may have been validated


@pytest.mark.parametrize(("name", "overfit"), [("limit_val_batches", 0), ("overfit_batches", 0.3)])
def test_a_fraction_that_leaves_no_batch_to_evaluate_is_refused(name, overfit):
    made = trainer(limit_val_batches=0.3, limit_test_batches=0.3, overfit_batches=overfit)
    check_evaluation(made, {"val": 4, "test": 4})
    check_evaluation(made, {"val": 0, "test": 4})
    with pytest.raises(UserError, match=rf"--trainer\.{name} 0\.3: leaves no val batch of 3"):
        check_evaluation(made, {"val": 3, "test": 4})
    with pytest.raises(UserError, match=r"--trainer\.limit_test_batches 0\.3: leaves no test batch of 1"):
        check_evaluation(made, {"val": 4, "test": 1})


def test_other_loaders_are_counted_by_lightning():
    assert count_steps(trainer(datamodule=None, estimated_stepping_batches=7)) == 7


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 300),
        ({"num_training_batches": 100}, 400),
        ({"num_training_batches": 200}, 600),
        ({"accumulate_grad_batches": 4}, 226),
        ({"max_steps": 250}, 250),
        ({"max_epochs": -1, "estimated_stepping_batches": 250}, 250),
        ({"num_training_batches": float("inf"), "estimated_stepping_batches": 250}, 250),
    ],
)
def test_other_loaders_of_a_resumed_run_add_their_steps_to_those_before(changed, expected):
    settings = {"num_training_batches": 50, "max_epochs": 4, "estimated_stepping_batches": 0, **changed}
    assert count_steps(trainer(datamodule=None, **settings), epochs_done=2, steps_done=200) == expected


def test_steps_of_an_epoch_that_was_cut_are_added_to_those_of_the_epochs_that_follow():
    settings = {"num_training_batches": 9, "max_epochs": 2, "estimated_stepping_batches": 18}
    assert count_steps(trainer(datamodule=None, **settings), epochs_done=0, steps_done=5) == 23


def test_a_loader_of_ones_own_must_have_the_batches_that_are_planned():
    for batches, limit in ((9, 1.0), (4, 4), (float("inf"), 1.0)):
        check_train_batches(trainer(num_training_batches=batches, limit_train_batches=limit))
    with pytest.raises(UserError, match=r"8 batches .*num_train_batches 9"):
        check_train_batches(trainer(num_training_batches=8))
