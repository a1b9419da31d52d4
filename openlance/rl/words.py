"""GRPO for answers in words (arXiv 2402.03300): advantages and clipped loss as of pictures, word by word."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from openlance.config import TextConfig
from openlance.errors import InputError
from openlance.infer.speak import Voice, speak_together
from openlance.rl.grpo import Judged, clipped
from openlance.rl.rewards.base import Media
from openlance.rl.rollout import Prompt
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.segment import Kind, Role, Segment
from openlance.train.losses import Objective
from openlance.train.parallel import Ranks, pattern_of
from openlance.train.settings import RLConfig


@dataclass(frozen=True, eq=False)
class Spoken:
    """Answers of some members of a group, to learn from.

    batch: each with its question, a sample. owner: [words] which of the members each word is of. old: [words]
    log-probability of each when it was spoken; reference: by the frozen policy, where it is wanted.
    """

    members: range
    batch: PackedBatch
    owner: Tensor
    old: Tensor
    reference: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.batch.tokens


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Of the answers. allowed: ids at or above are never drawn. stop: ids that end an answer. decode: ids of
    an answer, without the one that ends it, into words."""

    allowed: int
    stop: Collection[int]
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True, eq=False)
class Answers:
    """How questions are answered, and what is learnt from it; see `openlance.rl.learn.Maker`.

    A prompt's sample ends in an open turn of the assistant. Raises InputError for a network that is spread
    over processes: words are drawn one at a time, over a cache that it does not have.
    """

    objective: Objective
    config: RLConfig
    ranks: Ranks
    vocabulary: Vocabulary
    compares = True

    def __post_init__(self) -> None:
        if isinstance(self.objective, FSDPModule):
            raise InputError("words are learnt on one process, in float32: set precision to float32")

    def make(
        self, prompt: Prompt, generator: torch.Generator, shared: torch.Generator
    ) -> tuple[list[Media], list[Spoken]]:
        spoken = self._speak(prompt, self.config.group, self.config.temperature, generator)
        return [self._text(ids) for ids in spoken], [self._kept(prompt, spoken)]

    def best(self, prompt: Prompt, generator: torch.Generator) -> str:
        return self._text(self._speak(prompt, 1, 0.0, generator)[0])

    def _speak(
        self, prompt: Prompt, count: int, temperature: float, generator: torch.Generator
    ) -> list[list[int]]:
        """Ids of so many answers, what ends them included."""
        text = TextConfig(max_tokens=self.config.max_words, temperature=temperature)
        voices = [Voice(prompt.sample, text, generator) for _ in range(count)]
        model, vocabulary = self.objective.model, self.vocabulary
        for _ in speak_together(model, voices, allowed=vocabulary.allowed, stop=vocabulary.stop):
            pass  # the voices keep what they say
        return [voice.spoken for voice in voices]

    def _text(self, ids: list[int]) -> str:
        ended = ids[-1] in self.vocabulary.stop
        return self.vocabulary.decode(ids[:-1] if ended else ids)

    def _kept(self, prompt: Prompt, answers: list[list[int]]) -> Spoken:
        """What is learnt from, with the log-probabilities as an update will compute them, to the bit."""
        samples = [
            [*prompt.sample, Segment(Kind.TEXT, Role.ANSWER, torch.tensor(answer))] for answer in answers
        ]
        dense = self.ranks.device.type != "cuda"
        batch = pack(samples, self.objective.model.config, dense=dense).to(self.ranks.device)
        owner = batch.visibility.sample[batch.answer_index]
        spoken = Spoken(range(len(answers)), batch, owner, torch.empty(0))
        with torch.enable_grad():
            return replace(spoken, old=self.look(spoken).detach())

    def look(self, spoken: Spoken) -> Tensor:
        """[words] log-probability of each word now, differentiable; at the temperature it was drawn with."""
        pattern = pattern_of(spoken.batch, self.ranks)
        logits = (
            self.objective.logits(spoken.batch, pattern)[:, : self.vocabulary.allowed]
            / self.config.temperature
        )
        return logits.log_softmax(-1).gather(1, spoken.batch.answer_labels[:, None])[:, 0]

    def judge(self, spoken: Spoken, now: Tensor, advantage: Tensor) -> Judged:
        """The loss of each answer [members], a mean over its words."""
        ratio = (now - spoken.old).exp()
        loss = clipped(ratio, advantage[spoken.owner], self.config.ratio_range)
        away = (ratio.detach() - 1).abs()
        numbers = {
            "ratio": ratio.detach(), "first_ratio_off": away,
            "clipped": (away > self.config.ratio_range).float(),
        }  # fmt: skip
        if spoken.reference is not None:
            further = spoken.reference - now
            kl = further.exp() - further - 1  # unbiased, and never below 0
            loss, numbers["kl"] = loss + self.config.kl * kl, kl.detach()
        count = torch.bincount(spoken.owner, minlength=len(spoken.members))
        total = torch.zeros(len(spoken.members), device=loss.device).index_add(0, spoken.owner, loss)
        return Judged(total / count, numbers)
