"""Cards say what is in the data, in Markdown and in metadata that the Hub accepts."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import check_card
from huggingface_hub import DatasetCard
from mel_archives import an_image, sound_archive, to_json, write_folder
from PIL import Image

from mimic_el.datasets_scripts import cards
from mimic_el.datasets_scripts.builders import features_of
from mimic_el.datasets_scripts.cards import CardFacts, SplitFacts, card_text, draw_histograms, write_card
from mimic_el.datasets_scripts.prepare import Options, validate
from mimic_el.datasets_scripts.report import Report
from mimic_el.datasets_scripts.source import Source
from mimic_el.datasets_scripts.sources import open_source


def facts_of(source: Source) -> CardFacts:
    split = SplitFacts(1_234, 5, 6)
    splits = {"mentions": dict.fromkeys(("train", "validation", "test"), split), "entities": {"kb": split}}
    return CardFacts(splits, {config: features_of(config, source) for config in splits})


def card_of(name: str, folder: Path, **changes: Any) -> tuple[DatasetCard, str]:
    report = Report()
    source = open_source(name, folder, report)
    validate(source, report, Options(num_workers=1))
    text = card_text(source, report, replace(facts_of(source), **changes), ["sentence_words"])
    return DatasetCard(text), text


def test_card_of_an_archive(tmp_path: Path) -> None:
    card, text = card_of("wikimel", write_folder(sound_archive(), tmp_path), options={"image_size": "224"})
    data = card.data.to_dict()
    assert data["license"] == "unknown"
    assert data["size_categories"] == ["1K<n<10K"]
    assert data["language"] == ["en"]
    assert data["task_ids"] == ["entity-linking-retrieval"]
    configs = {config["config_name"]: config for config in data["configs"]}
    assert configs["mentions"]["default"] is True
    assert configs["mentions"]["data_files"][1] == {"split": "validation", "path": "mentions/validation-*.parquet"}
    assert configs["entities"]["data_files"] == [{"split": "kb", "path": "entities/kb-*.parquet"}]
    infos = {info["config_name"]: info for info in data["dataset_info"]}
    assert infos["entities"]["splits"] == [{"name": "kb", "num_bytes": 5, "num_examples": 1_234}]
    assert [column["name"] for column in infos["mentions"]["features"]][:5] == [
        "id",
        "mention",
        "sentence",
        "image",
        "answer",
    ]
    assert check_card(text, "dataset") == ([], [])
    assert "| mentions | 3 | 1 | 1 |" in text
    assert "| with an image | 2 | 0 | 1 |" in text
    assert "- entities: 4 here, 109,976 in the MIMIC paper." in text
    assert "prepare wikimel --data_dir DIR --output_dir OUT --image_size 224\n" in text
    assert "Words of a sentence: 2.4 on average, median 2, at most 4." in text
    assert "@inproceedings{luo2023multi" in text
    assert "![words of a sentence](figures/sentence_words.png)" in text
    assert str(tmp_path) not in text
    assert "no knowledge base" not in text


def test_card_of_a_closed_knowledge_base_says_so(tmp_path: Path) -> None:
    record = {"1": {"id": "1", "sentence": "Ann", "mentions": ["Ann"], "entities": ["Ann"], "answer": ["Q1"]}}
    card, text = card_of("wikimel", write_folder({"Wikidata-MEL.json": to_json(record)}, tmp_path))
    assert card.data.to_dict()["license"] == "mit"
    assert "**The source has no knowledge base.**" in text
    assert "They are not the splits of any publication" in text
    assert "luo2023multi" not in text
    assert check_card(text, "dataset") == ([], [])


def test_card_of_own_data_with_a_hostile_name(tmp_path: Path) -> None:
    files = {
        "entities.csv": b"id,name,</td>|`\n1,Ann,x\n",
        "mentions.csv": b"mention,sentence,answer\nAnn,Ann,1\n",
        "images/a.png": an_image(format="PNG"),
    }
    name = 'Mine: "quoted" | `code`\nlicense: mit'
    card, text = card_of("custom", write_folder(files, tmp_path), pretty_name=name, license="cc0-1.0")
    assert card.data.to_dict()["pretty_name"] == name
    assert card.data.to_dict()["license"] == "cc0-1.0"
    assert "License: cc0-1.0." in text
    assert "&lt;/td\\>\\|\\`" in text
    assert "```bibtex" not in text
    assert check_card(text, "dataset") == ([], [])


HOSTILE = "[a](https://x.org) ![b](c.png) <img src=d> # | `e` https://x.org www.x.org \x1b[2J\u202e m@x.org"


def test_no_text_of_data_is_markup_in_a_card(tmp_path: Path) -> None:
    row = {
        "mention": "Ann",
        "sentence": "Ann",
        "answer": "1",
        HOSTILE[:90]: {"not": "kept"},
        "[k](https://x.org)": "kept",
    }
    files = {"entities.csv": b"id,name\n1,Ann\n", "train.jsonl": json.dumps(row).encode()}
    _, text = card_of("custom", write_folder(files, tmp_path), pretty_name=HOSTILE, license=HOSTILE)
    body = text.partition("\n---\n")[2]
    for markup in ("](https", "](c.png", "<img", "\x1b", "\u202e", "https://x", "www.x", "m@x", "`e`"):
        assert markup not in body.replace("\\`", ""), markup
    assert "\\[k\\]" in body


def test_histograms(tmp_path: Path) -> None:
    counts = Counter({1: 50, 2: 30, 3: 19, 900: 1})
    assert draw_histograms({"words": ("words of a sentence", counts)}, tmp_path / "figures") == ["words"]
    with Image.open(tmp_path / "figures" / "words.png") as image:
        assert image.size == (500, 250)
        assert len(image.convert("RGB").getcolors(10**6) or []) > 2  # something is drawn


def test_card_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    source = open_source("wikimel", write_folder(sound_archive(), tmp_path / "data"), Report())
    report = Report()
    validate(source, report, Options(num_workers=1))
    (tmp_path / "out").mkdir()
    write_card(tmp_path / "out", source, report, facts_of(source))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "figures/" not in text
    assert "## Statistics" in text
    tasks = yaml.safe_load((tmp_path / "out" / "eval.yaml").read_text())["tasks"]
    assert {"id": "mrr", "config": "mentions", "split": "test"} in tasks
    assert "matplotlib is not installed" in caplog.text


@pytest.mark.parametrize(
    ("rows", "label"), [(0, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (25_846, "10K<n<100K"), (10**8, "10M<n<100M")]
)
def test_size_category(rows: int, label: str) -> None:
    assert cards._size_category(rows) == label
