"""Each reward on media whose answer is known, and what is no reward."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from openlance.errors import InputError
from openlance.rl.rewards import RewardError, Rewards, exact_match, named_reward, parse_rewards
from openlance.rl.rewards import remote as remote_module
from openlance.rl.rewards.ocr import distance, likeness, quoted
from openlance.rl.rewards.remote import Remote
from openlance.rl.rewards.simple import composition, edited, everything, motion
from openlance.world import Scene, Thing, WorldConfig, claims_of, describe, edit, render, render_clip
from openlance.world import sample_scene as draw_scene

BLANK = np.full((1, 96, 96, 3), 255, np.uint8)


def scene(seed: int, config: WorldConfig | None = None) -> Scene:
    return draw_scene(np.random.default_rng(seed), config or WorldConfig(max_things=2))


def written(text: str) -> np.ndarray:
    picture = Image.new("RGB", (360, 120), "white")
    ImageDraw.Draw(picture).text((20, 30), text, fill="black", font=ImageFont.load_default(48))
    return np.asarray(picture)[None]


@pytest.mark.parametrize(
    "prompt, wanted",
    [
        ('a sign that says "Open Now"', "Open Now"),
        ("a sign: “Open”", "Open"),
        ("it's a sign with 'Open' on it", "Open"),
        ('"one" above "two"', "one two"),
    ],
)
def test_the_wanted_text_is_what_is_quoted(prompt: str, wanted: str) -> None:
    assert quoted(prompt) == wanted


@pytest.mark.parametrize("prompt", ["a red sign", "it's a cat's sign", 'a sign with "  " on it'])
def test_a_prompt_without_quotes_is_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="no text to read in the prompt"):
        quoted(prompt)


@pytest.mark.parametrize(
    "read, wanted, score",
    [
        ("OPEN now", "Open Now", 1.0),
        ("opennow", "open now", 1.0),
        ("open", "opens", 0.8),
        ("", "open", 0.0),
        ("entirely different", "open", 0.0),
        ("open open", "open", 0.0),  # text that holds what is wanted, and more, gains nothing by it
        ("opens", "open", 0.75),
    ],
)
def test_likeness(read: str, wanted: str, score: float) -> None:
    assert likeness(read, wanted) == pytest.approx(score)


def test_levenshtein() -> None:
    assert [distance(*pair) for pair in (("kitten", "sitting"), ("", "ab"), ("abc", "abc"))] == [3, 2, 0]


@pytest.mark.slow
def test_ocr_reads_pictures() -> None:
    pytest.importorskip("rapidocr")
    ocr = named_reward("ocr")
    prompts = ['the word "HELLO"'] * 3
    hello, other, nothing = ocr(prompts, [written("HELLO"), written("WORLDS"), BLANK], [{}] * 3)
    assert (hello, nothing) == (1.0, 0.0) and other < 0.5


def test_an_engine_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(InputError, match=r"OCR reward needs RapidOCR: pip install 'openlance\[rl\]'"):
        named_reward("ocr")


def test_the_judge_rewards_what_is_true() -> None:
    shown = scene(1)
    words, claims = describe(shown, np.random.default_rng(0))
    other = render(scene(2), 96)[None]
    data = [{"claims": claims}] * 2
    right, wrong = composition([words] * 2, [render(shown, 96)[None], other], data)
    assert right == 1 and wrong < 1
    assert everything([words] * 2, [render(shown, 96)[None], other], data) == [1, 0]


def test_an_edit_has_two_halves() -> None:
    before = scene(3)
    change = edit(before, np.random.default_rng(0))
    data = {"before": before, "after": change.after}
    media = [render(change.after, 96)[None], render(before, 96)[None]]
    assert edited([change.instruction] * 2, media, [data] * 2) == [1.0, 0.5]


def test_motion_is_that_of_the_clip() -> None:
    moving = Scene("white", "plain", (Thing("circle", "red", "large", "left", motion="right"),))
    still = Scene("white", "plain", (Thing("circle", "red", "large", "left"),))
    claims = claims_of(moving, clip=True)
    media = [render_clip(moving, 5, 96), render_clip(still, 5, 96)]
    assert motion(["it moves"] * 2, media, [{"claims": claims}] * 2) == [1, 0]
    with pytest.raises(InputError, match="'it moves' claims no motion"):
        motion(["it moves"], media[:1], [{"claims": claims_of(moving)}])


def test_exact_answers() -> None:
    asked = [{"answer": "red"}] * 3
    assert exact_match(["what?"] * 3, [" Red\n", "red circle", ""], asked) == [1, 0, 0]
    with pytest.raises(InputError, match="'what\\?' has no 'answer' in its metadata"):
        exact_match(["what?"], ["red"], [{}])


def test_several_rewards_are_weighted() -> None:
    rewards = Rewards({"a": lambda p, m, d: [1.0, 0.0], "b": lambda p, m, d: [0.0, 0.5]}, {"a": 3.0})
    total, each = rewards(["x", "y"], [BLANK] * 2, [{}] * 2)
    assert total.tolist() == [0.75, 0.125]
    assert each["b"].tolist() == [0.0, 0.5]


def _raises(prompts: object, media: object, metadata: object) -> list[float]:
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    "function, said",
    [
        (_raises, "the reward mine failed: OSError: the disk is gone"),
        (lambda p, m, d: [0.5, float("nan")], "the reward mine gave nan for 'y': it must lie in"),
        (lambda p, m, d: [1.5, 0.5], "the reward mine gave 1.5 for 'x'"),
        (lambda p, m, d: [0.5, -0.1], "the reward mine gave -0.1 for 'y'"),
        (lambda p, m, d: [0.5], r"the reward mine must give one number for each of 2, not shape \(1,\)"),
    ],
)
def test_what_is_no_reward_is_named(function: object, said: str) -> None:
    rewards = Rewards({"sound": lambda p, m, d: [1.0] * len(p), "mine": function})  # type: ignore[dict-item]
    with pytest.raises(RewardError, match=said):
        rewards(["x", "y"], [BLANK] * 2, [{}] * 2)


@pytest.mark.parametrize(
    "specs, said",
    [
        (("beauty",), "unknown reward 'beauty': choose one of composition"),
        (("composition=0",), "weight of the reward composition must be above 0"),
        ((), "no reward"),
        (("clip:nowhere/at/all",), "nowhere/at/all: no CLIP model could be loaded"),
    ],
)
def test_rewards_that_cannot_be_are_refused(specs: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_rewards(specs)


def test_rewards_by_name() -> None:
    rewards = parse_rewards(("composition=2", "http://localhost/score?kind=a"))
    assert rewards.weights == {"composition": 2.0, "http://localhost/score?kind=a": 1.0}


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    from openlance.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a red circle and a blue square"], 300)
    tokenizer.save(tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    ).save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = tokenizer.special.im_end
    text = shape | {"vocab_size": 400, "max_position_embeddings": 8, "eos_token_id": ends}
    vision = shape | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    return tmp_path


def test_clip_scores_pictures(clip_folder: Path) -> None:
    """Random weights: a score in [0, 1] that depends on picture and words, and not on the batch."""
    score = named_reward(f"clip:{clip_folder}")
    prompts = ["a red circle", "a blue square", "a red circle"]
    media = [render(scene(seed), 96)[None] for seed in (1, 2, 3)]
    together = score(prompts, media, [{}] * 3)
    alone = [score([p], [m], [{}])[0] for p, m in zip(prompts, media, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert all(0 <= value <= 1 for value in together)


class Service(BaseHTTPRequestHandler):
    """Scores by the number of frames; fails as often as it is told, and keeps what it was asked."""

    failures: list[int]
    asked: list[dict]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.failures:
            return self.send_error(self.failures.pop())
        self.asked.append(asked)
        body = json.dumps({"scores": [len(frames) / 10 for frames in asked["media"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(remote_module, "FIRST_PAUSE", 0.01)
    Service.failures, Service.asked = [], []
    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_remote_reward_is_asked_in_batches_and_again_where_it_fails(service: str) -> None:
    Service.failures = [503, 429]
    media = [BLANK, np.repeat(BLANK, 3, axis=0), BLANK]
    found = Remote(service, batch=2)(["a", "b", "c"], media, [{"answer": 1}] * 3)
    assert found == [0.1, 0.3, 0.1]
    assert [asked["prompts"] for asked in Service.asked] == [["a", "b"], ["c"]]
    assert Service.asked[1]["metadata"] == [{"answer": 1}]


@pytest.mark.parametrize(
    "failures, said", [([404], "refused with 404"), ([500] * 3, "no answer after 2 tries")]
)
def test_a_remote_reward_that_does_not_answer_is_an_error(
    service: str, failures: list[int], said: str
) -> None:
    Service.failures = failures
    with pytest.raises(RewardError, match=f"the reward far failed.*{said}"):
        Rewards({"far": Remote(service, tries=2)})(["a"], [BLANK], [{}])
