"""Make the README's images of the report and of the terminal: train the quickstart config, then photograph its results.

python -m benchmarks.accuracy.screenshots                  into docs/images/
python -m benchmarks.accuracy.screenshots --output DIR

Needs Chromium with its driver (apt-get install chromium chromium-driver) and the `dev` extra.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text
from selenium import webdriver

from benchmarks import ROOT

MAX_BYTES = 200_000  # an image of the README
COLUMNS = 88
WIDTH_PX = 1180
REPORT_LAST = "#confusions .pair"  # the confusion matrices
NUM_COLORS = 160  # of an image: a palette makes its file a third as large, and this many show no steps
# --no-sandbox: a container has no namespaces for it.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


def train(folder: Path) -> tuple[str, Path]:
    """Train the quickstart config in a folder; return what the terminal showed, and the report."""
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
    return done.stdout, folder / "runs" / "quickstart" / "1" / "report.html"


def terminal_page(output: str, path: Path) -> None:
    """Write a page that shows terminal output, down to the list of the run's files."""
    shown = output[: output.index("Run folder")].rsplit("\n", 1)[0]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text("$ python train.py fit --config configs/quickstart.yaml", style="bold"))
        console.print(Text.from_ansi(shown))
        svg = console.export_svg(title="cifar_lightning")
    path.write_text(f'<meta charset="utf-8"><style>body {{ margin: 0 }}</style>{svg}', encoding="utf-8")


def photograph(page: Path, image: Path, last: str) -> None:
    """Save a page as PNG, down to the end of the first element that a CSS selector finds."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            metrics = {"width": WIDTH_PX, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.get(page.as_uri())
            bottom = driver.execute_script(
                "return document.querySelector(arguments[0]).getBoundingClientRect().bottom", last
            )
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"height": int(bottom) + 16})
            pixels = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        finally:
            driver.quit()
    pixels.quantize(NUM_COLORS, dither=Image.Dither.NONE).save(image, optimize=True)


def main() -> None:
    """Make both images and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder of the images")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        output, report = train(folder)
        terminal_page(output, folder / "terminal.html")
        photograph(report, args.output / "report.png", REPORT_LAST)
        photograph(folder / "terminal.html", args.output / "terminal.png", "svg")
    for name in ("report.png", "terminal.png"):
        size = (args.output / name).stat().st_size
        print(f"{args.output / name}: {size:,} bytes")
        if size >= MAX_BYTES:
            sys.exit(f"{name} is larger than {MAX_BYTES:,} bytes")


if __name__ == "__main__":
    main()
