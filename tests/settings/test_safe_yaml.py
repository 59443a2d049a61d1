"""YAML that cannot be read fails in one way, and what would grow without end is refused at once."""

import pytest
import yaml

from cifar_lightning.settings.safe_yaml import MAX_DEPTH, MAX_NODES, checked, read_yaml


@pytest.mark.parametrize("text", ["", "a: 1", "a: &x {b: [1, 2]}\nc: *x", "a: .nan", "- 1", "'2024-01-01'", "ä: ☃"])
def test_plain_data_is_what_pyyaml_reads(text):
    assert repr(read_yaml(text)) == repr(yaml.safe_load(text))


WRONG = ["2024-99-99", "!!int x", "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "9" * 5000, "[1", "? [1]: 2"]
WRONG += ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "[" * 3000, "- " * 3000, "a\0b"]
WRONG += [
    '"a\\0b"',
    "2024-01-01",
    "a: {b: 2024-01-01 10:00:00}",
    "!!set {a}",
    "!!binary aGk=",
    "!!omap [a: 1]",
    "0x" + "f" * 6000,
    "2024-01-01: 1",
]


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize("read", [read_yaml, checked(yaml.safe_load)], ids=["ours", "PyYAML's own"])
def test_whatever_is_wrong_is_a_yaml_error(text, read):
    with pytest.raises(yaml.YAMLError):
        read(text)


@pytest.mark.parametrize("text", ["&a [*a]", "&a {b: *a}", "a: &a\n  b: {c: [*a]}"])
def test_an_alias_inside_what_it_names_is_refused(text):
    with pytest.raises(yaml.YAMLError, match="an alias inside what it names"):
        read_yaml(text)


def test_aliases_of_aliases_are_counted_as_written_out_and_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 30)]
    with pytest.raises(yaml.YAMLError, match=f"more than {MAX_NODES:,} values"):
        read_yaml("\n".join(lines))  # 10^30 values would take longer than the universe is old


OTHER = ["064", "010", "-010", "0_10", "1:30", "1:30.5", "10:00:00:00", "a: [010]", "010: a"]


@pytest.mark.parametrize("text", OTHER)
def test_a_number_that_yaml_reads_as_another_is_refused(text):
    with pytest.raises(yaml.YAMLError, match="on line 1 is another number in YAML"):
        read_yaml(text)


def test_numbers_next_to_it_and_text_are_read():
    lines = ["007", "0", "00", "64", "-1_000", "0x10", "010.5", "1e3", "'064'", "'1:30'", "00:00:00:12", "08", "1: 2"]
    expected = [7, 0, 0, 64, -1000, 16, 10.5, "1e3", "064", "1:30", "00:00:00:12", "08", {1: 2}]
    assert read_yaml("\n".join(f"- {line}" for line in lines)) == expected


TWICE = ["lr: 1\nlr: 2", "{lr: 1, 'lr': 1}", "- {a: {b: 1, c: 2, b: 3}}", "a: &x {b: 1, b: 2}\nc: *x"]


@pytest.mark.parametrize("text", TWICE)
def test_a_key_that_a_mapping_has_twice_is_refused(text):
    with pytest.raises(yaml.YAMLError, match=r"(lr|b) is given twice, on lines 1 and [12]"):
        read_yaml(text)
    assert read_yaml("a: &x {b: 1}\nc: {b: 1}\nd: {<<: *x, b: 2}")["d"] == {"b": 2}


def test_depth_is_allowed_to_its_limit_and_not_beyond():
    assert read_yaml("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    with pytest.raises(yaml.YAMLError, match="nested deeper"):
        read_yaml("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_names_of_files_that_are_not_utf_8_come_back():
    names = {"root": "a \udcfc\udc80", "list": ["\udcff"], "plain": "caf\u00e9"}
    assert read_yaml(yaml.safe_dump(names)) == names
    assert checked(yaml.safe_load)(yaml.safe_dump(names)) == names
