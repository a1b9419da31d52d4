"""Questions about several pictures, with their exact answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from openlance.errors import InputError
from openlance.world.language import NUMBERS, caption, with_article
from openlance.world.questions import QA, Asked
from openlance.world.scene import Scene, WorldConfig, is_clear, is_held_out, known, pick, sample_scene

ORDINALS = ("first", "second", "third", "fourth")
Scenes = Sequence[Scene]
Rng = np.random.Generator


def sample_several(rng: Rng, config: WorldConfig, count: int = 2) -> tuple[Scene, ...]:
    """Clear scenes of still things without held-out pairs. Each shares about half of what can be compared
    with the first, so that "the same" is about as often true as not."""
    first = sample_scene(rng, config)
    return (first, *(_alike(first, rng, config) for _ in range(count - 1)))


def _alike(first: Scene, rng: Rng, config: WorldConfig) -> Scene:
    while True:
        scene = sample_scene(rng, config)
        if rng.random() < 0.5:
            scene = replace(scene, ground=first.ground)
        if len(scene.things) == len(first.things) == 1:
            shared = {
                name: getattr(first.things[0], name) for name in ("shape", "color") if rng.random() < 0.5
            }
            scene = replace(scene, things=(replace(scene.things[0], **shared),))
        if is_clear(scene) and not is_held_out(scene):
            return scene


def holds(scene: Scene) -> dict[str, set[str]]:
    """What can be said to be in a picture, by kind."""
    return {
        "shape": {with_article(thing.shape) for thing in scene.things},
        "color": {with_article(f"{thing.color} shape") for thing in scene.things},
        "both": {with_article(f"{thing.color} {thing.shape}") for thing in scene.things},
        "ground": {with_article(f"{scene.ground} ground")},
    }


def ask_which(scenes: Scenes, rng: Rng) -> Asked:
    """Something that one picture alone has."""
    options = []
    held = [holds(scene) for scene in scenes]
    for kind in held[0]:
        for index, mine in enumerate(held):
            others = set().union(*(other[kind] for other in held if other is not mine))
            options += [(kind, what, ORDINALS[index]) for what in sorted(mine[kind] - others)]
    if not options:
        return None
    kind = pick(rng, sorted({kind for kind, _, _ in options}))
    _, what, answer = pick(rng, [option for option in options if option[0] == kind])
    return f"which picture has {what}?", answer


def compared(scene: Scene) -> dict[str, object]:
    """What can be compared between pictures, by the name that a question gives it."""
    found: dict[str, object] = {"ground": scene.ground, "number of shapes": len(scene.things)}
    if len(scene.things) == 1:
        thing = scene.things[0]
        found |= {"shape": thing.shape, "color of the shape": thing.color, "size of the shape": thing.size}
    return found


def ask_same(scenes: Scenes, rng: Rng) -> Asked:
    """Whether something is the same in all pictures; yes and no are as likely where both can be asked."""
    facts = [compared(scene) for scene in scenes]
    names = [name for name in facts[0] if all(name in fact for fact in facts)]
    same = {name: all(fact[name] == facts[0][name] for fact in facts) for name in names}
    yes = rng.random() < 0.5
    options = [name for name in names if same[name] == yes] or names
    name = pick(rng, options)
    return f"is the {name} the same in all pictures?", "yes" if same[name] else "no"


def ask_most(scenes: Scenes, rng: Rng) -> Asked:
    """Which picture has the most or the fewest things, where it is one alone."""
    counts = [len(scene.things) for scene in scenes]
    options = [(word, best) for word, best in (("most", max(counts)), ("fewest", min(counts)))]
    options = [(word, best) for word, best in options if counts.count(best) == 1]
    if not options:
        return None
    word, best = pick(rng, options)
    return f"which picture has the {word} shapes?", ORDINALS[counts.index(best)]


def ask_total(scenes: Scenes, rng: Rng) -> Asked:
    total = sum(len(scene.things) for scene in scenes)
    return ("how many shapes are there in all pictures?", NUMBERS[total]) if total < len(NUMBERS) else None


SEVERAL_ASKERS: dict[str, Callable[[Scenes, Rng], Asked]] = {
    "which": ask_which, "same": ask_same, "most": ask_most, "total": ask_total,
}  # fmt: skip
SEVERAL_KINDS = tuple(SEVERAL_ASKERS)


def question_of_several(scenes: Scenes, rng: Rng, kinds: Sequence[str] = SEVERAL_KINDS) -> QA:
    """A question about two to four pictures together, of one of `kinds`, each equally likely among those that
    they allow. Pictures are named in their order: "first", "second". Raises InputError where they allow none.
    """
    if not 2 <= len(scenes) <= len(ORDINALS):
        raise InputError(f"questions of several pictures need two to four of them, not {len(scenes)}")
    for index in rng.permutation(len(kinds)):
        known("kind of question of several pictures", kinds[index], SEVERAL_KINDS)
        asked = SEVERAL_ASKERS[kinds[index]](scenes, rng)
        if asked:
            return QA(*asked, kinds[index])
    raise InputError(
        f"the pictures allow no question of the kinds {', '.join(kinds)}: {'; '.join(map(caption, scenes))}"
    )
