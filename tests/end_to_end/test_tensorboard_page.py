"""TensorBoard itself, started on three runs, as its server responds and a browser shows it."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from browser import browser
from program import TINY, start
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """TensorBoard's address over three short runs; it ends with the tests."""
    folder = tmp_path_factory.mktemp("board")
    for lr in (0.01, 0.003, 0.001):
        start("fit", *TINY, "--epochs", "2", "--lr", lr, cwd=folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "runs"), "--host", "localhost"]
    log = (folder / "log").open("w")
    server = subprocess.Popen([*command, "--port", str(port), "--load_fast", "false"], stdout=log, stderr=log)
    try:
        url = f"http://localhost:{port}"
        deadline = time.monotonic() + 120
        while not loaded(url):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def ask(url, path, body=None):
    """Return a response of the server as plain types."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/data/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def loaded(url):
    try:
        tags = ask(url, "plugin/scalars/tags")
    except OSError:
        return False
    return len(tags) == 3 and all("val_best/acc" in of_run for of_run in tags.values())


def test_the_server_has_scalars_images_curves_and_hyperparameters_of_each_run(address):
    scalars = ask(address, "plugin/scalars/tags")
    assert sorted(scalars) == ["smallnet/1", "smallnet/2", "smallnet/3"]
    for tags in scalars.values():
        assert {"train/loss", "val/acc", "val/loss", "train/lr", "val_best/acc"} <= set(tags)
        assert sum(tag.startswith("val_acc_of_class/") for tag in tags) == 10
    for tags in ask(address, "plugin/images/tags").values():
        assert {
            "visuals/batch_as_trained_on",
            "visuals/confusion_matrix",
            "visuals/most_confident_mistakes",
            "visuals/reliability",
        } <= set(tags)
    curves = ask(address, "plugin/pr_curves/tags")
    assert all(len(tags) == 10 for tags in curves.values())
    experiment = ask(address, "plugin/hparams/experiment", {"experimentName": ""})
    assert {info["name"] for info in experiment["hparamInfos"]} >= {"lr", "model", "batch_size", "epochs"}
    wanted = {"val_best/acc", "val_best/test_acc", "val_best/test_loss"}
    assert {info["name"]["tag"] for info in experiment["metricInfos"]} == wanted
    columns = [{"metric": name} for name in sorted(wanted)]
    asked = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"]}
    asked |= {"colParams": [{"metric": {"tag": column["metric"], "group": ""}} for column in columns]}
    groups = ask(address, "plugin/hparams/session_groups", {**asked, "startIndex": 0, "sliceSize": 10})
    lrs = sorted(group["hparams"]["lr"] for group in groups["sessionGroups"])
    assert lrs == [0.001, 0.003, 0.01]
    for group in groups["sessionGroups"]:
        assert {value["name"]["tag"] for value in group["metricValues"]} == wanted


# Everything that is shown lies in shadow roots.
TEXT = """
const texts = [];
const walk = (node) => {
  if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent);
  if (node.shadowRoot) walk(node.shadowRoot);
  if (node.nodeName !== 'STYLE' && node.nodeName !== 'SCRIPT') node.childNodes.forEach(walk);
};
walk(document.body);
return texts.join(' ');
"""


@pytest.mark.parametrize(
    ("tab", "shown"),
    [
        ("timeseries", ["/acc", "/loss_step", "val_acc_of_class", "smallnet/1", "smallnet/3"]),
        ("custom_scalars", ["Accuracy", "Loss", "Learning rate", "Accuracy of each class"]),
        ("images", ["visuals", "most_confident_mistakes", "confusion_matrix", "smallnet/2"]),
        ("pr_curves", ["pr_of_class"]),
        ("hparams", ["val_best/acc", "lr", "batch_size", "smallnet/1", "0.003"]),
    ],
)
def test_the_browser_shows_each_tab_filled(address, tab, shown):
    with browser(1600, 1600) as driver:
        driver.get(f"{address}/#{tab}")

        def is_shown(_):
            text = driver.execute_script(TEXT)
            return all(word in text for word in shown)

        WebDriverWait(driver, 60).until(is_shown, f"{tab}: {shown} are not all on the page")
        assert "No dashboards are active" not in driver.execute_script(TEXT)
