"""What a user of the installed wheel has: built once, unpacked, and run outside of the repository."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folders of the repository that are not part of the package.
_NOT_PACKAGED = {"tests", "benchmarks", "docs", "build", "dist", "runs"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    for module in ("setuptools", "pip"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed, so no wheel can be built here")
    place = tmp_path_factory.mktemp("wheel")
    # A build leaves files beside the sources.
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", *_NOT_PACKAGED)
    shutil.copytree(ROOT, place / "source", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    result = subprocess.run(
        [*command, "--wheel-dir", place, place / "source"], capture_output=True, text=True, cwd=place
    )
    assert result.returncode == 0, result.stderr
    [built] = place.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(place / "site")
    return place / "site"


def test_everything_is_in_it(wheel: Path) -> None:
    """Code of every package of the repository, and the files that it reads."""
    wanted = {
        path.relative_to(ROOT)
        for pattern in ("*.py", "*.yaml", "*.jinja*", "*.parquet", "py.typed")
        for path in ROOT.rglob(pattern)
        if not any(part.startswith(".") or part in _NOT_PACKAGED for part in path.relative_to(ROOT).parts)
    }
    assert len(wanted) > 20
    packed = {path.relative_to(wheel / "mimic_el") for path in (wheel / "mimic_el").rglob("*") if path.is_file()}
    assert sorted(map(str, wanted - packed)) == []
    assert not (wheel / "mimic_el" / "tests").exists()


def test_it_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """The console command, configurations by name, the sample data set, and the metric, all of the wheel."""
    program = f"""
import importlib.metadata, os, sys
import mimic_el
assert mimic_el.__file__.startswith({str(wheel)!r}), mimic_el.__file__
[distribution] = [d for d in importlib.metadata.distributions(path=[{str(wheel)!r}]) if d.name == "mimic-el"]
assert mimic_el.__version__ == distribution.version
[entry] = [e for e in distribution.entry_points if e.group == "console_scripts"]
assert entry.name == "mimic-el"
main = entry.load()
assert main(["--help"]) == 0
assert main(["prepare", "--help"]) == 0
assert "torch" not in sys.modules
assert main(["train", "sample", "--help"]) == 0

from pathlib import Path
from mimic_el import cli, mel_ranking, train
assert Path(train.parse_args(["sample"])[1].dataset_name).is_relative_to({str(wheel)!r})
sample = Path({str(wheel)!r}) / "mimic_el" / "datasets_scripts" / "sample"
assert len({{row["id"] for row in cli.read_entities(str(sample))}}) > 100
print(mel_ranking().compute(ranks=[1, 4], ks=[1]))
import evaluate
metrics = Path({str(wheel)!r}) / "mimic_el" / "metrics"
ranking = evaluate.load(str(metrics / "mel_ranking"))
assert ranking.compute(predictions=[[0.9, 0.3], [0.2, 0.5]], references=[0, 0], ks=[1])["hits@1"] == 0.5
nil = evaluate.load(str(metrics / "mel_nil"))
assert nil.compute(predictions=["Q1", None], references=["Q1", "Q2"])["nil_precision"] == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(wheel), "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "--warmup_steps" in result.stdout
    assert "'mrr': 0.625" in result.stdout
