"""The page of an index: nothing of data or of names is markup in it, and a page of somebody's own stays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import RepoCard
from tiny import built_by_twos, tiny_processor
from tiny_clip import tiny_model

from mimic_el.index_mimic import EntityIndex

LINKER = tiny_model(), tiny_processor(tiny_model())
ENTITY = {"id": "e", "name": "E", "description": "a thing"}
HOSTILE = "[a](https://x.org) <img src=d> `e`\n# Heading \x00\x1b[2J\u202e\ud800 " + "x" * 100_000


@pytest.fixture(scope="module")
def index() -> EntityIndex:
    entity = {**ENTITY, "name": HOSTILE.replace("\ud800", ""), "description": "x" * 100_000}
    fields = {f"field {number} {HOSTILE[:30]}": "x" for number in range(200)}
    return built_by_twos(LINKER, [{**entity, **fields}], None)


@pytest.mark.parametrize("which", ["model_id", "license", "source"])
def test_names_that_a_caller_gives(which: str, index: EntityIndex):
    with index.files_for_hub("me/kb", **{which: HOSTILE}) as files:
        page = files["README.md"]
    assert isinstance(page, bytes)
    text = page.decode()
    body = text.partition("\n---\n")[2]
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)
    for markup in ("](https://x", "<img", "\n# Heading", "\x00", "\x1b", "\u202e"):
        assert markup not in outside.replace("\\", "\\ "), markup
    assert len(body) < 12_000
    assert RepoCard(text).data.to_dict().get("base_model") is None


def test_a_model_from_a_directory_whose_name_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LINKER[0].config, "name_or_path", "/models/caf\udce9")
    built_by_twos(LINKER, [ENTITY], tmp_path)
    assert "caf\\\\udce9" in (tmp_path / "README.md").read_text()
    EntityIndex.from_pretrained(tmp_path).verify()


def test_a_page_of_one_s_own_stays(tmp_path: Path):
    page = tmp_path / "README.md"
    page.write_text("# Mine\n")
    index = built_by_twos(LINKER, [ENTITY], tmp_path)
    index.add(*LINKER, [{**ENTITY, "id": "f"}], show_progress=False)
    assert page.read_text() == "# Mine\n"
    page.write_text("")
    index.add(*LINKER, [{**ENTITY, "id": "g"}], show_progress=False)
    written = page.read_text()
    assert "| Entities | 3 |" in written
    index.remove(["g"])
    assert "| Entities | 2 |" in page.read_text()
    page.write_text(page.read_text().replace("<!-- Written from the index", "<!-- By me"))
    before = page.read_text()
    index.remove(["f"])
    index.compact()
    assert page.read_text() == before
    page.unlink()
    page.mkdir()
    index.add(*LINKER, [{**ENTITY, "id": "h"}], show_progress=False)
    assert page.is_dir()
