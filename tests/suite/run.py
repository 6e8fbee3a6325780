"""Runs transformers' own tests on MimicModel and MimicProcessor, and on CLIP beside them: `make suite`.

The source distribution of the installed version is fetched through pip (or taken from a folder or file that is given),
and its tests are run as they are. What they import from parts of transformers' repository that the distribution lacks
is stood in for: nothing of it bears on these models.

    python tests/suite/run.py [--source FILE] [--only PART_OF_A_TEST'S_NAME] [--workers 2]

Exits with 1 where a test fails on MIMIC and not on CLIP.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "suite"
SUBJECTS = ("mimic", "clip")
STATES = ("passed", "failed", "skipped", "left out")
SECONDS_FOR_A_TEST = 300

# Files that the tests import and that are not in the distribution.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "tests/utils/tiny_model_summary.json": "{}\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url, *_, **__):\n    return url\n",
    "pytest.ini": "[pytest]\nmarkers =\n",
}

PLUGIN = """
import pytest
from left_out import reason_for

def pytest_collection_modifyitems(config, items):
    # These are run once, by AttentionTest, and nothing else is by that.
    items[:] = [
        item
        for item in items
        if item.cls.__name__ not in ("ModelTest", "AttentionTest")
        or ("test_eager_matches_sdpa" in item.name) == (item.cls.__name__ == "AttentionTest")
    ]
    for item in items:
        if reason := reason_for(item.cls.__name__, item.originalname or item.name):
            item.add_marker(pytest.mark.skip(reason="left out: " + reason))
"""


def unpacked(source: Path | None) -> Path:
    """The folder with transformers' tests, of the version that is installed."""
    version = transformers.__version__
    place = WORK / f"transformers-{version}"
    if not (place / "tests" / "test_modeling_common.py").exists():
        WORK.mkdir(parents=True, exist_ok=True)
        if source is None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
            command += ["--quiet", "--dest", str(WORK), f"transformers=={version}"]
            subprocess.run(command, check=True)
            source = next(WORK.glob(f"transformers-{version}*.tar.gz"))
        with tarfile.open(source) as archive:
            archive.extractall(WORK, filter="data")
    for name, text in {**STAND_INS, "suite_plugin.py": PLUGIN}.items():
        if not (place / name).exists() or name == "suite_plugin.py":
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text, encoding="utf-8")
    return place


def run(subject: str, place: Path, only: str | None, workers: int) -> dict[str, tuple[str, str]]:
    """What came of each test, and the message of those that failed."""
    report = WORK / f"{subject}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(HERE / "suites.py"), "--rootdir", str(place), "-c"]
    command += [str(place / "pytest.ini"), "--import-mode=importlib", "-p", "suite_plugin", "-q", "--no-header"]
    command += [f"--junitxml={report}", f"--timeout={SECONDS_FOR_A_TEST}", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-k", only] if only else []
    command += ["--numprocesses", str(workers)] if workers else []
    path = [str(place), str(HERE), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "SUITE_SUBJECT": subject}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RUN_TRAINING_TESTS": "1"}
    with open(WORK / f"{subject}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, env=env, cwd=place, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.exists():
        sys.exit(f"The tests could not be run; see {log.name}.")
    return dict(outcomes(report))


def outcomes(report: Path):
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        state, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                state, message = "failed", child.get("message", "")
            elif child.tag == "skipped":
                message = child.get("message", "")
                state = "left out" if message.startswith("left out") else "skipped"
        yield name, (state, message)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, help="the source distribution, in place of one that pip fetches")
    parser.add_argument("--only", help="run the tests whose name has this, as pytest's -k")
    parser.add_argument("--workers", type=int, default=2, help="tests that run at a time")
    options = parser.parse_args()
    place = unpacked(options.source)
    results = {subject: run(subject, place, options.only, options.workers) for subject in SUBJECTS}
    print(f"transformers {transformers.__version__}: its own tests, unedited\n")
    print(f"{'':16}" + "".join(f"{subject + ': ' + state:>18}" for subject in SUBJECTS for state in STATES))
    areas = sorted({name.partition(".")[0] for result in results.values() for name in result})
    for area in [*areas, "all"]:
        counts = []
        for subject in SUBJECTS:
            count = collections.Counter(
                state for name, (state, _) in results[subject].items() if area in (name.partition(".")[0], "all")
            )
            counts += [count[state] for state in STATES]
        print(f"{area:16}" + "".join(f"{count:>18}" for count in counts))
    ours, control = results["mimic"], results["clip"]
    worse = [name for name, (state, _) in ours.items() if state == "failed" and control.get(name, ("",))[0] != "failed"]
    for title, names in (
        ("Fails on MIMIC and not on CLIP", worse),
        ("Fails on both", [name for name, (state, _) in ours.items() if state == "failed" and name not in worse]),
        (
            "Fails on CLIP and not on MIMIC",
            [
                name
                for name, (state, _) in control.items()
                if state == "failed" and ours.get(name, ("",))[0] != "failed"
            ],
        ),
    ):
        print(f"\n{title}: {len(names)}")
        for name in sorted(names):
            message = (ours if name in ours and ours[name][0] == "failed" else control)[name][1]
            print(f"  {name}: {' '.join(message.split())[:160]}")
    print(f"\nEverything that was printed is in {WORK}/*.log.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
