"""The page in a browser, with Gradio: its layout, and what happens when something is clicked.

A Space runs this file, with `config.yaml` in the same folder. On your own machine `mimic-el demo` calls it.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mimic_el.errors_mimic import MimicError
from mimic_el.space.linking import Linking, OwnEntities, Settings, image_of_request

logger = logging.getLogger(__name__)
HERE = Path(__file__).parent
MAX_UPLOAD = "10mb"
NOBODY = "not in the knowledge base"

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.mel-cards { display: flex; flex-direction: column; gap: 8px; }
.mel-card { display: grid; grid-template-columns: 56px 1fr auto; gap: 12px; align-items: center; padding: 8px 12px;
  border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--background-fill-primary); }
.mel-card.first { border-color: var(--color-accent); box-shadow: inset 3px 0 0 var(--color-accent); }
.mel-card img, .mel-card .none { width: 56px; height: 56px; object-fit: contain; border-radius: 8px;
  background: var(--background-fill-secondary); }
.mel-card .none { display: grid; place-items: center; font-size: 10px; color: var(--body-text-color-subdued); }
.mel-card b, .mel-card small, .mel-card span { overflow-wrap: anywhere; }
.mel-card small { color: var(--body-text-color-subdued); display: block; line-height: 1.35; }
.mel-card .score { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.mel-card .units { font-size: 11px; color: var(--body-text-color-subdued); }
.mel-hint { color: var(--body-text-color-subdued); }
#marked span { color: var(--body-text-color) !important; }
@media (max-width: 480px) {
  .mel-card { grid-template-columns: 56px 1fr; }
  .mel-card .score { grid-column: 2; text-align: left; display: flex; flex-wrap: wrap; gap: 0 12px; }
  .mel-card .score { align-items: baseline; }
  .mel-card .score br { display: none; }
}
"""


def theme() -> gr.themes.Base:
    # The system's own fonts: the page loads nothing from elsewhere.
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Soft(primary_hue="blue", neutral_hue="slate", radius_size="md", font=fonts[0], font_mono=fonts[1])


def page(linking: Linking, settings: Settings) -> gr.Blocks:
    """The page of a linker."""
    events = _Events(linking)
    with gr.Blocks(title=settings.title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# {_plain(settings.title)}\n{_plain(settings.description)}")
        own, asked, linked = gr.State(OwnEntities()), gr.State(None), gr.State([])
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                text = gr.Textbox(label="Text", lines=4, max_lines=12, placeholder="Paste a text.", elem_id="text")
                image = gr.Image(
                    label="Image (may be left out)", type="pil", height=220, sources=["upload", "clipboard"]
                )
                with gr.Accordion("Options", open=False):
                    mention = gr.Textbox(
                        label="Mention, as it stands in the text (found if left empty)", elem_id="mention"
                    )
                    top_k = gr.Slider(1, 20, value=5, step=1, label="Entities for each mention")
                link = gr.Button("Link", variant="primary", elem_id="link")
                if settings.examples:
                    gr.Examples([list(one) for one in settings.examples], [text, image, mention], label="Examples")
                with gr.Accordion("Add an entity of your own", open=False):
                    gr.HTML('<p class="mel-hint">It is known to this page only, until you close it.</p>')
                    name = gr.Textbox(label="Name", elem_id="own-name")
                    description = gr.Textbox(label="Description", lines=2, elem_id="own-description")
                    picture = gr.Image(label="Image", type="pil", height=140, sources=["upload"])
                    add = gr.Button("Add", elem_id="own-add")
                    added = gr.HTML(elem_id="own-added")
            with gr.Column(scale=6, min_width=320):
                marked = gr.HighlightedText(
                    label="Mentions: choose one",
                    show_legend=False,
                    show_inline_category=False,
                    color_map={"mention": "#2563eb"},
                    elem_id="marked",
                )
                chosen = gr.Dropdown([], label="Mention", elem_id="chosen", visible=False)
                cards = gr.HTML('<p class="mel-hint">The entities will stand here.</p>', elem_id="cards")
                with gr.Group(visible=False) as why_box:
                    with gr.Row():
                        entity = gr.Dropdown([], label="Why this entity", elem_id="why-entity", min_width=140)
                        versus = gr.Dropdown([], label="and not this one", elem_id="why-versus", min_width=140)
                    why = gr.Button("Explain", elem_id="explain")
                reason = gr.HTML(elem_id="reason")
        private: dict[str, Any] = {"api_name": "page", "api_visibility": "private"}
        shown = [chosen, cards, why_box, entity, versus, reason]
        link.click(events.link, [text, image, mention, top_k, own], [asked, linked, marked, *shown], **private)
        marked.select(events.chosen_in_text, [linked, own], [*shown], **private)
        chosen.input(events.chosen, [chosen, linked, own], [*shown], **private)
        why.click(events.explain, [asked, chosen, linked, entity, versus, own], [reason], **private)
        add.click(
            events.add,
            [own, name, description, picture],
            [own, added, name, description, picture],
            **private,
        )
        gr.api(events.api_link, api_name="link")
        gr.api(events.api_explain, api_name="explain")
    return blocks


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a visitor can cause is told as text; anything else as a fault of the page, its details in the log only."""

    @functools.wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except (MimicError, ValueError) as error:
            raise gr.Error(_plain(str(error))[:500], print_exception=False) from None
        except Exception:
            logger.exception("The page failed.")
            raise gr.Error("Something went wrong here. The server's log says what.", print_exception=False) from None

    return told


class _Events:
    """What follows from each click."""

    def __init__(self, linking: Linking) -> None:
        self._linking = linking

    @_told
    def link(self, text: str, image: Any, mention: str, top_k: float, own: OwnEntities) -> tuple[Any, ...]:
        linked = self._linking.link(text, image, mention, top_k, own)
        text = text.strip("\n")
        spans, at = [], 0
        for one in linked:
            spans += [(text[at : one["start"]], None), (text[one["start"] : one["end"]], "mention")]
            at = one["end"]
        spans = [span for span in [*spans, (text[at:], None)] if span[0]]
        return {"text": text, "image": image}, linked, spans, *self._shown(linked, 0, own)

    @_told
    def chosen_in_text(self, linked: list[dict[str, Any]], own: OwnEntities, event: gr.SelectData) -> tuple[Any, ...]:
        value = event.value[0] if isinstance(event.value, list | tuple) else event.value
        place = next((place for place, one in enumerate(linked) if one["mention"] == value), 0)
        return self._shown(linked, place, own)

    @_told
    def chosen(self, place: int, linked: list[dict[str, Any]], own: OwnEntities) -> tuple[Any, ...]:
        return self._shown(linked, place, own)

    def _shown(self, linked: list[dict[str, Any]], place: int, own: OwnEntities) -> tuple[Any, ...]:
        """What changes when a mention is chosen."""
        mentions = [(f"{one['mention']} ({one['start']}–{one['end']})", row) for row, one in enumerate(linked)]
        entities = linked[place]["entities"]
        known = [(f"{one['name']} ({one['entity_id']})", one["entity_id"]) for one in entities if one["entity_id"]]
        return (
            gr.Dropdown(choices=mentions, value=place, visible=len(mentions) > 1),
            self._cards(entities, own),
            gr.Group(visible=bool(known)),
            gr.Dropdown(choices=known, value=known[0][1] if known else None),
            gr.Dropdown(
                choices=[("(nothing: its score alone)", ""), *known], value=known[1][1] if len(known) > 1 else ""
            ),
            "",
        )

    def _cards(self, entities: list[dict[str, Any]], own: OwnEntities) -> str:
        if not entities:
            return '<p class="mel-hint">No entity was found for this mention.</p>'
        cards = []
        for place, one in enumerate(entities):
            thumbnail = None if one["entity_id"] is None else self._linking.thumbnail(one["entity_id"], own)
            image = (
                '<div class="none">no image</div>'
                if thumbnail is None
                else f'<img alt="" src="{_data_uri(thumbnail)}">'
            )
            name, ident = html.escape(one["name"] or ""), html.escape(one["entity_id"] or "")
            description = html.escape((one.get("description") or "")[:300])
            numbers = []
            if one.get("probability") is not None:
                numbers.append(f"<b>{one['probability']:.0%}</b>")
            units = ""
            if one.get("score") is not None:
                numbers.append(f"{one['score']:.2f}")
                parts = (f"{part[0]} {one[f'{part}_score']:.1f}" for part in ("text", "image", "cross_modal"))
                title = "scores of the text, image and cross-modal unit"
                units = f'<div class="units" title="{title}">{" · ".join(parts)}</div>'
            kind = "mel-card first" if place == 0 else "mel-card"
            what = f'<div><b>{name}</b> <span class="mel-hint">{ident}</span><small>{description}</small></div>'
            score = f'<div class="score">{"<br>".join(numbers)}{units}</div>'
            cards.append(f'<div class="{kind}">{image}{what}{score}</div>')
        return f'<div class="mel-cards">{"".join(cards)}</div>'

    @_told
    def explain(
        self,
        asked: dict[str, Any],
        place: int,
        linked: list[dict[str, Any]],
        entity: str,
        versus: str,
        own: OwnEntities,
    ) -> str:
        if not asked or not entity:
            raise gr.Error("Link something first.", print_exception=False)
        one = linked[place or 0]
        why = self._linking.explain(
            asked["text"], asked["image"], one["start"], one["end"], entity, versus or None, own
        )
        return why.to_html()

    @_told
    def add(self, own: OwnEntities, name: str, description: str, image: Any) -> tuple[Any, ...]:
        own, entity_id = self._linking.with_entity(own, name, description, image)
        message = f"<p>Added “{html.escape(name.strip())}” as {entity_id}. Link again to find it.</p>"
        return own, message, "", "", None

    # --- For programs: JSON in, JSON out

    @_told
    def api_link(
        self, text: str, image: str | None = None, mention: str | None = None, top_k: int = 5
    ) -> list[dict[str, Any]]:
        """Links the mentions of a text, with the help of an image, to the entities of the knowledge base.

        Args:
            text: the text.
            image: an image that stands beside it, as base64 or a data URI.
            mention: the words to be linked, as they stand in the text; found if left out.
            top_k: entities for each mention.
        """
        return self._linking.link(text, image_of_request(image, self._linking.allow_urls), mention, top_k)

    @_told
    def api_explain(
        self, text: str, start: int, end: int, entity_id: str, versus: str | None = None, image: str | None = None
    ) -> dict[str, Any]:
        """Says why a mention was linked to an entity, and not to another one.

        Args:
            text: the text.
            start: where the mention begins, in characters.
            end: where it ends.
            entity_id: the entity.
            versus: the other one.
            image: an image that stands beside the text, as base64 or a data URI.
        """
        picture = image_of_request(image, self._linking.allow_urls)
        why = self._linking.explain(text, picture, start, end, entity_id, versus)
        patches = {"mention_image": why.mention_image, "entity_image": why.entity_image}
        return {
            "summary": why.summary(),
            "explained": why.explained,
            "units": {name: unit._asdict() for name, unit in why.units.items()},
            "text": [word._asdict() for word in why.text],
            "entity_text": [word._asdict() for word in why.entity_text],
            **{name: None if values is None else values.tolist() for name, values in patches.items()},
        }


def _plain(text: str) -> str:
    """Text that is shown where HTML or Markdown would be read."""
    return html.escape(text).replace("[", "&#91;").replace("*", "&#42;").replace("`", "&#96;")


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def launch(settings: Settings, **options: Any) -> Any:
    """Serves the page; `options` are those of Gradio's `launch`. Local, with limited uploads, unless told otherwise."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    blocks = page(Linking.of(settings), settings)
    blocks.queue(max_size=64, default_concurrency_limit=1)
    safe = {"max_file_size": MAX_UPLOAD, "show_error": True, "footer_links": ["api", "settings"], "strict_cors": True}
    look = {"theme": theme(), "css": CSS}
    return blocks.launch(**{**safe, **look, **options})


def main() -> None:
    """What a Space runs: the settings of `config.yaml`, of which the environment may name model, index and entities."""
    names = {name: os.environ.get(f"MIMIC_{name.upper()}") for name in ("model", "index", "entities")}
    launch(Settings.read(HERE / "config.yaml", **names))


if __name__ == "__main__":
    main()
