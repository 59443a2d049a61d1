"""A command line is checked without torch, and nothing is refused that LightningCLI would take."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from special_files import POSIX_KINDS, make_special

from cifar_lightning.cli.flags import check_config, check_value, flag_value, normalize_arguments, suggest_flag, table
from cifar_lightning.errors import UserError
from cifar_lightning.settings.comparison import within


def test_aliases_become_long_names_and_every_flag_one_token():
    typed = ["--epochs", "3", "--lr=1e-3", "--batch_size", "64", "--trainer.devices", "2"]
    assert normalize_arguments("fit", typed) == [
        "--trainer.max_epochs=3",
        "--model.lr=1e-3",
        "--data.batch_size=64",
        "--trainer.devices=2",
    ]


@pytest.mark.parametrize(
    ("typed", "normalized"),
    [
        (["-c", "a.yaml"], ["--config=a.yaml"]),
        (["-c=a.yaml"], ["--config=a.yaml"]),
        (["--model.compile", "-c", "a.yaml"], ["--config=a.yaml", "--model.compile=true"]),
        (["--tune_lr"], ["--tune_lr=true"]),
        (["--trainer.deterministic", "--epochs", "1"], ["--trainer.deterministic=true", "--trainer.max_epochs=1"]),
        (["--trainer.max_steps", "-1"], ["--trainer.max_steps=-1"]),
        (["--print_config", "--epochs", "1"], ["--print_config", "--trainer.max_epochs=1"]),
        (["--trainer.callbacks+=Timer"], ["--trainer.callbacks+=Timer"]),
        (["--trainer.callbacks.duration", "x"], ["--trainer.callbacks.duration=x"]),
        (["--model.model_kwargs.dropout", "0.2"], ["--model.model_kwargs.dropout=0.2"]),
        (["--data", "data.yaml"], ["--data=data.yaml"]),
        (["--trainer.logger.name", ""], ["--trainer.logger.name="]),
        (["--lr", "1", "--lr", "2"], ["--model.lr=1", "--model.lr=2"]),
        (
            ["--lr", "1", "--model=a.yaml", "--lr=2", "-c", "b.yaml", "-c", "c.yaml"],
            ["--config=b.yaml", "--config=c.yaml", "--model=a.yaml", "--model.lr=1", "--model.lr=2"],
        ),
        (["--lr", "1", "--model.lr", "1"], ["--model.lr=1", "--model.lr=1"]),
    ],
)
def test_what_people_may_type_is_understood(typed, normalized):
    assert normalize_arguments("fit", typed) == normalized


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch: no such flag. Did you mean --trainer.max_epochs?"),
        (["--modle.lr", "1"], "Did you mean --model.lr?"),
        (["--batch-size", "1"], "Did you mean --batch_size?"),
        (["--max_epochs", "1"], "Did you mean --trainer.max_epochs?"),
        (["--learning_rate", "1"], "Did you mean --lr?"),
        (["--dropout", "1"], "--help"),
        (["--epochs", "x"], "--epochs x: a whole number."),
        (["--epochs", "abc"], "--epochs abc: a whole number."),
        (["--epochs", "3.5"], "--epochs 3.5: a whole number."),
        (["--epochs"], "--epochs: needs a value, a whole number."),
        (["--epochs", "--lr", "1"], "--epochs: needs a value"),
        (["--run_dir="], "--run_dir: is empty"),
        (["--init_weights", ""], "--init_weights: is empty"),
        (["--resume", " "], "--resume: is empty"),
        (["--lr", "-1"], "--lr -1: a positive number up to 1e30"),
        (["--lr", "-1e-3"], "--lr -1e-3: a positive"),
        (["--lr", "nan"], "--lr nan: a positive"),
        (["--lr=.inf"], "--lr .inf: a positive"),
        (["--batch_size", "0"], "--batch_size 0: 1 or more, below 2^31."),
        (["--trainer.accumulate_grad_batches", "9" * 20], "1 or more, below 2^31"),
        (["--trainer.gradient_clip_val", "-1"], "0 (off) or more"),
        (["--trainer.val_check_interval", "0"], "a fraction of an epoch"),
        (["--trainer.check_val_every_n_epoch", "0"], "1 or more"),
        (["--early_stopping.patience", "-2"], "0 or more validations"),
        (["--early_stopping.min_delta=-0.1"], "0 (any gain counts)"),
        (["--data.dataset", "cifar11"], "Did you mean cifar10"),
        (["--run_dir", "None"], "--run_dir None: Python's word, which is text here; give null, or leave it out."),
        (["--data.limit=None"], "give null"),
        (["--trainer.logger", "None"], "give null"),
        (["--epochs", "-2"], "--epochs -2: 1 or more, or -1 with --trainer.max_steps."),
        (["--model.num_classes", "3"], "The data gives the number of classes"),
        (["--data.drop_last", "maybe"], "true or false"),
        (["--epochs", "1", "--trainer.max_epochs", "2"], "--epochs 1 and --trainer.max_epochs 2 are one setting"),
        (["recipe.yaml"], "fit --config recipe.yaml"),
        (["-lr", "1"], "Flags have two dashes: --lr"),
        (["-config", "a.yaml"], "Flags have two dashes: --config"),
        (["-checkpoint.every_n_minutes", "5"], "Flags have two dashes: --checkpoint.every_n_minutes"),
        (["--output", "x"], "--output: a flag of predict and inspect, not of fit."),
    ],
)
def test_a_mistake_is_named_with_the_nearest_right_thing(typed, expected):
    with pytest.raises(UserError) as error:
        normalize_arguments("fit", typed)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_run_behind_the_flags_is_named_as_such(tmp_path):
    for command in ("validate", "test", "predict"):
        with pytest.raises(UserError) as of_a_folder:
            normalize_arguments(command, ["--data.root", "other", str(tmp_path)])
        assert f"{command} {tmp_path}" not in str(of_a_folder.value)
    (tmp_path / "config.yaml").write_text("")
    for command in ("validate", "test", "predict"):
        with pytest.raises(UserError, match=f": {command} {tmp_path}$"):
            normalize_arguments(command, ["--data.root", "other", str(tmp_path)])


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet101", "timm/resnet26d", "resnet19"])
def test_names_of_models_are_left_to_those_who_import_the_libraries(name):
    assert normalize_arguments("fit", ["--model.name", name]) == [f"--model.name={name}"]
    assert table()["model.name"]["prefixes"] == ["torchvision/", "timm/"]


@pytest.mark.parametrize("command", ["validate", "test", "predict", "tune"])
@pytest.mark.parametrize(
    "flag", ["--checkpoint.every_n_minutes=5", "--early_stopping.patience=1", "--checkpoint=some.yaml"]
)
def test_what_only_fit_has_a_use_for_is_not_silently_ignored_by_others(command, flag):
    with pytest.raises(UserError, match=f": a flag of fit, not of {command}"):
        normalize_arguments(command, [flag])


@pytest.mark.parametrize(
    "typed", [["--epochs", "x" * 70_000], ["--" + "x" * 70_000], ["x" * 70_000], ["--epochs", "\x1b[31m\n1"]]
)
def test_a_message_is_short_and_on_one_line_whatever_was_typed(typed):
    with pytest.raises(UserError) as error:
        normalize_arguments("fit", typed)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


def test_the_last_value_of_a_flag_counts():
    assert flag_value(["--a=1", "--b=2", "--a=3"], "a") == "3"
    assert flag_value(["--a=1"], "b") is None


def test_every_flag_is_its_own_suggestion():
    for name in table():
        assert f"--{name}?" in suggest_flag(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle:\n  lr: 1\n", "modle.lr is no setting. Did you mean model.lr?"),
        ("epochs: 3\n", "epochs is short for trainer.max_epochs on the command line"),
        ("trainer:\n  max_epoch: 1\n", "Did you mean trainer.max_epochs?"),
        ("model:\n  lr: -1\n", "model.lr -1: a positive"),
        ("data:\n  limit: None\n", "data.limit None: Python's word"),
        ("model:\n  lr: .nan\n", "model.lr nan: a positive"),
        ("data:\n  batch_size: many\n", "data.batch_size many: a whole number"),
        ("model: [1\n", "not YAML"),
        ("data: {seed: 2024-99-99}\n", "not YAML (month must be in 1..12)"),
        ("data: &a {root: *a}\n", "not YAML (nested deeper"),
        ("model:\n  lr: 1\n  lr: 2\n", "not YAML (lr is given twice, on lines 2 and 3"),
        ("data:\n  batch_size: 064\n", "not YAML (064 on line 2 is another number"),
        ("model: {lr: 1}\nmodel.lr: 1\n", "model.lr is given twice"),
        ("model:\n# lr: 1\n", "nothing stands under model"),
        ("data:\n  batch_size:\n", "data.batch_size has no value; a whole number"),
        ("seed_everything: 4294967296\n", "seed_everything 4294967296: 0 to 4294967295"),
        ("- 1\n", "holds a list"),
        ("model:\n  model_kwargs: widths=8\n", "model.model_kwargs widths=8: names and values, such as '{widths: "),
        ("model:\n  model_kwargs: [8]\n", "model.model_kwargs [8]: names and values"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file(tmp_path, text, expected):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as error:
        check_config(recipe)
    assert f"--config {recipe}: " in str(error.value)
    assert expected in str(error.value)


def test_a_recipe_may_leave_things_to_files_lists_and_classes(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "data: data.yaml\nmodel:\n  model_kwargs: {widths: [4, 8]}\n  name: null\ntrainer:\n  deterministic: true\n"
        "  callbacks:\n  - class_path: Timer\n    init_args: {duration: '1:00'}\n  devices: [0, 1]\n"
    )
    check_config(recipe)
    (tmp_path / "empty.yaml").write_text("")
    check_config(tmp_path / "empty.yaml")


def test_neither_is_a_setting_of_a_recipe_empty(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {freeze: ''}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: model\.freeze: is empty"):
        check_config(tmp_path / "mine.yaml")


def test_a_missing_recipe_suggests_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smallnet_cpu.yaml").touch()
    with pytest.raises(UserError, match=r"Did you mean configs/smallnet_cpu\.yaml"):
        check_config(tmp_path / "smallnet_gpu.yaml")


# -- against the real parser ------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_signatures(parser):
    from cifar_lightning.cli.parser import TABLE, table_text

    command = "python -m cifar_lightning.cli.lightning_cli"
    assert TABLE.read_text(encoding="utf-8") == table_text(parser), f"generate it: {command}"


_VALUES = st.one_of(
    st.integers(-10, 1000).map(str),
    st.floats().map(repr),
    st.text(alphabet="0123456789eE+-._xXnaift", min_size=1, max_size=6),
    st.sampled_from(["null", "None", "true", "False", "yes", ".nan", "inf", "-.inf", "1e3", "0x10", "~", "on", "1_0"]),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["trainer.max_epochs", "model.lr", "data.drop_last", "data.image_size", "model.optimizer"]),
    value=_VALUES,
)
def test_no_value_that_the_parser_takes_is_refused(parser, name, value):
    try:
        parsed = parser.parse_args([f"--{name}={value}"], defaults=False)[name]
    except UserError:
        return
    row = table()[name]
    if "int" in row["types"] and "." in value:
        return  # a whole number that is written as 3.0: the front asks for 3
    if "bounds" in row and parsed is not None and not within(parsed, row["bounds"]):
        with pytest.raises(UserError):
            check_value(name, value, "it")
    else:
        check_value(name, value, "it")


@pytest.mark.parametrize("kind", [*POSIX_KINDS, "folder", "huge"])
def test_only_regular_files_of_a_configs_size_are_read(kind, tmp_path):
    path = tmp_path / "mine.yaml"
    if kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        make_special(path, kind)
    with pytest.raises(UserError, match=r"--config .*mine\.yaml: cannot be read"):
        check_config(path)
    if kind == "folder":
        return
    for flag in ("model", "trainer", "trainer.callbacks", "trainer.logger"):
        with pytest.raises(UserError, match=f"--{flag} .*mine.yaml"):
            normalize_arguments("fit", [f"--{flag}", str(path)])
        (tmp_path / "outer.yaml").write_text(f"{flag.replace('.', ': {')}: mine.yaml{'}' * flag.count('.')}\n")
        with pytest.raises(UserError, match=r"mine\.yaml"):  # relative to the config
            check_config(tmp_path / "outer.yaml")


@pytest.mark.parametrize("value", ["2024-01-01", "!!set {a}", "!!binary aGk=", "0x" + "f" * 6000, "9" * 6000])
@pytest.mark.parametrize("name", ["seed_everything", "model.lr", "data.root", "trainer.callbacks"])
def test_what_no_setting_is_gets_a_sentence(name, value, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{name.replace('.', ': {')}: {value}{'}' * name.count('.')}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: not YAML") as caught:
        check_config(tmp_path / "mine.yaml")
    assert len(str(caught.value)) < 400
