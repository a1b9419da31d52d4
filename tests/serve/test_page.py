"""The web page in a real browser, on a real server of nano: each tab does its work, for each visitor alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import PATIENCE, Server

from openlance.data.save import read_settings

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = Path("/usr/bin/chromium")
SERVE = {"page": True, "queue": 4, "max_steps": 500}
WORDS = "a large red circle at the top left on white"
TABS = ("Generate", "Animate", "Edit", "Subject", "Ask")


class Visit:
    """A visitor with a browser of their own. strange: what it should not have said, asked for or got."""

    def __init__(self, browser: Any, address: str, width: int = 1280):
        self.strange: list[str] = []
        self.page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        self.page.set_default_timeout(PATIENCE / 4 * 1000)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.strange.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url, address))
        self.page.on("response", self._got)
        self.page.goto(address)
        self.see(self.page.get_by_role("tab", name="Generate")).wait_for()

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.strange.append(message.text)

    def _asked(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.strange.append(f"asked {url}")

    def _got(self, response: Any) -> None:
        if response.status >= 400:
            self.strange.append(f"{response.status} {response.url}")

    def see(self, locator: Any) -> Any:
        """Of several, the one on the tab that is open."""
        return locator.locator("visible=true").first

    def open(self, tab: str) -> None:
        self.see(self.page.get_by_role("tab", name=tab)).click()

    def press(self, name: str) -> None:
        self.see(self.page.get_by_role("button", name=name, exact=True)).click()

    def field(self, label: str) -> Any:
        return self.see(self.page.get_by_label(label, exact=True))

    def unfold(self, name: str) -> None:
        self.see(self.page.get_by_role("button", name=name)).click()

    def set(self, **sampling: Any) -> None:
        """Settings of the tab's Advanced, which is opened. Names as labels, in lower case."""
        self.unfold("Advanced")
        for name, value in sampling.items():
            label = name.capitalize()
            self.field("number input for Steps" if name == "steps" else label).fill(str(value))

    def said(self, words: str) -> str:
        """The line of the tab that says how it goes, once it has these words."""
        line = self.see(self.page.locator(".progress p").filter(has_text=words))
        line.wait_for()
        return line.inner_text()

    def done(self, before: str = "") -> int:
        """Wait for a result other than the one whose line is given; its seed."""
        end = time.monotonic() + PATIENCE
        while (line := self.said("done in")) == before and time.monotonic() < end:
            time.sleep(0.1)
        return int(line.split()[-1])

    def download(self) -> bytes:
        """The file of the result that is chosen below the tabs."""
        with self.page.expect_download() as coming:
            self.see(self.page.get_by_text("Download", exact=True)).click()
        return Path(coming.value.path()).read_bytes()

    def upload(self, data: bytes, name: str, box: int = 0) -> None:
        """Into one of the tab's boxes for pictures."""
        inputs = self.page.locator("[role=tabpanel]").locator("visible=true").locator("input[type=file]")
        inputs.nth(box).set_input_files({"name": name, "mimeType": "", "buffer": data})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    """A visit in which nothing strange must have happened at the end."""
    made = Visit(browser, server.address)
    yield made
    made.page.context.close()
    assert made.strange == []


@pytest.mark.slow
def test_a_picture_by_keyboard_its_seed_and_its_file(visit: Visit, browser: Any, server: Server) -> None:
    visit.set(steps=3)
    visit.field("Prompt").focus()
    visit.page.keyboard.type(WORDS)
    visit.page.keyboard.press("Enter")
    seed = visit.done()
    assert visit.field("Seed").input_value() == str(seed)
    shown = visit.see(visit.page.get_by_label("Made").locator("img"))
    assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [96, 96]
    data = visit.download()
    settings = read_settings(data)
    assert Image.open(BytesIO(data)).size == (96, 96)
    assert (settings["prompt"], settings["seed"], settings["sampling"]["steps"]) == (WORDS, seed, 3)
    other = Visit(browser, server.address)
    assert other.page.get_by_text("Results of this visit").locator("visible=true").count() == 0
    other.page.context.close()
    assert other.strange == []


@pytest.mark.slow
def test_the_same_seed_gives_the_same_picture_and_a_file_its_settings(visit: Visit) -> None:
    visit.set(steps=2)
    visit.field("Prompt").fill(WORDS)
    visit.press("Generate")
    first = visit.done()
    picture = visit.download()
    line = visit.said("done in")
    visit.press("Generate")
    assert visit.done(line) != first
    visit.unfold("Settings of a picture or clip made here")
    visit.field("Prompt").fill("something else")
    visit.upload(picture, "kept.png")
    visit.said("settings restored")
    assert visit.field("Prompt").input_value() == WORDS
    assert visit.field("Same seed").is_checked()
    visit.press("Generate")
    assert visit.done() == first
    assert Image.open(BytesIO(visit.download())).tobytes() == Image.open(BytesIO(picture)).tobytes()
