"""The built site in a browser without a network: pages load, images show, formulas are set, a phone is wide enough.

`sphinx-build -aEWn notebooks build/site && pytest --exhaustive tests/test_site.py`; `python tests/test_site.py FOLDER`
writes a picture of each page, as wide as a desk and as a phone.
"""

import base64
import contextlib
import functools
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

SITE = Path(__file__).parent.parent / "build" / "site"
PAGES = sorted(path.name for path in SITE.glob("*.html"))
PHONE, DESK = 390, 1280  # pixels

pytestmark = pytest.mark.exhaustive
every_page = pytest.mark.parametrize("page", PAGES or [pytest.param("", marks=pytest.mark.skip("no site was built"))])


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


class Browser:
    """Chromium, and a server of the site on this machine."""

    def __init__(self, driver: Any, address: str):
        self.driver, self.address = driver, address

    def show(self, page: str, width: int) -> None:
        """Loads a page and waits until its images and formulas are there."""
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(f"{self.address}/{page}")
        self.driver.execute_async_script("""
            const done = arguments[arguments.length - 1];
            (window.MathJax?.startup?.promise ?? Promise.resolve()).then(() => done());
        """)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def picture(self) -> bytes:
        """The page from top to bottom."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = {"captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", shot)["data"])


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync"]:
        options.add_argument(f"--{flag}")
    # A page that wants anything from elsewhere should fail here and not on a train.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with TemporaryDirectory() as profile:
        options.add_argument(f"--user-data-dir={profile}")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options, service)
        try:
            yield Browser(driver, f"http://127.0.0.1:{server.server_port}")
        finally:
            driver.quit()
            server.shutdown()
            server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("selenium", reason="needs selenium; it comes with jaxact[docs]")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver, which Debian has")
    with open_browser() as opened:
        yield opened


@every_page
def test_a_page(browser: Browser, page: str) -> None:
    browser.driver.get_log("browser")  # and forget what the page before said
    browser.show(page, DESK)
    assert browser.run("return document.title").endswith("jaxact")
    hidden = "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src)"
    assert browser.run(hidden) == []
    # A formula that MathJax has not set has no container; one it does not understand has an error in it.
    unset = "return [...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container'))"
    assert browser.run(f"{unset}.map(m => m.textContent)") == []
    assert browser.run("return [...document.querySelectorAll('mjx-merror')].map(m => m.textContent)") == []
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@every_page
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_page_is_as_wide_as_the_screen(browser: Browser, page: str, width: int) -> None:
    browser.show(page, width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    # The theme lets the text scroll as a whole; what is too wide should do so by itself.
    content = "document.querySelector('.content')"
    assert browser.run(f"return {content}.scrollWidth - {content}.clientWidth") == 0


def take_pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser:
        for page in PAGES:
            for width in (DESK, PHONE):
                browser.show(page, width)
                (folder / f"{Path(page).stem}-{width}.png").write_bytes(browser.picture())


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]))
