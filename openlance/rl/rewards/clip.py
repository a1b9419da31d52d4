"""How well a picture fits its prompt, by a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openlance.errors import InputError
from openlance.rl.rewards.base import Media, Metadata

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels that CLIP was trained on
STD = (0.26862954, 0.26130258, 0.27577711)
WEIGHT = 2.5  # brings the usual cosines into [0, 1] (CLIPScore, arXiv 2104.08718)


class CLIPScore:
    """The reward: 2.5 · max(cosine, 0), at most 1; of a clip, its middle frame.

    address: a Hugging Face id or a folder. Raises InputError for one that cannot be loaded.
    """

    def __init__(self, address: str, device: torch.device | str = "cpu", batch: int = 32):
        from transformers import AutoTokenizer, CLIPModel

        try:
            self.model = CLIPModel.from_pretrained(address).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(address)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"{address}: no CLIP model could be loaded ({first})") from error
        self.device, self.batch = device, batch

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[str], media: Sequence[Media], metadata: Sequence[Metadata]
    ) -> Sequence[float]:
        found: list[float] = []
        for start in range(0, len(prompts), self.batch):
            words = list(prompts[start : start + self.batch])
            pictures = torch.stack([self._pixels(shown) for shown in media[start : start + self.batch]])
            limit = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                words, return_tensors="pt", padding=True, truncation=True, max_length=limit
            )
            out = self.model(**tokens.to(self.device), pixel_values=pictures.to(self.device))
            cosine = (out.image_embeds * out.text_embeds).sum(-1)  # both have length 1
            found += (WEIGHT * cosine.clamp(min=0)).clamp(max=1).tolist()
        return found

    def _pixels(self, shown: Media) -> Tensor:
        """[3, side, side]: the shorter side resized, the middle cut out, normalised."""
        if isinstance(shown, str):
            raise InputError("CLIP looks at pictures, not words")
        side = self.model.config.vision_config.image_size
        picture = Image.fromarray(shown[len(shown) // 2])
        scale = side / min(picture.size)
        width, height = (max(side, round(length * scale)) for length in picture.size)
        left, top = (width - side) // 2, (height - side) // 2
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255
        return torch.from_numpy((pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).permute(
            2, 0, 1
        )
