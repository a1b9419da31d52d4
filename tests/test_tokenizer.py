from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openlance.errors import InputError
from openlance.tokenizer import StreamDecoder, Tokenizer, train_tokenizer

TEXTS = [
    "A red circle left of a blue square.",
    "What colour is the square? The square is blue.",
    "Turn the circle green; it's 3:45, DON'T wait.",
    "狐狸 und Füchse, naïve café, 🦊🏔️",
] * 5
HARD = [
    "",
    " ",
    "plain words",
    "e\u0301 ﬁ \r\n\n  x\t12345 don't DON'T",
    "狐狸在雪地里奔跑。🦊",
    "\x00\x7f\u200b\ufeff",
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>hi<|im_end|>\n",
    "<tool_call>a</tool_call> <|fim_prefix|><|nothing|>",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


def test_training_is_repeatable_and_fills_the_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), 320)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tokenizer.save(tmp_path / "a")
    again.save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert tokenizer.size == again.size == 320


def test_added_tokens_follow_the_words_in_order(tokenizer: Tokenizer) -> None:
    first = 320 - 22
    special = tokenizer.special
    assert (special.endoftext, special.im_start, special.im_end) == (first, first + 1, first + 2)
    assert (special.vision_start, special.vision_end) == (first + 9, first + 10)
    assert special.video_pad == first + 13
    assert tokenizer.encode("<|im_start|>") == [special.im_start]


@pytest.mark.parametrize("text", HARD)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    normal = text.replace("e\u0301", "é")  # the tokenizer composes accents (NFC)
    assert tokenizer.decode(tokenizer.encode(text)) == normal


def test_decode_and_stream_agree_with_the_library(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.size) for _ in range(rng.randrange(12))]
        for skip in (False, True):
            stream = StreamDecoder(tokenizer, skip_special=skip)
            streamed = "".join(map(stream.push, ids)) + stream.finish()
            whole = tokenizer.decode(ids, skip_special=skip)
            assert streamed == whole == library.decode(ids, skip_special_tokens=skip)


def test_stream_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    text = "a🦊é狐"
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert stream.finish() == ""
    assert stream.push(tokenizer.encode("狗")[0]) == ""  # its first byte or two
    assert stream.finish() == "\ufffd"


def test_skip_special_drops_control_tokens_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>a <tool_call>b<|im_end|>")
    assert tokenizer.decode(ids, skip_special=True) == "a <tool_call>b"


def test_offsets_are_characters_of_the_given_text(tokenizer: Tokenizer) -> None:
    text = "e\u0301 red 狐狸<|im_end|>🦊 circle"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(ids) == len(offsets)
    at = {text[start:end] for start, end in offsets}
    assert {"e\u0301", "<|im_end|>", "🦊"} <= at
    covered = {position for start, end in offsets for position in range(start, end)}
    assert covered == set(range(len(text)))


def test_both_layouts_load_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    whole = Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    parts = Tokenizer.load(tmp_path)
    for text in [*HARD, *TEXTS]:
        assert tokenizer.encode(text) == whole.encode(text) == parts.encode(text)
    assert tokenizer.size == whole.size == parts.size
    assert tokenizer.special == whole.special == parts.special


def test_unknown_id_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="token id 320 is unknown"):
        tokenizer.decode([1, 320])


def test_small_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="at least 278"):
        train_tokenizer(TEXTS, 277)


def test_bad_folders_say_what_is_wrong(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    whole = tmp_path / "tokenizer.json"
    text = whole.read_text(encoding="utf-8")
    whole.write_text(text[:-200], encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.load(tmp_path)
    whole.write_text(text.replace("<|video_pad|>", "<|film_pad|>"), encoding="utf-8")
    with pytest.raises(InputError, match=r"lacks the control token\(s\) <\|video_pad\|>"):
        Tokenizer.load(tmp_path)
    whole.unlink()
    config = tmp_path / "tokenizer_config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["added_tokens_decoder"]["900"] = fields["added_tokens_decoder"].pop("299")
    config.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(InputError, match="should get id"):
        Tokenizer.load(tmp_path)
    config.unlink()
    with pytest.raises(InputError, match=r"tokenizer_config\.json is missing"):
        Tokenizer.load(tmp_path)


def test_import_is_light() -> None:
    code = "import sys, openlance.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_golden_ids(golden_file, tmp_path: Path) -> None:
    cases = json.loads(golden_file("modules/tokenizer_cases.json").read_text(encoding="utf-8"))
    folder = golden_file("checkpoint/Lance_3B")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    for tokenizer in (Tokenizer.load(folder), Tokenizer.load(tmp_path)):
        assert tokenizer.size == 600
        for case in cases:
            assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
