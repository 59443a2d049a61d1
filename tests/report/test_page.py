"""The page as a browser shows it, and what it is made of."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from browser import browser
from jinja2 import UndefinedError
from made_run import CIFAR10, make_run
from selenium.webdriver.common.keys import Keys

from cifar_lightning.formatting import count, percent, unbroken
from cifar_lightning.report.page import command_of, facts_of, lit, matrix_of, render, render_page, reproduction_of
from cifar_lightning.report.report import make_report
from cifar_lightning.report.results import read_results
from cifar_lightning.runs.folder import RunFolder

HUNDRED = [f"a_class_{index:02}" for index in range(100)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a comparison, so that the page has every section."""
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder / "one")
    make_report(run, make_run(folder / "two", seed=1))
    return run


@pytest.fixture(scope="module")
def page(run):
    return run.report.read_text(encoding="utf-8")


# -- in a browser ----------------------------------------------------------------------------------------------------


def opened(driver, file, theme="light"):
    """Open a file; return the addresses that it asked for apart from its own and the console's messages."""
    driver.get_log("performance"), driver.get_log("browser")  # of what was open before
    media = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    driver.get(file.as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = [url for url in sent if url != file.as_uri() and not url.startswith("data:")]
    return asked, driver.get_log("browser")


@pytest.mark.parametrize("width", [1280, 390])
def test_it_asks_for_nothing_logs_nothing_and_never_overflows_in_light_and_dark(run, width):
    with browser(width) as driver:
        colours = []
        for theme in ("light", "dark"):
            asked, logged = opened(driver, run.report, theme)
            assert asked == []
            assert logged == []
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            colours.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
            broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
            assert driver.execute_script(broken) == 0
            text = "return getComputedStyle(document.querySelector('.chart text')).fill"
            colours[-1] += driver.execute_script(text)
        assert colours == ["rgb(244, 245, 247)rgb(27, 31, 36)", "rgb(14, 16, 20)rgb(232, 234, 238)"]


def test_nothing_sticks_out_of_its_section_on_a_phone(run):
    wide = """return [...document.querySelectorAll('main *')].filter(e => {
        const box = e.getBoundingClientRect();
        return box.right > innerWidth + 1 && !e.closest('.scroll');
    }).map(e => e.outerHTML.slice(0, 80))"""
    with browser(390) as driver:
        opened(driver, run.report)
        assert driver.execute_script(wide) == []


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_it_round(run):
    findings = json.loads(run.findings.read_text(encoding="utf-8"))
    recalls = {row["name"]: row["recall"] for row in findings["classes"]}
    read = "return [...document.querySelectorAll('#class-table tbody th')].map(e => e.textContent)"
    with browser() as driver:
        opened(driver, run.report)
        assert driver.execute_script(read) == list(CIFAR10)
        heading = driver.find_element("xpath", "//table[@id='class-table']//button[text()='recall']")
        heading.click()
        shown = driver.execute_script(read)
        assert [recalls[name] for name in shown] == sorted(recalls.values(), reverse=True)
        assert heading.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
        heading.click()
        assert [recalls[name] for name in driver.execute_script(read)] == sorted(recalls.values())
        driver.find_element("xpath", "//table[@id='class-table']//button[text()='class']").click()
        assert driver.execute_script(read) == sorted(CIFAR10)


def test_small_images_are_scaled_up_pixel_by_pixel(run):
    style = "return getComputedStyle(document.querySelector('.image img')).imageRendering"
    with browser() as driver:
        opened(driver, run.report)
        assert driver.execute_script(style) == "pixelated"
        size = "const i = document.querySelector('.image img'); return [i.width, i.naturalWidth]"
        assert driver.execute_script(size) == [96, 32]


@pytest.mark.parametrize(
    ("names", "n", "image_size"),
    [(HUNDRED, 2000, 32), (("ant", "bee", "cow"), 60, 224)],
    ids=["100 classes", "3 classes"],
)
def test_many_and_few_classes_fit_as_well(tmp_path, names, n, image_size):
    made = make_run(tmp_path / "run", names=names, n=n, image_size=image_size, skill=4)
    make_report(made)
    assert made.report.stat().st_size < 3e6
    with browser(390) as driver:
        asked, logged = opened(driver, made.report)
        assert asked == logged == []
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        rows = "return document.querySelectorAll('#class-table tbody tr').length"
        assert driver.execute_script(rows) == len(names)


def test_the_matrix_is_switched_by_keyboard_and_printed_with_counts_and_percentages(run):
    read = """return [...document.querySelectorAll('.matrix td')].slice(0, 1).flatMap(cell => [...cell.children])
        .filter(e => getComputedStyle(e).display !== 'none').map(e => e.textContent)"""
    cm = json.loads(run.findings.read_text(encoding="utf-8"))["confusion_matrix"]
    number, share = count(cm[0][0]), f"{100 * cm[0][0] / sum(cm[0]):.1f}"
    with browser() as driver:
        opened(driver, run.report)
        assert driver.execute_script(read) == [number]
        driver.execute_script("document.querySelector('[name=matrix]').focus()")
        driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        assert driver.execute_script(read) == [share]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert driver.execute_script(read) == [number, share]


def test_a_table_is_sorted_by_keyboard_alone(run):
    recalls = {row["name"]: row["recall"] for row in json.loads(run.findings.read_text(encoding="utf-8"))["classes"]}
    with browser() as driver:
        opened(driver, run.report)
        driver.execute_script("document.querySelector('#class-table button').focus()")
        driver.switch_to.active_element.send_keys(Keys.TAB)
        driver.switch_to.active_element.send_keys(Keys.ENTER)
        shown = driver.execute_script(
            "return [...document.querySelectorAll('#class-table tbody th')].map(e => e.textContent)"
        )
        assert [recalls[name] for name in shown] == sorted(recalls.values(), reverse=True)


def test_of_many_classes_the_most_confused_are_in_the_matrix_and_all_groups_are_named(tmp_path):
    made = make_run(tmp_path / "run", names=HUNDRED, n=4000, skill=4)
    make_report(made)
    page = made.report.read_text(encoding="utf-8")
    findings = json.loads(made.findings.read_text(encoding="utf-8"))
    matrix = matrix_of(np.array(findings["confusion_matrix"]), HUNDRED)
    shown = [row["name"] for row in matrix["rows"]]
    assert len(shown) == 20
    assert shown == sorted(shown)
    assert {name for pair in findings["confused_pairs"] for name in (pair["true"], pair["predicted"])} <= set(shown)
    assert "20 of 100 classes, of the most confused pairs" in page
    (groups,) = (insight["groups"] for insight in findings["insights"] if insight["kind"] == "groups")
    listed = re.search(r'<ul class="groups">(.*?)</ul>', page, re.DOTALL).group(1)
    assert len(groups) > 4
    assert all(name in listed for members in groups.values() for name in members)


def test_what_is_moved_sideways_says_so_and_what_is_whole_does_not(run):
    hints = """return [...document.querySelectorAll('.scroll')].map(box => [
        box.scrollWidth > box.clientWidth + 1,
        getComputedStyle(box, '::before').content.includes('sideways'),
        box.tabIndex === 0])"""
    for width in (390, 1280):
        with browser(width) as driver:
            opened(driver, run.report)
            found = driver.execute_script(hints)
            assert all(len(set(hint)) == 1 for hint in found)
            assert any(hint[0] for hint in found) == (width == 390)


def test_the_print_has_no_navigation_and_shows_whole_tables(run):
    with browser() as driver:
        opened(driver, run.report)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert not driver.find_element("tag name", "nav").is_displayed()
        overflow = "return getComputedStyle(document.querySelector('.scroll')).overflowX"
        assert driver.execute_script(overflow) == "visible"


# -- what it is made of ----------------------------------------------------------------------------------------------


def test_it_is_one_file_below_3_mb_that_names_no_address(run, page):
    assert run.report.stat().st_size < 3e6
    outside = re.findall(r'(?:src|href|srcset|action)="(?!data:|#)([^"]*)"', page)
    assert outside == []
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_every_number_of_the_class_table_is_in_findings(run, page):
    findings = json.loads(run.findings.read_text(encoding="utf-8"))
    body = re.search(r'id="class-table">.*?<tbody>(.*?)</tbody>', page, re.DOTALL).group(1)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    assert len(rows) == 10
    for row, found in zip(rows, findings["classes"], strict=True):
        cells = [cell.replace("\u00a0", " ") for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        low, high = found["recall_interval_95"]
        assert cells == [
            found["name"],
            percent(found["recall"]),
            f"{100 * low:.1f} to {percent(high)}",
            percent(found["precision"]),
            percent(found["f1"]),
            count(found["support"]),
            count(found["predicted"]),
            percent(found["mean_confidence"]),
        ]
        values = [float(value) for value in re.findall(r'class="number[^"]*" data-value="([^"]*)"', row)]
        keys = ("recall", "precision", "f1", "support", "predicted", "mean_confidence")
        assert values == [found[key] for key in keys]


def test_the_matrix_holds_counts_and_their_fractions_of_the_true_class(run, page):
    cm = np.array(json.loads(run.findings.read_text(encoding="utf-8"))["confusion_matrix"])
    body = re.search(r'class="matrix">.*?<tbody>(.*?)</tbody>', page, re.DOTALL).group(1)
    rows = [re.findall(r"<td(.*?)</td>", row, re.DOTALL) for row in body.split("</tr>")[:-1]]
    for (row, column), number in np.ndenumerate(cm):
        shown = re.findall(r'<span class="(?:count|percent)">(.*?)</span>', rows[row][column])
        expected = [count(number), f"{100 * number / cm[row].sum():.1f}"]
        assert shown == (expected if number or row == column else [])
        assert ("right" in rows[row][column]) == (row == column)


def test_the_tiles_and_the_calibration_say_what_findings_do(run, page):
    findings = json.loads(run.findings.read_text(encoding="utf-8"))
    calibration = findings["calibration"]
    for said in (
        percent(findings["summary"]["accuracy"], 2),
        percent(findings["summary"]["macro_f1"], 2),
        f"{findings['summary']['loss']:.4f}",
        percent(calibration["before"]["ece"], 2),
        *(f">{percent(row['threshold'])}</td>" for row in findings["coverage"] if row["threshold"] is not None),
        *(f">{percent(row['accuracy'], 2)}</td>" for row in findings["coverage"] if row["num_images"]),
        percent(calibration["after"]["ece"], 2),
        f"{calibration['temperature']:.3f}",
        *(item["text"].replace("'", "&#39;") for insight in findings["insights"] for item in insight["items"]),
    ):
        assert unbroken(said) in page


def test_no_number_is_parted_from_its_sign_but_in_what_is_copied(tmp_path):
    made = make_run(tmp_path / "run", names=("ant", "bee"), n=60)
    made.config.write_text("seed_everything: 0\nnote: 5 % of p = 1\n", encoding="utf-8")
    make_report(made, make_run(tmp_path / "other", names=("ant", "bee"), n=60, seed=1))
    page = made.report.read_text(encoding="utf-8")
    assert "note: 5 % of p = 1" in page
    outside = re.sub(r"<pre>.*?</pre>|<svg.*?</svg>|<style>.*?</style>|<script>.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r".{20}(?:\d %|\bp [=<&]|[=;] \d).{5}", re.sub(r'"[^"]*"', "", outside)) == []


def test_both_runs_are_called_the_same_throughout(run, page):
    section = re.search(r'<section id="comparison">.*?</section>', page, re.DOTALL).group()
    assert "<h2>Compared with two</h2>" in section
    assert section.count(str(run.path)) == section.count(str(run.path.with_name("two"))) == 1
    assert not re.search(r"\b(here|there)\b", re.sub(r'"[^"]*"', "", section))
    assert "<span>this run: " in section
    assert "<span>the other: " in section


def test_the_images_that_one_run_alone_classifies_correctly_are_called_a_selection(run, page):
    changed = json.loads(run.findings.read_text(encoding="utf-8"))["comparison"]["changed"]["won"]
    assert f"Correct in this run only: {changed['count']} images</h3>" in page
    number = int(re.search(rf"(\d+) of {changed['count']} are shown in this section", page).group(1))
    assert 0 < number <= len(changed["images"])
    assert len(changed["indices"]) == changed["count"] > len(changed["images"])


def test_p_is_not_repeated_in_its_column_and_no_two_columns_are_called_the_same(page):
    section = re.search(r'<section id="comparison">.*?</section>', page, re.DOTALL).group()
    assert not re.search(r"<td[^>]*>p\b", section)
    for heading in re.findall(r"<thead>(.*?)</thead>", page):
        labels = re.findall(r"<button[^>]*>(.*?)</button>", heading)
        assert len(set(labels)) == len(labels)


def test_insights_are_cards_in_the_section_of_their_subject_and_a_line_where_nothing_was_found(run, page):
    findings = json.loads(run.findings.read_text(encoding="utf-8"))
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL))
    where = {"accuracy": "accuracy", "calibration": "calibration"}
    for insight in findings["insights"]:
        title = unbroken(insight["title"])
        mark = f'<article class="card"><p><b>{title}</b>'
        mark = mark if insight["is_found"] else f'<details class="nothing"><summary>{title}</summary>'
        assert page.count(mark) == sections[where.get(insight["section"], "errors")].count(mark) == 1
    assert {insight["is_found"] for insight in findings["insights"]} == {True, False}


def test_an_image_is_on_the_page_once_with_its_name(run, page):
    shown = re.findall(r'<img src="([^"]*)"', page)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(set(shown)) == len(shown) > 50
    assert len(set(ids)) == len(ids)
    findings = json.loads(run.findings.read_text(encoding="utf-8"))
    for item in findings["galleries"][0]["images"]:
        assert f'title="{item["name"]}"' in page
        assert f'id="image-{item["index"]}"' in page
    assert all(f"#{target}" != "#" and target in ids for target in re.findall(r'href="#([^"]*)"', page))


def test_an_image_is_as_bright_as_its_grad_cam():
    image = np.full((4, 4, 3), 200, dtype=np.uint8)
    cam = np.zeros((4, 4), dtype=np.uint8)
    cam[:, 2:] = 255
    assert lit(image, cam)[0, :, 0].tolist() == [40, 40, 200, 200]


def test_what_a_run_was_is_said_without_doubled_words():
    config = {"model": {"optimizer": "muon", "lr": 0.05}}
    facts = dict(facts_of({"config": config, "split": {}, "environment": {"device": "cpu", "num_devices": 1}}))
    assert facts["Optimizer"] == "muon, lr 0.05"
    assert facts["Device"] == "cpu, num_devices 1"


def test_an_optimizer_of_a_subclass_is_named_in_place_of_the_settings_of_ours():
    config = {"model": {"optimizer": "adamw", "lr": 0.003, "schedule": "one_cycle", "label_smoothing": 0.1}}
    facts = dict(facts_of({"config": config, "split": {}, "environment": {"optimizers": ["SGD"]}}))
    assert facts["Optimizer"] == "SGD, label_smoothing 0.1"
    facts = dict(facts_of({"config": config, "split": {}, "environment": {"optimizers": []}}))
    assert facts["Optimizer"] == "adamw, lr 0.003, label_smoothing 0.1, schedule one_cycle"


def test_what_most_runs_leave_off_is_named_where_it_is_on():
    off = {"mixup": 0.0, "cutmix": 0.0, "ema_decay": 0.0, "pretrained": False, "pct_start": None}
    plain = {"policy": "none", "erasing": 0.0, "limit": None, "class_weights": "none", "sampler": "none"}
    config = {"model": {"optimizer": "sgd", "lr": 0.1, **off}, "data": {"flip": "random", "batch_size": 32, **plain}}
    known = {"config": config, "split": {}, "environment": {}}
    config["trainer"] = {"max_epochs": 3}
    facts = dict(facts_of(known))
    assert facts["Optimizer"] == "sgd, lr 0.1"
    assert facts["Training"] == "max_epochs 3, batch_size 32"
    assert facts["Augmentation"] == "flip random"
    config["model"] |= {"sgd_lr": 0.3, "momentum": 0.6, "weight_decay": 0.1}  # the first two are Muon's
    config["trainer"] = {"max_epochs": -1, "max_steps": 70}
    facts = dict(facts_of(known))
    assert facts["Optimizer"] == "sgd, lr 0.1, weight_decay 0.1"
    assert facts["Training"] == "max_steps 70, batch_size 32"
    config["model"] |= {"cutmix": 1.0, "ema_decay": 0.999, "pretrained": True, "pct_start": 0.05}
    config["data"] |= {"policy": "trivial", "erasing": 0.25, "limit": 500, "sampler": "balanced"}
    facts = dict(facts_of(known))
    assert facts["Optimizer"] == "sgd, lr 0.1, weight_decay 0.1, pct_start 0.05, ema_decay 0.999, pretrained True"
    assert facts["Training"] == "max_steps 70, batch_size 32, limit 500, sampler balanced"
    assert facts["Augmentation"] == "flip random, policy trivial, erasing 0.25, cutmix 1.0"


def test_names_cannot_become_markup_or_steer_anything(tmp_path):
    names = ("<script>alert(1)</script>", 'a"b', "狗", "a\x1b[31m\n", "caf\udce9", "{{ 7 * 7 }}")
    made = make_run(tmp_path / "run", names=names, n=120)
    make_report(made)
    page = made.report.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "狗" in page
    assert "caf\\udce9" in page
    assert "\x1b" not in page
    assert "{{ 7 * 7 }}" in page
    with browser() as driver:
        asked, logged = opened(driver, made.report)
        assert asked == logged == []
        read = "return [...document.querySelectorAll('#class-table tbody th')].map(e => e.textContent)"
        assert driver.execute_script(read)[:3] == list(names[:3])


def test_what_a_run_does_not_know_of_itself_is_left_out():
    nothing = {"config": {}, "split": {}, "environment": {}}
    assert facts_of(nothing) == []
    assert all(line.startswith("# ") for line in reproduction_of(nothing).splitlines())
    assert command_of({}) == ""


def test_the_reproduction_names_the_commit_and_what_no_commit_holds():
    environment = {"commit": "c0ffee", "dirty": True, "versions": {"torch": "2.10.0"}}
    config = {"model": {"name": "smallnet"}}
    lines = reproduction_of({"config": config, "split": {}, "environment": environment}).splitlines()
    assert lines[:3] == ["# the run used torch 2.10.0", "git checkout c0ffee", "pip install -e ."]
    assert lines[3].startswith("# ")
    assert lines[4].startswith("cifar-lightning fit --config config.yaml")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"resumed": [{"changed": {}}, {}], "command": ["python", "train.py", "fit"]}, None),
        (
            {"resumed": [{"changed": {"trainer.max_epochs": 9}}, {"changed": {"model.lr": 0.1}}]},
            "model.lr, trainer.max",
        ),
        ({"command": ["python", "train.py", "fit"], "ckpt_path": "runs/1/last.ckpt"}, "--ckpt_path runs/1/last.ckpt"),
        ({"command": ["python", "train.py", "fit", "--ckpt_path", "null"]}, None),
    ],
)
def test_a_training_that_its_config_does_not_repeat_says_so(environment, said):
    run = {"config": {"model": {"name": "smallnet"}}, "split": {}, "environment": environment}
    fit, *rest = reproduction_of(run).splitlines()
    assert fit.startswith("cifar-lightning fit --config config.yaml")
    assert len(rest) == (said is not None)
    assert all(said in line and line.startswith("# ") for line in rest)


@pytest.mark.parametrize("of", [{"model": {"name": "<Net>"}}, {"data": {"dataset": "<Rows>"}}])
def test_a_run_of_objects_from_python_names_no_command_that_cannot_repeat_it(of, tmp_path, page):
    assert "fit --config config.yaml" in page
    assert "inspect --config config.yaml" in page
    made = make_run(tmp_path / "run")
    made.config.write_text(yaml.safe_dump(of))
    make_report(made)
    shown = made.report.read_text(encoding="utf-8")
    assert "--config" not in shown
    assert "None" not in dict(facts_of({"config": of, "split": {"seed": 3}, "environment": {}}))["Seeds"]
    (name,) = (value for group in of.values() for value in group.values())
    assert name in reproduction_of({"config": of, "split": {}, "environment": {}})


def test_no_class_is_called_the_lowest_or_most_frequent_where_several_are(tmp_path):
    made = make_run(tmp_path / "run", names=HUNDRED, n=2000, skill=50)
    make_report(made)
    shown = made.report.read_text(encoding="utf-8")
    assert "Lowest recall" not in shown
    assert "Most confused:" not in shown
    assert "most frequent class" not in shown


@pytest.mark.parametrize("program", ["train.py", "-m cifar_lightning", "cifar-lightning"])
def test_the_command_of_a_run_is_the_one_that_was_typed(program):
    words = ["python3", *program.split(), "fit", "--lr", "a b"]
    python = "" if program == "cifar-lightning" else "python "
    assert command_of({"command": words}) == f"{python}{program} fit --lr 'a b'"


def test_a_run_without_validation_images_has_a_page_that_says_what_was_not_checked(tmp_path):
    made = make_run(tmp_path / "run", n=200)
    made.predictions_val.unlink()
    make_report(made)
    text = made.report.read_text(encoding="utf-8")
    assert "Validation images were not checked" in text
    assert "Without validation images the confidence is chosen on the test images" in text


def test_without_kept_images_mistakes_and_label_errors_are_listed_by_name(tmp_path):
    made = make_run(tmp_path / "run", n=200)
    made.gallery.unlink()
    make_report(made)
    page, findings = made.report.read_text(encoding="utf-8"), json.loads(made.findings.read_text())
    assert findings["galleries"] == []
    assert findings["mistakes"]["images"][0]["name"].rpartition("/")[2] in page
    assert "Labels to check" in page
    assert 'href="#images"' in page


def test_columns_of_the_matrix_have_names_of_their_own(tmp_path):
    names = ["long " * 8 + "1", "long " * 8 + "2", "cat"]
    matrix = matrix_of(np.eye(3, dtype=np.int64), names)
    assert [row["name"] for row in matrix["rows"]] == names
    shown = [row["short"] for row in matrix["rows"]]
    assert len(set(shown)) == 3
    assert max(map(len, shown)) <= 24


def test_only_learning_rates_that_were_not_recorded_by_step_are_called_so(tmp_path):
    made = make_run(tmp_path / "run", n=200)
    lrs, epochs = json.loads(made.learning_rates.read_text()), len(made.metrics_csv.read_text().splitlines()) - 1
    made.learning_rates.write_text(json.dumps({key: values[:epochs] for key, values in lrs.items()}))  # a step an epoch
    make_report(made)
    assert "were not recorded" not in made.report.read_text(encoding="utf-8")
    assert ">each step<" in made.report.read_text(encoding="utf-8")
    made.learning_rates.unlink()
    make_report(made)
    assert "were not recorded" in made.report.read_text(encoding="utf-8")
    assert ">each step<" not in made.report.read_text(encoding="utf-8")


def test_a_value_that_the_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="files"):
        render("model_card.md", card={})


def test_images_above_the_crisp_size_are_reduced(tmp_path):
    made = make_run(tmp_path / "run", names=("ant", "bee"), n=60, image_size=224)
    make_report(made)
    page = made.report.read_text(encoding="utf-8")
    assert 'class="smooth"' in page
    assert "data:image/jpeg" in page
    assert np.load(made.gallery)["images"].nbytes > 5 * len(page)


def test_identical_images_are_named_and_their_absence_is_said(tmp_path, page):
    assert "No identical images were found" in page
    run = make_run(tmp_path / "run")
    split = json.loads(run.split.read_text())
    first = [["test/<b>/0.png", "train/a/\x1b[31m.png"]]
    split["duplicates"] = [{"kind": "across splits", "text": "5 of 9 test images", "num_images": 5, "first": first}]
    run.split.write_text(json.dumps(split))
    make_report(run)
    shown = run.report.read_text(encoding="utf-8")
    assert "No identical images were found" not in shown
    assert "5 of 9 test images" in shown
    assert "test/&lt;b&gt;/0.png = train/a/\\x1b[31m.png" in shown


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of 24 classes, every other one without test images, and two of these predicted, against its copy."""
    made = make_run(tmp_path_factory.mktemp("runs") / "half", names=HUNDRED[:24], n=480)
    arrays = dict(np.load(made.predictions))
    kept = arrays["targets"] % 2 == 0
    logits = arrays["logits"][kept]
    logits[:, 5::2] = -50
    of_images = {name: arrays[name][kept] for name in ("targets", "indices", "names")}
    np.savez(made.predictions, logits=logits, class_names=arrays["class_names"], **of_images)
    make_report(made, RunFolder(shutil.copytree(made.path, made.path.with_name("copy"))))
    return made


def test_the_worst_classes_are_first_and_those_without_images_last(half):
    findings = json.loads(half.findings.read_text(encoding="utf-8"))
    recalls = {row["name"]: row["recall"] for row in findings["classes"]}
    table = re.search(r'id="class-table">.*?</table>', half.report.read_text(encoding="utf-8"), re.DOTALL).group()
    shown = [recalls[name] for name in re.findall(r'<th scope="row" data-value="(.*?)"', table)]
    assert shown == [*sorted(recall for recall in recalls.values() if recall is not None), *[None] * 12]


def test_macro_f1_names_the_number_of_classes_that_it_is_the_mean_of(half, page):
    assert "mean over 14 of 24 classes" in half.report.read_text(encoding="utf-8")
    assert "mean over 10 classes" in page


def test_a_class_without_images_has_no_interval_of_a_difference(half):
    shown = half.report.read_text(encoding="utf-8")
    section = re.search(r'<section id="comparison">.*?</section>', shown, re.DOTALL).group()
    (row,) = [row for row in re.findall(r"<tr>.*?</tr>", section) if ">a_class_01<" in row]
    assert re.findall(r">([^<]+)</td>", row) == ["0", "-", "-", "-", "-", "1.0000"]


def test_a_confidence_below_one_is_not_rounded_to_one(half):
    findings = json.loads(half.findings.read_text(encoding="utf-8"))
    findings["comparison"] = None
    findings["coverage"][0] |= {"threshold": 0.99996, "num_images": 8, "coverage": 0.004, "accuracy": 0.875}
    results = read_results(half)
    assert unbroken(">99.996 %</td>") in render_page(findings, results.images, None, "", results.confusion)
