"""Text to token ids and back: Qwen2's byte-level BPE.

A folder holds `tokenizer.json`, or `vocab.json` + `merges.txt` + `tokenizer_config.json`; both load the same.
"""

from __future__ import annotations

import codecs
import json
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from openlance.config import SpecialTokens
from openlance.errors import InputError

# How Qwen2 cuts text before merging bytes: contractions, words, single digits, punctuation, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The added tokens in Qwen's order; those after the first group are words of the text, not control tokens.
CONTROL = tuple(
    f"<|{name}|>"
    for name in (
        "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end",
        "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
    )
)  # fmt: skip
MARKUP = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

Read = TypeVar("Read")


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; `Tokenizer.load(folder)` reads one from a checkpoint.

    size: number of tokens. The model's vocabulary may be larger; ids from `size` on are never generated.
    special: ids of the control tokens that a sequence is built from.
    Raises InputError where a control token is missing.
    """

    def __init__(self, backend: tokenizers.Tokenizer, where: str = "tokenizer") -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise InputError(f"{where}: not a byte-level tokenizer (decoder {backend.decoder})")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special = _special_tokens(backend, where)
        self._added = backend.get_added_tokens_decoder()
        self._control = frozenset(i for i, token in self._added.items() if token.special)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads the tokenizer of a folder. Raises InputError for missing or broken files."""
        folder = Path(folder)
        whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if whole.is_file():
            return cls(_parse(whole, lambda: tokenizers.Tokenizer.from_file(str(whole))), str(whole))
        if vocab.is_file() and merges.is_file():
            return cls(_from_vocab(folder, vocab, merges), str(folder))
        raise InputError(f"{folder}: no tokenizer here (tokenizer.json, or vocab.json and merges.txt)")

    def encode(self, text: str) -> list[int]:
        """Token ids of the text. Control tokens written out in the text become their ids; none is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the characters [start, end) of `text` that it came from.

        A character cut into several tokens is in the span of each of them; together they cover the text.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        offsets = encoding.offsets
        if not unicodedata.is_normalized("NFC", text):
            # The library gives a composed character only the first of the characters it was composed from.
            starts = [*sorted({start for start, _ in offsets}), len(text)]
            offsets = [(start, starts[bisect_left(starts, end)]) for start, end in offsets]
        return encoding.ids, offsets

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD. Raises InputError for an unknown id."""
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int, skip_special: bool = False) -> bytes:
        """The bytes that one token stands for; none for a control token with `skip_special`."""
        token = int(token)
        if skip_special and token in self._control:
            return b""
        if token in self._added:
            return self._added[token].content.encode()
        text = self._backend.id_to_token(token)
        if text is None:
            raise InputError(f"token id {token} is unknown: the tokenizer has {self.size} tokens")
        return bytes(_BYTE_OF[character] for character in text)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, vocab.json, merges.txt and tokenizer_config.json into an existing folder."""
        folder = Path(folder)
        self._backend.save(str(folder / "tokenizer.json"))
        self._backend.model.save(str(folder))
        text = json.dumps(_qwen_config(self._added), indent=1, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


class StreamDecoder:
    """Decodes token by token and never emits half a character.

    The joined output, `finish()` included, equals `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters completed by this token, possibly none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token, self._skip_special))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a tokenizer of Qwen2's form from texts: bytes, merges, then Qwen's added tokens.

    vocab_size counts them all; little text gives a smaller one. The same texts give the same tokenizer.
    Raises InputError where `vocab_size` has no room for the bytes and the added tokens.
    """
    added = len(CONTROL) + len(MARKUP)
    if vocab_size < 256 + added:
        raise InputError(f"vocab_size must be at least {256 + added} (bytes, added tokens), not {vocab_size}")
    backend = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    backend.add_tokens([AddedToken(text, normalized=False) for text in MARKUP])
    return Tokenizer(backend)


def _pipeline(bpe: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _from_vocab(folder: Path, vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """A tokenizer from its older files; ids of the added tokens are in tokenizer_config.json."""
    backend = _pipeline(_parse(vocab, lambda: models.BPE.from_file(str(vocab), str(merges))))
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        raise InputError(
            f"{folder}: tokenizer_config.json is missing; it holds the ids of the control tokens"
        )
    added = _parse(config, lambda: _read_added(config))
    for token_id, fields in sorted(added.items()):
        content, special = fields.pop("content"), fields.pop("special", False)
        token = AddedToken(content, special=special, **fields)
        backend.add_special_tokens([token]) if special else backend.add_tokens([token])
        if backend.token_to_id(content) != token_id:
            raise InputError(
                f"{config}: {content!r} should get id {token_id}, but follows {vocab.name} as "
                f"{backend.token_to_id(content)}"
            )
    return backend


def _read_added(config: Path) -> dict[int, dict]:
    table = json.loads(config.read_text(encoding="utf-8"))["added_tokens_decoder"]
    known = ("content", "special", "single_word", "lstrip", "rstrip", "normalized")
    return {int(i): {name: fields[name] for name in known if name in fields} for i, fields in table.items()}


def _parse(path: Path, read: Callable[[], Read]) -> Read:
    """Calls `read`; an error while parsing becomes an InputError that names the file."""
    try:
        return read()
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for any broken file
        raise InputError(f"{path}: cannot be read as a tokenizer ({error})") from error


def _special_tokens(backend: tokenizers.Tokenizer, where: str) -> SpecialTokens:
    ids: dict[str, int] = {}
    missing = []
    for name in SpecialTokens.__dataclass_fields__:
        token_id = backend.token_to_id(f"<|{name}|>")
        if token_id is None:
            missing.append(f"<|{name}|>")
        else:
            ids[name] = token_id
    if missing:
        raise InputError(f"{where}: lacks the control token(s) {', '.join(missing)}")
    return SpecialTokens(**ids)


def _qwen_config(added: dict[int, AddedToken]) -> dict:
    """tokenizer_config.json for loaders of the Qwen2 tokenizer."""
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    table = {str(i): {name: getattr(token, name) for name in fields} for i, token in sorted(added.items())}
    endoftext = CONTROL[0]
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": table,
        "additional_special_tokens": [
            token.content for token in added.values() if token.special and token.content != endoftext
        ],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "pad_token": endoftext,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character; this is the way back.

    Bytes that are printable in Latin-1 stand for themselves, the others take code points from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_of_character()
