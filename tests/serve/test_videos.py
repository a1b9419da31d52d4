"""Clips over HTTP, with OpenAI's own client: made, waited for, fetched, kept over restarts, removed."""

from __future__ import annotations

import hashlib
import os
import resource
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from serving import PATIENCE, Server, address_of, gif, png, serving

from openlance.data.mark import DIGITAL_SOURCE_TYPE
from openlance.data.media import load_video
from openlance.data.save import read_settings

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")  # OpenAI's own server; the client stays

MINE, YOURS = "key-one", "key-two"
SERVE = {
    "api_keys": [hashlib.sha256(key.encode()).hexdigest() for key in (MINE, YOURS)],
    "max_pictures": 2,
    "max_frames": 13,
    "results": "kept",
}
FAST: dict[str, Any] = {"steps": 2, "seed": 5, "frames": 5}
LONG = FAST | {"steps": 200}


def make(server: Server, key: str = MINE, **given: Any) -> Any:
    """A clip that is completed."""
    own = {"extra_body": FAST, "prompt": "a red circle", "poll_interval_ms": 200} | given
    video = server.openai(key).videos.create_and_poll(**own)
    assert video.status == "completed", video.error
    return video


def post(server: Server, path: str = "", **sent: Any) -> Any:
    with server.http(headers={"Authorization": f"Bearer {MINE}"}) as http:
        return http.post(f"/v1/videos{path}", **sent)


def finished(server: Server, video_id: str, key: str = MINE) -> Any:
    return server.openai(key).videos.poll(video_id, poll_interval_ms=200)


def until(server: Server, video_id: str, status: str) -> Any:
    """The clip when it has this status."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        video = server.openai(MINE).videos.retrieve(video_id)
        if video.status == status:
            return video
        time.sleep(0.05)
    raise AssertionError(f"still {video.status}")


def kept(server: Server) -> set[str]:
    """Suffixes of the files in the folder of results, but for the database."""
    names = [name for name in os.listdir(server.folder / "kept") if not name.startswith("jobs.sqlite")]
    return {name.partition(".")[2] for name in names}


def test_a_clip_of_a_prompt(server: Server) -> None:
    client = server.openai(MINE)
    before = time.time()
    video = client.videos.create(prompt="a red circle", size="64x48", seconds="0.6", extra_body={"steps": 2})
    assert video.id.startswith("video_") and video.object == "video"
    assert (video.model, video.prompt, video.size) == ("nano", "a red circle", "64x48")
    assert video.status in ("queued", "in_progress") and video.error is None
    done = client.videos.poll(video.id, poll_interval_ms=200)
    assert (done.status, done.progress, done.seed) == ("completed", 100, video.seed)
    assert int(before) <= done.created_at <= done.completed_at <= time.time()
    assert done.expires_at - done.completed_at == 24 * 3600
    data = client.videos.download_content(video.id).content
    clip = load_video(data)
    assert clip.frames.shape == (done.frames, 48, 64, 3) and clip.fps == done.fps
    assert (done.frames - 1) % 4 == 0 and float(done.seconds) == pytest.approx(
        done.frames / done.fps, rel=1e-4
    )
    assert read_settings(data) == done.settings and done.settings["seed"] == video.seed
    assert DIGITAL_SOURCE_TYPE.encode() in data


def test_a_clip_from_a_first_picture(server: Server) -> None:
    video = make(server, input_reference=("first.png", png(), "image/png"))
    assert video.settings["task"] == "i2v" and video.frames == 5
    body = {"prompt": "it moves", "input_reference": {"image_url": address_of(png())}, **FAST,
            "last": {"image_url": address_of(png(seed=1))}, "frames": 9}  # fmt: skip
    done = finished(server, post(server, json=body).json()["id"])
    assert (done.status, done.settings["task"], done.frames) == ("completed", "i2v", 9)


def test_a_clip_of_subjects(server: Server) -> None:
    files = [("references[]", ("a.png", png(seed=seed))) for seed in range(2)]
    video = post(server, data={"prompt": "both"} | FAST, files=files).json()
    done = finished(server, video["id"])
    assert (done.status, done.settings["task"]) == ("completed", "subject_video")


def test_a_clip_is_edited(server: Server) -> None:
    client = server.openai(MINE)
    sent = client.videos.edit(
        prompt="make it blue", video=("a.gif", gif(), "image/gif"), extra_body={"steps": 2}
    )
    assert sent.size is None and sent.seconds is None  # as its clip: known when it is made
    done = finished(server, sent.id)
    assert (done.status, done.settings["task"]) == ("completed", "video_edit") and done.size
    again = post(server, "/edits", json={"prompt": "make it green", "video": {"id": done.id}, "steps": 2})
    assert finished(server, again.json()["id"]).size == done.size


def test_media_that_were_sent_are_removed_when_they_were_used(server: Server) -> None:
    make(server, input_reference=("first.png", png(), "image/png"))
    end = time.monotonic() + 10  # they go just after it is said to be completed
    while kept(server) != {"mp4"} and time.monotonic() < end:
        time.sleep(0.1)
    assert kept(server) == {"mp4"}


def test_a_clip_can_be_watched_and_given_up(server: Server) -> None:
    client = server.openai(MINE)
    video = client.videos.create(prompt="a red circle", extra_body=LONG)
    running = until(server, video.id, "in_progress")
    assert 0 <= running.progress < 100
    with pytest.raises(openai.ConflictError, match="is not completed"):
        client.videos.download_content(video.id)
    edit = post(server, "/edits", json={"prompt": "make it blue", "video": {"id": video.id}})
    assert (edit.status_code, edit.json()["error"]["param"]) == (409, "video")
    waiting = client.videos.create(prompt="another", extra_body=LONG)
    for given_up in (video, waiting):
        deleted = client.videos.delete(given_up.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (given_up.id, True, "video.deleted")
        with pytest.raises(openai.NotFoundError, match="there is no video"):
            client.videos.retrieve(given_up.id)
    start = time.monotonic()
    make(server)  # the worker is free again
    assert time.monotonic() - start < PATIENCE / 4
    assert kept(server) == {"mp4"}


def test_a_clip_that_is_removed_is_gone(server: Server) -> None:
    client = server.openai(MINE)
    video = make(server)
    assert (server.folder / "kept" / f"{video.id}.mp4").exists()
    client.videos.delete(video.id)
    assert not (server.folder / "kept" / f"{video.id}.mp4").exists()
    for call in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with pytest.raises(openai.NotFoundError):
            call(video.id)


def test_clips_are_listed_in_pages_to_their_owner(server: Server) -> None:
    client, other = server.openai(YOURS), server.openai(MINE)
    made = [make(server, YOURS, prompt=str(number)).id for number in range(3)]
    assert [video.id for video in client.videos.list(limit=2)] == made[::-1]  # all pages, the newest first
    assert [video.id for video in client.videos.list(limit=1, order="asc")] == made
    page = client.videos.list(limit=1, after=made[2])
    assert ([video.id for video in page.data], page.has_more, page.last_id) == ([made[1]], True, made[1])
    assert {video.id for video in other.videos.list(limit=100)}.isdisjoint(made)
    for call in (other.videos.retrieve, other.videos.download_content, other.videos.delete):
        with pytest.raises(openai.NotFoundError):
            call(made[0])
    assert post(server, "/edits", json={"prompt": "a", "video": {"id": made[0]}}).status_code == 404
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
            client.videos.list(**wrong)
    with pytest.raises(openai.NotFoundError):
        client.videos.list(after="video_none")


@pytest.mark.parametrize(
    ("asked", "status", "start", "end"),
    [
        ("bytes=0-9", 206, 0, 10),
        ("bytes=5-", 206, 5, None),
        ("bytes=-7", 206, -7, None),
        ("bytes=0-999999999", 206, 0, None),
        ("bytes=0-1,4-5", 200, 0, None),  # several: the whole, as RFC 9110 allows
        ("pages=1", 200, 0, None),
        ("bytes=999999999-", 416, 0, 0),
        ("bytes=9-5", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
    ],
)
def test_parts_of_a_clip(server: Server, asked: str, status: int, start: int, end: int | None) -> None:
    client = server.openai(MINE)
    video = next((video for video in client.videos.list() if video.status == "completed"), None) or make(
        server
    )
    data = client.videos.download_content(video.id).content
    with server.http(headers={"Authorization": f"Bearer {MINE}", "Range": asked}) as http:
        response = http.get(f"/v1/videos/{video.id}/content")
    assert response.status_code == status
    if status == 416:
        assert response.headers["content-range"] == f"bytes */{len(data)}"
        return
    assert response.content == data[start:end]
    assert response.headers["content-type"] == "video/mp4" and response.headers["accept-ranges"] == "bytes"
    if status == 206:
        first = start % len(data)
        last = first + len(response.content) - 1
        assert response.headers["content-range"] == f"bytes {first}-{last}/{len(data)}"


PNG = {"image_url": address_of(png())}
GIF = {"video_url": address_of(gif(), "image/gif")}


@pytest.mark.parametrize(
    ("given", "status", "param", "said"),
    [
        ({"fps": 8}, 400, "fps", "unknown field"),
        ({"seconds": "4", "frames": 5}, 400, "seconds", "leave one of them out"),
        ({"seconds": "4"}, 400, "seconds", "at most 13 frames"),
        ({"seconds": "9999"}, 400, "seconds", "frames: the model generates"),
        ({"seconds": "four"}, 400, "seconds", "valid number"),
        ({"seconds": 0}, 400, "seconds", "greater than 0"),
        ({"frames": 14}, 200, None, ""),  # rounded to 13
        ({"frames": 17}, 400, "frames", "at most 13 frames"),
        ({"steps": 201}, 400, "steps", "at most 200"),
        ({"size": "7x7"}, 400, "size", "between 16"),
        ({"guidance_interval": [0.9, 0.1]}, 400, None, "guidance_interval must be"),
        ({"last": PNG}, 400, "last", "needs a first frame"),
        ({"input_reference": PNG, "size": "96x96"}, 400, "size", "shape of its first frame"),
        ({"input_reference": {"image_url": "cat.png"}}, 400, "input_reference", "give media as data:"),
        ({"input_reference": {"file_id": "f"}}, 400, "input_reference.file_id", "unknown field"),
        ({"input_reference": {}}, 400, "input_reference", "give one file"),
        ({"input_reference": GIF}, 400, "input_reference", "a clip"),
        ({"references": [PNG] * 3}, 400, "references", "at most 2"),
        ({"video": PNG}, 400, "video", "still picture"),
        ({"video": {"id": "video_none"}}, 404, "video", "there is no video"),
        ({"video": GIF, "frames": 5}, 400, "frames", "as long"),
        ({"model": "sora-2"}, 404, "model", "not served here"),
        ({"prompt": " "}, 400, "prompt", "empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_by_name(
    server: Server, given: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    response = post(server, json={"prompt": "a", "steps": 2} | given)
    assert response.status_code == status, response.text
    if status == 200:
        assert response.json()["frames"] == 13
        server.openai(MINE).videos.delete(response.json()["id"])
    else:
        error = response.json()["error"]
        assert error["param"] == param and said in error["message"]


def test_an_edit_needs_a_clip(server: Server) -> None:
    error = post(server, "/edits", json={"prompt": "a"}).json()["error"]
    assert (error["param"], error["message"]) == ("video", "video: the clip to change is missing")


def test_a_clip_that_cannot_be_made_has_failed_and_says_why(server: Server) -> None:
    client = server.openai(MINE)
    video = client.videos.create_and_poll(
        prompt="a", input_reference=("a.png", png()[:300], "image/png"), extra_body=FAST, poll_interval_ms=200
    )
    assert (video.status, video.error.code) == ("failed", "refused")
    assert "damaged or cut short" in video.error.message
    with pytest.raises(openai.ConflictError, match="damaged or cut short"):
        client.videos.download_content(video.id)


def test_a_full_disk_fails_the_job_and_not_the_server(server: Server) -> None:
    client, pid = server.openai(MINE), server.process.pid
    video = client.videos.create(prompt="a red circle", extra_body=FAST | {"steps": 40})
    until(server, video.id, "in_progress")
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (500, unlimited[1]))  # for its files, the database's too
    try:
        done = finished(server, video.id)
        assert (done.status, done.error.code) == ("failed", "storage")
        assert "could not keep" in done.error.message and "File too large" in done.error.message
        with pytest.raises(openai.InternalServerError, match="the database of jobs cannot be used"):
            client.videos.create(prompt="a red circle", extra_body=FAST)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    assert client.videos.retrieve(video.id).status == "failed"
    assert kept(server) <= {"mp4"}
    make(server)


@pytest.mark.slow
def test_clips_outlive_a_server_that_is_killed(tmp_path: Path) -> None:
    picture = ("first.png", png(seed=3), "image/png")
    with serving(tmp_path, results="kept") as first:
        client = first.openai()
        done = make(first)
        given = [{"extra_body": LONG}, {"extra_body": FAST}, {"extra_body": FAST, "input_reference": picture},
                 {"extra_body": {"steps": 2, "frames": 5}}]  # fmt: skip
        asked = [client.videos.create(prompt=str(number), **own) for number, own in enumerate(given)]
        until(first, asked[0].id, "in_progress")
        first.process.kill()
        first.process.wait()
    with sqlite3.connect(tmp_path / "kept" / "jobs.sqlite") as table:
        table.execute("UPDATE videos SET expires_at = 1 WHERE id = ?", (done.id,))
    with serving(tmp_path, results="kept") as second:
        client = second.openai()
        videos = [finished(second, video.id) for video in asked]
        assert [video.status for video in videos] == ["completed"] * 4
        assert [video.seed for video in videos] == [video.seed for video in asked]
        assert [video.created_at for video in videos] == [video.created_at for video in asked]
        assert [video.settings["task"] for video in videos] == ["t2v", "t2v", "i2v", "t2v"]
        fresh = client.videos.create_and_poll(
            prompt="2", input_reference=picture, extra_body=FAST, poll_interval_ms=200
        )
        kept_one, fresh_one, other = (
            load_video(client.videos.download_content(video.id).content).frames.astype(float)
            for video in (videos[2], fresh, videos[1])
        )
        # The request came back whole. (What runs together differs in rounding, which H.264 makes visible.)
        assert np.abs(kept_one - fresh_one).mean() < 2 < 10 < np.abs(other - fresh_one).mean()
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(done.id)  # it had expired
        assert sorted(kept(second)) == ["mp4"] and len(os.listdir(tmp_path / "kept")) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"database": "sqlite:////nowhere/at/all.sqlite"},
            "sqlite:////nowhere/at/all.sqlite: cannot keep jobs",
        ),
        ({"results": "memory://results"}, "results outside of a folder need a --database"),
    ],
)
def test_a_server_that_cannot_keep_clips_does_not_start(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    with serving(tmp_path, ready=False, **settings) as server:
        assert server.process.wait(PATIENCE) == 1
    log = (tmp_path / "err.log").read_text()
    assert said in log.splitlines()[-1] and "Traceback" not in log
