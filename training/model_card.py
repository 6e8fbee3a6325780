"""The model card of a trained MIMIC model, written from what the training did."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import Trainer

from ..backbones_mimic import backbone_of
from ..datasets_scripts.cards import EVAL_TASKS
from ..explanation_mimic import Explanation
from ..hub_files_mimic import EVAL_RESULTS_FOLDER
from ..markdown_mimic import code, code_block, escaped, plain_line, table
from .reliability import COVERAGES, CalibrationReport

TASK = "multimodal-entity-linking"
CURVES = "training_curves.png"
RELIABILITY = "reliability.png"
EXPLANATION = "explanation.png"
# The paper's table 3: percent, but the mean rank.
PUBLISHED: dict[str, dict[str, float]] = {
    "wikimel": {"hits@1": 87.98, "hits@3": 95.07, "hits@5": 96.37, "mrr": 91.82, "mean_rank": 11.02},
    "richpediamel": {"hits@1": 81.02, "hits@3": 91.77, "hits@5": 94.38, "mrr": 86.95, "mean_rank": 55.11},
    "wikidiverse": {"hits@1": 63.51, "hits@3": 81.04, "hits@5": 86.43, "mrr": 73.44, "mean_rank": 227.08},
}
_SHOWN = ("hits@1", "hits@3", "hits@5", "mrr", "mean_rank")
_LABELS = {"hits@1": "Hits@1", "hits@3": "Hits@3", "hits@5": "Hits@5", "mrr": "MRR", "mean_rank": "Mean rank"}
_LIBRARIES = ("mimic-el", "torch", "transformers", "datasets", "accelerate", "tokenizers", "huggingface_hub")
# Arguments that say what was trained, shown where they differ from these.
_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "seed",
    "bf16",
    "fp16",
    "eval_epochs",
    "early_stopping_patience",
    "missing_answers",
    "index_dtype",
)
_CONFIG = ("text_max_length", "mask_text_padding", "ignore_duplicate_answers", "symmetric_loss", "context_window")
# How many characters of a text of the data are shown, and of an id; how many kinds of mentions.
_TEXT_SHOWN, _ID_SHOWN, _KINDS_SHOWN = 300, 100, 50
_CITATION = """\
@inproceedings{luo2023mimic,
  title = {Multi-Grained Multimodal Interaction Network for Entity Linking},
  author = {Luo, Pengfei and Xu, Tong and Wu, Shiwei and Zhu, Chen and Xu, Linli and Chen, Enhong},
  booktitle = {Proceedings of the 29th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year = {2023},
  doi = {10.1145/3580305.3599439}
}"""


@dataclass
class TrainingRun:
    """What a training did, as far as its card tells.

    Args:
        dataset: Hub id or directory of the data set; of a directory only the last part is told.
        dataset_revision: the Hub's revision that was asked for.
        base_model: Hub id or directory of the checkpoint that training started from; `None` for random weights.
        encoder: what the backbone is, in words.
        license: of the model: an identifier of the Hub.
        train_mentions, train_mentions_left_out, entities, unreadable_images: counts; `None` where not known.
        metrics: for "validation" and "test", what [`RankedMentions.metrics`] gives.
        example: a mention of the test split and what the model made of it: its `row`, `mention`, `sentence` and
            `answer`, `has_image`, and `linked`, the pipeline's output.
        explanation: why one of its mentions is linked as it is, drawn into the card.
        calibration: how well the probabilities are kept by the test split, where the model is calibrated.
        has_index: whether the pipeline finds an index of the data set's entities by itself.
        steps, epochs, seconds: of the training.
        log_history: the trainer's log.
        arguments, model: the training's and the model's settings.
        hardware: the machine, in words.
        versions: of the libraries.
    """

    dataset: str | None = None
    dataset_revision: str | None = None
    base_model: str | None = None
    encoder: str = "a dual encoder"
    license: str = "apache-2.0"
    train_mentions: int | None = None
    train_mentions_left_out: int = 0
    entities: int | None = None
    unreadable_images: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    example: dict[str, Any] | None = None
    explanation: Explanation | None = None
    calibration: CalibrationReport | None = None
    has_index: bool = False
    steps: int = 0
    epochs: float = 0.0
    seconds: float | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def observe(self, trainer: Trainer, *, entities: int, correct_images: bool, seconds_before: float = 0.0) -> None:
        """Takes over what the trainer knows: arguments, log, machine, versions, and metrics that are not set yet.

        Args:
            entities: of the knowledge base.
            correct_images: the processor's setting.
            seconds_before: what earlier sessions of the training took.
        """
        state = trainer.state
        self.steps, self.epochs = state.global_step, float(state.epoch or 0)
        self.log_history = [dict(entry) for entry in state.log_history]
        runtimes = [entry["train_runtime"] for entry in self.log_history if "train_runtime" in entry]
        self.seconds = seconds_before + runtimes[-1] if runtimes else None
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        arguments = trainer.args.to_dict()
        self.arguments = {name: arguments[name] for name in _ARGUMENTS if name in arguments}
        self.arguments["processes"] = trainer.args.world_size
        config = model.config
        backbone = config.backbone_config
        self.encoder = backbone_of(backbone).described(backbone)
        self.model = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "text encoder": _tower(backbone.text_config, f"{config.text_max_length} tokens"),
            "image encoder": _tower(
                backbone.vision_config, f"{config.image_size} px, patches of {backbone.vision_config.patch_size}"
            ),
        }
        self.arguments |= {name: getattr(config, name) for name in _CONFIG}
        self.arguments["correct_images"] = correct_images
        self.hardware = hardware(trainer.args.device)
        self.versions = versions()
        if self.entities is None:
            self.entities = entities
        if self.train_mentions is None and hasattr(trainer.train_dataset, "__len__"):
            self.train_mentions = len(trainer.train_dataset)  # type: ignore[arg-type]
        if not self.metrics:
            evaluations = [entry for entry in self.log_history if f"eval_{_SHOWN[0]}" in entry]
            if evaluations:
                best = max(evaluations, key=lambda entry: entry["eval_mrr"])
                self.metrics["validation"] = {
                    name.removeprefix("eval_"): value for name, value in best.items() if name.startswith("eval_")
                }

    @property
    def benchmark(self) -> str | None:
        """The benchmark's name in [`PUBLISHED`] if the data set is one, judged by its name."""
        name = (self.dataset_title or "").lower().replace("-", "").replace("_", "")
        return next((benchmark for benchmark in PUBLISHED if benchmark in name), None)

    @property
    def dataset_id(self) -> str | None:
        """The data set's id on the Hub; `None` where it is a directory."""
        return _hub_id(self.dataset)

    @property
    def dataset_title(self) -> str | None:
        """The last part of the data set's id or path."""
        return None if self.dataset is None else _last_part(self.dataset)

    def card(
        self,
        model_name: str,
        with_curves: bool = False,
        with_reliability: bool = False,
        with_explanation: bool = False,
    ) -> ModelCard:
        """The card.

        Args:
            model_name: the model's name or Hub id, for title and snippets.
            with_curves: whether `training_curves.png` is beside it.
            with_reliability: whether `reliability.png` is.
            with_explanation: whether `explanation.png` is.
        """
        title = plain_line(model_name.rpartition("/")[2], _ID_SHOWN)
        data = ModelCardData(
            library_name="transformers",
            license=self.license,
            pipeline_tag="text-ranking",  # of those that the Hub knows, the one that is nearest
            base_model=_hub_id(self.base_model),
            datasets=[self.dataset_id] if self.dataset_id else None,
            tags=["mimic", TASK, "entity-linking", "multimodal", "custom_code"],
            model_name=title,
            eval_results=self._eval_results() or None,
            metrics=None,
        )
        missing = {split: int(metrics.get("missing_answers", 0)) for split, metrics in self.metrics.items()}
        card = ModelCard.from_template(
            data,
            template_path=str(Path(__file__).with_name("model_card.md.jinja")),
            escaped=escaped,
            code=code,
            table=table,
            title=title,
            encoder=escaped(self.encoder),
            start="random weights" if self.base_model is None else _linked("", self.base_model),
            data=_linked("datasets/", self.dataset) if self.dataset else "",
            usage=self._usage(model_name),
            example=self.example and {**self.example, "answer": plain_line(self.example["answer"], _ID_SHOWN)},
            results=self._results(),
            labels=[_LABELS[name] for name in _SHOWN],
            entities=self.entities,
            missing=" and ".join(f"{count:,} {split}" for split, count in missing.items() if count),
            missing_rule=(
                "They count as misses."
                if str(self.arguments.get("missing_answers")) == "miss"
                else "They are not part of the figures."
            ),
            curves=CURVES if with_curves else "",
            calibration=self.calibration,
            sureness=self._sureness(),
            reliability=RELIABILITY if with_reliability else "",
            explanation=EXPLANATION if with_explanation else "",
            facts=self._facts(),
            arguments=[code(f"{name}={value}") for name, value in self.arguments.items()],
            libraries=[escaped(f"{name} {version}") for name, version in self.versions.items()],
            citation=_CITATION,
        )
        return ModelCard(re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n")

    def _eval_results(self) -> list[EvalResult]:
        results = []
        for split, metrics in self.metrics.items():
            for name in _SHOWN:
                if name not in metrics:
                    continue
                results.append(
                    EvalResult(
                        task_type=TASK,
                        task_name="Multimodal entity linking",
                        dataset_type=self.dataset_id or self.dataset_title or "unknown",
                        dataset_name=self.dataset_title or "unknown",
                        dataset_config="mentions",
                        dataset_split=split,
                        dataset_revision=plain_line(self.dataset_revision, _ID_SHOWN)
                        if self.dataset_id and self.dataset_revision
                        else None,
                        metric_type=name,
                        metric_name=_LABELS[name],
                        metric_value=round(float(metrics[name]), 6),
                    )
                )
        return results

    def eval_results(self) -> str | None:
        """The figures of the test split as the Hub's leaderboards read them (`.eval_results/*.yaml`).

        `None` where there are none, the data set is not on the Hub, or huggingface_hub is too old to write them. The
        tasks are those of the `eval.yaml` that `mimic-el prepare` writes; Hits and MRR are in percent.
        """
        measured = self.metrics.get("test", {})
        if self.dataset_id is None:
            return None
        return eval_results_yaml(self.dataset_id, measured, self.dataset_revision)

    def _usage(self, model_name: str) -> str:
        """The block of Python that links a mention of the data set."""
        dataset = self.dataset_id or self.dataset_title or "path/to/a/data-set"
        lines = ["from datasets import load_dataset", "from transformers import pipeline", ""]
        if self.has_index:
            lines.append(f'linker = pipeline("{TASK}", model={_quoted(model_name)}, trust_remote_code=True)')
        else:
            lines += [
                f'entities = load_dataset({_quoted(dataset)}, "entities", split="kb")',
                f'linker = pipeline("{TASK}", model={_quoted(model_name)}, trust_remote_code=True, entities=entities)',
            ]
        row = 0 if self.example is None else self.example["row"]
        lines.append(f'mention = load_dataset({_quoted(dataset)}, "mentions", split="test")[{row}]')
        if self.example is None:
            lines.append("linker(mention, top_k=3)")
        else:
            image = "and an image" if self.example["has_image"] else "without an image"
            mention, sentence = (plain_line(self.example[name], _TEXT_SHOWN) for name in ("mention", "sentence"))
            lines.append(f"# {mention!r} in {sentence!r}, {image}")
            lines.append("linker(mention, top_k=3)")
            rows = [str(_rounded(row)) for row in self.example["linked"]]
            lines += [
                f"# {'[' if n == 0 else ' '}{row}{']' if n == len(rows) - 1 else ','}" for n, row in enumerate(rows)
            ]
        return code_block("\n".join(lines), "python")

    def _results(self) -> list[list[str]]:
        """The rows of the table of figures."""
        rows = []
        for split, metrics in self.metrics.items():
            rows.append((f"This model, {split}", metrics, 100.0))
            kinds = sorted({name[: -len("_mrr")] for name in metrics if name.endswith("_mrr")})
            for kind in kinds[:_KINDS_SHOWN]:
                names = [name for name in (*_SHOWN, "mentions") if f"{kind}_{name}" in metrics]
                own = {name: metrics[f"{kind}_{name}"] for name in names}
                rows.append((f"This model, {split}, kind {escaped(kind, _ID_SHOWN)}", own, 100.0))
            if len(kinds) > _KINDS_SHOWN:
                rows.append((f"This model, {split}, {len(kinds) - _KINDS_SHOWN:,} more kinds", {}, 100.0))
        if rows and self.benchmark is not None:
            rows.append(("Published MIMIC, test", PUBLISHED[self.benchmark], 1.0))
        return [
            [
                label,
                f"{int(metrics['mentions']):,}" if "mentions" in metrics else "",
                *(
                    f"{metrics[name] * (1.0 if name == 'mean_rank' else factor):.2f}" if name in metrics else ""
                    for name in _SHOWN
                ),
            ]
            for label, metrics, factor in rows
        ]

    def _sureness(self) -> list[list[str]]:
        """The rows of the table of what the probabilities are worth."""
        figures = {} if self.calibration is None else self.calibration.figures
        return [
            [label, f"{figures[name]:.3f}"]
            for label, name in (
                ("Share of right answers (NIL is one of the answers)", "accuracy"),
                ("Expected calibration error of the answer given (15 bins)", "ece"),
                ("Expected calibration error of the best entity", "ece_best"),
                (
                    "Expected calibration error of the best entity, uncalibrated (softmax of the scores)",
                    "ece_best_before",
                ),
                ("Expected calibration error that perfect probabilities would show by chance", "ece_of_chance"),
                ("Brier score of the answer given", "brier"),
                ("Area under the ROC: best entity right or wrong", "auc_best"),
                ("Area under the ROC: NIL or not", "auc_nil"),
                ("NIL precision", "nil_precision"),
                ("NIL recall", "nil_recall"),
                ("NIL F1", "nil_f1"),
                *(
                    (f"Sets for {percent}%: share with the right answer", f"coverage_{percent}")
                    for percent in COVERAGES
                ),
            )
            if name in figures
        ]

    def _facts(self) -> list[tuple[str, str]]:
        """The rows of the table of how it was trained."""
        facts = []
        if self.dataset is not None:
            revision = f", revision {code(self.dataset_revision)}" if self.dataset_revision else ""
            facts.append(("Data", f"{_linked('datasets/', self.dataset)}{revision}"))
        if self.train_mentions is not None:
            left = f" ({self.train_mentions_left_out:,} left out: their answer is not in the knowledge base)"
            facts.append(("Mentions", f"{self.train_mentions:,}" + (left if self.train_mentions_left_out else "")))
        if self.entities is not None:
            facts.append(("Entities", f"{self.entities:,}"))
        if self.unreadable_images:
            facts.append(("Images that could not be read", f"{self.unreadable_images:,}"))
        if self.steps:
            facts.append(("Steps", f"{self.steps:,} ({self.epochs:.4g} epochs)"))
        if self.seconds is not None:
            facts.append(("Time", _duration(self.seconds)))
        if self.hardware:
            facts.append(("Hardware", escaped(self.hardware)))
        facts += [(escaped(name.capitalize()), escaped(_plain(value))) for name, value in self.model.items()]
        return facts

    def write(self, directory: str | os.PathLike[str], model_name: str | None = None) -> ModelCard:
        """Writes README.md, [`eval_results`], and the images of training curves and calibration if matplotlib is
        installed, into a directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with_curves = draw_curves(self.log_history, directory / CURVES)
        with_reliability = self.calibration is not None and draw_reliability(self.calibration, directory / RELIABILITY)
        if self.explanation is not None:
            self.explanation.save(directory / EXPLANATION)
        name = model_name or directory.resolve().name
        card = self.card(name, with_curves, with_reliability, self.explanation is not None)
        card.save(directory / "README.md")
        if results := self.eval_results():
            path = directory / EVAL_RESULTS_FOLDER / f"{self.dataset_title}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(results, encoding="utf-8")
        return card


def eval_results_yaml(dataset_id: str, measured: Mapping[str, Any], revision: str | None = None) -> str | None:
    """Figures on a data set's test split, as `.eval_results/*.yaml` has them; `None` where there are none.

    Args:
        dataset_id, revision: the data set on the Hub.
        measured: what [`RankedMentions.metrics`] gives; Hits@k and MRR are fractions.
    """
    entry_of = getattr(huggingface_hub, "EvalResultEntry", None)
    found = {task: measured[metric] for metric, task in EVAL_TASKS.items() if isinstance(measured.get(metric), float)}
    if entry_of is None or not found:
        return None
    entries = [
        entry_of(dataset_id, task, round(100 * value, 4), dataset_revision=revision) for task, value in found.items()
    ]
    return yaml.safe_dump(huggingface_hub.eval_result_entries_to_yaml(entries), sort_keys=False)


def draw_curves(log_history: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draws training loss and validation metrics against epochs; returns whether there was anything to draw with."""
    history = list(log_history)
    losses = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry and "epoch" in entry]
    evaluations = [entry for entry in history if "eval_mrr" in entry and "epoch" in entry]
    if not losses or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if evaluations else 1
    figure = Figure(figsize=(4.6 * panels, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].plot(*zip(*losses, strict=True), color="#2a6f97", linewidth=1.5)
    axes[0].set_title("Training loss", loc="left", fontsize=10)
    if evaluations:
        epochs = [entry["epoch"] for entry in evaluations]
        for name, color in (("mrr", "#2a6f97"), ("hits@1", "#c8553d")):
            values = [entry[f"eval_{name}"] for entry in evaluations]
            axes[1].plot(epochs, values, color=color, linewidth=1.5, marker="o", markersize=3, label=_LABELS[name])
        axes[1].set_ylim(0, 1)
        axes[1].legend(frameon=False, fontsize=9, loc="lower right")
        axes[1].set_title("Validation", loc="left", fontsize=10)
    for axis in axes:
        axis.set_xlim(left=0)
        _plain_axis(axis, "Epoch")
    figure.savefig(path)
    return True


def draw_reliability(report: CalibrationReport, path: Path) -> bool:
    """Draws how often the best entity is right against its probability, before and after, and the accuracy against
    the share of mentions that is kept; returns whether there was anything to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
    curves = ((report.before, "#c8553d", "softmax of the scores"), (report.after, "#2a6f97", "calibrated"))
    most = max(count for curve, _, _ in curves for _, _, count in curve)
    for curve, color, label in curves:
        said, seen, counts = zip(*curve, strict=True)
        left.plot(said, seen, color=color, linewidth=1.5, label=label)
        # The area of a dot tells the number of mentions.
        left.scatter(said, seen, s=[8 + 60 * count / most for count in counts], color=color)
    left.set_xlim(0, 1)
    left.set_ylim(0, 1)
    left.legend(frameon=False, fontsize=9, loc="upper left")
    left.set_title("Best entity: share that is right", loc="left", fontsize=10)
    _plain_axis(left, "Probability")
    right.plot(*zip(*report.kept, strict=True), color="#2a6f97", linewidth=1.5)
    right.set_xlim(0, 1)
    right.set_ylim(top=1)
    right.set_title("Accuracy of the surest answers", loc="left", fontsize=10)
    _plain_axis(right, "Share of mentions that is kept")
    figure.savefig(path)
    return True


def _plain_axis(axis: Any, label: str) -> None:
    axis.set_xlabel(label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def hardware(device: torch.device) -> str:
    """The device that trained, in words."""
    if device.type == "cuda":
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name(device)}" if count > 1 else torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that training rests on."""
    found = {"Python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _tower(config: Any, reads: str) -> str:
    return f"{config.num_hidden_layers} layers, width {config.hidden_size}, {reads}"


def _hub_id(name: str | None) -> str | None:
    """The name if it is of the form of a Hub id and no directory here."""
    if name is None or "/" not in name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _linked(prefix: str, name: str | None) -> str:
    hub_id = _hub_id(name)
    if hub_id is not None:
        return f"[{hub_id}](https://huggingface.co/{prefix}{hub_id})"
    return code(_last_part(str(name)))


def _last_part(name: str) -> str:
    """The last part of an id or a path, as a line."""
    try:
        return plain_line(Path(name).resolve().name, _ID_SHOWN)
    except (OSError, RuntimeError, ValueError):  # it cannot be a path, or its links go round
        return plain_line(Path(name).name, _ID_SHOWN)


def _quoted(text: str) -> str:
    """A string of Python in double quotes."""
    return json.dumps(plain_line(text), ensure_ascii=False)


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, 2)
        if isinstance(value, float)
        else plain_line(value, _TEXT_SHOWN)
        if isinstance(value, str)
        else value
        for name, value in row.items()
    }


__all__ = ["PUBLISHED", "TrainingRun", "draw_curves", "draw_reliability", "eval_results_yaml"]
