"""Jobs as a visitor watches them: how far they are, what they look like, what they came to."""

from __future__ import annotations

import asyncio
import base64
import html
import io
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

from PIL import Image

from openlance.serve.engine import Engine, Job
from openlance.serve.jobs import JobError, Outcome, Piece, Progress, Request
from openlance.serve.page.session import Session
from openlance.serve.work import cancel, submit

_THUMBNAIL = 384  # pixels: a preview travels inside the page
_BREATH, _PATIENCE = 0.1, 1.0  # seconds between two looks, at least and at most


class Watched:
    """One job as it goes. text: the words so far; preview: a JPEG in base64. error: why it failed."""

    def __init__(self, job: Job):
        self.job = job
        self.progress: Progress | None = None
        self.preview = ""
        self.text = ""
        self.outcome: Outcome | None = None
        self.error: JobError | None = None

    async def watch(self, changed: asyncio.Event) -> None:
        """Take up its events until it ends."""
        async for event in self.job.events():
            if isinstance(event, Piece):
                self.text += event.text
            elif isinstance(event, Progress):
                self.progress = event
                if event.preview:
                    self.preview = await asyncio.to_thread(_thumbnail, event.preview)
            changed.set()
        try:
            self.outcome = await self.job.result()
        except JobError as error:
            self.error = error
        changed.set()


async def follow(
    engine: Engine, session: Session, place: str, requests: Sequence[Request]
) -> AsyncGenerator[list[Watched], None]:
    """Submit requests, and yield the same list again and again until all have ended.

    All are accepted, or none: raises Busy and JobError as `Engine.submit` does. Who stops listening stops
    the jobs. place: the tab, under which the session knows them.

    An event that yields these on to a browser should say each time all that it has to say: of two states that
    arrive together Gradio's client shows the second alone, for it changes the first by their difference.
    """
    jobs = session.running[place] = submit(engine, requests)
    watched, changed = [Watched(job) for job in jobs], asyncio.Event()
    tasks = [asyncio.create_task(one.watch(changed)) for one in watched]
    try:
        while not all(task.done() for task in tasks):
            yield watched
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), _PATIENCE)
            changed.clear()
            await asyncio.sleep(_BREATH)
        await asyncio.gather(*tasks)
        yield watched
    finally:  # not a task group: who listens may do so from several tasks
        cancel(jobs)
        for task in tasks:
            task.cancel()
        session.running.pop(place, None)


def progress_bar(watched: Sequence[Watched], waiting: int) -> str:
    """HTML: how far they are, and what they look like so far. waiting: jobs in the queue of the server."""
    steps = [one.progress for one in watched if one.progress is not None]
    if not steps:
        started = any(one.job.state == "running" for one in watched)
        return note("starting …" if started else f"waiting: {waiting} in the queue", busy=True)
    done = sum(step.step for step in steps)
    total = steps[0].total * len(watched)
    pictures = "".join(
        f'<img alt="number {number} so far" src="data:image/jpeg;base64,{one.preview}">'
        for number, one in enumerate(watched, start=1)
        if one.preview
    )
    words = f"step {done} of {total}"
    return f'<progress aria-label="{words}" max="{total}" value="{done}"></progress>{note(words)}{pictures}'


def note(words: str, *, busy: bool = False, wrong: bool = False) -> str:
    """HTML: one line that screen readers say; with a bar that only moves, where it is not known how far."""
    bar = '<progress aria-label="waiting"></progress>' if busy else ""
    return f'{bar}<p role="{"alert" if wrong else "status"}">{html.escape(words)}</p>'


def _thumbnail(picture: bytes) -> str:
    """A PNG as a small JPEG, in base64."""
    image, small = Image.open(io.BytesIO(picture)).convert("RGB"), io.BytesIO()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(small, "JPEG")
    return base64.b64encode(small.getvalue()).decode()
