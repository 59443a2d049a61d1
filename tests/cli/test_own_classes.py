"""Classes of one's own on the command line: --model, --data, --optimizer and --lr_scheduler."""

import abc
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau

from cifar_lightning import ImageClassifier, ImageDataModule
from cifar_lightning.cli import lightning_cli
from cifar_lightning.cli.flags import check_config, normalize_arguments
from cifar_lightning.cli.lightning_cli import TrainingCLI
from cifar_lightning.cli.main import run_command, training_arguments
from cifar_lightning.cli.parser import check_arguments
from cifar_lightning.errors import UserError
from cifar_lightning.report.page import facts_of
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.schema import upgrade_config
from cifar_lightning.training.model_checks import check_monitors
from cifar_lightning.training.tensorboard import hyperparameters_of

DATA = ["--data.dataset", "synthetic", "--data.image_size", "16"]


class Mine(ImageClassifier):
    def __init__(self, my_argument: int = 1, lr: float = 0.5, **kwargs):
        super().__init__(lr=lr, **kwargs)
        self.my_argument = my_argument


class Narrow(ImageClassifier):
    """Takes neither the number of classes nor an optimizer."""

    def __init__(self, width: int = 2):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, width), torch.nn.Linear(width, 10))
        super().__init__(model=model, image_size=16)


class MyData(ImageDataModule):
    def __init__(self, my_fraction: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.my_fraction = my_fraction


class Fixed(ImageDataModule):
    """Takes no arguments."""

    def __init__(self):
        super().__init__("synthetic", batch_size=100, limit=300, image_size=16)


class FixedModel(ImageClassifier):
    """Takes no arguments."""

    def __init__(self):
        super().__init__(image_size=16, model_kwargs={"widths": [2, 2, 2]})


class Foreign(LightningModule):
    pass


class Lion(torch.optim.SGD):
    pass


class Switched(torch.optim.SGD):
    """Steps only after `train`, with other weights than those of `eval`, as those of schedulefree."""

    is_training = False

    def train(self):
        self._switch(True, 0.5)

    def eval(self):
        self._switch(False, 2)

    @torch.no_grad()
    def _switch(self, is_training, factor):
        if self.is_training != is_training:
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.mul_(factor)
        self.is_training = is_training

    def step(self, closure=None):
        if not self.is_training:
            raise Exception("Optimizer was not in train mode when step is called.")
        return super().step(closure)


class Switches(ImageClassifier):
    """Has the hooks that the error names."""

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.trainer.optimizers[0].train()

    def on_validation_epoch_start(self):
        super().on_validation_epoch_start()
        if self.trainer.state.fn == "fit":
            self.trainer.optimizers[0].eval()

    def on_validation_end(self):
        if self.trainer.state.fn == "fit":
            self.trainer.optimizers[0].train()


class SwitchesModes(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        trainer.optimizers[0].train()


MINE, MY_DATA = f"{__name__}.Mine", f"{__name__}:MyData"
ARGUMENTS = {"class_path": MINE, "init_args": {"my_argument": 3}}


def command_line(*arguments):
    return TrainingCLI("fit", training_arguments("fit", arguments)[0])


@pytest.mark.parametrize(
    "typed",
    [
        ["--model", MINE, "--model.my_argument", "3"],
        [f"--model={MINE}", "--model.init_args.my_argument=3"],
        ["--model.class_path", MINE, "--model.my_argument", "3"],
        ["--model_class", MINE, "--model.my_argument", "3"],
        ["--model.my_argument", "3", "--model", MINE],
    ],
)
def test_every_spelling_of_a_class_and_its_arguments_is_the_same(typed):
    assert sorted(normalize_arguments("fit", typed)) == ["--model.my_argument=3", f"--model_class={MINE}"]


@pytest.mark.parametrize("in_file", [False, True])
def test_a_group_with_a_class_path_is_a_class_and_its_arguments(tmp_path, in_file):
    value = yaml.safe_dump(ARGUMENTS, default_flow_style=True)
    if in_file:
        (tmp_path / "model.yaml").write_text(value)
        value = str(tmp_path / "model.yaml")
    assert normalize_arguments("fit", ["--model", value]) == [f"--model_class={MINE}", '--model={"my_argument": 3}']


@pytest.mark.parametrize(
    ("typed", "way_out"),
    [
        (["--model", "smallnet"], "--model.name smallnet"),
        (["--data", "folder"], "--data.dataset folder"),
        (["--trainer", "gpu"], "settings"),
        (["--data.dataset", "./mine:make"], "package.module:name"),
    ],
)
def test_a_word_that_is_neither_settings_nor_a_path_is_refused_with_the_way_out(typed, way_out):
    with pytest.raises(UserError, match=re.escape(" ".join(typed)) + ".*" + re.escape(way_out)):
        normalize_arguments("fit", typed)


@pytest.mark.parametrize("typed", [["--model.my_argument", "3"], ["--data", MY_DATA, "--model.my_argument", "3"]])
def test_without_a_class_an_unknown_flag_is_refused_at_once(typed):
    with pytest.raises(UserError, match=r"--model\.my_argument: no such flag"):
        normalize_arguments("fit", typed)


def test_arguments_of_a_class_that_a_config_or_a_run_names_are_left_to_the_parser(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": ARGUMENTS}))
    mine = ["--model.my_argument", "3"]
    assert normalize_arguments("fit", ["--config", str(config), *mine])[-1] == "--model.my_argument=3"
    assert normalize_arguments("fit", ["--resume", str(tmp_path), *mine])[-1] == "--model.my_argument=3"
    assert normalize_arguments("test", mine, config) == ["--model.my_argument=3"]


@pytest.mark.parametrize("model", [ARGUMENTS, {**ARGUMENTS["init_args"], "class_path": MINE}, MINE])
def test_a_class_in_yaml_stands_apart_from_its_arguments(tmp_path, model):
    flat = upgrade_config({"model": model, "data": {"root": "x"}})
    assert flat["model_class"] == MINE
    assert flat.get("model", {"my_argument": 3}) == {"my_argument": 3}
    assert upgrade_config(flat) == flat
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": model}))
    check_config(path)
    (tmp_path / "checkpoints").mkdir()  # a run of somebody else
    with pytest.raises(UserError, match=rf"--model_class {MINE}.*\n.*--trust_code true"):
        check_config(path)


def test_a_class_in_a_file_that_a_config_names_is_refused_with_the_flag_that_takes_it(tmp_path):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(ARGUMENTS))
    (tmp_path / "config.yaml").write_text("model: model.yaml\n")
    with pytest.raises(UserError, match=r"config\.yaml: model model\.yaml: .*--model model\.yaml"):
        check_config(tmp_path / "config.yaml")


def test_a_key_of_another_group_is_not_taken_for_a_class():
    own_net = {"model": {"class_path": "my.Net"}}
    for config in ({"trainer": {"model": MINE}}, {"model": "mine.yaml"}, {"model": own_net}):
        assert upgrade_config(config) == config


def test_subclasses_get_flags_defaults_and_the_data_and_their_config_repeats_them(tmp_path):
    flags = ["--model", MINE, "--data", MY_DATA, "--data.my_fraction", "0.25", "--model.model_kwargs.widths", "[2, 2]"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"model": ARGUMENTS}))
    cli = command_line("--config", str(path), *DATA, *flags)
    model, data, _ = cli.instantiate()
    assert (type(model), model.my_argument, model.num_classes) == (Mine, 3, 10)
    assert (type(data), data.my_fraction) == (MyData, 0.25)
    assert model.optimizer_settings.lr == 0.5
    assert model.plans_schedule
    path.write_text(cli.config_text)
    assert command_line("--config", str(path)).config_text == cli.config_text


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"class_path": "reads_a_file.Model"}},
        {"data": {"transforms": ["default", {"class_path": "reads_a_file.Shift"}]}},
        {"trainer": {"callbacks": [{"class_path": "reads_a_file.Watch"}]}},
    ],
)
def test_code_that_a_config_elsewhere_names_is_imported_in_the_working_directory(settings, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    config = tmp_path / "elsewhere" / "mine.yaml"
    config.write_text(yaml.safe_dump(settings))
    (tmp_path / "names.txt").write_text("a")
    (tmp_path / "reads_a_file.py").write_text(
        "from lightning.pytorch import Callback\nfrom cifar_lightning import ImageClassifier, Transform\n"
        "open('names.txt').close()\nclass Model(ImageClassifier): pass\nclass Shift(Transform): pass\n"
        "class Watch(Callback): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert "reads_a_file" in command_line("--config", str(config), *DATA).config_text
    sys.modules.pop("reads_a_file")


def test_a_subclass_with_few_arguments_takes_an_optimizer_and_a_schedule():
    cli = command_line(
        *["--model", f"{__name__}:Narrow", *DATA, "--model.width", "3"],
        *["--optimizer.lr", "0.25", "--optimizer", f"{__name__}:Lion"],  # in any order
        *["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "val/loss"],
    )
    model, _, _ = cli.instantiate()
    made = model.configure_optimizers()
    assert isinstance(made["optimizer"], Lion)
    assert made["optimizer"].param_groups[0]["lr"] == 0.25
    assert sum(map(len, (group["params"] for group in made["optimizer"].param_groups))) == 4
    assert isinstance(made["lr_scheduler"]["scheduler"], ReduceLROnPlateau)
    assert made["lr_scheduler"]["monitor"] == "val/loss"
    assert not model.plans_schedule
    assert cli.model_name == f"{__name__}:Narrow"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_states_that_an_optimizer_makes_with_itself_follow_the_precision_of_the_weights(dtype):
    model, _, _ = command_line(*DATA, "--optimizer", "Adagrad", "--optimizer.lr", "0.25").instantiate()
    model.to(dtype)  # as the Trainer does in 64-true, before it asks for the optimizer
    optimizer = model.configure_optimizers()
    assert {state["sum"].dtype for state in optimizer.state.values()} == {dtype}
    assert set(optimizer.state) == set(model.parameters()) == set(optimizer.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", f"{__name__}.Mien"], ["--model", "Did you mean Mine?"]),
        (["--model", f"{__name__}x.Mine"], ["--model", f"Did you mean {__name__}"]),
        (["--model", f"{__name__}.Foreign"], ["ImageClassifier", "lightning.Trainer", "docs/"]),
        (["--model", "torch.nn.Linear"], ["not a subclass of ImageClassifier"]),
        (["--data", "torch.utils.data:DataLoader"], ["not a subclass of ImageDataModule"]),
        (["--data", f"{__name__}.command_line"], ["--data", "not a subclass of ImageDataModule"]),
        (["--model", MINE, "--model.my_argment", "3"], ["--model.my_argment", "my_argument?"]),
        (["--model", MINE, "--model.my_argument", "x"], ["--model.my_argument", "x", "int"]),
        (["--optimizer.lr", "0.1"], ["--optimizer.lr", "--optimizer CLASS"]),
        (["--optimizer", "SGD", "--optimizer.lr", "-1"], ["--optimizer torch.optim.SGD", "-1"]),
        (["--optimizer", "SGD", "--tune_lr"], ["--tune_lr", "--optimizer SGD"]),
        (["--optimizer", "SGD", "--lr", "0.1"], ["--model.lr", "--optimizer SGD"]),
        (["--optimizer", "SGD", "--model.weight_decay", "0.05"], ["--model.weight_decay", "--optimizer SGD"]),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_give(flags, words):
    with pytest.raises(UserError) as refused:
        command_line(*DATA, *flags).instantiate()
    assert [word for word in words if word not in str(refused.value)] == []
    assert len(str(refused.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optimizer=adamw"], ["--optimizer adamw", "Did you mean AdamW?", "--model.optimizer adamw"]),
        (["--optimizer=torch.optim.adamw"], ["Did you mean AdamW?"]),
        (["--optimizer=Lion2"], ["--optimizer Lion2", "torch.optim", "package.module.Class", "timm/NAME"]),
        (["--optimizer=RAdm"], ["--optimizer RAdm", "Did you mean RAdam?"]),
        (["--optimizer=torch.optim.RAdm"], ["--optimizer torch.optim.RAdm", "Did you mean RAdam?"]),
        (["--optimizer=SGD", "--optimizer.learning_rate=1"], ["learning_rate", "Did you mean lr?"]),
        (["--optimizer={class_path: SGD, init_args: {momentun: 1}}"], ["momentun", "Did you mean momentum?"]),
        (["--optimizer=SGD", "--lr_scheduler=StepLR"], ["StepLR: required: step_size."]),
        (["--optimizer=SGD", "--lr_scheduler=ReduceLROnPlateau"], ["ReduceLROnPlateau: required: monitor."]),
        (["--trainer.profiler=SimpleProfiler", "--trainer.profiler.dir_path=x"], ["Did you mean dirpath?"]),
    ],
)
def test_a_misspelt_class_or_argument_gets_the_nearest_one(parser, flags, words):
    with pytest.raises(UserError) as refused:
        parser.parse_args(flags)
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr_scheduler=StepLR", "--lr_scheduler.step_size=3"], ["--lr_scheduler", "--optimizer"]),
        (["--optimizer=SGD", "--model.pct_start=0.2"], ["--model.pct_start 0.2", "--optimizer torch.optim.SGD"]),
        (
            ["--optimizer=SGD", "--lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"],
            ["--lr_scheduler.monitor val/loss"],
        ),
    ],
)
def test_settings_that_do_not_go_with_an_optimizer_are_refused_also_from_a_config(parser, flags, words):
    parsed = parser.parse_args(flags)
    with pytest.raises(UserError) as refused:
        check_arguments("fit", parsed, parser.get_defaults())
    assert [word for word in words if word not in str(refused.value)] == []


def test_classes_whose_constructors_take_no_arguments_are_made_and_their_config_repeats_them(tmp_path):
    flags = ["--data", f"{__name__}.Fixed", "--model", f"{__name__}.FixedModel"]
    cli = command_line(*flags)
    model, data, _ = cli.instantiate()
    assert (type(model), type(data)) == (FixedModel, Fixed)
    (tmp_path / "config.yaml").write_text(cli.config_text)
    again, _, _ = command_line("--config", str(tmp_path / "config.yaml")).instantiate()
    assert type(again) is FixedModel


def test_inspect_reads_the_config_of_such_a_class_and_tune_says_what_it_lacks(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(command_line("--model", f"{__name__}.Narrow", *DATA, "--data.limit", "100").config_text)
    monkeypatch.setattr("cifar_lightning.cli.inspect.inspect_source", lambda *_, **__: pytest.fail("is called"))
    with pytest.raises(pytest.fail.Exception, match="is called"):
        run_command(["inspect", "--config", str(config), "--output", str(tmp_path / "page.html")])
    with pytest.raises(UserError, match=r"find --lr, which --model .*Narrow does not take"):
        run_command(["tune", "--config", str(config), "--run_dir", str(tmp_path / "tuned")])
    assert not (tmp_path / "tuned").exists()


RELU = torch.nn.ReLU()


class Activated(ImageClassifier):
    def __init__(self, activation: torch.nn.Module = RELU, **kwargs):
        super().__init__(**kwargs)
        self.activation = activation


class FurtherActivated(Activated):
    def __init__(self, scale: float = 1.0, **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize("kind", ["Activated", "FurtherActivated"])
def test_a_default_that_yaml_cannot_hold_stays_the_default_of_the_class(kind, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(command_line("--model", f"{__name__}.{kind}", *DATA).config_text)
    model, _, _ = command_line("--config", str(config)).instantiate()
    assert isinstance(model.activation, torch.nn.ReLU)
    given = command_line("--config", str(config), "--model.activation", "torch.nn.GELU")
    config.write_text(given.config_text)
    assert isinstance(command_line("--config", str(config)).instantiate()[0].activation, torch.nn.GELU)


class Abstract(ImageClassifier, abc.ABC):
    @abc.abstractmethod
    def penalty(self): ...


class NotBegun(ImageClassifier):
    def __init__(self, lr: float = 0.1):
        self.layer = torch.nn.Linear(2, 2)


class Raises(ImageDataModule):
    def __init__(self, dataset: str = "synthetic"):
        raise KeyError("photos")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", f"{__name__}.Abstract"], ["Abstract", "penalty"]),
        (["--model", f"{__name__}.NotBegun"], ["NotBegun", "__init__"]),
        (["--data", f"{__name__}.Raises"], ["Raises", "KeyError: 'photos'", f"{__file__}:"]),
        (["--optimizer", "SparseAdam"], ["--optimizer torch.optim.SparseAdam", "dense gradients"]),
        (
            ["--optimizer", "SGD", "--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "0"],
            ["StepLR", "ZeroDivision"],
        ),
        (
            ["--optimizer", "SGD", "--lr_scheduler", "CosineAnnealingLR", "--lr_scheduler.T_max", "0"],
            ["--lr_scheduler torch.optim.lr_scheduler.CosineAnnealingLR", "ZeroDivision"],
        ),
    ],
)
def test_what_fails_when_it_is_made_or_in_its_first_step_is_refused_before_a_run_is_made(flags, words):
    data = DATA if "--data" not in flags else []
    with pytest.raises(UserError) as refused:
        command_line(*data, "--trainer.accelerator", "cpu", *flags).instantiate()
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize("is_gpu", [False, True])
def test_an_optimizer_with_modes_needs_a_class_or_a_callback_that_sets_them(is_gpu, monkeypatch):
    monkeypatch.setattr(lightning_cli, "is_on_cuda", lambda trainer: is_gpu)
    switched = [*DATA, "--optimizer", f"{__name__}.Switched", "--optimizer.lr", "0.1"]
    for flags in ([], ["--trainer.callbacks", "DeviceStatsMonitor"]):
        with pytest.raises(UserError, match=r"Switched: .*train mode.*on_train_epoch_start.*on_validation_epoch_start"):
            command_line(*switched, *flags).instantiate()
    for flags in (["--model", f"{__name__}.Switches"], ["--trainer.callbacks", f"{__name__}.SwitchesModes"]):
        command_line(*switched, *flags).instantiate()


def test_what_steps_only_on_a_gpu_is_refused_only_for_a_run_on_a_cpu(monkeypatch):
    capturable = [*DATA, "--optimizer", "AdamW", "--optimizer.capturable", "true"]
    for is_gpu in (True, False):
        monkeypatch.setattr(lightning_cli, "is_on_cuda", lambda trainer, is_gpu=is_gpu: is_gpu)
        if is_gpu:
            command_line(*capturable).instantiate()
        else:
            with pytest.raises(UserError, match="capturable"):
                command_line(*capturable).instantiate()


def test_validation_predictions_of_an_optimizer_with_modes_are_those_of_the_best_checkpoint(tmp_path):
    flags = ["--model", f"{__name__}.Switches", "--model.model_kwargs", "{widths: [2, 2]}", "--epochs", "2"]
    flags += ["--optimizer", f"{__name__}.Switched", "--optimizer.lr", "0.1", "--trainer.accelerator", "cpu"]
    run = RunFolder(tmp_path / "run")
    assert run_command(["fit", *DATA, "--data.limit", "300", *flags, "--run_dir", str(run.path)]) == 0
    data = ImageDataModule("synthetic", image_size=16, limit=300)
    data.setup()
    model = Switches.load_from_checkpoint(run.best_checkpoint, weights_only=True).eval()
    with torch.no_grad():
        expected = torch.cat([model(images) for images, _ in data.val_dataloader()])
    for command in (None, ["validate", str(run.path), "--trust_code", "true", "--trainer.accelerator", "cpu"]):
        if command is not None:
            run.predictions_val.unlink()
            assert run_command(command) == 0
        found = torch.from_numpy(np.load(run.predictions_val)["logits"])
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init_args", [5, [1], "x"])
def test_init_args_that_are_no_arguments_are_refused(init_args, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"model": {"class_path": MINE, "init_args": init_args}}))
    with pytest.raises(UserError):
        command_line("--config", str(config), *DATA)


def test_what_a_schedule_monitors_is_checked_before_training():
    check_monitors([], validates=True, plateau="val/loss")
    check_monitors([], validates=True, module=Narrow(), plateau="val/f2")  # may log it
    for validates, monitor in ((True, "val/los"), (False, "val/loss")):
        with pytest.raises(UserError, match=rf"--lr_scheduler: monitors {monitor}"):
            check_monitors([], validates=validates, plateau=monitor)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [(["--model.help"], "--model.lr X"), (["--model.help", MINE], "--model.my_argument N")],
)
def test_the_flags_of_a_group_and_of_a_class_are_shown(capsys, asked, shown):
    assert run_command(["fit", *asked]) == 0
    assert shown in capsys.readouterr().out


def test_report_and_board_name_the_optimizer_and_schedule_that_were_used():
    config = {
        "model": {"optimizer": "adamw", "lr": 0.003, "schedule": "one_cycle", "tta": "none"},
        "model_class": "my.Classifier",
        "optimizer": {"class_path": "torch.optim.RAdam", "init_args": {"lr": 0.25, "foreach": None}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}},
    }
    facts = dict(facts_of({"config": config, "split": {}, "environment": {}}))
    assert facts["Model"] == "my.Classifier"
    assert facts["Optimizer"] == "torch.optim.RAdam lr 0.25, torch.optim.lr_scheduler.StepLR step_size 3, tta none"
    board = hyperparameters_of(config)
    assert (board["optimizer"], board["lr"]) == ("torch.optim.RAdam lr 0.25", 0.25)
    assert "schedule" not in board


def test_label_smoothing_that_is_typed_with_a_loss_of_ones_own_is_refused_and_that_of_a_config_is_not(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {loss: torch.nn.MultiMarginLoss, label_smoothing: 0.1}\n")
    own, typed = f"--config={tmp_path / 'own.yaml'}", "--model.label_smoothing=0.1"
    for flags in ([own, typed], [typed, "--model.loss=torch.nn.MultiMarginLoss"]):
        with pytest.raises(UserError, match=r"--model\.label_smoothing 0\.1: only cross_entropy uses it"):
            command_line(*flags)
    usual = ["--model={loss: cross_entropy}", typed]
    for flags in ([own], [own, "--model.label_smoothing=0"], [typed], [own, *usual]):
        command_line(*flags)
