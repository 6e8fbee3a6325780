"""The texts of the sample data set: forms of `texts.toml`, and how a mention is put into one.

A form is one whole text with slots. Grammar that depends on the mention (articles, "is" or "are", capitals) is settled
here, by the noun class of its name, so that a text reads as if it had been written with that name in mind. Nothing here
knows of drawings or images.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimic_el.datasets_scripts.sample_entities import SOURCES, Entity, Name, SampleError, senses

SPLITS = ("train", "validation", "test")
KINDS = ("text", "image", "both")
NEUTRAL = "neutral"
ALIAS_SHARE = 0.35

_SLOT = re.compile(r"\{(\w*)\}")
# Slots that agree with the mention: for a singular and for a plural.
_AGREEMENT = {
    "this": ("this", "these"),
    "is": ("is", "are"),
    "was": ("was", "were"),
    "has": ("has", "have"),
    "does": ("does", "do"),
    "it": ("it", "they"),
    "them": ("it", "them"),
    "its": ("its", "their"),
    "s": ("s", ""),
}
_ARTICLES = ("the", "a", "an", "some")
_MENTION = ("m", *_AGREEMENT, *_ARTICLES)
# Words that are spoken with a vowel at their start though they are not spelled so, and the other way round.
_SPOKEN_VOWEL = ("hour", "honest", "heir", "x-ray")
_SPOKEN_CONSONANT = ("uni", "use", "usu", "eu", "one", "once")

Pool = dict[str, list[str]]


@dataclass(frozen=True)
class Forms:
    """The text forms of texts.toml, by split, and the fillers of their slots.

    Attributes:
        neutral: forms that suit every entity.
        pools: for each category and pool, forms that suit the entities which name the pool.
        slots: for each category, and for `neutral`, the fillers of its forms' slots.
    """

    neutral: Pool
    pools: dict[str, dict[str, Pool]]
    slots: dict[str, dict[str, list[str]]]

    def of(self, entity: Entity, kind: str, split: str) -> list[str]:
        """The forms that a mention of this entity can have."""
        if kind == "image":
            return self.neutral[split]
        return [form for pool in entity.pools for form in self.pools[entity.category][pool].get(split, ())]

    def slots_for(self, entity: Entity, kind: str) -> dict[str, list[str]]:
        return self.slots[NEUTRAL if kind == "image" else entity.category]


def read_forms(path: Path = SOURCES / "texts.toml") -> Forms:
    """Reads the text forms.

    Raises:
        SampleError: a form is malformed, or is listed twice (for two splits or two categories).
    """
    with path.open("rb") as file:
        content = tomllib.load(file)
    shared: dict[str, list[str]] = content["slots"]
    slots, pools = {NEUTRAL: shared}, {}
    for category, tables in content["category"].items():
        slots[category] = shared | tables.pop("slots", {})
        pools[category] = tables
    forms = Forms(neutral=content[NEUTRAL], pools=pools, slots=slots)
    seen: dict[str, str] = {}
    listed = [(NEUTRAL, NEUTRAL, forms.neutral)]
    listed += [
        (category, f"{category}.{name}", pool) for category, named in pools.items() for name, pool in named.items()
    ]
    for category, place, pool in listed:
        if set(pool) != set(SPLITS) or not all(pool.values()):
            raise SampleError(f"{path.name}, {place}: needs forms for each of {', '.join(SPLITS)} and no other.")
        # A neutral form must not show what class of noun it is made for.
        allowed = {"m"} if category == NEUTRAL else set(_MENTION)
        for split in SPLITS:
            for form in pool[split]:
                _check(form, f"{path.name}, {place}, {split}: {form!r}", allowed | set(slots[category]))
                if form in seen:
                    raise SampleError(f"{path.name}, {place}, {split}: {form!r} is listed under {seen[form]} too.")
                seen[form] = f"{place}, {split}"
    return forms


def _check(form: str, place: str, allowed: set[str]) -> None:
    names = [name[:1].lower() + name[1:] for name in _SLOT.findall(form)]
    if names.count("m") != 1 or not set(names) <= allowed:
        raise SampleError(f"{place} needs one {{m}} and no slots but {sorted(allowed)}.")
    if re.search(r"[{}]", _SLOT.sub("", form)) or form != " ".join(form.split()):
        raise SampleError(f"{place} has a brace or a space too many.")
    if not is_chat(form) and not re.match(r"\W*(?:[A-Z0-9]|\{[A-Z])", _SLOT.sub(_numbers_as_digits, form)):
        raise SampleError(f"{place} begins with a small letter but has capitals: a chat message has none.")


def _numbers_as_digits(slot: re.Match[str]) -> str:
    return "0" if slot[1] in ("num", "price") else slot[0]


def is_chat(form: str) -> bool:
    """Whether a form is a chat message: it has no capital, and what fills its slots stays small too."""
    return form == form.lower()


def check_pools(entities: Sequence[Entity], forms: Forms) -> None:
    """Checks that each entity has forms, and that no pool belongs to so few entities that a form gives one away.

    Raises:
        SampleError: a pool that an entity names does not exist, or fewer than three entities name a pool.
    """
    users: Counter[tuple[str, str]] = Counter()
    for entity in entities:
        for pool in entity.pools:
            if pool not in forms.pools.get(entity.category, {}):
                raise SampleError(f"texts.toml has no forms [category.{entity.category}.{pool}], for {entity.id}.")
            users[entity.category, pool] += 1
    for category, pools in forms.pools.items():
        for pool in pools:
            if users[category, pool] < 3:
                raise SampleError(
                    f"{users[category, pool]} entities use the forms [category.{category}.{pool}] of texts.toml: fewer "
                    "than three, so a form would name its entity."
                )


@dataclass(frozen=True)
class Text:
    """A text, the mention as it stands in it, and the form both come from."""

    mention: str
    text: str
    form: str


def compose(form: str, name: Name, slots: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Text:
    """Fills in a form.

    Args:
        form: as in texts.toml.
        name: of the entity, with the noun class that decides on articles, agreement and capitals.
        slots: fillers of the other slots; two slots of one text never get the same filler.
        rng: chooses the fillers.

    Returns:
        the text, which contains the mention as returned.
    """
    parts = _SLOT.split(form)
    chosen: dict[int, str] = {}
    for place, slot in enumerate(parts):
        key = slot[:1].lower() + slot[1:]
        if place % 2 and key not in _MENTION:
            options = [option for option in slots[key] if option not in chosen.values()]
            chosen[place] = options[int(rng.integers(len(options)))]
    # From the end to the start: an article looks at the word after it, and hands its capital on where it falls away.
    tail, after_mention, length = "", 0, 0
    for place in range(len(parts) - 1, -1, -1):
        part = parts[place]
        if place % 2 == 0:
            tail = part + tail
            continue
        key, capital = part[:1].lower() + part[1:], part[:1].isupper()
        if key == "m":
            written = name.text
            after_mention, length = len(tail), len(written)
        elif key in _ARTICLES:
            written = _article(key, name.noun, tail)
            if not written:
                tail = tail.removeprefix(" ")
        elif key in _AGREEMENT:
            written = _AGREEMENT[key][name.noun == "plural"]
        else:
            written = chosen[place]
        tail = written + tail
        if capital and not (key == "m" and name.noun.startswith("proper")):
            tail = tail[:1].upper() + tail[1:]
    text = tail.lower() if is_chat(form) else tail
    start = len(text) - after_mention - length
    return Text(mention=text[start : start + length], text=text, form=form)


def _article(slot: str, noun: str, tail: str) -> str:
    word = tail.lstrip(" '").lower()
    vowel = word.startswith(_SPOKEN_VOWEL) or (word[:1] in set("aeiou") and not word.startswith(_SPOKEN_CONSONANT))
    indefinite = "an" if vowel else "a"
    if slot == "an":
        return indefinite
    if noun in ("proper", "bare"):
        return ""
    if noun == "proper-the" or slot == "the":
        return "the"
    if noun in ("count", "proper-count"):
        return indefinite
    return "some" if slot == "some" else ""


def eligible(entities: Sequence[Entity], kind: str) -> list[Entity]:
    """The entities that a kind of mention can be about.

    `image` needs another entity of the same name; `text` needs that none of these is of the same category, for a text
    only tells categories apart; `both` takes all.
    """
    groups = senses(entities)

    def fits(entity: Entity) -> bool:
        others = [e for e in groups[entity.name.lower()] if e is not entity]
        if kind == "both":
            return True
        return bool(others) and (kind == "image" or all(e.category != entity.category for e in others))

    return [entity for entity in entities if fits(entity)]


def choose_name(entity: Entity, kind: str, rng: np.random.Generator) -> Name:
    """What a mention calls its entity: its name or, now and then in the kind `both`, another one."""
    if kind == "both" and entity.aliases and rng.random() < ALIAS_SHARE:
        return entity.aliases[int(rng.integers(len(entity.aliases)))]
    return Name(entity.name if entity.noun.startswith("proper") else entity.name.lower(), entity.noun)


class FormChooser:
    """Chooses forms for the mentions of one split: an entity gets each form that suits it before any a second time."""

    def __init__(self, forms: Forms, split: str, rng: np.random.Generator):
        self.forms, self.split, self.rng = forms, split, rng
        self._used: Counter[tuple[str, str]] = Counter()

    def choose(self, entity: Entity, kind: str) -> str:
        """One of the forms that this entity has had least, at random.

        How often others have had it does not count: an entity of few forms would keep them to itself.
        """
        forms = self.forms.of(entity, kind, self.split)
        least = min(self._used[entity.id, form] for form in forms)
        options = [form for form in forms if self._used[entity.id, form] == least]
        form = options[int(self.rng.integers(len(options)))]
        self._used[entity.id, form] += 1
        return form
