"""The web page in a real browser, on a real server of nano: each tab does its work."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import PATIENCE, Server, address_of, gif, png

from openlance.data.save import read_settings
from openlance.world import Scene, Thing, render

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = Path("/usr/bin/chromium")
SERVE = {"page": True, "queue": 4, "max_steps": 500}
WORDS = "a large red circle at the top left on white"
FRAMES = "async () => { for (let n = 0; n < 20; n++) await new Promise(requestAnimationFrame) }"
TABS = ("Generate", "Animate", "Edit", "Subject", "Ask")


class Visit:
    """A visitor with a browser of their own. strange: what it should not have said, asked for or got."""

    def __init__(self, browser: Any, address: str, width: int = 1280):
        self.strange: list[str] = []
        self.page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        self.page.set_default_timeout(PATIENCE / 2 * 1000)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.strange.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url, address))
        self.page.on("response", self._got)
        with self.page.expect_response("**/queue/data*"):  # an event of its own: a click before goes nowhere
            self.page.goto(address)
        self.see(self.page.get_by_role("tab", name="Generate")).wait_for()
        self.page.evaluate(FRAMES)

    def _heard(self, message: Any) -> None:
        if message.type == "error":
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

    @property
    def tab(self) -> Any:
        """The tab that is open."""
        return self.page.get_by_role("tabpanel").locator("visible=true")

    def shows(self, words: str) -> None:
        """Wait until the tab has these words."""
        self.see(self.tab.get_by_text(words)).wait_for()

    def ask(self, words: str) -> None:
        box = self.see(self.tab.locator("textarea"))
        if words:
            box.fill(words)
        box.press("Enter")

    def press(self, name: str) -> None:
        self.see(self.page.get_by_role("button", name=name, exact=True)).click()

    def field(self, label: str) -> Any:
        return self.see(self.page.get_by_label(label, exact=True))

    def unfold(self, name: str) -> None:
        self.see(self.page.get_by_role("button", name=name)).click()

    def fill(self, label: str, value: object) -> None:
        """Type into a field. What has just been unfolded may be put back to what it was while Gradio builds
        it, quicker than a visitor types: then once more."""
        field, end = self.field(label), time.monotonic() + PATIENCE
        while time.monotonic() < end:
            field.fill(str(value))
            self.page.evaluate(FRAMES)
            if field.input_value() == str(value):
                return
        raise AssertionError(f"{label} does not keep {value}")

    def set(self, **sampling: Any) -> None:
        """Settings of the tab's Advanced, which is opened. Names as labels, in lower case."""
        self.unfold("Advanced")
        self.page.evaluate(FRAMES)
        for name, value in sampling.items():
            self.fill("number input for Steps" if name == "steps" else name.capitalize(), value)

    def choose(self, label: str, option: str) -> None:
        """One of a list."""
        self.field(label).click()
        self.see(self.page.get_by_role("option", name=option, exact=True)).click()

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

    def listed(self, seed: int) -> None:
        """Wait until the result of this seed is listed below the tabs, after the tab has said that it is
        done, and until its picture is there: what stands below it moves until then."""
        self.see(self.page.locator("p[role=status]").filter(has_text=f"· seed {seed}")).wait_for()
        self.page.wait_for_function(
            "[...document.querySelectorAll('.results .grid-wrap img')].every(image => image.naturalWidth)"
        )

    def download(self, seed: int) -> bytes:
        """The file of the result that is chosen below the tabs, once that is the one of this seed."""
        self.listed(seed)
        with self.page.expect_download() as coming:
            self.see(self.page.get_by_text("Download", exact=True)).click()
        return Path(coming.value.path()).read_bytes()

    def upload(self, data: bytes, name: str, box: int = 0) -> None:
        """Into one of the tab's boxes for pictures."""
        inputs = self.tab.locator("input[type=file]")
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


def test_a_picture_by_keyboard_its_seed_and_its_file(visit: Visit, browser: Any, server: Server) -> None:
    visit.set(steps=3)
    visit.field("Prompt").focus()
    visit.page.keyboard.type(WORDS)
    visit.page.keyboard.press("Enter")
    seed = visit.done()
    assert visit.field("Seed").input_value() == str(seed)
    shown = visit.see(visit.page.locator(".grid-wrap img"))
    assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [96, 96]
    data = visit.download(seed)
    settings = read_settings(data)
    assert Image.open(BytesIO(data)).size == (96, 96)
    assert (settings["prompt"], settings["seed"], settings["sampling"]["steps"]) == (WORDS, seed, 3)
    other = Visit(browser, server.address)
    assert other.page.get_by_text("Results of this visit").locator("visible=true").count() == 0
    other.page.context.close()
    assert other.strange == []


def test_the_same_seed_gives_the_same_picture_and_a_file_its_settings(visit: Visit) -> None:
    visit.set(steps=2, reuse=0.5)
    visit.choose("Solver", "ab2")
    visit.choose("Reuse order", "1")
    visit.field("Prompt").fill(WORDS)
    visit.press("Generate")
    first = visit.done()
    picture = visit.download(first)
    line = visit.said("done in")
    visit.press("Generate")
    assert visit.done(line) != first
    visit.unfold("Settings of a picture or clip made here")
    visit.field("Prompt").fill("something else")
    visit.field("Reuse").fill("0")
    visit.choose("Solver", "unipc")
    visit.upload(picture, "kept.png")
    visit.said("settings restored")
    sampling = read_settings(picture)["sampling"]
    assert (sampling["solver"], sampling["reuse"], sampling["reuse_order"]) == ("ab2", 0.5, 1)
    assert (visit.field("Solver").input_value(), visit.field("Reuse").input_value()) == ("ab2", "0.5")
    assert visit.field("Prompt").input_value() == WORDS
    assert visit.field("Same seed").is_checked()
    visit.press("Generate")
    assert visit.done() == first
    assert Image.open(BytesIO(visit.download(first))).tobytes() == Image.open(BytesIO(picture)).tobytes()


def test_a_preview_and_cancel(visit: Visit) -> None:
    visit.set(steps=500)
    visit.field("Prompt").fill(WORDS)
    visit.press("Generate")
    visit.see(visit.page.get_by_alt_text("number 1 so far")).wait_for()
    assert re.fullmatch(r"step \d+ of 500", visit.said("step"))
    visit.press("Cancel")
    visit.said("cancelled")
    assert visit.page.locator(".grid-wrap img").count() == 0


def test_who_leaves_takes_their_jobs_along(browser: Any, server: Server) -> None:
    leaving = Visit(browser, server.address)
    leaving.set(steps=500)
    leaving.field("Prompt").fill(WORDS)
    leaving.press("Generate")
    leaving.press("Generate")  # once more while it is made: nothing more is
    leaving.said("step")
    assert server.metric("openlance_jobs_waiting") == 0
    assert server.metric("openlance_jobs_running") == 1
    leaving.page.context.close()
    end = time.monotonic() + PATIENCE / 4
    while server.metric("openlance_jobs_running") and time.monotonic() < end:
        time.sleep(0.5)
    assert server.metric("openlance_jobs_running") == 0


def test_edits_go_on_from_any_turn(visit: Visit) -> None:
    visit.open("Edit")
    visit.set(steps=2)
    visit.see(visit.page.get_by_text("make the circle green")).click()
    turns, line = visit.tab.locator(".thumbnails button"), ""
    for words in ("make the circle green", "change the background to beige", "make the star red"):
        visit.shows("goes on from turn")
        if words == "make the star red":
            turns.nth(1).click()
            visit.shows("goes on from turn 1")
        visit.field("Instruction").fill(words)
        visit.field("Instruction").press("Enter")
        visit.done(line)
        line = visit.said("done in")
    visit.shows("goes on from turn 3")
    assert [turn.locator("img").get_attribute("title") for turn in turns.all()] == [
        "0 · as it was",
        "1 · make the circle green",
        "2 · change the background to beige",
        "3 · make the star red (from 1)",
    ]


def test_a_clip_is_edited_and_asked_about(visit: Visit) -> None:
    visit.open("Edit")
    visit.set(steps=2)
    visit.upload(gif(), "moving.gif")
    visit.shows("goes on from turn 0")
    visit.field("Instruction").fill("make the square red")
    visit.press("Edit")
    assert read_settings(visit.download(visit.done()))["task"] == "video_edit"
    visit.press("Ask about this")
    visit.see(visit.page.get_by_role("tab", name="Ask", selected=True)).wait_for()
    visit.ask("")
    visit.said("tokens")
    assert visit.page.get_by_test_id("bot").count() == 1


def test_animate_shows_a_clip(visit: Visit) -> None:
    visit.open("Animate")
    visit.set(steps=2)
    visit.upload(png(96, 96), "first.png")
    visit.field("What happens").fill("a circle growing")
    visit.press("Animate")
    seed = visit.done()
    clip = visit.see(visit.tab.locator("video"))
    visit.page.wait_for_function("clip => clip.readyState >= 2", arg=clip.element_handle())
    assert clip.evaluate("clip => [clip.videoWidth, clip.videoHeight]") == [96, 96]
    settings = read_settings(visit.download(seed))
    assert (settings["task"], settings["frames"], settings["seed"]) == ("i2v", 9, seed)


def test_a_result_becomes_a_subject(visit: Visit) -> None:
    visit.set(steps=2)
    visit.field("Prompt").fill(WORDS)
    visit.press("Generate")
    visit.listed(visit.done())
    visit.press("Use as subject")
    visit.see(visit.page.get_by_role("tab", name="Subject", selected=True)).wait_for()
    visit.set(steps=2)
    visit.fill("number input for Number", 2)
    visit.field("Prompt").fill("the circle at the bottom on black")
    visit.press("Draw")
    last = int(visit.said(" to ").split()[-1])
    settings = read_settings(visit.download(last))
    assert (settings["task"], settings["prompt"]) == ("subject_image", "the circle at the bottom on black")
    assert visit.page.locator(".results .grid-wrap img").count() == 3


def test_answers_are_those_of_the_api_and_are_cleared(visit: Visit, server: Server) -> None:
    star, shapes = Scene("white", "plain", (Thing("star", "blue", "large", "left"),)), BytesIO()
    Image.fromarray(render(star)).save(shapes, "PNG")
    question = "what shape is blue?"
    shown = {"type": "image_url", "image_url": {"url": address_of(shapes.getvalue())}}
    content = [shown, {"type": "text", "text": question}]
    answered = server.openai().chat.completions.create(
        model="nano", messages=[{"role": "user", "content": content}]
    )
    visit.open("Ask")
    visit.upload(shapes.getvalue(), "shapes.png")
    visit.see(visit.tab.locator(".thumbnail-item")).wait_for()
    visit.ask(question)
    assert visit.said("tokens") == f"{answered.usage.completion_tokens} tokens"
    answers = visit.page.get_by_test_id("bot")
    assert answers.inner_text().strip() == answered.choices[0].message.content
    assert visit.page.get_by_test_id("user").count() == 2  # the picture, and the words
    visit.ask("and where is it?")
    answers.nth(1).wait_for()
    visit.said("tokens")
    visit.press("Clear")
    answers.first.wait_for(state="detached")


def test_a_question_that_is_stopped_may_be_asked_again(visit: Visit) -> None:
    visit.set(steps=500)
    visit.field("Prompt").fill(WORDS)
    visit.press("Generate")
    visit.said("step")
    visit.open("Ask")
    visit.ask("what is it?")
    visit.said("waiting: 1 in the queue")
    visit.press("Stop")
    visit.said("stopped")
    assert visit.see(visit.tab.locator("textarea")).input_value() == "what is it?"
    assert visit.page.get_by_test_id("bot").count() == 0
    visit.open("Generate")
    visit.press("Cancel")
    visit.said("cancelled")


def test_what_cannot_be_done_is_said(visit: Visit) -> None:
    visit.press("Generate")
    visit.said("the prompt is empty")
    visit.field("Prompt").fill(WORDS)
    visit.fill("number input for Number", 8)
    visit.press("Generate")
    visit.said("the server is busy")  # eight at once, and four may wait
    visit.open("Edit")
    visit.field("Instruction").fill("make it red")
    visit.press("Edit")
    visit.said("there is nothing to edit yet")
    visit.upload(b"no picture", "broken.png")
    visit.said("no picture or clip of a known kind")
    visit.open("Ask")
    visit.ask("")
    visit.said("nothing is asked")


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, server: Server) -> None:
    phone = Visit(browser, server.address, width=390)
    for tab in TABS:
        phone.open(tab)
        phone.see(phone.tab.locator("textarea")).wait_for()
        assert phone.page.evaluate("document.documentElement.scrollWidth") == 390, tab
    phone.page.context.close()
    assert phone.strange == []
