from __future__ import annotations

from pathlib import Path

import pytest

from mimic_el.errors_mimic import MimicError
from mimic_el.hub_files_mimic import HubFilesError, hub_files, refuse_links


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def test_model(tmp_path: Path) -> None:
    there = ["config.json", "model.safetensors", "pipeline_mimic.py", "README.md", "loss.png", "test_results.json"]
    other = ["training_args.bin", "trainer_state.json", "unreadable_images.jsonl", ".env", "notes.py"]
    root = tree(tmp_path, *there, *other, "checkpoint-7/model.safetensors", "index/index_config.json")
    files, left_out = hub_files(root, "model")
    assert files == {name: root / name for name in sorted(there)}
    assert left_out == sorted([*other, "checkpoint-7/", "index/"])


def test_index(tmp_path: Path) -> None:
    there = ["index_config.json", "shard-0.safetensors", "shard-0.jsonl", "matcher-1.safetensors", "README.md"]
    root = tree(tmp_path, *there, "build_state.json", ".lock", "first-stage-1.faiss")
    files, left_out = hub_files(root, "index")
    assert set(files) == set(there)
    assert left_out == [".lock", "build_state.json", "first-stage-1.faiss"]


def test_dataset(tmp_path: Path) -> None:
    there = ["README.md", "mentions/train.parquet", "entities/kb.parquet", "problems.jsonl"]
    root = tree(tmp_path, *there, ".prepare/manifest.json", "mentions/.cache", "mentions/test.parquet.incomplete")
    files, left_out = hub_files(root, "dataset")
    assert set(files) == set(there)
    assert left_out == [".prepare/", "mentions/.cache", "mentions/test.parquet.incomplete"]


@pytest.mark.parametrize(
    ("kind", "link"), [("model", "x_results.json"), ("index", "shard-9.jsonl"), ("dataset", "a/b.parquet")]
)
def test_links(tmp_path: Path, kind: str, link: str) -> None:
    secret = tree(tmp_path / "elsewhere", "secret") / "secret"
    root = tree(tmp_path / "root", "README.md", "a/c.parquet")
    (root / link).symlink_to(secret)
    with pytest.raises(HubFilesError, match=f"{link} is a symbolic link to {secret}") as error:
        hub_files(root, kind)
    assert isinstance(error.value, MimicError)
    (root / link).unlink()
    (root / link).symlink_to(root / "README.md")  # stays inside
    assert link in hub_files(root, kind)[0]


def test_the_directory_may_be_a_link(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "README.md")
    (tmp_path / "link").symlink_to(root)
    assert list(hub_files(tmp_path / "link", "dataset")[0]) == ["README.md"]


def test_links_that_do_not_go_do_not_matter(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "config.json")
    (root / "checkpoint-1").symlink_to(tmp_path)
    (root / "gone.png").symlink_to(tmp_path / "nothing")
    files, left_out = hub_files(root, "model")
    assert (list(files), left_out) == (["config.json"], ["checkpoint-1/", "gone.png"])


def test_folders_that_are_links(tmp_path: Path) -> None:
    """They would be passed over in silence, or followed out of the directory."""
    root = tree(tmp_path / "root", "README.md", "a/b.parquet")
    (root / "more").symlink_to(root / "a")
    with pytest.raises(HubFilesError, match=r"more is a symbolic link to the folder"):
        hub_files(root, "dataset")
    with pytest.raises(HubFilesError, match="outside of"):
        refuse_links(root / "a", [root / "README.md"])


def test_kinds() -> None:
    with pytest.raises(ValueError, match="model, index, dataset"):
        hub_files(".", "space")
