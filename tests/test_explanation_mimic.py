"""An explanation as a page and as an image."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import random_image

from mimic_el.explanation_mimic import ExplainedSide, Explanation, UnitContribution, WordContribution, heat_map

HOSTILE = '<script>alert("x")</script> & <img src=x onerror=y>'


def explanation(versus: bool = True) -> Explanation:
    text = f"Sara saw {HOSTILE} here."
    patches = np.array([[0.5, -0.25], [0.0, 0.1]])
    mention = ExplainedSide(
        "Sara",
        text,
        [WordContribution("Sara", 0, 4, 0.5)],
        [WordContribution("saw", 5, 8, -0.2)],
        random_image(1),
        patches,
    )
    entity = ExplainedSide(HOSTILE, HOSTILE)
    found = {"entity_id": "e1", "name": HOSTILE, "description": HOSTILE, "score": 2.0}
    rival = {"entity_id": HOSTILE, "name": "Rival", "description": "", "score": 1.25} if versus else None
    leads = (0.5, 0.5, -0.25) if versus else (None, None, None)
    units = {
        name: UnitContribution(score, lead)
        for name, score, lead in zip(("text", "image", "cross_modal"), (1.0, 0.75, 0.25), leads, strict=True)
    }
    return Explanation(found, rival, units, mention, entity, ExplainedSide("Rival", "") if versus else None, 0.0, 0.0)


def test_what_is_explained_is_the_score_or_the_lead():
    assert explanation(versus=False).explained == 2.0
    assert explanation().explained == 0.75
    assert explanation().mention_side.total == pytest.approx(0.5 - 0.2 + 0.35)


def test_a_page_shows_hostile_text_as_text():
    page = explanation().to_html()
    assert "<script" not in page
    assert "onerror=y>" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert re.search(r'<mark style="background:rgba\(220,38,38,0\.\d+\)" title="-0\.200">saw</mark>', page)
    assert not re.search(r'(src|href)="(?!data:)', page)


@pytest.mark.parametrize("versus", [True, False])
def test_it_is_saved_as_a_picture_and_as_a_page(tmp_path, versus):
    why = explanation(versus)
    why.save(tmp_path / "why.png")
    with Image.open(tmp_path / "why.png") as image:
        assert image.width > 600
        assert image.height > 200
    why.save(tmp_path / "why.html")
    assert (tmp_path / "why.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(ValueError, match=r"not as why\.docx"):
        why.save(tmp_path / "why.docx")


def test_the_summary_says_what_decided():
    assert "and not to Rival" in explanation().summary()
    assert "by 0.75. The text unit adds most" in explanation().summary()
    behind = explanation()
    behind.entity["score"] = 1.0
    assert "scores 0.25 more. The cross-modal unit decides it." in behind.summary()


def test_a_heat_map_is_blue_where_it_speaks_for_and_red_where_against():
    patches = np.array([[1.0, -1.0]])
    shown = np.asarray(heat_map(Image.new("RGB", (200, 100), "white"), patches, (0, 0, 1, 1), 1.0, 100)).astype(int)
    assert shown.shape == (50, 100, 3)
    red, _, blue = shown[25, 10]
    assert blue > red + 50
    red, _, blue = shown[25, 90]
    assert red > blue + 50


def test_a_heat_map_leaves_what_the_model_did_not_see():
    shown = np.asarray(heat_map(Image.new("L", (100, 50), 255), np.ones((2, 2)), (0.25, 0, 0.75, 1), 1.0, 100))
    assert (shown[25, 10] == 255).all()
    assert not (shown[25, 50] == 255).all()


def test_texts_that_are_long_or_control_what_is_shown(tmp_path: Path) -> None:
    long, hostile = "word " * 200_000, "<script>x</script>\x00\x1b[2J\x9b\u202eabc"
    words = [WordContribution("word", 500_000, 500_004, 0.5), WordContribution("x" * 10_000, 600_000, 700_000, -0.5)]
    side = ExplainedSide(hostile + long, long + hostile, [], words)
    entity = {"entity_id": hostile, "name": hostile + long, "description": long, "score": 1.0}
    units = {name: UnitContribution(0.3, None) for name in ("text", "image", "cross_modal")}
    why = Explanation(entity, None, units, side, side, None, 0.0, 0.0)
    page = why.to_html()
    assert len(page) < 20_000
    assert "<script>x" not in page
    assert not set(page) & set("\x00\x1b\x9b\u202e")
    why.save(tmp_path / "why.html")
    why.save(tmp_path / "why.png")
    assert len(why.summary()) < 1000
