from __future__ import annotations

import json
import os
import pickle
import resource
import runpy
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPConfig

from mimic_el import cli
from mimic_el.scripts.convert_original_checkpoint import (
    ConversionError,
    from_original,
    main,
    read_checkpoint,
    read_clip_config,
    to_original,
)
from mimic_el.tests.tiny_clip import save_tiny_clip, tiny_clip_config, tiny_inputs, tiny_model

GOLDEN = Path(__file__).parent / "golden"
SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_original_checkpoint.py"
CHECKPOINT, CLIP = GOLDEN / "lightning.ckpt", GOLDEN / "golden.json"
UNUSED = ("matcher.cmfu.context_layer_norm.weight", "matcher.cmfu.context_layer_norm.bias")


def convert(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Gives the message with which the command line refuses to convert."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        return message

    return run


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return read_checkpoint(CHECKPOINT)


@pytest.fixture
def clip_config() -> CLIPConfig:
    return read_clip_config(str(CLIP))


# --- There and back -----------------------------------------------------------------------------------------------


def test_lightning_checkpoint_scores_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert("--checkpoint", CHECKPOINT, "--clip", CLIP, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert "132 tensors" in said
    assert all(name in said for name in UNUSED)
    assert "Without a processor" in said

    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    batch, expected = load_file(GOLDEN / "batch.safetensors"), load_file(GOLDEN / "expected_batch.safetensors")
    inputs = {name.removeprefix("mention.").replace("entity.", "entity_"): batch[name] for name in batch}
    with torch.no_grad():
        output = model(**inputs, return_loss=True)
    for name in ("loss", "logits", "text_logits", "image_logits", "cross_modal_logits"):
        torch.testing.assert_close(
            output[name], expected[name], rtol=1e-5, atol=1e-5 * expected[name].abs().max().item()
        )


def test_converted_directory_needs_nothing_of_ours_installed(tmp_path: Path) -> None:
    """It is loaded by a Python that cannot import `mimic_el`, from the code that travels with it."""
    convert("--checkpoint", CHECKPOINT, "--clip", CLIP, "--output_dir", tmp_path / "out")
    program = """
import sys
sys.modules["mimic_el"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
print(model.config.image_hidden_size, sum(p.numel() for p in model.parameters()))
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    expected = sum(t.numel() for name, t in read_checkpoint(CHECKPOINT).items() if name not in UNUSED)
    assert result.stdout.split() == ["24", str(expected)]


def test_back_to_the_published_format(tmp_path: Path, published: dict[str, Tensor]) -> None:
    convert("--checkpoint", CHECKPOINT, "--clip", CLIP, "--output_dir", tmp_path / "out")
    convert("--to_original", "--checkpoint", tmp_path / "out", "--output_dir", tmp_path / "back")
    content = torch.load(tmp_path / "back" / "mimic.ckpt", weights_only=True)
    assert "pytorch-lightning_version" in content  # what Lightning looks for
    back = content["state_dict"]
    assert back.keys() == published.keys()
    for name, tensor in published.items():
        if name in UNUSED:
            assert torch.equal(back[name], torch.full_like(tensor, 1.0 if name.endswith("weight") else 0.0))
        else:
            assert torch.equal(back[name], tensor), name
    convert("--checkpoint", tmp_path / "back" / "mimic.ckpt", "--clip", CLIP, "--output_dir", tmp_path / "again")
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_old_position_buffers_come_and_go(published: dict[str, Tensor], clip_config: CLIPConfig) -> None:
    model = from_original(published, clip_config)
    old = to_original(model, position_ids=True)
    added = sorted(old.keys() - published.keys())
    assert added == [f"encoder.clip.{part}_model.embeddings.position_ids" for part in ("text", "vision")]
    assert old[added[0]].tolist() == [list(range(16))]
    assert old[added[1]].tolist() == [list(range(17))]  # 4 x 4 patches and the class token
    again = from_original(old, clip_config)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    old[added[0]] = old[added[0]].flip(1)
    with pytest.raises(ConversionError, match="does not number the positions from 0"):
        from_original(old, clip_config)


@pytest.mark.parametrize("kind", ["state_dict.pt", "lightning.pt", "legacy.pt", "state_dict.safetensors"])
def test_every_kind_of_file(tmp_path: Path, published: dict[str, Tensor], kind: str) -> None:
    path = tmp_path / kind
    if kind.endswith(".safetensors"):
        save_file(published, path)
    else:
        content: Any = OrderedDict(published)
        if kind != "state_dict.pt":
            content = {"state_dict": content, "optimizer_states": [{"state": {0: torch.ones(3)}}], "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy.pt")
    read = read_checkpoint(path)
    assert read.keys() == published.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in published.items())


def test_half_precision_weights_become_float32(published: dict[str, Tensor], clip_config: CLIPConfig) -> None:
    model = from_original({name: tensor.half() for name, tensor in published.items()}, clip_config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_clip_directory_brings_the_processor(tmp_path: Path) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    model = tiny_model(text_max_length=40)
    save_file(to_original(model), tmp_path / "weights.safetensors")
    convert("--checkpoint", tmp_path / "weights.safetensors", "--clip", clip, "--output_dir", tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.config.text_max_length == processor.text_max_length == 40
    assert processor.correct_images is False  # the published code corrects nothing
    inputs = processor.process_mentions(["Orange"], ["Orange opened a shop."], [None])
    entity = tiny_inputs(2, prefix="entity_", length=40)
    with torch.no_grad():
        ours, converted = (m(**inputs, **entity).logits for m in (model, loaded))
    torch.testing.assert_close(ours, converted)


def test_clip_directory_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = save_tiny_clip(tmp_path / "clip", tokenizer=False)
    save_file(to_original(tiny_model()), tmp_path / "weights.safetensors")
    convert(
        *("--checkpoint", tmp_path / "weights.safetensors", "--clip", clip, "--output_dir", tmp_path / "out"),
        *("--text_max_length", 12),
    )
    assert "Without a processor" in capsys.readouterr().out
    assert AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).config.text_max_length == 12


def test_runs_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(SCRIPT), "--checkpoint", str(tmp_path / "none.ckpt"), "--clip", "x", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == f"error: There is no checkpoint file {tmp_path / 'none.ckpt'}.\n"


# --- What does not fit --------------------------------------------------------------------------------------------


def test_missing_and_unknown_weights_are_all_listed(published: dict[str, Tensor], clip_config: CLIPConfig) -> None:
    weights = dict(published)
    del weights["matcher.tglu.fc_query.bias"], weights["encoder.clip.logit_scale"]
    weights["matcher.tglu.fc_other.bias"] = torch.ones(3)
    weights["matcher.cmfu.text_fc.bias"] = torch.ones(3)
    with pytest.raises(ConversionError) as error:
        from_original(weights, clip_config)
    message = str(error.value)
    assert "4 of its weights" in message
    for part in (
        "missing: matcher.tglu.fc_query.bias",
        "missing: encoder.clip.logit_scale",
        "unknown: matcher.tglu.fc_other.bias",
        "of another shape: matcher.cmfu.text_fc.bias is (3,), (24,) in this configuration",
    ):
        assert part in message


def test_another_clip_is_refused(published: dict[str, Tensor]) -> None:
    with pytest.raises(ConversionError, match="does not fit the CLIP configuration"):
        from_original(published, tiny_clip_config())


def test_weights_of_another_model_are_refused(clip_config: CLIPConfig) -> None:
    with pytest.raises(ConversionError, match=r"not the weights of a published MIMIC model.*bert\.pooler"):
        from_original({"bert.pooler": torch.ones(2, 2)}, clip_config)


@pytest.mark.parametrize("size", ["dv", "TGLU_hidden_dim", "IDLU_hidden_dim", "CMFU_hidden_dim"])
def test_given_sizes_are_checked(refusal: Callable[..., str], tmp_path: Path, size: str) -> None:
    common = ("--checkpoint", CHECKPOINT, "--clip", CLIP, "--output_dir", tmp_path / "out")
    assert f"`{size}` is 96, but the checkpoint's" in refusal(*common, f"--{size}", 96)
    assert not (tmp_path / "out").exists()
    convert(*common, f"--{size}", 24)


def test_text_longer_than_clip_allows(published: dict[str, Tensor], clip_config: CLIPConfig) -> None:
    assert from_original(published, clip_config).config.text_max_length == 16  # not 40: it has 16 positions
    with pytest.raises(ConversionError, match="only 16 positions"):
        from_original(published, clip_config, text_max_length=17)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a CLIP configuration"),
        ('{"hidden_size": 3}', "is not a CLIP configuration"),
        ('{"model_type": "siglip", "text_config": {}, "vision_config": {}}', "'siglip'"),
    ],
)
def test_bad_clip_configurations(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "clip.json"
    path.write_text(content)
    with pytest.raises(ConversionError, match=message):
        read_clip_config(str(path))


def test_absent_clip_configurations(refusal: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"There is no CLIP configuration .*none\.json"):
        read_clip_config(str(tmp_path / "none.json"))
    with pytest.raises(ConversionError, match="There is no CLIP configuration"):
        read_clip_config(str(tmp_path))
    assert "`--clip` is needed" in refusal("--checkpoint", CHECKPOINT, "--output_dir", tmp_path / "out")


def test_plain_clip_json(tmp_path: Path) -> None:
    """The configuration itself, and not only as an entry `clip_config`."""
    path = tmp_path / "clip.json"
    path.write_text(json.dumps(json.loads(CLIP.read_text())["clip_config"]))
    assert read_clip_config(str(path)).to_dict() == read_clip_config(str(CLIP)).to_dict()


def test_nothing_is_overwritten(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty" in refusal("--checkpoint", CHECKPOINT, "--clip", CLIP, "--output_dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    convert("--checkpoint", CHECKPOINT, "--clip", CLIP, "--output_dir", tmp_path / "out")
    convert("--to_original", "--checkpoint", tmp_path / "out", "--output_dir", tmp_path / "back")
    assert "mimic.ckpt exists" in refusal(
        "--to_original", "--checkpoint", tmp_path / "out", "--output_dir", tmp_path / "back"
    )
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["mimic.ckpt"]


def test_only_a_whole_mimic_checkpoint_goes_back(refusal: Callable[..., str], tmp_path: Path) -> None:
    back = ("--output_dir", tmp_path / "back")
    clip = save_tiny_clip(tmp_path / "clip")
    assert "its model type is 'clip'" in refusal("--to_original", "--checkpoint", clip, *back)
    model = tiny_model()
    model.save_pretrained(tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    del weights["matcher.tglu.fc_query.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    assert "lacks weights of a MimicModel: matcher.tglu.fc_query.weight" in refusal(
        "--to_original", "--checkpoint", tmp_path / "part", *back
    )
    assert not (tmp_path / "back").exists()


def test_going_back_says_what_the_published_code_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(mask_text_padding=True).save_pretrained(tmp_path / "out")
    convert("--to_original", "--checkpoint", tmp_path / "out", "--output_dir", tmp_path / "back")
    assert "mask_text_padding" in capsys.readouterr().err


# --- Files that are broken or mean harm ---------------------------------------------------------------------------


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def omegaconf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A class that pickles as omegaconf's does. Whatever reads it finds no such module."""
    module = types.ModuleType("omegaconf.dictconfig")
    config = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    module.DictConfig = config  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, "omegaconf.dictconfig", module)
        yield config


ATTACKS = {
    "os.system": (lambda marker: Runs(os.system, f"touch {marker}"), f"{os.system.__module__}.system"),
    "exec": (lambda marker: Runs(exec, f"open({str(marker)!r}, 'w')"), "builtins.exec"),
    "eval": (lambda marker: Runs(eval, f"open({str(marker)!r}, 'w')"), "builtins.eval"),
    "torch.hub": (lambda marker: Runs(torch.hub.load, str(marker), "model"), "torch.hub.load"),
    "open": (lambda marker: Runs(open, str(marker), "w"), "io.open"),
    "subprocess": (lambda marker: Runs(subprocess.Popen, ["touch", str(marker)]), "subprocess.Popen"),
    "getattr": (lambda marker: Runs(getattr, "", "join"), "builtins.getattr"),
    "torch.load": (lambda marker: Runs(torch.load, str(marker)), "torch.serialization.load"),
    "method": (lambda marker: Runs(Path.touch, marker), "pathlib.Path.touch"),
}


PLACES = ("top", "state_dict", "hyper_parameters", "legacy", "protocol 4")


@pytest.mark.parametrize(
    ("attack", "place"),
    # Protocols before 4 pickle a method as a call of getattr.
    [(attack, place) for attack in ATTACKS for place in PLACES if attack != "method" or place == "protocol 4"],
)
def test_code_is_refused_and_named(tmp_path: Path, omegaconf: Any, attack: str, place: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    make, wanted = ATTACKS[attack]
    payload, content = make(marker), {"state_dict": {"weight": torch.ones(2)}, "epoch": 1}
    if place == "hyper_parameters":
        hyper_parameters = omegaconf()
        hyper_parameters.__dict__["_content"] = {"model": {"dv": payload}}
        content["hyper_parameters"] = hyper_parameters
    elif place == "state_dict":
        content["state_dict"]["bias"] = payload  # type: ignore[index]
    else:
        content["callbacks"] = payload
    torch.save(
        content,
        path,
        _use_new_zipfile_serialization=place != "legacy",
        pickle_protocol=4 if place == "protocol 4" else 2,
    )
    sys.modules.pop("omegaconf.dictconfig", None)
    with pytest.raises(ConversionError) as error:
        read_checkpoint(path)
    assert f"`{wanted}`" in str(error.value)
    assert "Nothing of it was executed" in str(error.value)
    assert not marker.exists()


def test_modules_of_classes_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "payload_module.py").write_text(f"class Payload: pass\nopen({str(tmp_path / 'executed')!r}, 'a')\n")
    monkeypatch.syspath_prepend(tmp_path)
    import payload_module

    torch.save({"state_dict": {}, "extra": payload_module.Payload()}, tmp_path / "evil.ckpt")
    (tmp_path / "executed").unlink()
    del sys.modules["payload_module"]
    with pytest.raises(ConversionError, match=r"`payload_module\.Payload`"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_hyper_parameters_are_not_needed(tmp_path: Path, omegaconf: Any, legacy: bool) -> None:
    """Of the kinds that training runs save: omegaconf's, a namespace, paths, dates, default dictionaries."""
    import argparse
    import collections
    import datetime

    hyper_parameters = omegaconf()
    hyper_parameters.__dict__["_content"] = {
        "namespace": argparse.Namespace(lr=1e-5, betas=(0.9, 0.999)),
        "path": Path("runs"),
        "date": datetime.datetime(2023, 8, 6),
        "counts": collections.defaultdict(dict, {"a": {"b": 1}}),
        "names": {"set", "of"},
        "bytes": b"\x00\xff",
        "types": [int, float, str, list, dict],
    }
    content = {"state_dict": OrderedDict(weight=torch.arange(4.0)), "hyper_parameters": hyper_parameters}
    allowed = set(torch.serialization.get_safe_globals())
    torch.save(content, tmp_path / "real.ckpt", _use_new_zipfile_serialization=not legacy)
    sys.modules.pop("omegaconf.dictconfig", None)
    weights = read_checkpoint(tmp_path / "real.ckpt")
    assert list(weights) == ["weight"]
    assert weights["weight"].tolist() == [0, 1, 2, 3]
    assert "omegaconf.dictconfig" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == allowed  # the stand-ins are gone afterwards


def test_objects_that_claim_to_be_hyper_parameters(tmp_path: Path) -> None:
    """Classes of omegaconf and the like are let pass; a function reached through one of those packages is not."""
    pickled = b"\x80\x02}X\x0a\x00\x00\x00state_dictcomegaconf.omegaconf\nos.system\nX\x02\x00\x00\x00ls\x85Rs."
    with zipfile.ZipFile(tmp_path / "evil.ckpt", "w") as archive:
        archive.writestr("evil/data.pkl", pickled)
        archive.writestr("evil/version", "3\n")
    with pytest.raises(ConversionError, match=r"`omegaconf\.omegaconf\.os\.system`"):
        read_checkpoint(tmp_path / "evil.ckpt")


def test_broken_files(tmp_path: Path) -> None:
    whole = CHECKPOINT.read_bytes()
    cases = {
        "empty.ckpt": b"",
        "half.ckpt": whole[: len(whole) // 2],
        "tail.ckpt": whole[-2000:],
        "text.ckpt": b"this is not a checkpoint",
        "plain.pkl": pickle.dumps({"state_dict": {}}),
        "half.safetensors": b"\x00" * 20,
        "json.safetensors": b'{"weights": 1}',
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=f"{name}.*(cannot be read as|is not a readable|holds neither)"):
            read_checkpoint(path)


def zipped(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", pickled)
        archive.writestr("evil/version", "3\n")
    return path


def nested(depth: int) -> bytes:
    """A tuple of two of a tuple of two ..., as a key: to hash it takes 2^depth steps."""
    return b"\x80\x02})" + b"2\x86" * depth + b"Ns."


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\x00\x5e\xd0\x7e\x85Rs.",
        nested(60),
        nested(100_000),
        b"\x80\x02B\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00abc.",
        b"\x80\x02" + b"N" * 3_000_000 + b".",
        b"\x80\x02L" + b"9" * 60_000 + b"L\n.",
    ],
    ids=["bytearray", "laughs", "deep", "long bytes", "longer bytes", "instructions", "digits"],
)
def test_small_files_take_little(tmp_path: Path, pickled: bytes) -> None:
    with MemoryLimit(), pytest.raises(ConversionError):
        read_checkpoint(zipped(tmp_path / "evil.ckpt", pickled))


class MemoryLimit:
    """No more than 2 GB of addresses beyond what the process has."""

    def __enter__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, self.before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    """The archive has a checksum of every weight."""
    with zipfile.ZipFile(CHECKPOINT) as archive:
        entry = max(archive.infolist(), key=lambda item: item.file_size)
        content = archive.read(entry)
    whole = bytearray(CHECKPOINT.read_bytes())
    place = whole.index(content) + len(content) // 2
    whole[place] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(whole)
    with pytest.raises(ConversionError, match=rf"is damaged: the content of {entry.filename}"):
        read_checkpoint(tmp_path / "damaged.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.long(), r"torch\.int64, not floating-point"),
        (lambda tensor: torch.full_like(tensor, float("nan")), "not finite"),
        (lambda tensor: torch.full_like(tensor, float("inf")), "not finite"),
    ],
)
def test_weights_that_are_no_numbers(
    published: dict[str, Tensor], clip_config: CLIPConfig, change: Callable[[Tensor], Tensor], message: str
) -> None:
    name = "matcher.tglu.fc_query.weight"
    with pytest.raises(ConversionError, match=f"{name}.*{message}"):
        from_original({**published, name: change(published[name])}, clip_config)


def test_views_share_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    weights = {
        "all": base,
        "part": base[1:, ::2],
        "turned": base.T,
        "none": torch.empty(0, 3),
        "one": torch.tensor(5.0),
    }
    weights["parameter"] = torch.nn.Parameter(base.clone())
    for legacy in (False, True):
        torch.save(weights, tmp_path / "views.pt", _use_new_zipfile_serialization=not legacy)
        read = read_checkpoint(tmp_path / "views.pt")
        assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is not JSON"),
        (json.dumps({"text_config": "x", "vision_config": 5}), "not a valid CLIP configuration"),
        (json.dumps({"text_config": {"num_attention_heads": 0}, "vision_config": {}}), "CLIP configuration"),
        (json.dumps({"text_config": {"hidden_size": 10**6, "vocab_size": 10**7}, "vision_config": {}}), ""),
        (json.dumps({"text_config": {"num_hidden_layers": 10**9}, "vision_config": {}}), "more layers than"),
    ],
)
def test_clip_configurations_of_no_model(
    refusal: Callable[..., str], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "clip.json").write_text(content)
    with MemoryLimit():
        said = refusal("--checkpoint", CHECKPOINT, "--clip", tmp_path / "clip.json", "--output_dir", tmp_path / "out")
    assert message in said


def test_clip_directory_with_few_positions(tmp_path: Path) -> None:
    """The published 40 tokens are a default, not a demand."""
    clip = tmp_path / "clip"
    tiny_clip_config(positions=12).save_pretrained(clip)
    model = tiny_model(backbone_config=tiny_clip_config(positions=12))
    save_file(to_original(model), tmp_path / "weights.safetensors")
    common = ("--checkpoint", tmp_path / "weights.safetensors", "--clip", clip)
    for given, length in (((), 12), (("--text_max_length", 8), 8)):
        convert(*common, *given, "--output_dir", tmp_path / f"out{length}")
        assert json.loads((tmp_path / f"out{length}" / "config.json").read_text())["text_max_length"] == length


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """Damage is either refused or leaves tensors that can be read."""
    torch.save({"state_dict": {"a": torch.arange(6.0), "b": torch.ones(2, 2)}}, tmp_path / "small.ckpt")
    whole = bytearray((tmp_path / "small.ckpt").read_bytes())
    refused = 0
    for position in range(0, len(whole), 5):
        damaged = whole.copy()
        damaged[position] ^= 0x55
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
        except ConversionError:
            refused += 1
        else:
            assert all(isinstance(value.sum().item(), float | int) for value in read.values())
    assert refused > 10


def test_archives_larger_than_they_seem(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(1 << 20)}}, tmp_path / "zeros.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "zeros.ckpt") as source,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ConversionError, match="compressed archive"):
        read_checkpoint(tmp_path / "bomb.ckpt")


def test_tensors_larger_than_they_seem(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "bomb.pt")
    with pytest.raises(ConversionError, match="more than the file stores"):
        read_checkpoint(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "neither a Lightning checkpoint"),
        ({}, "an empty dict"),
        ({"state_dict": {"weight": "text"}}, "'weight' is not a tensor but a str"),
        ({"weight": torch.ones(2).to_sparse()}, "not a plain tensor"),
    ],
)
def test_other_contents(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ConversionError, match=message):
        read_checkpoint(tmp_path / "other.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ConversionError, match=r"has no data\.pkl"):
        read_checkpoint(tmp_path / "other.zip")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(ConversionError, match=r"script\.pt"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_share_what_is_stored_are_not_copied_without_end(tmp_path: Path, legacy: bool) -> None:
    shared = torch.zeros(1 << 20)
    weights = {f"w{number}": shared for number in range(64)}
    torch.save(weights, tmp_path / "many.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConversionError, match="would take more than 4 times the file's"):
        read_checkpoint(tmp_path / "many.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: [1],
        lambda config: {**config, "dtype": "nope"},
        lambda config: {**config, "backbone_config": 5},
        lambda config: {**config, "backbone_config": {**config["backbone_config"], "text_config": "x"}},
        lambda config: {**config, "backbone_config": {**config["backbone_config"], "text_config": {
            **config["backbone_config"]["text_config"], "num_attention_heads": 0}}},
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_one_error_for_every_program(
    refusal: Callable[..., str], tmp_path: Path, change: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    back = ("--output_dir", tmp_path / "back")
    assert "is not a checkpoint of a MimicModel" in refusal("--to_original", "--checkpoint", tmp_path / "model", *back)
    assert cli.main(["link", "--model", str(tmp_path / "model"), "--mention", "a", "--text", "a"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_damaged_tokenizer_of_clip_is_an_error(refusal: Callable[..., str], tmp_path: Path) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (clip / name).exists():
            (clip / name).write_text('{"model": 5')
    message = refusal("--checkpoint", CHECKPOINT, "--clip", clip, "--output_dir", tmp_path / "out")
    assert "cannot be loaded" in message or "CLIP configuration" in message
