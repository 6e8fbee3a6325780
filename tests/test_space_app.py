"""The page in a real browser (Chromium). Skipped where Gradio, Playwright or a browser is missing.

`MIMIC_PAGE_MODEL=runs/demo MIMIC_PAGE_SCREENSHOTS=docs` takes the pictures of docs/serving.md, with a trained model.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from published import ROOT, tiny_linker
from tiny import knowledge_base, random_image
from transformers import pipeline

from mimic_el.space.linking import Linking, Settings

# Imported where it is used: Gradio takes seconds, in every worker that only collects the tests.
for name in ("gradio", "playwright"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the page needs {name}", allow_module_level=True)
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="the page is tried in Chromium, which is not installed")

HOSTILE = '<img src=x onerror="document.title=\'broken\'"><script>document.title="broken"</script>'
TRAINED = os.environ.get("MIMIC_PAGE_MODEL")
SCREENSHOTS = os.environ.get("MIMIC_PAGE_SCREENSHOTS")
SECONDS = 60_000


def served(linking: Linking, settings: Settings) -> tuple[Any, str]:
    from mimic_el.space import app

    blocks = app.page(linking, settings)
    blocks.queue(default_concurrency_limit=1)
    look: Any = {"theme": app.theme(), "css": app.CSS}
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True, **look
    )
    return blocks, address


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    model, processor = tiny_linker()
    entities = [
        *knowledge_base(4),
        {"id": "hostile", "name": HOSTILE, "description": HOSTILE, "images": [random_image(9)]},
    ]
    load: Any = pipeline
    linker = load("multimodal-entity-linking", model=model, processor=processor, entities=entities)
    blocks, address = served(Linking(linker, entities), Settings("tiny", examples=(("Georgia 1 won.", None, None),)))
    yield address
    blocks.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(SECONDS)
    page.goto(address)
    page.wait_for_selector("#text textarea")
    yield page
    page.close()


def link(page: Any, text: str, image: Path | None = None) -> None:
    page.fill("#text textarea", text)
    if image is not None:
        page.set_input_files("input[type=file] >> nth=0", str(image))
        page.wait_for_selector("img[alt]:visible", state="attached")
        page.wait_for_selector(".image-frame img, .image-container img")
    page.click("#link")
    page.wait_for_selector(".mel-card")


def test_a_typed_text_and_an_uploaded_image_are_linked_and_a_rival_explained(page: Any):
    link(page, "Orange 0 came to Georgia 1.", ROOT / "docs" / "photo.png")
    assert page.input_value("#chosen input") == "Orange 0 (0–8)"
    names = page.locator(".mel-card b").all_inner_texts()
    assert len(names) == 5
    page.click("#explain")
    page.wait_for_selector(".mimic-why")
    why = page.inner_text(".mimic-why")
    assert "What each unit adds to the lead" in why
    assert why.count("text ") >= 3
    assert page.locator(".mimic-why .images img").count() >= 2


def test_an_entity_is_added_and_found(page: Any):
    page.click("text=Add an entity of your own")
    page.fill("#own-name input, #own-name textarea", "Newcomer")
    page.fill("#own-description textarea", "Just arrived.")
    page.click("#own-add")
    page.wait_for_selector("text=Added “Newcomer” as own:1")
    page.click("text=Options")
    page.fill("#mention input, #mention textarea", "Newcomer")
    page.fill('input[type="number"]', "6")
    link(page, "The Newcomer spoke.")
    page.wait_for_function("document.querySelectorAll('.mel-card').length == 6")
    assert "own:1" in page.inner_text("#cards")


def test_a_hostile_name_is_text(page: Any):
    link(page, "Georgia 1 won.")
    assert "<script>" in page.inner_text("#cards")
    page.click("#explain")
    page.wait_for_selector(".mimic-why")
    assert page.title() != "broken"
    assert page.locator("#cards script, .mimic-why script").count() == 0


def test_an_error_is_told_as_text(page: Any):
    page.fill("#text textarea", "nothing that is known")
    page.click("#link")
    toast = page.wait_for_selector(".toast-body, .toast-text")
    assert "No name of the knowledge base" in toast.inner_text()
    assert "Traceback" not in page.inner_text("body")


def test_programs_link_and_explain_and_read_no_files(address: str, tmp_path: Path):
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    text = "Orange 0 came to Georgia 1."
    linked = client.predict(text, None, None, 3, api_name="/link")
    assert [one["mention"] for one in linked] == ["Orange 0", "Georgia 1"]
    best, rival = (one["entity_id"] for one in linked[0]["entities"][:2])
    why = client.predict(text, 0, 8, best, rival, None, api_name="/explain")
    lead = linked[0]["entities"][0]["score"] - linked[0]["entities"][1]["score"]
    assert why["explained"] == pytest.approx(lead, abs=0.05)
    place = tmp_path / "secret.png"
    random_image(1).save(place)
    for hostile in (str(place), f"file://{place}", "http://127.0.0.1:9/x.png"):
        with pytest.raises(Exception, match=r"no file is read|URLs are not read"):
            client.predict(text, hostile, None, 3, api_name="/link")


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [("desktop", (1280, 900), "light"), ("phone", (390, 844), "light"), ("dark", (1280, 900), "dark")],
)
def test_it_fits_the_screen(browser: Any, address: str, tmp_path: Path, name: str, size: tuple[int, int], scheme: str):
    text, image = "Georgia 1 won against Turkey 2.", None
    blocks = None
    if TRAINED:
        settings = Settings(TRAINED, entities=str(ROOT / "datasets_scripts" / "sample"))
        blocks, address = served(Linking.of(settings), settings)
        text = os.environ.get("MIMIC_PAGE_TEXT", "Page 14 of Ines's scrapbook: Arm.")
        image = ROOT / "docs" / "photo.png"
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.set_default_timeout(SECONDS)
    page.goto(f"{address}?__theme={scheme}")
    page.wait_for_selector("#text textarea")
    link(page, text, image)
    page.click("#explain")
    page.wait_for_selector(".mimic-why")
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = sum(map(int, re.findall(r"\d+", background)[:3]))
    assert (shade < 200) == (scheme == "dark")
    directory = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
    page.screenshot(path=directory / f"page-{name}.png", full_page=True)
    page.close()
    if blocks is not None:
        blocks.close()
