"""The demonstration, on the toy data set: its baselines, its table, its image, and all of it in one run."""

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import toy_data
import yaml
from PIL import Image
from transformers import AutoModel

from mimic_el import Calibration, train
from mimic_el.index_mimic import EntityIndex
from mimic_el.scripts import demo
from mimic_el.training import KnowledgeBase
from mimic_el.training.reliability import ScoredMentions

ROOT = Path(__file__).parents[1]


def test_name_match_is_what_all_random_orders_give_on_average() -> None:
    # Six entities: three of one name, two of another, one alone.
    names = ["A", "A", "A", "B", "B", "C"]
    entities = [{"id": str(row), "name": name, "description": "", "images": []} for row, name in enumerate(names)]
    mentions = [
        {"mention": "a", "answer": "1", "kind": "text"},  # one of three, in another case
        {"mention": "C", "answer": "5", "kind": "both"},  # alone
        {"mention": "B", "answer": "0", "kind": "both"},  # two others have the name
        {"mention": "Zed", "answer": "4", "kind": "text"},  # nobody has
    ]

    def oracle(mention: dict[str, str]) -> tuple[float, float]:
        ranks = []
        for order in itertools.permutations(range(6)):
            best_first = sorted(order, key=lambda row: names[row].lower() != mention["mention"].lower())
            ranks.append(1 + best_first.index(int(mention["answer"])))
        return float(np.mean([rank == 1 for rank in ranks])), float(np.mean([1 / rank for rank in ranks]))

    figures = demo.name_match(mentions, KnowledgeBase(entities))
    for kind in ("all", "text", "both"):
        expected = np.mean([oracle(m) for m in mentions if kind in ("all", m["kind"])], axis=0)
        assert [figures[kind]["hits@1"], figures[kind]["mrr"]] == pytest.approx(list(expected))


def test_records_without_images() -> None:
    mentions, entities = toy_data.mentions("test", 2), toy_data.entities()
    assert demo.without_images(mentions) == [{**mention, "image": None} for mention in mentions]
    assert demo.without_images(entities) == [{**entity, "images": []} for entity in entities]
    assert mentions[0]["image"] is not None


def test_shown_mentions_are_of_all_kinds_and_two_share_a_name() -> None:
    rows = [
        ("both", "A", "1"),
        ("image", "b", "2"),
        ("text", "C", "3"),
        ("image", "D", "4"),
        ("image", "E", "5"),
    ]
    rows += [("image", "d", "4"), ("image", "e", "6")]
    mentions = [{"kind": kind, "mention": mention, "answer": answer} for kind, mention, answer in rows]
    assert demo.choose(mentions) == [2, 1, 0, 4, 6]
    assert demo.choose(mentions[:6]) == [2, 1, 0]


def test_table_has_a_line_for_each_row_and_columns_for_each_kind() -> None:
    figures = {"all": {"hits@1": 0.5, "mrr": 0.625}, "text": {"hits@1": 1.0, "mrr": 1.0}}
    lines = demo.table({"One": figures, "Another": figures}, {"all": 2, "text": 1}).splitlines()
    assert lines[0].split() == ["all", "(2)", "text", "(1)"]
    assert lines[2].split() == ["One", "50.0", "62.5", "100.0", "100.0"]
    assert len({len(line) for line in lines}) == 1


def test_figures_with_nil_counted_by_hand() -> None:
    # Two entities and a mention of each; p(NIL) is 1/2, 1/10: the sum of all is one.
    scored = ScoredMentions(
        scores=np.array([[2.0, 1.0, np.nan], [4.0, 0.0, np.nan]]),
        name_fits=np.full((2, 9), np.nan),
        places=np.array([0, 1]),
        answer_scores=np.array([2.0, 0.0]),
        count=2,
    )
    # The line of NIL is 0 at the best score 2, and ln(1/9) at 4. The softmax of both is 0.73 to 0.27 and 0.98 to 0.02.
    lines: dict[str, tuple[float, ...]] = {"nil": (0.0, -np.log(9) / 2), "rest": (-9.0, 0.0), "sharpness": (0.0, 0.0)}
    calibration = Calibration(16, 0.5, {"best": (2.0, 1.0)}, lines)
    figures = demo.with_nil(scored, calibration, ["text", "both"], taken_out=False)
    # NIL 0.5, the answer 0.37, the other 0.13; the other 0.88, NIL 0.1, the answer 0.02.
    assert figures["text"] == {"hits@1": 0, "mrr": 1 / 2}
    assert figures["both"] == {"hits@1": 0, "mrr": pytest.approx(1 / 3)}
    assert figures["all"] == {"hits@1": 0, "mrr": pytest.approx((1 / 2 + 1 / 3) / 2)}
    # One entity is left, with a best score of 1 and 4: p(NIL) is 0.75 and 0.1.
    figures = demo.with_nil(scored, calibration, ["text", "both"], taken_out=True)
    assert figures["text"] == {"hits@1": 1, "mrr": 1}
    assert figures["both"] == {"hits@1": 0, "mrr": 1 / 2}


def test_nil_is_drawn_and_told() -> None:
    mention = {"mention": "A", "sentence": "A here.", "image": None, "answer": "1"}
    nil: dict[str, Any] = {"entity_id": None, "name": "not in the knowledge base", "score": None, "probability": 0.25}
    found: dict[str, Any] = {"entity_id": "1", "name": "A", "score": 2.0, "probability": 0.5}
    base = KnowledgeBase([{"id": "1", "name": "A", "description": "", "images": []}])
    with_both, plain = (demo.draw_links([mention], [answers], base) for answers in ([found, nil], [found, found]))
    assert with_both.size == plain.size
    assert np.asarray(with_both).tobytes() != np.asarray(plain).tobytes()
    assert demo.sureness(nil).strip() == "25%"
    assert demo.sureness({"score": 1.0}) == ""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, demo.Figures]]:
    """The demonstration as `make demo` runs it, on the toy data and a toy configuration."""
    directory = tmp_path_factory.mktemp("demo")
    rows = toy_data.mentions("test", 9)
    for row, kind in enumerate(itertools.islice(itertools.cycle(demo.KINDS), 9)):
        rows[row]["kind"] = kind
    splits = {"train": toy_data.mentions("train", 18), "validation": rows, "test": rows}
    data = toy_data.write_dataset(directory / "toy", **splits)
    settings: dict[str, Any] = {"clip_config": toy_data.CLIP_CONFIG, **toy_data.SIZES}
    settings |= {"from_scratch": True, "vocab_size": 700, "text_max_length": 12, "num_train_epochs": 2}
    settings |= {"learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True}
    (directory / "toy.yaml").write_text(yaml.safe_dump(settings))
    command = ["--config", str(directory / "toy.yaml"), "--dataset", str(data), "--threads", "1"]
    return directory / "out", demo.main([*command, "--output_dir", str(directory / "out")])


def test_demo_leaves_checkpoint_index_table_and_image(
    run: tuple[Path, dict[str, demo.Figures]], capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir, rows = run
    assert list(rows) == ["Exact name, at random", "MIMIC, images hidden", "MIMIC"]
    assert json.loads((output_dir / "demo_results.json").read_text()) == rows
    measured = json.loads((output_dir / "test_results.json").read_text())
    assert rows["MIMIC"]["all"]["mrr"] == measured["test_mrr"]
    assert rows["MIMIC"]["image"]["hits@1"] == measured["test_image_hits@1"]
    # Each name is that of three entities.
    assert rows["Exact name, at random"]["all"] == pytest.approx({"hits@1": 1 / 3, "mrr": (1 + 1 / 2 + 1 / 3) / 3})
    index = EntityIndex.from_pretrained(output_dir / "index")
    index.check_model(AutoModel.from_pretrained(output_dir))
    assert len(index) == 9
    with Image.open(output_dir / demo.LINKED) as image:
        assert image.height > 300
        # The answers are among three entities of nine often enough that one is framed.
        assert (np.asarray(image) == (0x2E, 0x8B, 0x57)).all(axis=-1).any()


def test_configuration_of_the_sample_is_read(tmp_path: Path) -> None:
    model_args, data_args, args = train.parse_args([str(demo.CONFIG), "--output_dir", str(tmp_path), "--use_cpu"])
    assert model_args.from_scratch
    assert model_args.correct_images is None  # the default: images are put right
    assert Path(str(data_args.dataset_name)).resolve() == demo.SAMPLE.resolve()
    assert args.num_train_epochs > 0
    knowledge_base = toy_data.knowledge_base()
    model, processor = train.build_model(model_args, toy_data.mentions("train", 4), knowledge_base)
    assert processor.text_max_length == model.config.text_max_length


def test_sample_has_what_the_demo_shows() -> None:
    if not demo.SAMPLE.is_dir():
        pytest.skip("the sample data set is not there")
    splits, knowledge_base = train.load_data(train.DataArguments(dataset_name=str(demo.SAMPLE)))
    test = splits["test"]
    assert isinstance(test, datasets.Dataset)
    assert set(test["kind"]) == set(demo.KINDS)
    assert len(demo.choose([dict(mention) for mention in test])) == 5
    assert set(test["answer"]) <= set(knowledge_base.column("id"))
