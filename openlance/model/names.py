"""The one table between the released parameter names and ours.

Released names mark the generation expert with the suffix `_moe_gen` on a module; here the experts are two
branches, `und` and `gen`. The table is read both ways: to load a release, and to save in its layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable

PARTS = frozenset({"und", "gen", "vision"})

# Fixed sin-cos values that a release may store: dropped on load whatever their size, computed where needed.
POSITION_TABLE = "latent_pos_embed.pos_embed"

# (released module, our module). {e}: the expert, {i}: a number, {path}: any modules below.
RULES = (
    ("language_model.model.embed_tokens", "embed"),
    ("language_model.lm_head", "head"),
    ("language_model.model.norm{e}", "norm.{e}"),
    ("language_model.model.layers.{i}.input_layernorm{e}", "layers.{i}.{e}.attn_norm"),
    ("language_model.model.layers.{i}.self_attn.q_proj{e}", "layers.{i}.{e}.q"),
    ("language_model.model.layers.{i}.self_attn.k_proj{e}", "layers.{i}.{e}.k"),
    ("language_model.model.layers.{i}.self_attn.v_proj{e}", "layers.{i}.{e}.v"),
    ("language_model.model.layers.{i}.self_attn.o_proj{e}", "layers.{i}.{e}.o"),
    ("language_model.model.layers.{i}.self_attn.q_norm{e}", "layers.{i}.{e}.q_norm"),
    ("language_model.model.layers.{i}.self_attn.k_norm{e}", "layers.{i}.{e}.k_norm"),
    ("language_model.model.layers.{i}.post_attention_layernorm{e}", "layers.{i}.{e}.mlp_norm"),
    ("language_model.model.layers.{i}.mlp{e}.gate_proj", "layers.{i}.{e}.gate"),
    ("language_model.model.layers.{i}.mlp{e}.up_proj", "layers.{i}.{e}.up"),
    ("language_model.model.layers.{i}.mlp{e}.down_proj", "layers.{i}.{e}.down"),
    ("vae2llm", "latent_in"),
    ("llm2vae", "latent_out"),
    ("time_embedder.mlp.{i}", "time_embed.{i}"),
    ("vit_model.{path}", "vision.tower.{path}"),
)
RELEASED_EXPERT = {"und": "", "gen": "_moe_gen"}
OUR_EXPERT = {suffix: name for name, suffix in RELEASED_EXPERT.items()}
MARKS = {"{i}": r"(?P<i>\d+)", "{path}": r"(?P<path>.+)", "{leaf}": r"(?P<leaf>weight|bias)"}

VISION = "vit_model."  # what precedes, in model.safetensors, the names that vit.safetensors has
GENERATION = ("latent_in.", "latent_out.", "time_embed.", "norm.gen.")


def part_of(name: str) -> str:
    """The part ("und", "gen" or "vision") that one of our parameter names belongs to."""
    if name.startswith("vision."):
        return "vision"
    is_gen = name.startswith(GENERATION) or re.match(r"layers\.\d+\.gen\.", name)
    return "gen" if is_gen else "und"


def _translator(source: int, experts: dict[str, str], alternatives: str) -> Callable[[str], str | None]:
    """A function from the names of column `source` of the table to those of the other column."""
    table = []
    for rule in RULES:
        pattern = re.escape(rule[source] + ".{leaf}")
        for mark, group in (MARKS | {"{e}": f"(?P<e>{alternatives})"}).items():
            pattern = pattern.replace(re.escape(mark), group)
        table.append((re.compile(pattern), rule[1 - source] + ".{leaf}"))

    def translate(name: str) -> str | None:
        for pattern, template in table:
            if match := pattern.fullmatch(name):
                groups = match.groupdict()
                if "e" in groups:
                    groups["e"] = experts[groups["e"]]
                return template.format(**groups)
        return None

    return translate


to_ours = _translator(0, OUR_EXPERT, "|_moe_gen")
to_ours.__doc__ = "Our name of a released parameter; None for a name that the release does not have."
to_released = _translator(1, RELEASED_EXPERT, "und|gen")
to_released.__doc__ = "The released name of one of our parameters; None for a name that we do not have."
