"""A checkpoint's own code, loaded with `trust_remote_code=True` where nothing of this project is installed."""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from huggingface_hub import HfApi
from published import CODE_FILES, ROOT, TASK, entities_and_mentions, same_links, save_linker, tiny_linker
from python_processes import ForkingPython, clean_python
from transformers import pipeline

from mimic_el import EntityIndex, MimicModel, MimicProcessor

ALICE = "hf_alice"
# Pillow, and what transformers and torch require themselves.
REQUIRED = {"transformers", "torch", "huggingface_hub", "safetensors", "numpy", "PIL", "tqdm"}
AUTO_MAP = {"AutoConfig": "configuration_mimic.MimicConfig", "AutoModel": "modeling_mimic.MimicModel"}
CUSTOM_PIPELINES = {
    TASK: {"impl": "pipeline_mimic.MultimodalEntityLinkingPipeline", "pt": ["AutoModel"], "type": "multimodal"}
}


@pytest.fixture(scope="module")
def clean(hub: Hub) -> ForkingPython:
    return clean_python(hub)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_linker(tmp_path_factory.mktemp("checkpoints") / "linker")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    entities, mentions = entities_and_mentions(tmp_path_factory.mktemp("images"))
    return {"entities": entities, "mentions": mentions}


@pytest.fixture(scope="module")
def links(checkpoint: Path, data: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What the installed package links the mentions to."""
    model, processor = MimicModel.from_pretrained(checkpoint), MimicProcessor.from_pretrained(checkpoint)
    linker = pipeline(TASK, model=model, processor=processor, entities=data["entities"])
    return linker(data["mentions"], top_k=3)


@pytest.fixture(scope="module")
def api(hub: Hub, checkpoint: Path) -> HfApi:
    """Alice's, whose `alice/linker` has the checkpoint, and other weights on the branch "other"."""
    hub.add_user("alice", token=ALICE)
    api = hub.api(ALICE)
    api.create_repo("alice/linker")
    api.upload_folder(repo_id="alice/linker", folder_path=checkpoint)
    api.create_branch("alice/linker", branch="other")
    other = save_linker(checkpoint.parent / "other", seed=1)
    api.upload_folder(repo_id="alice/linker", folder_path=other, revision="other")
    return api


def test_the_environment_knows_nothing_of_us(clean: ForkingPython):
    code = """
        from importlib.util import find_spec
        names = ["mimic_el", "datasets", "evaluate", "pandas", "yaml", "torch", "transformers", "accelerate", "PIL"]
        result = [name for name in names if find_spec(name)]
    """
    assert clean.run(code) == ["yaml", "torch", "transformers", "accelerate", "PIL"]


@pytest.mark.parametrize("name", sorted(CODE_FILES))
def test_code_imports_nothing_else(name: str):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    # What a `try` surrounds is optional, for transformers too.
    optional = {node for guard in ast.walk(tree) if isinstance(guard, ast.Try) for node in ast.walk(guard)}
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in optional:
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert f"{node.module}.py" in CODE_FILES, f"line {node.lineno} imports a file that stays behind"
    assert imported <= REQUIRED | sys.stdlib_module_names


def test_checkpoint_brings_its_code(checkpoint: Path):
    assert {path.name for path in checkpoint.glob("*.py")} == CODE_FILES
    for name in CODE_FILES:
        assert (checkpoint / name).read_bytes() == (ROOT / name).read_bytes()
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["custom_pipelines"] == CUSTOM_PIPELINES
    processor = json.loads((checkpoint / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_mimic.MimicProcessor"}


AUTO_CLASSES = """
    import torch
    from transformers import AutoConfig, AutoModel, AutoProcessor

    config = AutoConfig.from_pretrained(place, trust_remote_code=True)
    model = AutoModel.from_pretrained(place, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
    names = [entity["name"] for entity in entities]
    images = [entity["images"] for entity in entities]
    with torch.no_grad():
        features = model.encode_entities(**processor.process_entities(names, names, images))
        inputs = processor.process_mentions(names, names, [None] * len(names))
        logits = model.score(model.encode_mentions(**inputs), features).logits
    result = {
        "modules": sorted({type(part).__module__.split(".")[0] for part in (config, model, processor)}),
        "logits": logits.tolist(),
        "text_max_length": [config.text_max_length, processor.text_max_length],
    }
"""


def test_auto_classes_from_a_directory(clean: ForkingPython, checkpoint: Path, data: dict[str, Any]):
    loaded = clean.run(AUTO_CLASSES, place=checkpoint, entities=data["entities"])
    assert loaded["modules"] == ["transformers_modules"]
    assert loaded["text_max_length"] == [40, 40]
    names = [entity["name"] for entity in data["entities"]]
    model, processor = MimicModel.from_pretrained(checkpoint), MimicProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        images = [entity["images"] for entity in data["entities"]]
        entities = model.encode_entities(**processor.process_entities(names, names, images))
        mentions = model.encode_mentions(**processor.process_mentions(names, names, [None] * len(names)))
        expected = model.score(mentions, entities).logits
    torch.testing.assert_close(torch.tensor(loaded["logits"]), expected)


PIPELINE = """
    from transformers import pipeline

    linker = pipeline(model=place, trust_remote_code=True, **{"entities": entities, **options})
    result = linker(mentions, top_k=3)
"""


@pytest.mark.parametrize("options", [{}, {"task": TASK}], ids=["task not named", "task named"])
@pytest.mark.parametrize("where", ["directory", "hub"])
def test_pipeline(
    clean: ForkingPython, api: HfApi, checkpoint: Path, data: dict[str, Any], links: list, where: str, options: dict
):
    place = checkpoint if where == "directory" else "alice/linker"
    assert same_links(clean.run(PIPELINE, place=str(place), options=options, **data), links)


def test_code_is_run_only_if_trusted(clean: ForkingPython, api: HfApi):
    code = """
        from transformers import AutoModel
        AutoModel.from_pretrained("alice/linker", trust_remote_code=False)
    """
    assert "trust_remote_code=True" in clean.error(code)


def test_entity_index_from_the_code(
    clean: ForkingPython, api: HfApi, data: dict[str, Any], links: list, tmp_path: Path
):
    code = """
        from transformers import AutoModel, AutoProcessor, pipeline
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        EntityIndex = get_class_from_dynamic_module("index_mimic.EntityIndex", "alice/linker")
        model = AutoModel.from_pretrained("alice/linker", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained("alice/linker", trust_remote_code=True)
        EntityIndex.build(model, processor, entities, directory, show_progress=False)
        linker = pipeline(model="alice/linker", trust_remote_code=True, index=directory)
        result = [linker(mentions, top_k=3), type(linker.index) is EntityIndex]
    """
    directory = str(tmp_path / "index")
    found, same_class = clean.run(code, directory=directory, **data)
    assert same_class
    assert same_links(found, links)
    assert len(EntityIndex.from_pretrained(directory)) == len(data["entities"])


def test_fine_tuning_and_saving_again(clean: ForkingPython, api: HfApi, hub: Hub, data: dict[str, Any], tmp_path: Path):
    """With the Trainer as it is; then a second load, in a process that has not seen the first repository."""
    code = """
        import torch
        from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

        model = AutoModel.from_pretrained("alice/linker", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained("alice/linker", trust_remote_code=True)

        def columns(rows, *names):
            return ([row[name] for row in rows] for name in names)

        inputs = dict(processor.process_mentions(*columns(mentions, "mention", "text", "image")))
        of_entities = processor.process_entities(*columns(entities, "name", "description", "images"))
        inputs |= {f"entity_{name}": tensor for name, tensor in of_entities.items()}
        rows = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(len(mentions))]

        def collate(rows):
            return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, "return_loss": True}

        arguments = TrainingArguments(
            "runs", max_steps=3, per_device_train_batch_size=12, learning_rate=1e-3, report_to=[], use_cpu=True,
            logging_steps=1, save_strategy="no", disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, collate, rows, processing_class=processor)
        trainer.train()
        trainer.save_model(directory)
        result = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    """
    first, again = tmp_path / "tuned", tmp_path / "again"
    losses = clean.run(code, directory=first, **data)
    assert losses[-1] < losses[0]

    code = """
        from transformers import AutoModel, AutoProcessor, pipeline

        linker = pipeline(model=first, trust_remote_code=True, entities=entities)
        result = [linker(mentions, top_k=3)]
        linker.save_pretrained(again)
        result.append(pipeline(model=again, trust_remote_code=True, entities=entities)(mentions, top_k=3))
        AutoModel.from_pretrained(first, trust_remote_code=True).push_to_hub("alice/tuned")
        AutoProcessor.from_pretrained(first, trust_remote_code=True).push_to_hub("alice/tuned")
    """
    of_first, of_again = clean.run(code, token=ALICE, first=first, again=again, **data)
    assert same_links(of_first, of_again)

    pushed = hub.files("alice/tuned")
    for name in ("config.json", "processor_config.json"):
        # A configuration that came from a repository must not go on pointing there.
        for text in ((first / name).read_text(), (again / name).read_text(), pushed[name].decode()):
            assert "alice/linker" not in text
            config = json.loads(text)
            if name == "config.json":
                assert config["auto_map"] == AUTO_MAP
                assert config["custom_pipelines"] == CUSTOM_PIPELINES
            else:
                assert config["auto_map"] == {"AutoProcessor": "processing_mimic.MimicProcessor"}
    for name in CODE_FILES:
        source = (ROOT / name).read_bytes()
        assert (first / name).read_bytes() == (again / name).read_bytes() == pushed[name] == source
    assert same_links(clean.run(PIPELINE, place="alice/tuned", options={}, **data), of_first)


def first_weight(seed: int) -> float:
    """What tells the checkpoints of these tests apart."""
    return tiny_linker(seed)[0].matcher.tglu.fc_query.weight[0, 0].item()


OPTIONS = """
    from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

    def first_weight(model):
        return model.matcher.tglu.fc_query.weight[0, 0].item()

    def load(place, **options):
        AutoConfig.from_pretrained(place, trust_remote_code=True, **options)
        AutoProcessor.from_pretrained(place, trust_remote_code=True, **options)
        return AutoModel.from_pretrained(place, trust_remote_code=True, **options)
"""


def test_revision_and_token(clean: ForkingPython, api: HfApi, data: dict[str, Any]):
    api.update_repo_settings("alice/linker", private=True)
    commit = api.repo_info("alice/linker", revision="other").sha
    code = """
        result = [first_weight(load("alice/linker", revision=revision, token=secret)) for revision in revisions]
        options = {"revision": "other", "token": secret, "trust_remote_code": True}
        result.append(first_weight(pipeline(model="alice/linker", entities=entities, **options).model))
    """
    code = textwrap.dedent(OPTIONS) + textwrap.dedent(code)
    revisions = [None, "other", commit]
    try:
        found = clean.run(code, revisions=revisions, secret=ALICE, **data)
        ours, others = first_weight(0), first_weight(1)
        assert found == pytest.approx([ours, others, others, others])
        assert "token" in clean.error(textwrap.dedent(OPTIONS) + 'load("alice/linker")')
    finally:
        api.update_repo_settings("alice/linker", private=False)


def test_cache_dir_and_local_files_only(clean: ForkingPython, hub: Hub, api: HfApi, data: dict[str, Any], links: list):
    code = """
        import os

        load("alice/linker", cache_dir="here")
        places = ["here/models--alice--linker", os.path.join(os.environ["HF_HOME"], "hub")]
        result = [os.path.isdir(place) for place in places]
    """
    assert clean.run(textwrap.dedent(OPTIONS) + textwrap.dedent(code)) == [True, False]
    clean.run(PIPELINE, place="alice/linker", options={}, **data)
    hub.forget()
    options = {"local_files_only": True}
    assert same_links(clean.run(PIPELINE, place="alice/linker", options=options, keep_cache=True, **data), links)
    assert hub.requests == []
    assert "offline mode" in clean.error(PIPELINE, place="alice/linker", options=options, **data)


def test_dtype_and_device_map(clean: ForkingPython, api: HfApi, data: dict[str, Any], links: list):
    code = """
        import torch

        def dtypes(model):
            parts = (model.encoder, model.matcher)
            return [sorted({str(parameter.dtype) for parameter in part.parameters()}) for part in parts]

        result = [dtypes(load("alice/linker", dtype=dtype)) for dtype in (torch.bfloat16, "bfloat16", "auto")]
        options = {"trust_remote_code": True, "entities": entities}
        half = pipeline(model="alice/linker", dtype=torch.bfloat16, **options)
        half.save_pretrained("half")
        with open("half/tokenizer_config.json") as file:
            assert "dtype" not in file.read()
        again = pipeline(model="half", **options)
        result += [dtypes(half.model), dtypes(again.model), half(mentions), again(mentions)]

        placed = [load("alice/linker", device_map=device_map) for device_map in ("cpu", "auto", {"": "cpu"})]
        result += [[str(model.device) for model in placed]]
        result += [pipeline(model="alice/linker", device_map="auto", **options)(mentions, top_k=3)]
    """
    *dtypes, of_half, of_again, devices, of_placed = clean.run(textwrap.dedent(OPTIONS) + textwrap.dedent(code), **data)
    half, full = [["torch.bfloat16"], ["torch.float32"]], [["torch.float32"], ["torch.float32"]]
    assert dtypes == [half, half, full, half, half]
    assert same_links(of_half, of_again)
    assert devices == ["cpu", "cpu", "cpu"]
    assert same_links(of_placed, links)


def test_subfolder(clean: ForkingPython, api: HfApi, checkpoint: Path, data: dict[str, Any]):
    """The code is taken from the repository's root, as of any model."""
    api.create_branch("alice/linker", branch="folders")
    other = save_linker(checkpoint.parent / "other", seed=1)
    api.upload_folder(
        repo_id="alice/linker", folder_path=other, path_in_repo="other", ignore_patterns="*.py", revision="folders"
    )
    code = """
        options = {"revision": "folders", "subfolder": "other"}
        result = [first_weight(load("alice/linker", **options))]
        linker = pipeline(
            model="alice/linker", revision="folders", model_kwargs={"subfolder": "other"}, trust_remote_code=True,
            entities=entities,
        )
        result += [first_weight(linker.model)]
    """
    found = clean.run(textwrap.dedent(OPTIONS) + textwrap.dedent(code), **data)
    assert found == pytest.approx([first_weight(1)] * 2)


def test_pipeline_is_saved_and_pushed(clean: ForkingPython, hub: Hub, api: HfApi, data: dict[str, Any], links: list):
    """With its index beside it, which then needs not be named, from a directory or from the Hub."""
    code = """
        import os
        from huggingface_hub import HfApi
        from transformers import pipeline

        linker = pipeline(model="alice/linker", trust_remote_code=True, entities=entities)
        linker.push_to_hub("alice/pushed")
        linker.save_pretrained("saved", save_index=True)
        result = [pipeline(model="saved", trust_remote_code=True)(mentions, top_k=3)]
        HfApi().create_repo("alice/whole")
        HfApi().upload_folder(repo_id="alice/whole", folder_path="saved")
    """
    [from_directory] = clean.run(code, token=ALICE, **data)
    assert same_links(from_directory, links)
    pushed = hub.files("alice/pushed")
    assert json.loads(pushed["config.json"])["custom_pipelines"] == CUSTOM_PIPELINES
    assert {name for name in pushed if name.endswith(".py")} == CODE_FILES
    assert same_links(clean.run(PIPELINE, place="alice/pushed", options={}, **data), links)
    code = """
        from transformers import pipeline
        result = pipeline(model="alice/whole", trust_remote_code=True)(mentions, top_k=3)
    """
    assert same_links(clean.run(code, **data), links)
    assert not [name for name in hub.downloads("alice/whole") if "README" in name]
