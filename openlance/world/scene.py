"""The world: coloured shapes on a ground, described by plain values that can be drawn, said and judged.

A scene lives on three columns by three rows of cells. A thing stands in one cell; lengths are fractions of
the picture, so that a scene means the same at every size.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from openlance.errors import InputError

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLORS: dict[str, RGB] = {
    "red": (214, 32, 40),
    "green": (36, 152, 60),
    "blue": (30, 84, 232),
    "yellow": (248, 220, 20),
    "purple": (150, 48, 200),
    "orange": (248, 128, 12),
    "cyan": (24, 200, 216),
    "pink": (255, 120, 190),
}
GROUNDS: dict[str, RGB] = {
    "white": (250, 250, 250),
    "gray": (136, 136, 136),
    "black": (12, 12, 12),
    "beige": (228, 208, 172),
    "navy": (20, 28, 84),
    "brown": (92, 60, 40),
}
# The second colour of a texture: the ground, moved by a fixed step towards the middle of the scale.
TONE_STEP = 36
TONES: dict[str, RGB] = {
    name: (r - TONE_STEP, g - TONE_STEP, b - TONE_STEP)
    if r + g + b > 3 * 128
    else (r + TONE_STEP, g + TONE_STEP, b + TONE_STEP)
    for name, (r, g, b) in GROUNDS.items()
}
PLACES = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
TEXT_PLACES = ("top", "center", "bottom")
SIZES = ("small", "large")
TEXTURES = ("plain", "stripes", "checks", "dots")
MOTIONS = ("still", "left", "right", "up", "down", "grow", "shrink")
TIMES = ("always", "early", "late")  # of a motion: the whole clip, its first half, its second half
WORDS = (
    "A", "GO", "HI", "NO", "OK", "UP", "BUS", "CAT", "DOG", "FOX", "JAM", "KEY", "SUN", "YES", "ZOO",
    "BLUE", "FISH", "MOON", "OPEN", "STOP", "TREE", "WAVE", "HELLO", "LANCE", "QUICK", "VIDEO",
)  # fmt: skip

LIKE_RINGS = ("D", "O")  # letters that, alone, would be taken for a thing

RADII = {"small": 0.092, "large": 0.152}  # fraction of the shorter side
JITTER = 0.013  # largest offset: a large thing still stays inside its cell
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # cells (x, y) over a clip

# Never in training: every shape misses one colour, and no colour is missed twice.
HELD_OUT = frozenset({
    ("circle", "purple"), ("square", "cyan"), ("triangle", "pink"),
    ("cross", "orange"), ("star", "green"), ("ring", "yellow"),
})  # fmt: skip


def known(kind: str, value: object, choices) -> None:
    """Raise InputError unless `value` is one of `choices`; `kind` names it in the message."""
    if value not in choices:
        raise InputError(f"unknown {kind} {value!r}: choose one of {', '.join(map(str, choices))}")


def cell(place: str) -> tuple[int, int]:
    """(column, row) of a place, each 0, 1 or 2."""
    known("place", place, PLACES)
    row, column = divmod(PLACES.index(place), 3)
    return column, row


@dataclass(frozen=True)
class Thing:
    """One shape. Place and size are those of the first frame; offset (dx, dy) in fractions of the picture.

    when: in which part of a clip it moves.
    """

    shape: str
    color: str
    size: str
    place: str
    offset: tuple[float, float] = (0.0, 0.0)
    motion: str = "still"
    when: str = "always"

    def __post_init__(self) -> None:
        known("shape", self.shape, SHAPES)
        known("color", self.color, COLORS)
        known("size", self.size, SIZES)
        known("place", self.place, PLACES)
        known("motion", self.motion, MOTIONS)
        if self.motion not in possible_motions(self.size, self.place):
            raise InputError(f"a {self.size} thing at the {self.place} cannot move {self.motion!r}")
        known("time of a motion", self.when, TIMES)
        if self.motion == "still" and self.when != "always":
            raise InputError(f"a thing that stands still cannot move {self.when!r}: give it a motion")

    @property
    def cells(self) -> frozenset[tuple[int, int]]:
        """Every cell that the thing touches between the first and the last frame."""
        column, row = cell(self.place)
        dx, dy = STEPS.get(self.motion, (0, 0))
        return frozenset({(column, row), (column + dx, row + dy)})


@dataclass(frozen=True)
class Text:
    """A word in capitals across the middle of the top, center or bottom row; it takes the whole row.

    One to five letters A to Z; D or O alone would look like a ring.
    """

    word: str
    color: str
    place: str

    def __post_init__(self) -> None:
        known("color", self.color, COLORS)
        known("place of a text", self.place, TEXT_PLACES)
        letters = self.word.isascii() and self.word.isalpha() and self.word.isupper()
        if not (letters and len(self.word) <= 5) or self.word in LIKE_RINGS:
            raise InputError(
                f"cannot write {self.word!r}: a word has one to five letters A to Z in capitals, "
                "and is neither D nor O alone, which look like a ring"
            )

    @property
    def cells(self) -> frozenset[tuple[int, int]]:
        row = cell(self.place)[1]
        return frozenset((column, row) for column in range(3))


@dataclass(frozen=True)
class Scene:
    """A ground with things and at most one text. No two of them ever share a cell."""

    ground: str
    texture: str = "plain"
    things: tuple[Thing, ...] = ()
    text: Text | None = None

    def __post_init__(self) -> None:
        known("ground", self.ground, GROUNDS)
        known("texture", self.texture, TEXTURES)
        taken: set[tuple[int, int]] = set()
        for part in self.parts:
            if taken & part.cells:
                raise InputError(f"{part} stands where another part of the scene is or moves to")
            taken |= part.cells

    @property
    def parts(self) -> tuple[Thing | Text, ...]:
        """The things, and the text where there is one."""
        return (*self.things, self.text) if self.text else self.things


@dataclass(frozen=True)
class WorldConfig:
    """What `sample_scene` draws from. `count_weights[n - 1]` weighs n things and is cut at `max_things`."""

    max_things: int = 2
    count_weights: tuple[float, ...] = (0.55, 0.45, 0.35, 0.25)
    grounds: tuple[str, ...] = tuple(GROUNDS)
    textures: tuple[str, ...] = ("plain",)
    words: tuple[str, ...] = ()
    text_share: float = 0.5  # of the scenes, where there are words
    motions: tuple[str, ...] = ("still",)
    times: tuple[str, ...] = ("always",)

    def __post_init__(self) -> None:
        if not 1 <= self.max_things <= min(4, len(self.count_weights)):
            raise InputError(f"max_things is {self.max_things}: give 1 to 4, with a weight for each count")
        for kind, values, choices in (
            ("ground", self.grounds, GROUNDS),
            ("texture", self.textures, TEXTURES),
            ("motion", self.motions, MOTIONS),
            ("time of a motion", self.times, TIMES),
        ):
            for value in values:
                known(kind, value, choices)


def is_held_out(scene: Scene) -> bool:
    """Whether any thing is one of the (shape, color) pairs of HELD_OUT, kept for evaluation."""
    return any((thing.shape, thing.color) in HELD_OUT for thing in scene.things)


def possible_motions(size: str, place: str) -> tuple[str, ...]:
    """The motions that keep a thing in the picture; it grows from small, and shrinks from large."""
    column, row = cell(place)
    fits = {name: 0 <= column + dx <= 2 and 0 <= row + dy <= 2 for name, (dx, dy) in STEPS.items()}
    fits |= {"still": True, "grow": size == "small", "shrink": size == "large"}
    return tuple(name for name in MOTIONS if fits[name])


def is_clear(scene: Scene) -> bool:
    """Whether no (shape, color) occurs twice, and cells side by side hold different colors.

    So "the red circle" always means one thing, and neighbours never melt into one.
    """
    things = scene.things
    if len({(thing.shape, thing.color) for thing in things}) < len(things):
        return False
    return not any(
        a.color == b.color and any(abs(x - u) + abs(y - v) == 1 for x, y in a.cells for u, v in b.cells)
        for index, a in enumerate(scene.parts)
        for b in scene.parts[:index]
    )


def pick(rng: np.random.Generator, choices):
    """One of a sequence, each equally likely."""
    return choices[int(rng.integers(len(choices)))]


def sample_thing(
    rng: np.random.Generator, motions: tuple[str, ...] = ("still",), times: tuple[str, ...] = ("always",)
) -> Thing:
    """A thing of any kind, anywhere."""
    size, place = pick(rng, SIZES), pick(rng, PLACES)
    motion = pick(rng, [m for m in motions if m in possible_motions(size, place)] or ["still"])
    dx, dy = rng.uniform(-JITTER, JITTER, size=2)
    thing = Thing(pick(rng, SHAPES), pick(rng, list(COLORS)), size, place, (float(dx), float(dy)), motion)
    # One choice draws nothing, so that worlds without times are the same as ever.
    return thing if motion == "still" or len(times) == 1 else replace(thing, when=pick(rng, times))


def sample_scene(
    rng: np.random.Generator, config: WorldConfig = WorldConfig(), *, held_out: bool | None = False
) -> Scene:
    """A clear scene. `held_out`: False never shows a held-out pair, True always does, None may."""
    weights = np.array(config.count_weights[: config.max_things], dtype=float)
    while True:
        count = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
        scene = Scene(pick(rng, config.grounds), pick(rng, config.textures))
        if config.words and rng.random() < config.text_share:
            text = Text(pick(rng, config.words), pick(rng, list(COLORS)), pick(rng, TEXT_PLACES))
            scene = replace(scene, text=text)
        for _ in range(20 * count):  # a crowded scene may have no room left: then start again
            if len(scene.things) == count:
                break
            with suppress(InputError):  # the new thing stands on another: draw again
                thing = sample_thing(rng, config.motions, config.times)
                wider = replace(scene, things=(*scene.things, thing))
                scene = wider if is_clear(wider) else scene
        if len(scene.things) == count and held_out in (None, is_held_out(scene)):
            return scene


def cell_labels(scene: Scene) -> np.ndarray:
    """int64 [9, 3]: per place, shape, color and size of its thing, counted from 1; 0 for nothing."""
    labels = np.zeros((len(PLACES), 3), dtype=np.int64)
    for thing in scene.things:
        labels[PLACES.index(thing.place)] = (
            1 + SHAPES.index(thing.shape),
            1 + list(COLORS).index(thing.color),
            1 + SIZES.index(thing.size),
        )
    return labels
