"""The entities of the sample data set, and the published packages that their names and drawings come from.

Packages are read as they were published: never unpacked, never installed, each checked against its digest and its
license. The build stops if the packages do not know an identifier, or a name beside it. Knows nothing of texts, or of
how a drawing is shown.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "sample_sources"
KB_IMAGES = 2

# How a name behaves in a sentence. The first four are common nouns, written small: "a kiwi", "some salt", "these
# boots", "painted orange". The others keep their capital: "Kenya", "the Emirates", "a Tesla".
NOUNS = ("count", "mass", "plural", "bare", "proper", "proper-the", "proper-count")
DEFAULT_POOL = "any"

# What a logo may be under when the package names a license for that one icon.
ICON_LICENSES = {"CC0-1.0", "MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0"}


class SampleError(ValueError):
    """An input of the build is missing or is not what it should be."""


@dataclass(frozen=True)
class Package:
    """A published package: where drawings or names come from, and on what terms."""

    name: str
    version: str
    sha256: str
    license: str
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
            "one-color brand logos collected by Simple Icons; names and colors of brands",
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

# The order is that of preference: an entity's images in the knowledge base are its first drawings, and the third
# one, where there is one, is kept for the mentions of validation and test.
EMOJI_SETS = ("@iconify-json/noto", "@iconify-json/twemoji", "@iconify-json/fluent-emoji-flat")
LOGO_SETS = {"logos": "@iconify-json/logos", "devicon": "@iconify-json/devicon"}


class PackageStore:
    """The packages of `PACKAGES`, read from the archives in a folder.

    Args:
        folder: where `npm pack` put the archives.

    Raises:
        SampleError: an archive is missing, is not the published one, or states another license.
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
                    "delete it and download it again."
                )
            # The archive is the published one, byte for byte; it is read in memory and never unpacked.
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
                files = {}
                for member in archive:
                    reader = archive.extractfile(member) if member.isfile() else None
                    if reader is not None:
                        files[member.name.removeprefix("package/")] = reader.read()
            license = json.loads(files["package.json"]).get("license")
            if license != package.license:
                raise SampleError(f"{package.name} {package.version} is under {license}, not under {package.license}.")
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
    """One drawing of an entity. `ink` is the color of a one-color drawing, None for a colored one."""

    package: str
    svg: str
    ink: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Name:
    """What an entity is called within a sentence, and the noun class (one of `NOUNS`) that grammar needs to know."""

    text: str
    noun: str


@dataclass
class Entity:
    """A row of entities.tsv, with its drawings once the packages were read.

    `pools` names the lists of text forms, within those of its category, that suit the entity.
    """

    id: str
    name: str
    category: str
    noun: str
    pools: list[str]
    source_name: str
    extra_drawings: list[str]
    aliases: list[Name]
    description: str
    drawings: list[Drawing] = field(default_factory=list)

    @property
    def kb_drawings(self) -> list[Drawing]:
        """What the knowledge base shows, and the mentions of the training split."""
        return self.drawings[:KB_IMAGES]


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
            aliases = []
            for alias in filter(None, row["aliases"].split("; ")):
                text, _, noun = alias.partition(":")
                aliases.append(Name(text, noun or row["noun"]))
            for noun in (row["noun"], *(alias.noun for alias in aliases)):
                if noun not in NOUNS:
                    raise SampleError(f"{path}, line {number}: noun is {noun!r}, not one of {', '.join(NOUNS)}.")
            entities.append(
                Entity(
                    id=row["id"],
                    name=row["name"],
                    category=row["category"],
                    noun=row["noun"],
                    pools=row["pools"].split() or [DEFAULT_POOL],
                    source_name=row["source_name"],
                    extra_drawings=row["drawings"].split(),
                    aliases=aliases,
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
        SampleError: no package knows the identifier or a drawing that the list asks for, or a logo has a license
            of its own that is not among `ICON_LICENSES`.
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
        license = brand.get("license", {}).get("type")
        if license is not None and license not in ICON_LICENSES:
            raise SampleError(f"{entity.id}: the logo itself is under {license}; leave this entity out.")
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


def senses(entities: Sequence[Entity]) -> dict[str, list[Entity]]:
    """Entities by name, in lower case: those under one key cannot be told apart by their name."""
    groups: dict[str, list[Entity]] = defaultdict(list)
    for entity in entities:
        groups[entity.name.lower()].append(entity)
    return groups
