"""The card of a data set, generated from its data: metadata, fields, statistics, histograms, what is wrong with it."""

from __future__ import annotations

import logging
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from mimic_el.markdown_mimic import escaped, listed, metadata_text, plain_line, table

from .custom import CustomData
from .melbench import MelBench
from .mimic_archive import MimicArchive
from .report import KINDS, MAX_LISTED, SPLITS, Report
from .source import Source
from .wikidiverse import WikiDiverseRelease

logger = logging.getLogger(__name__)

# What models are compared by on a data set, by the name of the metric.
EVAL_TASKS = {"hits@1": "hits_at_1", "hits@3": "hits_at_3", "hits@5": "hits_at_5", "mrr": "mrr"}

_MIMIC = """@inproceedings{luo2023multi,
  title = {Multi-Grained Multimodal Interaction Network for Entity Linking},
  author = {Luo, Pengfei and Xu, Tong and Wu, Shiwei and Zhu, Chen and Xu, Linli and Chen, Enhong},
  booktitle = {Proceedings of the 29th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year = {2023},
  pages = {1583--1594}
}"""
_MELBENCH = """@inproceedings{zhou2021weibo,
  title = {Weibo-MEL, Wikidata-MEL and Richpedia-MEL: Multimodal Entity Linking Benchmark Datasets},
  author = {Zhou, Xingchen and Wang, Peng and Li, Guozheng and Xie, Jiafeng and Wu, Jiangheng},
  booktitle = {Knowledge Graph and Semantic Computing (CCKS)},
  year = {2021}
}"""
_GHMFC = """@inproceedings{wang2022multimodal,
  title = {Multimodal Entity Linking with Gated Hierarchical Fusion and Contrastive Training},
  author = {Wang, Peng and Wu, Jiangheng and Chen, Xiaohang},
  booktitle = {Proceedings of the 45th International ACM SIGIR Conference on Research and Development in Information
               Retrieval},
  year = {2022}
}"""
_WIKIDIVERSE = """@inproceedings{wang2022wikidiverse,
  title = {WikiDiverse: A Multimodal Entity Linking Dataset with Diversified Contextual Topics and Entity Types},
  author = {Wang, Xuwu and Tian, Junfeng and Gui, Min and Li, Zhixu and Wang, Rui and Yan, Ming and Chen, Lihan and
            Xiao, Yanghua},
  booktitle = {Proceedings of the 60th Annual Meeting of the Association for Computational Linguistics (ACL)},
  year = {2022}
}"""
_CITATIONS = {
    "wikimel": [_MELBENCH, _GHMFC],
    "richpediamel": [_MELBENCH, _GHMFC],
    "wikidiverse": [_WIKIDIVERSE],
    "custom": [],
}
_ORIGINS = {
    "wikimel": "WikiMEL: mentions in captions of images, from Wikipedia, linked to Wikidata.",
    "richpediamel": "RichpediaMEL: mentions in sentences from Wikipedia, linked to Wikidata through Richpedia.",
    "wikidiverse": "WikiDiverse: mentions in captions of images, from Wikinews, linked to Wikipedia.",
    "custom": "",
}
_IMAGES_LICENSE = "Images of Wikimedia Commons have licenses of their own, each its own."

# Spelled here, because they are the user's to read; the names are the columns'.
_FIELDS = {
    "mentions": {
        "id": "unique in the data set",
        "mention": "the words that name the entity",
        "sentence": "the sentence or caption that the mention is in",
        "image": "the image that goes with the sentence, or null",
        "answer": "the id of the entity that is meant, or null where it is none",
        "source_id": "the id that the source gives the record that the mention is from, or null",
        "topic": "the topic of the news",
        "mention_type": "the type of the entity",
        "start": "where the mention begins in the sentence, in characters, or null where that is not known",
        "end": "where it ends",
    },
    "entities": {
        "id": "unique in the knowledge base",
        "qid": "the entity's id in Wikidata, or null",
        "name": "the entity's name",
        "description": "a text on the entity, or empty",
        "images": "its images, none or more",
    },
}


@dataclass(frozen=True)
class SplitFacts:
    """What was written of a split: rows, bytes of its rows, bytes of its Parquet files."""

    rows: int
    data_bytes: int
    file_bytes: int


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of, besides the report.

    Attributes:
        splits: by configuration and split, what was written.
        features: by configuration, the columns.
        options: the command's options that shape the data, as they were given.
        pretty_name: overrides the data set's name.
        license: overrides the license identifier.
    """

    splits: dict[str, dict[str, SplitFacts]]
    features: dict[str, datasets.Features]
    options: dict[str, str] = field(default_factory=dict)
    pretty_name: str | None = None
    license: str | None = None


def _license(source: Source) -> tuple[str, str]:
    """The identifier and what the source says."""
    name = source.benchmark.name
    if isinstance(source, MelBench):
        return (
            "mit",
            f"MELBench is published under the MIT license (copyright 2021 BlueStragglers). {_IMAGES_LICENSE}",
        )
    if isinstance(source, WikiDiverseRelease):
        return "cc-by-sa-4.0", f"WikiDiverse is published under CC BY-SA 4.0. {_IMAGES_LICENSE}"
    if isinstance(source, CustomData):
        return "unknown", "No license was stated."
    origin = "WikiDiverse, published under CC BY-SA 4.0" if name == "wikidiverse" else "MELBench, published under MIT"
    text = f"The archive states no license of its own. Its mentions derive from {origin}. {_IMAGES_LICENSE}"
    return "unknown", text


def _size_category(rows: int) -> str:
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((label for bound, label in bounds if rows < bound), "10M<n<100M")


def metadata(source: Source, facts: CardFacts) -> DatasetCardData:
    """The card's YAML: license, languages, task, configurations with their files, columns and sizes."""
    name = source.benchmark.name
    is_custom = isinstance(source, CustomData)
    data = DatasetCardData(
        language=None if is_custom else ["en"],
        license=metadata_text(facts.license or _license(source)[0]),
        pretty_name=metadata_text(facts.pretty_name or source.benchmark.pretty_name),
        size_categories=[_size_category(sum(split.rows for split in facts.splits["mentions"].values()))],
        task_categories=["text-retrieval"],
        task_ids=["entity-linking-retrieval"],
        tags=["entity-linking", "multimodal-entity-linking", "image", *([] if is_custom else [name])],
    )
    configs = MetadataConfigs(
        {
            config: {"data_files": [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in splits]}
            | ({"default": True} if config == "mentions" else {})
            for config, splits in facts.splits.items()
        }
    )
    infos = DatasetInfosDict()
    for config, splits in facts.splits.items():
        infos[config] = datasets.DatasetInfo(
            features=facts.features[config],
            splits=datasets.SplitDict.from_split_dict(
                [
                    {"name": split, "num_bytes": written.data_bytes, "num_examples": written.rows}
                    for split, written in splits.items()
                ]
            ),
            download_size=sum(split.file_bytes for split in splits.values()),
            dataset_size=sum(split.data_bytes for split in splits.values()),
        )
    configs.to_dataset_card_data(data)
    infos.to_dataset_card_data(data)
    return data


def _percentile(counts: Counter[int], share: float) -> int:
    """The smallest value that `share` of all are not above."""
    if not counts:
        return 0
    values = np.repeat(list(counts), list(counts.values()))
    return int(np.percentile(values, 100 * share, method="inverted_cdf"))


def _lengths(counts: Counter[int]) -> str:
    mean = sum(value * count for value, count in counts.items()) / max(1, counts.total())
    return f"{mean:.1f} on average, median {_percentile(counts, 0.5)}, at most {max(counts, default=0)}"


def _fields(config: str, facts: CardFacts) -> list[list[str]]:
    def type_name(feature: Any) -> str:
        if isinstance(feature, datasets.List):
            return f"list of {type_name(feature.feature)}"
        return "image" if isinstance(feature, datasets.Image) else feature.dtype

    return [
        [f"**{escaped(name)}**", type_name(feature), _FIELDS[config].get(name, "of the source")]
        for name, feature in facts.features[config].items()
    ]


def _counts(report: Report) -> tuple[list[list[Any]], list[list[Any]]]:
    """The rows of the tables of mentions and of entities."""
    stats = report.statistics
    plain = stats.to_dict()
    labels = {
        "mentions": "mentions",
        "mentions_with_image": "with an image",
        "nil_mentions": "of no entity",
        "distinct_answers": "distinct answers",
    }
    mentions = [[label, *(plain[key][split] for split in SPLITS)] for key, label in labels.items() if key in plain]
    mentions.append(["answers that are none in train", 0, *(stats.unseen_answers(split) for split in SPLITS[1:])])
    entities: list[list[Any]] = [
        ["all", stats.entities],
        ["with a qid", stats.entities_with_qid],
        ["with a description", stats.entities_with_description],
        ["with an image", plain["entities_with_image"]],
        ["images in all", plain["entity_images"]],
    ]
    return mentions, entities


def _md5_verdict(entry: dict[str, Any]) -> str:
    if entry["expected_md5"] is None:
        return "not known"
    return "the same" if entry["expected_md5"] == entry["md5"] else f"differs: {entry['expected_md5']}"


def _histograms(source: Source, report: Report) -> dict[str, tuple[str, Counter[int]]]:
    stats = report.statistics
    histograms = {
        "sentence_words": ("words of a sentence", stats.sentence_words),
        "mention_words": ("words of a mention", stats.mention_words),
        "description_words": ("words of a description", stats.description_words),
        "images_per_entity": ("images of an entity", stats.images_per_entity),
    }
    return {name: entry for name, entry in histograms.items() if any(value for value in entry[1])}


def draw_histograms(histograms: dict[str, tuple[str, Counter[int]]], folder: Path) -> list[str]:
    """Draw counts by value as `folder/NAME.png`; one percent of the largest values is gathered in the last bar.

    Returns:
        The names drawn: none, with a warning in the log, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed: the card comes without histograms (pip install matplotlib)")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (title, counts) in histograms.items():
        last = max(_percentile(counts, 0.99), 1)
        width = max(1, -(-(last + 1) // 40))
        bars = Counter[int]()
        for value, count in counts.items():
            bars[min(value, last) // width * width] += count
        figure = Figure(figsize=(5, 2.5), layout="constrained")
        axes = figure.subplots()
        axes.bar(list(bars), list(bars.values()), width=width * 0.9, align="edge")
        axes.set_xlabel(f"{title} (the last bar: {last // width * width} and more)")
        axes.set_ylabel("count")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"{name}.png", dpi=100)
    return list(histograms)


def card_text(source: Source, report: Report, facts: CardFacts, figures: list[str]) -> str:
    """The card in Markdown, its YAML first. `figures` are the histograms drawn in `figures/`.

    Texts that come from data are escaped here or in the template, `dataset_card.md.jinja`.
    """
    data = metadata(source, facts)
    stats = report.statistics
    mention_counts, entity_counts = _counts(report)
    published = [(what, counts["found"], counts["published"]) for what, counts in report.published.items()]
    differing = [entry for entry in published if entry[1] != entry[2]]
    titles = {name: title for name, (title, _) in _histograms(source, report).items()}
    written = facts.splits.get("mentions", {})
    card = DatasetCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("dataset_card.md.jinja")),
        escaped=escaped,
        table=table,
        origin=_ORIGINS[source.benchmark.name],
        split="test" if "test" in written else next(iter(written), "train"),
        fields={config: _fields(config, facts) for config in ("mentions", "entities")},
        splits=list(SPLITS),
        mention_counts=mention_counts,
        entity_counts=entity_counts,
        lengths={
            "sentence": _lengths(stats.sentence_words),
            "mention": _lengths(stats.mention_words),
            "description": _lengths(stats.description_words),
        },
        figures=[(name, titles[name]) for name in figures],
        format=source.format,
        name=source.benchmark.name,
        options="".join(
            f" --{name}" + (f" {shlex.quote(value)}" if value else "") for name, value in facts.options.items()
        ),
        kind=type(source).__name__,
        is_closed=source.is_closed,
        has_answers_alone="closed_knowledge_base" in report.counts,
        files=[
            [escaped(name), entry["bytes"], entry["md5"], _md5_verdict(entry)] for name, entry in report.files.items()
        ],
        differing=differing,
        is_as_published=bool(published) and not differing,
        unused_fields=listed(f"{escaped(name)} ({count:,})" for name, count in sorted(report.unused_fields.items())),
        findings=[[kind, report.counts[kind], KINDS[kind].effect] for kind in KINDS if report.counts[kind]],
        max_listed=MAX_LISTED,
        license=f"License: {escaped(facts.license)}." if facts.license else _license(source)[1],
        citations=_CITATIONS[source.benchmark.name] + ([_MIMIC] if isinstance(source, MimicArchive) else []),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n"


def eval_yaml(source: Source, facts: CardFacts) -> str | None:
    """The tasks that the Hub collects models' figures for (`eval.yaml`); `None` where there is no test split."""
    if "test" not in facts.splits.get("mentions", {}):
        return None
    name = plain_line(facts.pretty_name or source.benchmark.pretty_name)
    described = {
        "name": name,
        "description": f"{name}: multimodal entity linking. Each test mention's answer is ranked among all entities; "
        "Hits@k and MRR in percent.",
        "evaluation_framework": "mimic-el",
        "tasks": [{"id": task, "config": "mentions", "split": "test"} for task in EVAL_TASKS.values()],
    }
    return yaml.safe_dump(described, sort_keys=False, allow_unicode=True)


def write_card(folder: Path, source: Source, report: Report, facts: CardFacts) -> None:
    """Write `README.md`, `eval.yaml` and, where matplotlib is installed, `figures/*.png`."""
    figures = draw_histograms(_histograms(source, report), folder / "figures")
    (folder / "README.md").write_text(card_text(source, report, facts, figures), encoding="utf-8")
    if tasks := eval_yaml(source, facts):
        (folder / "eval.yaml").write_text(tasks, encoding="utf-8")
