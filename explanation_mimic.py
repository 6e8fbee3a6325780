"""An explanation of a link: as numbers, as a page and as an image file. Does not know how the numbers are computed."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .texts_mimic import CONTROLS

# What speaks for the link, and what against it.
_FOR, _AGAINST = (37, 99, 235), (220, 38, 38)
_LEGEND = "Blue speaks for it, red against it."
_UNITS = {"text": "Text", "image": "Image", "cross_modal": "Cross-modal"}


class WordContribution(NamedTuple):
    """A word, its place in the text as given (characters), and what it adds."""

    word: str
    start: int
    end: int
    contribution: float


class UnitContribution(NamedTuple):
    """What a unit adds to the score, and to the lead over the rival; `None` without one."""

    score: float
    lead: float | None


@dataclass
class ExplainedSide:
    """A mention or an entity, and what each part of it adds.

    Args:
        title: what heads it: the mention's words, or the entity's name.
        body: the mention's text, or the entity's description.
        title_words, body_words: the words of both that the model read.
        image (`PIL.Image.Image`, *optional*): as the model was given it.
        patches (`numpy.ndarray` of shape `(rows, columns)`, *optional*): what the image's patches add.
        box: the part of the image that the patches cover: left, top, right and bottom, as fractions of its sides.
        whole_image: what an image adds that was not at hand, so that it cannot be divided.
    """

    title: str
    body: str
    title_words: list[WordContribution] = field(default_factory=list)
    body_words: list[WordContribution] = field(default_factory=list)
    image: Image.Image | None = None
    patches: np.ndarray | None = None
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    whole_image: float = 0.0

    @property
    def text_total(self) -> float:
        """What the words add together."""
        return sum(word.contribution for word in [*self.title_words, *self.body_words])

    @property
    def image_total(self) -> float:
        """What the image adds."""
        return self.whole_image + (0.0 if self.patches is None else float(self.patches.sum()))

    @property
    def total(self) -> float:
        return self.text_total + self.image_total


@dataclass
class Explanation:
    """Why a mention was linked to an entity, and, where one was named, not to a rival.

    Args:
        entity: the entity, as the pipeline gives it: `entity_id`, `name`, `description` and the scores.
        versus: the rival, in the same form.
        units: what each of `text`, `image` and `cross_modal` adds to the entity's score: a third of the unit's own.
        mention_side, entity_side: what the words and patches add to `explained`.
        versus_side: what the rival's own words and patches add to it; they count against it where they fit the mention.
        baseline: the score of a mention and an entity with no text and no image; 0 with a rival, as it is the same.
        rounding: by how much the index's rounded features change the score (or the lead).
    """

    entity: dict[str, Any]
    versus: dict[str, Any] | None
    units: dict[str, UnitContribution]
    mention_side: ExplainedSide
    entity_side: ExplainedSide
    versus_side: ExplainedSide | None
    baseline: float
    rounding: float

    @property
    def explained(self) -> float:
        """The score, or the lead over the rival. It is the sum of the contributions, `baseline` and `rounding`."""
        return self.entity["score"] - (0.0 if self.versus is None else self.versus["score"])

    @property
    def sides(self) -> list[ExplainedSide]:
        return [side for side in (self.mention_side, self.entity_side, self.versus_side) if side is not None]

    @property
    def text(self) -> list[WordContribution]:
        """The words of the mention's text, with what each adds."""
        return self.mention_side.body_words

    @property
    def entity_text(self) -> list[WordContribution]:
        """The words of the entity's description, with what each adds."""
        return self.entity_side.body_words

    @property
    def mention_image(self) -> np.ndarray | None:
        """What the patches of the mention's image add, of shape (rows, columns); `None` without an image."""
        return self.mention_side.patches

    @property
    def entity_image(self) -> np.ndarray | None:
        """What the patches of the entity's image add; `None` without one, or where it was not at hand."""
        return self.entity_side.patches

    def __repr__(self) -> str:
        what = f"{self.entity['entity_id']!r}, score {self.entity['score']:.2f}"
        if self.versus is not None:
            what += f", versus {self.versus['entity_id']!r}, {self.versus['score']:.2f}"
        units = ", ".join(f"{name} {self._of(unit):+.2f}" for name, unit in self.units.items())
        return f"Explanation({what}: {units})"

    def _of(self, unit: UnitContribution) -> float:
        return unit.score if unit.lead is None else unit.lead

    # --- As a page

    def to_html(self) -> str:
        """A fragment of a page, with styles of its own: texts with their words shaded, images, and the units' bars.

        Everything from data is escaped, and images are data URIs: the fragment loads nothing.
        """
        sides = zip(self._headings(), self.sides, strict=True)
        columns = "".join(_side_html(heading, side, self._scales()) for heading, side in sides)
        return f'<div class="mimic-why">{_STYLE}<p>{html.escape(self.summary())}</p>{self._bars_html()}{columns}</div>'

    def _repr_html_(self) -> str:
        return self.to_html()

    def summary(self) -> str:
        """The explanation in a sentence or two."""
        leading = max(self.units, key=lambda name: self._of(self.units[name]))
        mention, name, ident = map(_named, (self.mention_side.title, self.entity["name"], self.entity["entity_id"]))
        names = f"“{mention}” is linked to {name} ({ident})"
        if self.versus is None:
            return f"{names} with a score of {self.entity['score']:.2f}. The {_UNITS[leading].lower()} unit adds most."
        rival = f"{_named(self.versus['name'])} ({_named(self.versus['entity_id'])})"
        if self.explained >= 0:
            return f"{names} and not to {rival}, by {self.explained:.2f}. The {_UNITS[leading].lower()} unit adds most."
        worst = min(self.units, key=lambda name: self._of(self.units[name]))
        return f"{names}, but {rival} scores {-self.explained:.2f} more. The {_UNITS[worst].lower()} unit decides it."

    def _headings(self) -> list[str]:
        return ["Mention", "Entity", "Rival"][: len(self.sides)]

    def _scales(self) -> tuple[float, float]:
        """The largest contribution of a word and of a patch, by which colors are scaled: the same on all sides."""
        words = [abs(word.contribution) for side in self.sides for word in [*side.title_words, *side.body_words]]
        patches = [float(np.abs(side.patches).max()) for side in self.sides if side.patches is not None]
        return max(words, default=0.0) or 1.0, max(patches, default=0.0) or 1.0

    def _bars_html(self) -> str:
        largest = max(abs(self._of(unit)) for unit in self.units.values()) or 1.0
        rows = []
        for name, unit in self.units.items():
            value = self._of(unit)
            side, width = ("for" if value >= 0 else "against"), 50 * abs(value) / largest
            rows.append(
                f'<div class="bar"><span>{_UNITS[name]}</span><i><b class="{side}" style="width:{width:.1f}%"></b></i>'
                f"<span>{value:+.2f}</span></div>"
            )
        what = "What each unit adds to the score" if self.versus is None else "What each unit adds to the lead"
        return f'<div class="bars"><h4>{what}</h4>{"".join(rows)}<small>{_LEGEND}</small></div>'

    # --- As an image file

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the explanation as an image file (`.png` and what else Pillow writes), or as a page (`.html`).

        Raises:
            ValueError: if the name ends otherwise.
        """
        path = Path(path)
        if path.suffix.lower() in (".html", ".htm"):
            title = html.escape(f"{_named(self.mention_side.title)}: {_named(self.entity['name'])}")
            head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            path.write_text(f"{head}<body>{self.to_html()}</body></html>\n", encoding="utf-8")
            return
        if path.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"An explanation is saved as an image (why.png) or a page (why.html), not as {path.name}.")
        self.picture().save(path)

    def picture(self) -> Image.Image:
        """The explanation as an image: a column for each side, and the units' bars below."""
        return _Sheet(self).drawn()


def heat_map(image: Image.Image, patches: np.ndarray, box: Sequence[float], largest: float, side: int) -> Image.Image:
    """An image with its patches' contributions laid over it, its longer side so many pixels."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    gray = image.convert("L").convert("RGB").resize(size, Image.Resampling.LANCZOS)
    shown = np.asarray(gray, dtype=np.float32) * 0.6 + 255 * 0.4
    left, top, right, bottom = (round(part * side) for part, side in zip(box, (*size, *size), strict=True))
    field = Image.fromarray(patches.astype(np.float32)).resize(
        (max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC
    )
    values = np.zeros(shown.shape[:2], dtype=np.float32)
    values[top : top + field.height, left : left + field.width] = np.asarray(field)
    strength = np.clip(np.abs(values) / largest, 0, 1)[..., None] * 0.85
    colors = np.where(values[..., None] >= 0, np.array(_FOR), np.array(_AGAINST)).astype(np.float32)
    return Image.fromarray((shown * (1 - strength) + colors * strength).round().astype(np.uint8))


# --- Texts as they are shown

_MOST_OF_A_NAME, _MOST_PASSED_OVER = 200, 2000


def _named(text: Any) -> str:
    """A name, or a word, cut where it is very long."""
    some = str(text)[:_MOST_OF_A_NAME]
    return CONTROLS.sub("\ufffd", some) + ("…" if len(str(text)) > len(some) else "")


def _passed_over(text: str) -> str:
    """What stands around the words that the model read: the beginning and the end of it, where it is very long."""
    half = _MOST_PASSED_OVER // 2
    return CONTROLS.sub("\ufffd", text if len(text) <= _MOST_PASSED_OVER else f"{text[:half]} … {text[-half:]}")


# --- Parts of the page

_STYLE = (
    "<style>.mimic-why{font:15px/1.5 system-ui,sans-serif;max-width:1100px;display:flex;flex-wrap:wrap;gap:16px}"
    ".mimic-why p,.mimic-why .bars{flex:1 1 100%;margin:0}.mimic-why .side{flex:1 1 170px;min-width:0;max-width:340px}"
    ".mimic-why h4{margin:0 0 4px;font-size:13px;opacity:.75;font-weight:600}"
    ".mimic-why .title{font-weight:600}.mimic-why .body,.mimic-why .title{overflow-wrap:anywhere;margin:0 0 6px}"
    ".mimic-why mark{color:inherit;border-radius:3px;padding:1px 1px}"
    ".mimic-why .images{display:flex;gap:6px}.mimic-why img{flex:1 1 0;min-width:0;border-radius:6px}"
    ".mimic-why small{opacity:.75}"
    ".mimic-why .bar{display:flex;gap:8px;align-items:center;max-width:560px}"
    ".mimic-why .bar span{flex:0 0 6.5em;font-variant-numeric:tabular-nums}"
    ".mimic-why .bar i{flex:1;height:12px;position:relative;background:rgba(128,128,128,.18);border-radius:3px}"
    f".mimic-why .bar b{{position:absolute;top:0;bottom:0;border-radius:3px}}"
    f".mimic-why .for{{left:50%;background:rgb{_FOR}}}.mimic-why .against{{right:50%;background:rgb{_AGAINST}}}"
    "</style>"
)


def _side_html(heading: str, side: ExplainedSide, scales: tuple[float, float]) -> str:
    parts = [
        f'<p class="title" dir="auto">{_marked(side.title, side.title_words, scales[0])}</p>',
        f'<p class="body" dir="auto">{_marked(side.body, side.body_words, scales[0])}</p>',
    ]
    if side.image is not None and side.patches is not None:
        shown = heat_map(side.image, side.patches, side.box, scales[1], 240)
        given = _data_uri(side.image.resize(shown.size, Image.Resampling.LANCZOS))
        parts.append(
            f'<div class="images"><img alt="{heading}: the image" src="{given}">'
            f'<img alt="{heading}: what its parts add" src="{_data_uri(shown)}"></div>'
        )
    parts.append(f"<small>text {side.text_total:+.2f}, image {side.image_total:+.2f}</small>")
    return f'<div class="side"><h4>{heading}</h4>{"".join(parts)}</div>'


def _marked(text: str, words: Sequence[WordContribution], largest: float) -> str:
    """A text with its words shaded by what they add."""
    parts, at = [], 0
    for word in words:
        strength = min(1.0, abs(word.contribution) / largest) * 0.6
        color = ",".join(map(str, _FOR if word.contribution >= 0 else _AGAINST))
        parts.append(html.escape(_passed_over(text[at : word.start])))
        parts.append(
            f'<mark style="background:rgba({color},{strength:.3f})" title="{word.contribution:+.3f}">'
            f"{html.escape(_named(text[word.start : word.end]))}</mark>"
        )
        at = word.end
    return "".join(parts) + html.escape(_passed_over(text[at:]))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


# --- The picture


class _Sheet:
    """Draws an explanation: a column for each side, the units' bars below."""

    COLUMN, GAP, IMAGE = 300, 24, 146
    LINES = 9

    def __init__(self, explanation: Explanation) -> None:
        self.why = explanation
        self.font, self.bold, self.small = _font(15), _font(17), _font(13)

    def drawn(self) -> Image.Image:
        sides = self.why.sides
        width = self.GAP + len(sides) * (self.COLUMN + self.GAP)
        sheet = Image.new("RGB", (width, 1600), "white")
        draw = ImageDraw.Draw(sheet)
        top = self._paragraph(draw, self.GAP, self.GAP, width - 2 * self.GAP, self.why.summary(), [], 1.0) + 12
        bottoms = []
        for column, (heading, side) in enumerate(zip(self.why._headings(), sides, strict=True)):
            bottoms.append(self._side(sheet, draw, self.GAP + column * (self.COLUMN + self.GAP), top, heading, side))
        bottom = self._bars(draw, max(bottoms) + self.GAP)
        return sheet.crop((0, 0, width, bottom + self.GAP))

    def _side(
        self, sheet: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, heading: str, side: ExplainedSide
    ) -> int:
        words, patches = self.why._scales()
        draw.text((left, top), heading, font=self.small, fill="#6b7280")
        top = self._paragraph(draw, left, top + 20, self.COLUMN, side.title, side.title_words, words, self.bold)
        top = self._paragraph(draw, left, top + 4, self.COLUMN, side.body, side.body_words, words) + 8
        if side.image is not None and side.patches is not None:
            shown = heat_map(side.image, side.patches, side.box, patches, self.IMAGE)
            sheet.paste(side.image.resize(shown.size, Image.Resampling.LANCZOS), (left, top))
            sheet.paste(shown, (left + self.COLUMN - self.IMAGE, top))
            top += shown.height + 6
        totals = f"text {side.text_total:+.2f}   image {side.image_total:+.2f}"
        draw.text((left, top), totals, font=self.small, fill="#374151")
        return top + 18

    def _paragraph(
        self,
        draw: ImageDraw.ImageDraw,
        left: int,
        top: int,
        width: int,
        text: str,
        words: Sequence[WordContribution],
        largest: float,
        font: Any = None,
    ) -> int:
        """Writes a text in lines, its words shaded; returns where the next line would begin."""
        font = font or self.font
        height = round(font.size * 1.45)
        x, lines = float(left), 1
        for piece, contribution in _pieces(text, words):
            length = draw.textlength(piece, font=font)
            if x > left and x + length > left + width:
                x, top, lines = left, top + height, lines + 1
                piece = piece.lstrip()
                length = draw.textlength(piece, font=font)
            if lines > self.LINES:
                draw.text((left, top), "…", font=font, fill="#374151")
                break
            if contribution:
                strength = min(1.0, abs(contribution) / largest) * 0.6
                color = _FOR if contribution > 0 else _AGAINST
                fill = tuple(round(255 + (part - 255) * strength) for part in color)
                draw.rectangle((x - 1, top - 1, x + length + 1, top + height - 3), fill=fill)
            draw.text((x, top), piece, font=font, fill="#111827")
            x += length
        return top + height

    def _bars(self, draw: ImageDraw.ImageDraw, top: int) -> int:
        why = self.why
        what = "What each unit adds to the score" if why.versus is None else "What each unit adds to the lead"
        draw.text((self.GAP, top), what, font=self.small, fill="#6b7280")
        values = {name: why._of(unit) for name, unit in why.units.items()}
        largest = max(map(abs, values.values())) or 1.0
        middle, half = self.GAP + 250, 140
        for name, value in values.items():
            top += 24
            end = middle + round(half * value / largest)
            draw.text((self.GAP, top), _UNITS[name], font=self.font, fill="#111827")
            draw.rectangle((middle - half, top + 3, middle + half, top + 15), fill="#eef0f3")
            fill = _FOR if value >= 0 else _AGAINST
            draw.rectangle((min(middle, end), top + 3, max(middle, end), top + 15), fill=fill)
            draw.text((middle + half + 12, top), f"{value:+.2f}", font=self.font, fill="#111827")
        draw.text((self.GAP, top + 26), _LEGEND, font=self.small, fill="#6b7280")
        return top + 44


def _pieces(text: str, words: Sequence[WordContribution]) -> Iterator[tuple[str, float]]:
    """A text cut into what may stand on a line of its own: words with their contribution, and what is between."""
    at = 0
    for word in words:
        yield from ((piece, 0.0) for piece in _spaced(_passed_over(text[at : word.start])))
        yield _named(text[word.start : word.end]), word.contribution
        at = word.end
    yield from ((piece, 0.0) for piece in _spaced(_passed_over(text[at:])))


def _spaced(text: str) -> list[str]:
    text = " ".join(text.split("\n"))
    return re.findall(r"\s+|\S+", text)


def _font(size: int) -> Any:
    """A font of many scripts where matplotlib has brought one along; Pillow's own, of Latin letters, otherwise."""
    found = importlib.util.find_spec("matplotlib")
    places = list(found.submodule_search_locations or []) if found else []
    for place in places:
        path = Path(place, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


__all__ = ["ExplainedSide", "Explanation", "UnitContribution", "WordContribution", "heat_map"]
