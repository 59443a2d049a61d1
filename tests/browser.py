"""Headless Chromium through selenium, with a fresh profile, for tests of pages."""

import atexit
import contextlib
import functools
import shutil
import tempfile

import pytest

# --no-sandbox: a container has no namespaces for it. The rest keeps the browser from sending requests of its own.
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync", "--hide-scrollbars"]
FLAGS += ["--force-device-scale-factor=1"]


@contextlib.contextmanager
def browser(width=1280, height=900):
    """Yield a selenium driver in a new tab that logs console and network; skip the test without a browser.

    The network log is `driver.get_log("performance")`, the console log `driver.get_log("browser")`.
    """
    driver = _chromium()
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    try:
        # Windows are at least about 500 pixels wide; the width of a phone is emulated.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield driver
    finally:
        driver.close()
        driver.switch_to.window(first)


@functools.cache
def _chromium():
    """Start the browser of this process: it takes longer than most tests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    if chromium is None or driver_path is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    atexit.register(profile.cleanup)
    for flag in (*FLAGS, f"--user-data-dir={profile.name}", "--window-size=1280,900"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver_path))
    atexit.register(driver.quit)
    driver.get("about:blank")  # the new-tab page of Chromium sends requests of its own
    return driver
