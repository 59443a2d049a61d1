"""The real parser raises short errors, and the table made of it says what its types say."""

import pytest
from jsonargparse import Namespace
from program import REPO

from cifar_lightning.cli.parser import check_arguments, config_text, describe_flags
from cifar_lightning.cli.trainer_arguments import ARGUMENTS
from cifar_lightning.errors import UserError
from cifar_lightning.models.registry import MODELS


def test_a_mistake_raises_at_most_two_lines(parser):
    for arguments in (["--trainer.max_epoch=1"], ["--model.lr=x"], ["--data.flip=sideways"]):
        with pytest.raises(UserError) as error:
            parser.parse_args(arguments)
        assert 1 <= len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.lr=0"], "--model.lr 0: a positive number up to 1e30, such as 3e-3."),
        (["--model.lr=x"], "--model.lr x: a number."),
        (["--model.head_lr=-1"], "--model.head_lr -1: a positive number up to 1e30, such as 3e-3."),
        (["--data={batch_size: 0}"], "--data.batch_size 0: 1 or more, below 2^31."),
        (["--data={limit: 0}"], "--data.limit 0: 1 or more, below 2^31."),
        (["--checkpoint={every_n_minutes: 0}"], "--checkpoint.every_n_minutes 0: a positive number of minutes"),
    ],
)
def test_the_parser_names_the_flag_and_its_limits_without_pydantics_words(parser, arguments, expected):
    with pytest.raises(UserError) as error:
        parser.parse_args(arguments)
    assert expected in str(error.value)
    assert "constrained" not in str(error.value)
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--trainer.callbacks+=EarlyStopping"],
            ["--trainer.callbacks lightning.pytorch.callbacks.EarlyStopping: required: monitor."],
        ),
        (["--trainer.callbacks=[{class_path: EarlyStopping}]"], ["EarlyStopping", "monitor", "required"]),
        (["--trainer.callbacks+=EarlyStoping"], ["Did you mean EarlyStopping?"]),
        (["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStoping"], ["Did you mean EarlyStopping?"]),
        (["--trainer.logger=lightning.pytorch.loggers.CSVLogger"], ["--trainer.logger", "save_dir", "required"]),
        (["--trainer.logger=CSVLoger"], ["CSVLoger", "Did you mean CSVLogger?"]),
        (["--trainer.logger={class_path: CSVLogger, init_args: {savedir: x}}"], ["savedir"]),
        (["--model.model=torch.nn.Linear"], ["--model.model torch.nn.Linear: required: in_features, out_features"]),
        (["--trainer.logger=json.JSONDecoder"], ["--trainer.logger json.JSONDecoder", "subclass of Logger"]),
        (["--trainer.callbacks+=no.such.Thing"], ["no.such.Thing", "No module named"]),
        (["--data={root: 7}"], ["--data.root", "7", "quote it"]),
    ],
)
def test_a_message_about_a_class_or_a_value_keeps_the_cause(parser, flags, words):
    with pytest.raises(UserError) as refused:
        parser.parse_args(flags)
    assert [word for word in words if word not in str(refused.value)] == []
    assert "Does not validate" not in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("flag", "row"),
    [
        ("model.lr", {"types": ["float"], "default": 0.003, "bounds": {"gt": 0, "le": 1e30}}),
        ("data.image_size", {"types": ["int", "null"], "default": None}),
        ("data.flip", {"types": [], "default": "random", "choices": ["random", "alternating", "none"]}),
        ("trainer.deterministic", {"types": ["bool", "null"], "choices": ["warn"]}),
        ("model.model_kwargs", {"types": ["null"], "open": True}),
        ("model.name", {"default": "smallnet", "choices": list(MODELS), "prefixes": ["torchvision/", "timm/"]}),
        ("run_dir", {"commands": ["fit", "tune"]}),
    ],
)
def test_a_row_of_the_table_is_what_the_signature_says(parser, flag, row):
    described = describe_flags(parser)[flag]
    assert described["help"]
    assert {key: described[key] for key in row} == row


def test_the_help_of_the_trainer_says_what_this_program_does(parser):
    rows = describe_flags(parser)
    for name, argument in ARGUMENTS.items():
        text = rows[f"trainer.{name}"]["help"]
        assert text == argument.does.replace("`", "") or text.startswith("Refused: ")
    assert "--run_dir" in rows["trainer.default_root_dir"]["help"]
    assert "hpc" not in rows["ckpt_path"]["help"]


def test_help_texts_are_plain(parser):
    texts = [row["help"] for row in describe_flags(parser).values()]
    assert [text for text in texts if "``" in text or ":func:" in text or "\n" in text] == []


def test_a_config_has_every_value_but_the_runs_own_path(parser):
    config = parser.parse_args(["--run_dir=here", "--model.lr=0.5"])
    text = config_text(parser, config)
    assert "here" not in text
    again = parser.parse_string(text)
    assert (again.model.lr, again.run_dir) == (0.5, None)


@pytest.mark.parametrize("flag", ["--run_dir=!!timestamp x", "--data.root=&a *a", "--init_weights=2024-99-99"])
def test_yaml_that_jsonargparse_would_die_of_is_plain_text(parser, flag):
    name, _, text = flag[2:].partition("=")
    assert parser.parse_args([flag])[name] == text


def test_numbers_with_leading_zeros_and_times_are_read_as_they_are_typed(parser):
    given = parser.parse_args(["--data.batch_size=064", "--run_dir=1:30", "--trainer.max_time=10:00:00:00"])
    assert (given.data.batch_size, given.run_dir, given.trainer.max_time) == (64, "1:30", "10:00:00:00")


@pytest.mark.parametrize("flag", ["--trainer.callbacks=&a {b: *a}", "--model.model_kwargs=!!int x"])
def test_yaml_that_jsonargparse_would_never_end_with_is_refused(parser, flag):
    with pytest.raises(UserError):
        parser.parse_args([flag])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data={crop_padding_px: null}"], "--data.crop_padding_px: needs a value"),
        (["--model.model_kwargs={num_classes: 3}"], "num_classes cannot be set"),
        (["--model.model_kwargs={1: 2}"], "1 cannot be set"),
        (["--model.model_kwargs={in_channels: 1}"], "in_channels cannot be set here; --data.in_channels 1"),
        (
            ["--trainer.enable_checkpointing=false", "--checkpoint.every_n_minutes=5"],
            "--checkpoint.every_n_minutes with --trainer.enable_checkpointing false",
        ),
        (["--model.name=smalnet"], "--model.name smalnet: not a model.* Did you mean smallnet"),
        (["--model.optimizer=my.Lion"], "--model.optimizer my.Lion: .* Your own by its class: --optimizer my.Lion"),
        (["--model.name=torchvision/resnet19"], "Did you mean torchvision/resnet18"),
        (["--trainer.max_steps=0"], "--trainer.max_steps 0: 1 or more, or -1"),
        (["--trainer.val_check_interval=00:00:10:00"], "val_check_interval 00:00:10:00: a fraction of an epoch"),
        (["--trainer={accumulate_grad_batches: 0}"], "--trainer.accumulate_grad_batches 0: 1 or more"),
        (["--trainer.devices=3.5"], "--trainer.devices 3.5: auto, a number of devices, or a list"),
        (["--trainer.devices="], "--trainer.devices : auto, a number"),
        (["--trainer.devices=99999999999999999999"], "--trainer.devices 99999999999999999999: at most 1024"),
    ],
)
def test_values_that_the_types_let_through_are_refused(parser, arguments, expected):
    with pytest.raises(UserError, match=expected):
        check_arguments("fit", parser.parse_args(arguments))


@pytest.mark.parametrize("devices", ["auto", "1", "-1", "0,1", "1,", "[0, 1]", "[3]"])
def test_all_spellings_of_devices_are_taken(parser, devices):
    check_arguments("fit", parser.parse_args([f"--trainer.devices={devices}"]))


@pytest.mark.parametrize("text", ["model: null", "trainer: 3", "data: [1]"])
def test_a_group_that_is_no_group_is_refused(parser, text):
    with pytest.raises(UserError, match=text.partition(":")[0]):
        check_arguments("fit", parser.parse_string(text))


@pytest.mark.parametrize(
    ("command", "ckpt_path", "epochs", "expected"),
    [
        ("fit", "nowhere.ckpt", 1, "--ckpt_path nowhere.ckpt: no such file"),
        ("fit", "last", 1, "--ckpt_path last: no such file"),  # which Lightning would look for
        ("fit", None, 0, "--epochs 0: 1 or more"),
        ("fit", None, -1, "--epochs -1: 1 or more"),
    ],
)
def test_what_would_fail_later_is_refused(command, ckpt_path, epochs, expected):
    config = Namespace(ckpt_path=ckpt_path, trainer=Namespace(max_epochs=epochs, max_steps=-1))
    with pytest.raises(UserError, match=expected):
        check_arguments(command, config)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.cutmix=1", "--data.batch_size=1"], r"--model\.cutmix 1\.0 with --batch_size 1: .*give 2 or more"),
        (["--model.sgd_lr=0.2"], r"--model\.sgd_lr 0\.2: adamw does not use it"),
        (["--model.optimizer=sgd", "--model.momentum=0.5"], r"--model\.momentum 0\.5: sgd does not use it"),
        (["--model.optimizer=muon", "--model.weight_decay=0.1"], r"--model\.weight_decay 0\.1: muon does not use it"),
        (["--model.stem_train_fraction=0.5"], r"--model\.stem_train_fraction 0\.5: smallnet has no stem"),
        (["--init_weights=a", "--model.pretrained=true"], "--init_weights with --model.pretrained"),
        (["--data.class_weights=balanced", "--data.sampler=balanced"], "--data.class_weights balanced with"),
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(parser, flags, expected):
    parsed = parser.parse_args(flags)
    with pytest.raises(UserError, match=expected):
        check_arguments("fit", parsed)


@pytest.mark.parametrize("recipe", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_recipe_has_such_a_flag(parser, recipe):
    check_arguments("fit", parser.parse_args(["--config", str(recipe)]))
