"""Make the images of README and docs: train the quickstart config, then photograph terminal, report and TensorBoard.

python -m benchmarks.accuracy.screenshots                  into docs/images/
python -m benchmarks.accuracy.screenshots --output DIR --run RUN    of a run that exists: no image of the terminal

Needs Chromium with its driver (apt-get install chromium chromium-driver) and the `dev` extra.
"""

import argparse
import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks import ROOT

MAX_BYTES = 100_000  # of an image
COLUMNS = 100
NUM_LINES = 30  # of the end of `fit`
WIDTH_PX, HEIGHT_PX = 1000, 1100  # of the report's beginning
BOARD_PX = (1280, 800)  # of the window of a small laptop: TensorBoard at its default size
CARDS = "document.querySelectorAll('card-view').length > 5"
NUM_COLORS = (160, 64, 32)  # of a palette, which makes the file a third as large; the first small enough is taken
# --no-sandbox: a container has no namespaces for it.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


def train(folder: Path) -> tuple[str, Path]:
    """Train the quickstart config in a folder; return what the terminal showed, and the run."""
    arguments = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.enable_progress_bar", "false"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    # The image shows no path of the machine that made it.
    shown = done.stdout.replace(str(folder), "/home/me").replace(str(ROOT / "train.py"), "train.py")
    return shown, folder / "runs" / "quickstart" / "1"


def terminal_page(output: str, path: Path) -> None:
    """Write a page that shows the end of a terminal's output."""
    shown = "\n".join(output.rstrip().splitlines()[-NUM_LINES:])
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text("$ python train.py fit --config configs/quickstart.yaml", style="bold"))
        console.print(Text("..."))
        console.print(Text.from_ansi(shown))
        svg = console.export_svg(title="cifar_lightning")
    path.write_text(f'<meta charset="utf-8"><style>body {{ margin: 0 }}</style>{svg}', encoding="utf-8")


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve the runs of a folder; yield the address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--logdir", folder.name, "--host", "localhost", "--port", str(port), "--load_fast", "false"]
    command = [sys.executable, "-m", "tensorboard.main", *flags]
    server = subprocess.Popen(command, cwd=folder.parent, stderr=subprocess.DEVNULL)  # the page shows the path
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("localhost", port)):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("TensorBoard does not start")
            time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Yield a headless browser with a fresh profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def photograph(driver: webdriver.Chrome, url: str, image: Path, size: tuple[int, int], ready: str = "true") -> None:
    """Save a page as PNG, once a condition in JavaScript holds and two images of it are equal; print its size."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(url)
    WebDriverWait(driver, 60).until(lambda _: driver.execute_script(f"return {ready}"), f"{url} is not complete")
    before, deadline = b"", time.monotonic() + 30
    while (shown := driver.get_screenshot_as_png()) != before and time.monotonic() < deadline:
        before = shown
        time.sleep(1)
    pixels = Image.open(io.BytesIO(shown)).convert("RGB")
    for num_colors in NUM_COLORS:
        pixels.quantize(num_colors, dither=Image.Dither.NONE).save(image, optimize=True)
        if image.stat().st_size < MAX_BYTES:
            break
    print(f"{image}: {image.stat().st_size:,} bytes")


def main() -> None:
    """Make the images and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder of the images")
    parser.add_argument("--run", type=Path, help="a run that exists")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, chromium() as driver:
        folder = Path(temporary)
        run = args.run
        if run is None:
            output, run = train(folder)
            terminal_page(output, page := folder / "terminal.html")
            driver.get(page.as_uri())
            box = "document.querySelector('svg').viewBox.baseVal"
            ratio = driver.execute_script(f"return {box}.height / {box}.width")
            photograph(driver, page.as_uri(), args.output / "terminal.png", (WIDTH_PX, int(WIDTH_PX * ratio)))
        photograph(driver, (run / "report.html").resolve().as_uri(), args.output / "report.png", (WIDTH_PX, HEIGHT_PX))
        with tensorboard(run.resolve().parents[1]) as url:
            photograph(driver, url, args.output / "tensorboard.png", BOARD_PX, CARDS)
            custom = "document.readyState === 'complete'"
            photograph(driver, f"{url}/#custom_scalars", args.output / "tensorboard_charts.png", BOARD_PX, custom)


if __name__ == "__main__":
    main()
