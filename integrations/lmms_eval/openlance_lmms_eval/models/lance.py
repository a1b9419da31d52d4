"""Lance behind lmms-eval's interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from tqdm import tqdm

from openlance.data.media import load_video
from openlance.infer.pipeline import LancePipeline
from openlance.infer.result import Generated

DEFAULT_TOKENS = 256


@register_model("lance")
class Lance(lmms):
    """Arguments are those of `--model_args`, all texts or numbers."""

    def __init__(
        self,
        pretrained: str = "nano",
        variant: str | None = None,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        frames: int | None = None,
        batch_size: int | str = 8,
        **strange: Any,
    ):
        super().__init__()
        if strange:
            raise ValueError(f"unknown model_args: {', '.join(sorted(strange))}")
        import torch

        self.pipeline = LancePipeline.from_pretrained(
            pretrained,
            variant=variant,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            tasks=["chat", "x2t_image", "x2t_video"],  # type: ignore[list-item]
        )
        if adapter is not None:
            self.pipeline.load_adapter(adapter)
        self.frames, self.batch = frames, int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """An answer to each request, in their order."""
        found: list[str] = []
        for start in tqdm(range(0, len(requests), self.batch), disable=self.rank != 0):
            orders = [self._order(*request.args) for request in requests[start : start + self.batch]]
            found += [answer.text for answer in self.pipeline.run(orders)]
        return found

    def _order(
        self,
        context: str,
        settings: Mapping[str, Any],
        doc_to_visual: Any,
        doc_id: int,
        task: str,
        split: str,
    ) -> Any:
        shown = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        return self.pipeline.order.ask(context, list(self._media(shown)), **text_options(settings))

    def _media(self, shown: Sequence[Any]) -> Iterator[Any]:
        """Pictures as they are; the path of a clip too, unless a number of frames is wanted of it."""
        for source in shown:
            if not isinstance(source, str) or self.frames is None:
                yield source
            else:
                clip = load_video(source, self._spread)
                yield Generated(clip.frames, clip.fps, {})  # an earlier result is shown as it is

    def _spread(self, count: int, fps: float) -> list[int]:
        assert self.frames is not None
        return [min(count - 1, int((place + 0.5) * count / self.frames)) for place in range(self.frames)]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lance answers in words: choose tasks that generate (generate_until)")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("lance is asked once here: choose tasks of one round")


def text_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation settings as ours; greedy unless it says that it draws."""
    until = settings.get("until") or []
    options: dict[str, Any] = {
        "max_tokens": int(settings.get("max_new_tokens", DEFAULT_TOKENS)),
        "stop": (until,) if isinstance(until, str) else tuple(text for text in until if text.strip()),
        "seed": 0,
    }
    if settings.get("do_sample") and (settings.get("temperature") or 0) > 0:
        options["temperature"] = float(settings["temperature"])
        options["top_p"] = float(settings.get("top_p") or 1.0)
    return options
