"""What a source gives, in plain values, for the tests of the formats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mimic_el.datasets_scripts.prepare import Options, check_images, survey
from mimic_el.datasets_scripts.report import SPLITS, Report
from mimic_el.datasets_scripts.source import Source
from mimic_el.datasets_scripts.sources import open_source

SHARED = Path(__file__).parents[2] / "shared" / "data"


def rows_of(source: Source) -> dict[str, list[dict[str, Any]]]:
    """All rows as plain values, images by their bytes."""
    entities = [
        {
            "id": row.id,
            "qid": row.qid,
            "name": row.name,
            "description": row.description,
            "images": [image.read() for image in row.images],
        }
        for row in source.entities(Report())
    ]
    mentions = {
        split: [
            {
                "id": row.id,
                "mention": row.mention,
                "sentence": row.sentence,
                "answer": row.answer,
                "image": row.image and row.image.read(),
                **row.extra,
            }
            for row in source.mentions(split, Report())
        ]
        for split in SPLITS
    }
    return {"kb": entities, **mentions}


def findings(name: str, data_dir: Path, tmp_path: Path, **options: Any) -> tuple[Report, list[tuple[Any, ...]]]:
    """The report on a data set, and its list of findings as `(kind, file, row)`."""
    report = Report()
    source = open_source(name, data_dir, report, **options)
    report.list_in(tmp_path / "problems.jsonl")
    check_images(source, Options(num_workers=1))
    survey(source, report, Options())
    report.close()
    source.close()
    lines = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert Counter(line["kind"] for line in lines) == report.counts
    return report, [(line["kind"], line["file"], line["row"]) for line in lines]
