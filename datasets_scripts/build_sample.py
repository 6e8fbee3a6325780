"""Builds the sample data set: a few hundred entities with colliding names, and mentions of them.

The drawings come from published packages of flags, brand logos and pictograms, which are read as they were
published (never unpacked, never installed). Fetch them into a folder by name and version, then build:

    mkdir packages && cd packages && npm pack $(python -m mimic_el.datasets_scripts.build_sample --list_packages)
    python -m mimic_el.datasets_scripts.build_sample --packages_dir packages --output_dir sample

What is said of the entities is in `sample_sources/`: `entities.tsv` lists them by the identifier of their source,
`sentences.toml` has the sentence forms, `card.md` is the card's text. An identifier, or a name beside it, that the
packages do not know stops the build. The same inputs, seed and library versions give the same files.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import string
import sys
import tarfile
import tomllib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from tqdm.auto import tqdm

SOURCES = Path(__file__).parent / "sample_sources"
SPLITS = ("train", "validation", "test")
KINDS = ("words", "picture", "both")
SIZES = {"train": 6000, "validation": 420, "test": 600}
PICTURE_SIZE = 64
DRAWING_SIZE = 192
KB_PICTURES = 2
SHARD = "{split}-00000-of-00001.parquet"

# What a logo may be under when the package names a licence for that one icon.
ICON_LICENCES = {"CC0-1.0", "MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0"}


class SampleError(ValueError):
    """An input of the build is missing or is not what it should be."""


@dataclass(frozen=True)
class Package:
    """A published package: where drawings or names come from, and on what terms."""

    name: str
    version: str
    sha256: str
    licence: str
    role: str
    project: str

    @property
    def filename(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
            "Apache-2.0",
            "emoji drawn by Google (Noto Emoji)",
            "https://github.com/googlefonts/noto-emoji",
        ),
        Package(
            "@iconify-json/twemoji",
            "1.2.5",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
            "CC-BY-4.0",
            "emoji and flags drawn by Twitter, Inc. and other contributors (Twemoji)",
            "https://github.com/jdecked/twemoji",
        ),
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
            "MIT",
            "emoji drawn by Microsoft Corporation (Fluent Emoji)",
            "https://github.com/microsoft/fluentui-emoji",
        ),
        Package(
            "flag-icons",
            "7.5.0",
            "c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518",
            "MIT",
            "flags drawn by Panayiotis Lipiridis and contributors; names of countries",
            "https://github.com/lipis/flag-icons",
        ),
        Package(
            "@iconify-json/circle-flags",
            "1.2.11",
            "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9",
            "MIT",
            "round flags of countries and regions drawn by HatScripts",
            "https://github.com/HatScripts/circle-flags",
        ),
        Package(
            "simple-icons",
            "16.37.0",
            "cd9faf0e6faa8a8fdd15e9632ab4c86fcae4b986fe552b87673149847f2f671d",
            "CC0-1.0",
            "one-colour brand logos collected by Simple Icons; names and colours of brands",
            "https://github.com/simple-icons/simple-icons",
        ),
        Package(
            "@iconify-json/logos",
            "1.2.19",
            "1e8907c088bbf02eab8ee1b28f37e68ef22c380f2fb579ff99736b8ce5abf13a",
            "CC0-1.0",
            "brand logos collected by Gil Barbara (SVG Logos)",
            "https://github.com/gilbarbara/logos",
        ),
        Package(
            "@iconify-json/devicon",
            "1.2.68",
            "5b5469af72fbe9aecb3b3c941931af967d0901a8deeff7c48ff4a3f0af2dde0c",
            "MIT",
            "logos of programming languages and tools collected by konpa (Devicon)",
            "https://github.com/devicons/devicon",
        ),
        Package(
            "@iconify-json/game-icons",
            "1.2.4",
            "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4",
            "CC-BY-3.0",
            "pictograms drawn by Lorc, Delapouite and contributors (Game-icons.net)",
            "https://github.com/game-icons/icons",
        ),
        Package(
            "unicode-emoji-json",
            "0.9.0",
            "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
            "MIT",
            "names of emoji",
            "https://github.com/muan/unicode-emoji-json",
        ),
        Package(
            "cldr-subdivisions-full",
            "48.2.0",
            "558fef1e523e21c2bff7ebf4ff6c7686e4e8594df82ac2cd94a71935662596cd",
            "Unicode-3.0",
            "names of regions",
            "https://github.com/unicode-org/cldr-json",
        ),
    )
}

# The order is that of preference: an entity's pictures in the knowledge base are its first drawings, and the third
# one, where there is one, is kept for the mentions of validation and test.
EMOJI_SETS = ("@iconify-json/noto", "@iconify-json/twemoji", "@iconify-json/fluent-emoji-flat")
LOGO_SETS = {"logos": "@iconify-json/logos", "devicon": "@iconify-json/devicon"}


class PackageStore:
    """The packages of `PACKAGES`, read from the archives in a folder.

    Args:
        folder: where `npm pack` put the archives.

    Raises:
        SampleError: an archive is missing, is not the published one, or states another licence.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        missing = [p for p in PACKAGES.values() if not (self.folder / p.filename).is_file()]
        if missing:
            names = " ".join(f"{p.name}@{p.version}" for p in missing)
            raise SampleError(
                f"{self.folder} lacks {len(missing)} of {len(PACKAGES)} packages. In that folder, run: npm pack {names}"
            )
        self._files: dict[str, dict[str, bytes]] = {}
        for package in PACKAGES.values():
            content = (self.folder / package.filename).read_bytes()
            if hashlib.sha256(content).hexdigest() != package.sha256:
                raise SampleError(
                    f"{self.folder / package.filename} is not {package.name} {package.version} as it was published: "
                    "delete it and fetch it again."
                )
            # The archive is the published one, byte for byte; it is read in memory and never unpacked.
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
                files = {}
                for member in archive:
                    reader = archive.extractfile(member) if member.isfile() else None
                    if reader is not None:
                        files[member.name.removeprefix("package/")] = reader.read()
            licence = json.loads(files["package.json"]).get("license")
            if licence != package.licence:
                raise SampleError(f"{package.name} {package.version} is under {licence}, not under {package.licence}.")
            self._files[package.name] = files

    def has(self, package: str, path: str) -> bool:
        return path in self._files[package]

    def text(self, package: str, path: str) -> str:
        return self._files[package][path].decode("utf-8")

    def json(self, package: str, path: str) -> Any:
        return json.loads(self._files[package][path])

    @cached_property
    def _icon_sets(self) -> dict[str, dict[str, Any]]:
        return {name: self.json(name, "icons.json") for name in PACKAGES if name.startswith("@iconify-json/")}

    @cached_property
    def _characters(self) -> dict[str, dict[str, str]]:
        return {name: self.json(name, "chars.json") for name in EMOJI_SETS}

    @cached_property
    def emoji_names(self) -> dict[str, str]:
        """Code points ("1f34a", "1f43b-200d-2744") to names."""
        names = self.json("unicode-emoji-json", "data-by-emoji.json")
        return {code_points(character): entry["name"] for character, entry in names.items()}

    @cached_property
    def flag_names(self) -> dict[str, str]:
        """ISO 3166 codes ("ge", "us-ga") to names of countries and regions."""
        subdivisions = self.json("cldr-subdivisions-full", "subdivisions/en/en.json")
        regions = subdivisions["subdivisions"]["localeDisplayNames"]["subdivisions"]
        names = {f"{code[:2]}-{code[2:]}": name for code, name in regions.items() if len(code) > 2}
        return names | {entry["code"]: entry["name"] for entry in self.json("flag-icons", "country.json")}

    @cached_property
    def brands(self) -> dict[str, dict[str, Any]]:
        """Slugs ("orange") to what simple-icons says of a brand: title, hex, source, license."""
        icons = self.json("simple-icons", "data/simple-icons.json")
        return {icon.get("slug") or brand_slug(icon["title"]): icon for icon in icons}

    def icon(self, package: str, name: str) -> str | None:
        """The SVG document of one icon of an icon set, or None where the set has none of that name."""
        icons = self._icon_sets[package]
        alias = icons.get("aliases", {}).get(name)
        if alias is not None:
            if set(alias) != {"parent"}:
                return None
            name = alias["parent"]
        icon = icons["icons"].get(name)
        if icon is None:
            return None
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )

    def emoji(self, package: str, points: str) -> str | None:
        """The SVG document of an emoji by its code points, or None where the set lacks it."""
        name = self._characters[package].get(points)
        return None if name is None else self.icon(package, name)


def short_name(package: str) -> str:
    """A package's name as it stands in the data set's column `drawing`."""
    return package.removeprefix("@iconify-json/")


def code_points(character: str) -> str:
    """Hexadecimal code points joined by hyphens, without the variation selector."""
    return "-".join(f"{ord(c):x}" for c in character if c != "\ufe0f")


def brand_slug(title: str) -> str:
    """The name of a brand's file in simple-icons, by the rule that package documents."""
    replaced = {"+": "plus", ".": "dot", "&": "and", "đ": "d", "ħ": "h", "ı": "i", "ĸ": "k", "ŀ": "l", "ł": "l"}
    replaced |= {"ß": "ss", "ŧ": "t", "ø": "o"}
    plain = "".join(replaced.get(c, c) for c in title.lower())
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFD", plain))


@dataclass(frozen=True)
class Drawing:
    """One drawing of an entity. `ink` is the colour of a one-colour drawing, None for a coloured one."""

    package: str
    svg: str
    ink: tuple[int, int, int] | None = None


@dataclass
class Entity:
    """A row of entities.tsv, with its drawings once the packages were read."""

    id: str
    name: str
    category: str
    proper: bool
    source_name: str
    extra_drawings: list[str]
    aliases: list[str]
    description: str
    drawings: list[Drawing] = field(default_factory=list)

    @property
    def kb_drawings(self) -> list[Drawing]:
        """What the knowledge base shows, and the mentions of the training split."""
        return self.drawings[:KB_PICTURES]


def read_entities(path: Path = SOURCES / "entities.tsv") -> list[Entity]:
    """Reads the list of entities.

    Raises:
        SampleError: a row is malformed or an identifier is listed twice.
    """
    entities = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=2):
            if (
                None in row
                or None in row.values()
                or not all(row[k] for k in ("id", "name", "category", "description"))
            ):
                raise SampleError(f"{path}, line {number}: a field is missing or there is one too many.")
            if row["noun"] not in ("common", "proper"):
                raise SampleError(f"{path}, line {number}: noun is {row['noun']!r}, not common or proper.")
            entities.append(
                Entity(
                    id=row["id"],
                    name=row["name"],
                    category=row["category"],
                    proper=row["noun"] == "proper",
                    source_name=row["source_name"],
                    extra_drawings=row["drawings"].split(),
                    aliases=[alias for alias in row["aliases"].split("; ") if alias],
                    description=row["description"],
                )
            )
    repeated = [id for id, count in Counter(e.id for e in entities).items() if count > 1]
    if repeated:
        raise SampleError(f"{path} lists more than once: {', '.join(repeated)}.")
    return entities


def find_drawings(entity: Entity, packages: PackageStore) -> tuple[str, list[Drawing]]:
    """Looks an entity up by its identifier.

    Returns:
        the name that the source gives it, and its drawings, best first.

    Raises:
        SampleError: no package knows the identifier or a drawing that the list asks for, or a logo has a licence
            of its own that is not among `ICON_LICENCES`.
    """
    kind, _, key = entity.id.partition(":")
    name: str | None = None
    found: list[tuple[str, str | None, tuple[int, int, int] | None]] = []
    if kind == "emoji":
        name = packages.emoji_names.get(key)
        found = [(package, packages.emoji(package, key), None) for package in EMOJI_SETS]
    elif kind == "flag":
        name = packages.flag_names.get(key)
        path = f"flags/4x3/{key}.svg"
        indicators = "-".join(f"{0x1F1E6 + ord(c) - ord('a'):x}" for c in key)
        found = [
            ("flag-icons", packages.text("flag-icons", path) if packages.has("flag-icons", path) else None, None),
            ("@iconify-json/twemoji", packages.emoji("@iconify-json/twemoji", indicators), None),
            ("@iconify-json/circle-flags", packages.icon("@iconify-json/circle-flags", key), None),
        ]
    elif kind == "pictogram":
        package = "@iconify-json/game-icons"
        name = key.replace("-", " ")
        found = [(package, packages.icon(package, key), (0, 0, 0))]
    elif kind == "brand" and key in packages.brands:
        brand = packages.brands[key]
        name = brand["title"]
        licence = brand.get("license", {}).get("type")
        if licence is not None and licence not in ICON_LICENCES:
            raise SampleError(f"{entity.id}: the logo itself is under {licence}; leave this entity out.")
        ink = bytes.fromhex(brand["hex"])
        found = [("simple-icons", packages.text("simple-icons", f"icons/{key}.svg"), (ink[0], ink[1], ink[2]))]
    elif kind == "brand" and entity.extra_drawings:
        # Not among the brands of simple-icons: the identifier is then the icon's name in its own set.
        icon_name = entity.extra_drawings[0].partition(":")[2].removesuffix("-icon")
        name = icon_name.replace("-", " ") if icon_name == key else None
    for reference in entity.extra_drawings:
        short, _, icon_name = reference.partition(":")
        svg = packages.icon(LOGO_SETS[short], icon_name) if short in LOGO_SETS else None
        if svg is None:
            raise SampleError(f"{entity.id}: there is no drawing {reference!r} in the packages.")
        found.append((LOGO_SETS[short], svg, None))
    drawings = [Drawing(package, svg, ink) for package, svg, ink in found if svg is not None]
    if name is None or not drawings:
        raise SampleError(f"{entity.id} ({entity.name}): the packages know no such identifier.")
    return name, drawings


def add_drawings(entities: Sequence[Entity], packages: PackageStore) -> None:
    """Fills in the drawings of all entities, and checks the names in the list against the packages.

    Raises:
        SampleError: see `find_drawings`; or the list names the source's entry otherwise than the source does.
    """
    for entity in entities:
        name, entity.drawings = find_drawings(entity, packages)
        if name != entity.source_name:
            raise SampleError(f"{entity.id} is {name!r} in its source, and {entity.source_name!r} in entities.tsv.")


# Sentences


@dataclass(frozen=True)
class Forms:
    """The sentence forms of sentences.toml, by split."""

    frames: dict[str, list[str]]
    neutral: dict[str, list[str]]
    clauses: dict[str, dict[str, list[str]]]
    slots: dict[str, list[str]]


def read_forms(path: Path = SOURCES / "sentences.toml") -> Forms:
    """Reads the sentence forms.

    Raises:
        SampleError: a form is malformed, or two splits (or two categories) share one.
    """
    with path.open("rb") as file:
        content = tomllib.load(file)
    forms = Forms(
        frames=content["frames"], neutral=content["neutral"], clauses=content["category"], slots=content["slots"]
    )
    allowed = {"m", "the", *forms.slots}
    pools = {"frames": forms.frames, "neutral": forms.neutral} | {f"category {c}": v for c, v in forms.clauses.items()}
    seen: dict[str, str] = {}
    for pool, by_split in pools.items():
        for split in SPLITS:
            for form in by_split.get(split, ()):
                place = f"{path.name}, {pool}, {split}: {form!r}"
                slots = [name for _, name, _, _ in string.Formatter().parse(form) if name is not None]
                wanted = "s" if pool == "frames" else "m"
                if slots.count(wanted) != 1 or not set(slots) <= allowed | {wanted}:
                    raise SampleError(f"{place} needs one {{{wanted}}} and no slots but {sorted(allowed)}.")
                if form in seen:
                    raise SampleError(f"{place} is listed under {seen[form]} too.")
                seen[form] = f"{pool}, {split}"
            if not by_split.get(split):
                raise SampleError(f"{path.name}, {pool}: no form for {split}.")
    return forms


@dataclass(frozen=True)
class Sentence:
    mention: str
    sentence: str
    form: str


def compose(
    frame: str, clause: str, surface: str, article: bool, slots: dict[str, list[str]], rng: np.random.Generator
) -> Sentence:
    """Puts a mention into a clause and the clause into a frame.

    Args:
        frame: with `{s}` where the clause goes.
        clause: with `{m}` where the mention goes, and `{the}` where a common noun needs its article.
        surface: how the mention is written.
        article: whether `{the}` stands for "the ".
        slots: fillers of the other slots; two slots of one sentence never get the same filler.
        rng: chooses the fillers.

    Returns:
        the sentence, which contains the mention as returned, and its form.
    """
    form = frame.replace("{s}", clause)
    chosen: list[str] = []
    parts: list[str] = []
    start = 0
    for literal, name, _, _ in string.Formatter().parse(form):
        parts.append(literal)
        if name == "m":
            start = sum(map(len, parts))
            parts.append(surface)
        elif name == "the":
            parts.append("the " if article else "")
        elif name is not None:
            options = [option for option in slots[name] if option not in chosen]
            chosen.append(options[int(rng.integers(len(options)))])
            parts.append(chosen[-1])
    text = "".join(parts)
    text = f"{text[0].upper()}{text[1:]}."
    return Sentence(mention=text[start : start + len(surface)], sentence=text, form=form)


def senses(entities: Sequence[Entity]) -> dict[str, list[Entity]]:
    """Entities by name, in lower case: those under one key cannot be told apart by their name."""
    groups: dict[str, list[Entity]] = defaultdict(list)
    for entity in entities:
        groups[entity.name.lower()].append(entity)
    return groups


def eligible(entities: Sequence[Entity], kind: str) -> list[Entity]:
    """The entities that a kind of mention can be about.

    `picture` needs another entity of the same name; `words` needs that none of these is of the same category, for a
    sentence only tells categories apart; `both` takes all.
    """
    groups = senses(entities)

    def fits(entity: Entity) -> bool:
        others = [e for e in groups[entity.name.lower()] if e is not entity]
        if kind == "both":
            return True
        return bool(others) and (kind == "picture" or all(e.category != entity.category for e in others))

    return [entity for entity in entities if fits(entity)]


def surface_form(entity: Entity, kind: str, rng: np.random.Generator) -> str:
    """How a mention is written: the name, in lower case now and then, or (kind `both`) another name."""
    if kind == "both" and entity.aliases and rng.random() < 0.35:
        return entity.aliases[int(rng.integers(len(entity.aliases)))]
    # A neutral sentence must not give the sense away by its capitals.
    lowered = {"picture": 0.2}.get(kind, 0.05 if entity.proper else 0.7)
    return entity.name.lower() if rng.random() < lowered else entity.name


# Pictures


def stable_rng(*key: object) -> np.random.Generator:
    """A generator that depends on the key alone, so that one picture's seed does not hang on how many came before."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def render(drawing: Drawing, ink: tuple[int, int, int] | None = None) -> Image.Image:
    """Draws an SVG as an RGBA picture, trimmed to what is drawn, its longer side `DRAWING_SIZE` at most."""
    import resvg_py

    colour = "#{:02x}{:02x}{:02x}".format(*(ink or drawing.ink or (0, 0, 0)))
    svg = drawing.svg.replace("currentColor", colour)
    if drawing.ink is not None:
        svg = svg.replace("<svg ", f'<svg fill="{colour}" ', 1)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWING_SIZE, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as file:
        picture = file.convert("RGBA")
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise SampleError(f"A drawing of {drawing.package} came out empty.")
    picture = picture.crop(box)
    picture.thumbnail((DRAWING_SIZE, DRAWING_SIZE), Image.Resampling.LANCZOS)
    return picture


def brightness(colour: Sequence[float]) -> float:
    """Perceived brightness of an RGB colour, 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def random_colour(rng: np.random.Generator) -> np.ndarray:
    grey = rng.uniform(60, 220)
    return np.clip(grey + rng.normal(0, 28, size=3), 0, 255)


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """A scene without a subject: a gradient, cloudy noise, stripes, a horizon, tiles or lights out of focus."""
    first, second = random_colour(rng), random_colour(rng)
    second = first + (second - first) * rng.uniform(0.2, 0.8)
    rows, columns = np.mgrid[0:size, 0:size] / size
    angle = rng.uniform(0, 2 * math.pi)
    along = (columns - 0.5) * math.cos(angle) + (rows - 0.5) * math.sin(angle)
    style = rng.integers(6)
    if style == 0:
        weight = along + 0.5
    elif style == 1:
        grain = int(rng.integers(3, 9))
        noise = Image.fromarray(rng.uniform(0, 255, (grain, grain)).astype(np.uint8))
        weight = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) / 255
    elif style == 2:
        weight = 0.5 + 0.5 * np.sin(along * rng.uniform(15, 60) + np.sin(rows * rng.uniform(2, 12)))
    elif style == 3:
        weight = 1 / (1 + np.exp(-(along - rng.uniform(-0.25, 0.25)) * rng.uniform(20, 90)))
    elif style == 4:
        tiles = rng.uniform(3, 9)
        across = (rows - 0.5) * math.cos(angle) - (columns - 0.5) * math.sin(angle)
        weight = ((np.floor(along * tiles) + np.floor(across * tiles)) % 2) * rng.uniform(0.3, 1)
    else:
        weight = np.zeros((size, size))
        for _ in range(int(rng.integers(4, 14))):
            x, y, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.04, 0.2)
            weight = np.maximum(weight, ((columns - x) ** 2 + (rows - y) ** 2 < radius**2) * rng.uniform(0.3, 1))
    weight = np.clip(weight, 0, 1)[..., None]
    canvas = Image.fromarray((first * (1 - weight) + second * weight).astype(np.uint8))
    return canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))


def homography(source: Sequence[Sequence[float]], target: Sequence[Sequence[float]]) -> list[float]:
    """The eight coefficients with which Pillow's perspective transform takes `target` points back to `source`.

    Args:
        source, target: four (x, y) points each.
    """
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.asarray(rows, dtype=float), np.asarray(values, dtype=float)).tolist()


def place(drawing: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """Puts a drawing on a transparent square of `size`, scaled, turned, tilted, and perhaps cut by the edge."""
    width, height = drawing.size
    scale = rng.uniform(0.72, 1.0) * size / max(width, height)
    half = np.array([width * scale / 2, height * scale / 2])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    corners = corners + rng.uniform(-0.05, 0.05, size=(4, 2)) * 2 * half
    angle = math.radians(float(np.clip(rng.normal(0, 6), -18, 18)))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    # Up to a twentieth of the drawing may lie outside the picture.
    room = np.maximum(size / 2 - half * 0.9, 0)
    corners = corners @ turn.T + size / 2 + rng.uniform(-1, 1, size=2) * room
    coefficients = homography([(0, 0), (width, 0), (width, height), (0, height)], corners.tolist())
    return drawing.transform((size, size), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)


def on_card(drawing: Image.Image, paper: Sequence[int]) -> Image.Image:
    """A drawing on a rounded card, the way a logo is seen on a sign or a sticker."""
    side = round(max(drawing.size) * 1.16)
    card = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    ImageDraw.Draw(card).rounded_rectangle((0, 0, side - 1, side - 1), radius=side // 7, fill=(*paper, 255))
    card.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return card


def camera(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """What a camera does to a scene: light, colour, blur, noise, compression. Returns `PICTURE_SIZE` squared RGB."""
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.8, 1.15))
    picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.75, 1.15))
    picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.75, 1.25))
    picture = picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
    pixels = np.asarray(picture, dtype=np.float64) * rng.uniform(0.94, 1.06, size=3)
    pixels += rng.normal(0, rng.uniform(0, 5), size=pixels.shape)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=int(rng.integers(45, 90)))
        with Image.open(buffer) as file:
            picture = file.convert("RGB")
    return picture


def photograph(drawing: Drawing | None, rng: np.random.Generator) -> Image.Image:
    """Shows a drawing the way a photo would, or only a background where there is none.

    Returns:
        an RGB picture, `PICTURE_SIZE` squared; the same for the same drawing and generator state.
    """
    size = 2 * PICTURE_SIZE
    scene = background(rng, size)
    if drawing is not None:
        light = brightness(np.asarray(scene, dtype=float).mean(axis=(0, 1)).tolist())
        ink = drawing.ink
        if ink is None:
            subject = render(drawing)
            if rng.random() < 0.2:
                subject = on_card(subject, tuple(rng.integers(225, 256, size=3).tolist()))
        else:
            # A one-colour drawing is printed in its own colour most of the time, and else in black or white; mostly
            # on a card, the way logos are seen, and always where it would not stand out.
            chosen = ink if rng.random() < 0.9 else [(25, 25, 25), (245, 245, 245)][int(rng.integers(2))]
            subject = render(drawing, chosen)
            if abs(light - brightness(chosen)) < 90 or rng.random() < 0.6:
                tones = (215, 256) if brightness(chosen) <= 200 else (20, 70)
                subject = on_card(subject, tuple(rng.integers(*tones, size=3).tolist()))
        layer = place(subject, rng, size)
        if rng.random() < 0.5:
            shadow = Image.new("RGBA", (size, size), (0, 0, 0, 0))
            shadow.putalpha(layer.getchannel("A").point(lambda a: a // 2).filter(ImageFilter.GaussianBlur(3)))
            scene.paste(shadow, (int(rng.integers(0, 5)), int(rng.integers(0, 5))), shadow)
        scene.paste(layer, (0, 0), layer)
    return camera(scene, rng)


def catalogue_picture(drawing: Drawing) -> Image.Image:
    """How the knowledge base shows a drawing: upright, whole, on plain paper. `PICTURE_SIZE` squared RGB."""
    subject = render(drawing)
    paper = (60, 60, 60) if drawing.ink is not None and brightness(drawing.ink) > 200 else (246, 246, 246)
    canvas = Image.new("RGB", (DRAWING_SIZE + 16, DRAWING_SIZE + 16), paper)
    canvas.paste(subject, ((canvas.width - subject.width) // 2, (canvas.height - subject.height) // 2), subject)
    return canvas.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)


def encode(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=quality, method=6)
    return buffer.getvalue()


# Rows


def entity_rows(entities: Sequence[Entity]) -> Iterator[dict[str, Any]]:
    for entity in tqdm(entities, desc="entities", unit="entity"):
        stem = re.sub(r"[^a-z0-9]+", "-", entity.id)
        images = [
            {"bytes": encode(catalogue_picture(drawing), 75), "path": f"{stem}.{short_name(drawing.package)}.webp"}
            for drawing in entity.kb_drawings
        ]
        yield {
            "id": entity.id,
            "qid": None,
            "name": entity.name,
            "description": entity.description,
            "images": images,
            "category": entity.category,
        }


def rounds(items: Sequence[Any], rng: np.random.Generator) -> Iterator[Any]:
    """All items in a random order, then again in another, without end: each comes up equally often."""
    while True:
        for index in rng.permutation(len(items)):
            yield items[int(index)]


def mention_rows(entities: Sequence[Entity], forms: Forms, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The mentions of one split, a third of each kind, in a random order.

    Raises:
        SampleError: the forms of the split do not suffice for that many different sentences.
    """
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for kind in KINDS:
        rng = stable_rng(seed, split, kind)
        choice = rounds(eligible(entities, kind), rng)
        pools = forms.clauses | {"picture": forms.neutral}
        clauses = {pool: rounds(by_split[split], rng) for pool, by_split in pools.items()}
        for _ in range(count // len(KINDS)):
            entity: Entity = next(choice)
            pool = "picture" if kind == "picture" else entity.category
            for _ in range(100):
                frame = forms.frames[split][int(rng.integers(len(forms.frames[split])))]
                surface = surface_form(entity, kind, rng)
                text = compose(frame, next(clauses[pool]), surface, not entity.proper, forms.slots, rng)
                if (text.sentence, entity.name) not in seen:
                    break
            else:
                raise SampleError(f"There are too few sentence forms for {count} mentions in {split}.")
            seen.add((text.sentence, entity.name))
            drawing = None
            if kind != "words":
                options = entity.kb_drawings if split == "train" else entity.drawings
                drawing = options[int(rng.integers(len(options)))]
            rows.append(
                {
                    "mention": text.mention,
                    "sentence": text.sentence,
                    # Half of the mentions that words decide have no picture, half one without a subject.
                    "photo": kind != "words" or bool(rng.random() < 0.5),
                    "answer": entity.id,
                    "kind": kind,
                    "form": text.form,
                    "drawing": drawing,
                }
            )
    order = stable_rng(seed, split, "order").permutation(len(rows))
    shuffled = [rows[int(index)] for index in order]
    for number, row in enumerate(tqdm(shuffled, desc=split, unit="mention")):
        drawing, photo = row["drawing"], row.pop("photo")
        row["id"] = f"{split}-{number:05d}"
        row["image"] = None
        row["drawing"] = None if drawing is None else short_name(drawing.package)
        if photo:
            picture = photograph(drawing, stable_rng(seed, split, number, "photo"))
            row["image"] = {"bytes": encode(picture, 62), "path": f"{row['id']}.webp"}
    return shuffled


# The data set


def write_parquet(rows: Sequence[dict[str, Any]], features: Any, path: Path) -> None:
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    unfinished = path.with_suffix(".unfinished")
    Dataset.from_dict(columns, features=features).to_parquet(str(unfinished))
    os.replace(unfinished, path)


def card(entities: Sequence[Entity], splits: dict[str, list[dict[str, Any]]], seed: int) -> str:
    """The data set's README.md: the text of card.md with the counts filled in."""
    groups = [group for group in senses(entities).values() if len(group) > 1]
    versions = {name: metadata.version(name) for name in ("resvg-py", "pillow", "numpy", "datasets", "pyarrow")}
    shown = {e.id: {short_name(drawing.package) for drawing in e.kb_drawings} for e in entities}
    drawn = [row for row in splits["test"] if row["drawing"] is not None]
    unseen = sum(row["drawing"] not in shown[row["answer"]] for row in drawn)
    counts = "\n".join(
        f"| {split} | {len(rows):,} | " + " | ".join(f"{sum(r['kind'] == k for r in rows):,}" for k in KINDS) + " |"
        for split, rows in splits.items()
    )
    kinds = Counter(entity.id.partition(":")[0] for entity in entities)
    return string.Template((SOURCES / "card.md").read_text(encoding="utf-8")).substitute(
        entities=len(entities),
        colliding=sum(map(len, groups)),
        groups=len(groups),
        emoji=kinds["emoji"],
        flags=kinds["flag"],
        brands=kinds["brand"],
        pictograms=kinds["pictogram"],
        pictures=sum(len(entity.kb_drawings) for entity in entities),
        counts=counts,
        unseen=unseen,
        shown=len(drawn),
        packages="\n".join(
            f"| {p.name} | {p.version} | {p.licence} | [{p.role}]({p.project}) |" for p in PACKAGES.values()
        ),
        python=platform.python_version(),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        seed=seed,
    )


def build(packages_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str], seed: int = 0) -> None:
    """Writes the sample data set (Parquet files and card) to a folder.

    Args:
        packages_dir: where the archives of `PACKAGES` lie.
        output_dir: made where it does not exist; files of an earlier build are replaced.
        seed: of the sentences, the pictures and the order.

    Raises:
        SampleError: a package is missing or altered, or an input of `sample_sources` is at fault.
    """
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    entity_features = Features(
        id=text, qid=text, name=text, description=text, images=List(ImageFeature()), category=text
    )
    mention_features = Features(
        id=text, mention=text, sentence=text, image=ImageFeature(), answer=text, kind=text, form=text, drawing=text
    )
    forms = read_forms()
    entities = read_entities()
    unknown = sorted({entity.category for entity in entities} - set(forms.clauses))
    if unknown:
        raise SampleError(f"sentences.toml has no clauses for: {', '.join(unknown)}.")
    add_drawings(entities, PackageStore(packages_dir))
    output = Path(output_dir)
    write_parquet(list(entity_rows(entities)), entity_features, output / "entities" / SHARD.format(split="kb"))
    splits = {split: mention_rows(entities, forms, split, SIZES[split], seed) for split in SPLITS}
    for split, rows in splits.items():
        write_parquet(rows, mention_features, output / "mentions" / SHARD.format(split=split))
    (output / "README.md").write_text(card(entities, splits, seed), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mimic_el.datasets_scripts.build_sample",
        description="Build the sample data set from published packages of flags, logos and pictograms.",
    )
    parser.add_argument("--packages_dir", help="folder with the archives that npm pack fetched")
    parser.add_argument("--output_dir", help="folder to write the data set to")
    parser.add_argument("--seed", type=int, default=0, help="of sentences, pictures and order (default: %(default)s)")
    parser.add_argument("--list_packages", action="store_true", help="print the packages to fetch, and stop")
    options = parser.parse_args(arguments)
    if options.list_packages:
        print(" ".join(f"{package.name}@{package.version}" for package in PACKAGES.values()))
        return 0
    if options.packages_dir is None or options.output_dir is None:
        parser.error("--packages_dir and --output_dir are needed (or --list_packages)")
    try:
        build(options.packages_dir, options.output_dir, options.seed)
    except SampleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
