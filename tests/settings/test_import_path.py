"""Import paths on the command line, and those found in run folders."""

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from cifar_lightning.cli.flags import check_config, table
from cifar_lightning.errors import UserError
from cifar_lightning.settings.import_path import check_trust, import_object, import_paths, import_trusted


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one's own in the working directory."""
    (tmp_path / "my_parts").mkdir()
    (tmp_path / "my_parts" / "__init__.py").touch()
    (tmp_path / "my_parts" / "sets.py").write_text(
        "class Photos:\n    def make(self): return 1\ndef birds(): return 2\n"
    )
    (tmp_path / "my_parts" / "broken.py").write_text("import a_missing_library\n")
    (tmp_path / "my_parts" / "raising.py").write_text("raise OSError('no disk today')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_parts"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_path_with_a_colon_or_points_is_imported_from_the_working_directory(package: Path) -> None:
    assert import_object("my_parts.sets:birds", "--data.dataset")() == 2
    assert import_object("my_parts.sets.Photos", "--data.dataset") is import_object("my_parts.sets:Photos", "--x")
    assert import_object("my_parts.sets:Photos.make", "--x")(None) == 1
    assert import_object("collections:OrderedDict", "--x") is OrderedDict


@pytest.mark.parametrize(
    ("path", "reasons"),
    [
        ("my_parts.sets:bird", ["has no bird", "birds?"]),
        ("my_parts.sets.Photo", ["has no Photo", "Photos?"]),
        ("my_parts.set:birds", ["no module my_parts.set", "my_parts.sets?"]),
        ("my_part.sets:birds", ["no module my_part", "my_parts?"]),
        ("my_parts.broken:x", ["imports a_missing_library"]),
        ("my_parts.raising:x", ["OSError: no disk today"]),
        ("not a path", ["not an import path"]),
        ("os:", ["not an import path"]),
        ("plain", ["not an import path"]),
    ],
)
def test_a_path_that_cannot_be_imported_is_refused_with_flag_value_and_cause(
    path: str, reasons: list[str], package: Path
) -> None:
    with pytest.raises(UserError) as raised:
        import_object(path, "--data.dataset")
    for text in (f"--data.dataset {path}", *reasons):
        assert text in str(raised.value)


@pytest.mark.parametrize("path", ["my_parts.sets:birds", "os:system", "torchnot.x:y", "subprocess.Popen"])
def test_code_named_in_a_run_folder_is_not_imported_without_trust(
    path: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cifar-lightning", "test", "runs/a b/1"])
    with pytest.raises(UserError, match="cifar-lightning test 'runs/a b/1' --trust_code true"):
        check_trust(path, "--model.name", Path("config.yaml"), trust_code=False)
    assert "my_parts.sets" not in sys.modules
    check_trust(path, "--model.name", Path("config.yaml"), trust_code=True)


@pytest.mark.parametrize("path", ["torch:os.abort", "torchvision.datasets:FakeData", "my.sets:birds"])
def test_a_data_set_that_a_run_names_is_code_in_any_package(path: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(f"data: {{dataset: '{path}'}}\n")
    with pytest.raises(UserError, match="--trust_code true"):
        check_config(tmp_path / "config.yaml")
    check_config(tmp_path / "config.yaml", trust_code=True)


@pytest.mark.parametrize("path", ["torch.hub:load", "torch:os.system", "torch:load", "torch.utils.data:dataloader"])
def test_what_runs_code_in_a_trusted_package_is_not_trusted(path: str) -> None:
    with pytest.raises(UserError, match="trust"):
        import_trusted(path, "--model.name", Path("best.ckpt"), trust_code=False)


@pytest.mark.parametrize(
    "path", ["torch.hub:load", "torch:os.system", "torch.utils.cpp_extension:subprocess.Popen", "torch.load"]
)
def test_neither_is_it_in_a_config_which_is_read_without_torch(path: str) -> None:
    with pytest.raises(UserError, match="trust"):
        check_trust(path, "--model.loss", Path("config.yaml"), trust_code=False)


def test_classes_of_known_libraries_are_trusted() -> None:
    for path in (
        "torch.nn:CrossEntropyLoss",
        "torch.optim.RAdam",
        "torchvision.models:resnet18",
        "torch.nn.functional.nll_loss",
    ):
        assert callable(import_trusted(path, "--x", Path("best.ckpt"), trust_code=False))
        check_trust(path, "--x", Path("config.yaml"), trust_code=False)
    assert import_trusted("torch.nn.Linear", "--x", Path("best.ckpt"), trust_code=False) is torch.nn.Linear


def test_import_paths_of_a_config_are_found() -> None:
    config = {
        "data": {"dataset": "my.sets:birds", "root": "my.photos"},
        "trainer": {"callbacks": [{"class_path": "my.Callback", "init_args": {"hook": "os.system", "n": 3}}]},
    }
    assert list(import_paths(config)) == [
        ("data.dataset", "my.sets:birds"),
        ("trainer.callbacks.class_path", "my.Callback"),
        ("trainer.callbacks.init_args.hook", "os.system"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "model: {name: 'my:Net'}",
        "model: {name: my.Net}",
        "trainer: {callbacks: [{class_path: my.Callback}]}",
        "data: {transforms: [default, {class_path: my.Noise}]}",
        "data: {transforms: [my.Noise]}",
        "trainer: {callbacks: [my.Callback]}",
        "trainer: {logger: my.Logger}",
        "model: {model: my.Net}",
        "model: {metrics: my.Metric}",
        "model: {metrics: {kappa: my.Metric}}",
        "trainer: {accelerator: my.Accelerator}",
        "trainer: {callbacks: '[{class_path: my.Callback, of: 2024-01-01}]'}",
        "optimizer: '{class_path: my.Optimizer}'",
        "data: {transforms: [{class_path: torch.nn.Sequential, init_args: {a: {class_path: torch.load}}}]}",
    ],
)
def test_the_config_of_a_run_needs_trust_and_a_config_elsewhere_does_not(line: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(line)
    check_config(config)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="--trust_code true"):
        check_config(config)
    check_config(config, trust_code=True)


def test_the_config_of_a_seeds_run_without_a_checkpoint_needs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("out/0", "out/notes"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").write_text("model: {loss: 'subprocess:Popen'}")
    check_config(tmp_path / "out" / "0" / "config.yaml")
    (tmp_path / "out" / "seeds.json").write_text('{"seeds": [0]}')
    monkeypatch.chdir(tmp_path / "out" / "0")
    for config in (Path("config.yaml"), Path("../0/config.yaml"), tmp_path / "out" / "0" / "config.yaml"):
        with pytest.raises(UserError, match="--trust_code true"):
            check_config(config)
        check_config(config, trust_code=True)
    check_config(tmp_path / "out" / "notes" / "config.yaml")  # no run of these seeds


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("trainer: {callbacks: settings.yaml}", "my.Class"),
        ("trainer: {callbacks: [./settings.yaml]}", "{class_path: my.Class}"),
        ("trainer: settings.yaml", "{callbacks: [my.Class]}"),
        ("optimizer: sub/outer.yaml", "{class_path: torch.load}"),
        ("trainer: {logger: settings.yaml}", "{class_path: my.Class}  # \xff"),
        ("model: {model: {class_path: torch.nn.Sequential, init_args: {a: settings.yaml}}}", "my.Class"),
        ("model: {metrics: settings.yaml}", "settings.yaml"),
        ("trainer: {callbacks: ~/settings.yaml}", "my.Class"),
        ("trainer: {callbacks: 'file://HERE/settings.yaml'}", "my.Class"),
        ("trainer: {callbacks: 'file:/HERE/settings.yaml'}", "my.Class"),
    ],
)
def test_neither_is_code_that_it_names_in_a_file_of_settings(
    line: str, settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    line = line.replace("HERE", str(tmp_path))
    config = tmp_path / "config.yaml"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "outer.yaml").write_text("../settings.yaml")
    (tmp_path / "settings.yaml").write_bytes(settings.encode("latin-1"))
    config.write_text(line)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"--trust_code true|settings\.yaml: cannot be read"):
        check_config(config)
    (tmp_path / "settings.yaml").write_text("{}")
    check_config(config)


def test_weights_that_a_config_names_are_no_file_of_settings(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2_000_000)}, tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_text("model: {model_kwargs: {checkpoint_path: weights.pth}}")
    (tmp_path / "checkpoints").mkdir()
    check_config(tmp_path / "config.yaml")


def test_files_of_settings_that_name_each_other_many_times_are_not_read_without_end(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("trainer: {callbacks: a.yaml}")
    for name, other in (("a.yaml", "b.yaml"), ("b.yaml", "a.yaml")):
        (tmp_path / name).write_text(f"[{', '.join([other] * 1000)}]")
    with pytest.raises(UserError, match=r"[ab]\.yaml: cannot be read .*100"):
        check_config(tmp_path / "config.yaml")


def test_every_setting_that_takes_a_class_may_be_its_path() -> None:
    plain = {"trainer.devices", "trainer.max_time", "trainer.val_check_interval", "model.loss_kwargs"}
    plain |= {"model.model_kwargs", "model.freeze", "data.train_sizes", "data.class_names"}
    for name in {name for name, row in table().items() if row.get("open")} - plain:
        assert list(import_paths({name: "my.Class"})) == [(name, "my.Class")]


def test_the_config_of_a_run_may_name_classes_and_plain_functions_of_known_libraries(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    inner = "{class_path: torchvision.transforms.v2.ToDtype, init_args: {dtype: torch.uint8}}"
    transform = f"{{class_path: torchvision.transforms.v2.Compose, init_args: {{transforms: [{inner}]}}}}"
    (tmp_path / "config.yaml").write_text(f"data: {{transforms: [default, {transform}]}}")
    check_config(tmp_path / "config.yaml")
    check_trust("torch.nn.functional:cross_entropy", "--x", tmp_path / "best.ckpt", trust_code=False)
