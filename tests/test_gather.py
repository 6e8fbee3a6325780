"""Tests of training/gather.py and training/grad_cache.py: n processes, or a batch in chunks, train as one process does
with the whole batch. In float64, compared with the plain loss of one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import outcomes_together, run_together
from python_processes import ForkingPython, own_python
from tiny_clip import tiny_inputs, tiny_model

from mimic_el.training import grad_cache
from mimic_el.training.dealing import DealtBatches, DealtStream, part_of
from mimic_el.training.grad_cache import cached_step

# What each process does: its part of the batch, its loss, and the gradients that DistributedDataParallel leaves.
_STEP = """
import sys
sys.path.insert(0, tests)
import torch
from tiny_clip import tiny_model
from torch.nn.parallel import DistributedDataParallel
from mimic_el.training import grad_cache
from mimic_el.training.gather import shared_loss, without_unused_parameters
from mimic_el.training.grad_cache import cached_step

grad_cache._BLOCK_BYTES = 4 * 12 * 12 * 2**2  # 2 mentions and 2 entities at a time
result = {}
for name, scenario in scenarios.items():
    batch = torch.load(scenario["batch"])
    rows, columns = slice(*scenario["rows"][rank]), slice(*scenario["columns"][rank])
    inputs = {key: value[columns if key.startswith("entity_") else rows] for key, value in batch.items()}
    inputs["labels"] = inputs["labels"] - columns.start
    model = tiny_model(**scenario["settings"]).double().train()
    without_unused_parameters(model)
    wrapped = DistributedDataParallel(model)
    if scenario["chunk"]:
        loss = cached_step(
            wrapped, model, inputs, scenario["chunk"], torch.Tensor.backward, merge=scenario["merge"], gather=True
        )
    else:
        encoded = {key: value for key, value in inputs.items() if not key.endswith("labels")}
        output = wrapped(**encoded, return_scores=False)
        loss = shared_loss(model, output.mention_features, output.entity_features, inputs["labels"],
                           inputs["entity_labels"], merge=scenario["merge"])
        loss.backward()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    path = f"{results}/{name}-{rank}.pt"
    torch.save({key: value.grad for key, value in model.named_parameters()}, path)
    result[name] = [float(mean / count), path]
"""


@pytest.fixture(scope="module")
def python(hub: Any) -> ForkingPython:
    return own_python(hub)


def batch_of(answers: list[int], columns: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of mentions with these answers, and entities of these numbers, in float64. Entities of one number have
    the same text and image, and an answer is its first column unless mentions and entities are as many."""
    kinds = tiny_inputs(max(columns) + 1, seed + 1, "entity_")
    batch = tiny_inputs(len(answers), seed) | {name: tensor[columns] for name, tensor in kinds.items()}
    batch |= {"labels": torch.arange(len(answers)), "entity_labels": torch.tensor(columns)}
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def whole_loss(
    batch: dict[str, torch.Tensor], columns: list[int] | None = None, labels: list[int] | None = None, **settings: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process that has the whole batch, maybe of some of its entities only."""
    model = tiny_model(**settings).double().train()
    inputs = dict(batch)
    if columns is not None:
        inputs |= {name: tensor[columns] for name, tensor in batch.items() if name.startswith("entity_")}
        inputs["labels"] = torch.tensor(labels)
    loss = model(**inputs).loss
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(
    found: tuple[float, dict[str, torch.Tensor]], wanted: tuple[float, dict[str, torch.Tensor]], what: str
) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5), what
    for name, gradient in wanted[1].items():
        if gradient is None:
            assert found[1][name] is None, name
            continue
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=f"{what}, {name}")


SETTINGS: dict[str, Any] = {
    "published": {},
    "masked": {"ignore_duplicate_answers": True, "mask_text_padding": True},
    "symmetric": {"symmetric_loss": True, "ignore_duplicate_answers": True},
}


@pytest.mark.parametrize("count", [2, 3])
def test_processes_train_as_one_with_the_whole_batch(python: ForkingPython, tmp_path: Path, count: int) -> None:
    # Uneven parts, and answers that repeat within a part and across parts.
    answers = [4, 1, 4, 0, 2, 1, 5][: 2 * count + 1]
    rows = [[part.start, part.stop] for part in (part_of(len(answers), rank, count) for rank in range(count))]
    batch = batch_of(answers, answers)
    torch.save(batch, tmp_path / "batch.pt")
    scenarios, wanted = {}, {}
    for name, settings in SETTINGS.items():
        for chunk in (None, 2):
            key = f"{name}-{chunk}"
            common = {"batch": str(tmp_path / "batch.pt"), "settings": settings, "chunk": chunk, "merge": False}
            scenarios[key] = {**common, "rows": rows, "columns": rows}
            wanted[key] = whole_loss(batch, **settings)
    # An answer is there once: the first of its columns stays.
    kept = [answers.index(number) for number in dict.fromkeys(answers)]
    labels = [list(dict.fromkeys(answers)).index(number) for number in answers]
    scenarios["merged"] = {**scenarios["published-None"], "merge": True}
    wanted["merged"] = whole_loss(batch, kept, labels)
    # Hard negatives come after a process's answers: 3 is new, and twice; 4 and 5 are or may be answers.
    numbers: list[int] = []
    places: list[int] = []
    columns, first = [], 0
    for start, stop in rows:
        own = [*answers[start:stop], 3, 5, 4]
        places += range(first, first + stop - start)
        columns.append([first, first + len(own)])
        numbers, first = numbers + own, first + len(own)
    hard = batch_of(answers, numbers) | {"labels": torch.tensor(places)}
    torch.save(hard, tmp_path / "hard.pt")
    scenarios["hard"] = {**scenarios["published-2"], "batch": str(tmp_path / "hard.pt"), "columns": columns}
    kept = sorted({*places, numbers.index(3), *([] if 5 in answers else [numbers.index(5)])})
    wanted["hard"] = whole_loss(hard, kept, [kept.index(place) for place in places])

    found = run_together(
        python,
        count,
        _STEP,
        tmp_path / "run",
        tests=str(Path(__file__).parent),
        scenarios=scenarios,
        results=str(tmp_path),
    )
    for name, expected in wanted.items():
        for rank in range(count):
            loss, path = found[rank][name]
            assert_same((loss, torch.load(path)), expected, f"{name}, process {rank}")


# --- One process


@pytest.mark.parametrize("side", [2, 100])
@pytest.mark.parametrize("chunk", [1, 2, 4, 9])
def test_chunks_give_the_gradients_of_the_whole_batch(chunk: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are scored in blocks of so many mentions and entities."""
    monkeypatch.setattr(grad_cache, "_BLOCK_BYTES", 4 * 12 * 12 * side**2)
    batch = batch_of([4, 1, 4, 0, 2], [4, 1, 4, 0, 2])
    for settings in SETTINGS.values():
        model = tiny_model(**settings).double().train()
        loss = cached_step(model, model, batch, chunk, torch.Tensor.backward)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert_same((float(loss), gradients), whole_loss(batch, **settings), f"chunks of {chunk}")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_the_same_when_a_chunk_is_encoded_again(checkpointing: bool) -> None:
    """Compared with the same chunks encoded once, all of them with a graph."""
    batch = batch_of([3, 1, 0, 2], [3, 1, 0, 2])
    model = tiny_model(mask_text_padding=True).double().train()
    for part in (model.encoder.backbone.config.text_config, model.encoder.backbone.config.vision_config):
        part.attention_dropout = 0.3
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.3
    torch.manual_seed(7)
    parts = [
        model(**{name: tensor[rows] for name, tensor in batch.items() if "labels" not in name}, return_scores=False)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    mentions = type(parts[0].mention_features).cat([part.mention_features for part in parts])
    entities = type(parts[0].entity_features).cat([part.entity_features for part in parts])
    wanted = model.contrastive_loss(model.score(mentions, entities), batch["labels"])
    wanted.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    after = torch.rand(1)
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7)
    loss = cached_step(model, model, batch, 2, torch.Tensor.backward)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same((float(loss), found), (float(wanted.detach()), gradients), "dropout")
    assert torch.rand(1) == after  # the numbers that follow are those of a plain step


def test_chunks_in_mixed_precision() -> None:
    """Autocast's rounding is the same in chunks: each item is encoded on its own."""
    batch = {n: t.float() if t.is_floating_point() else t for n, t in batch_of([3, 1, 0, 2], [3, 1, 0, 2]).items()}

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    plain, cached = tiny_model().train(), tiny_model().train()
    with autocast():
        loss = plain(**batch).loss
    loss.backward()
    found = cached_step(cached, cached, batch, 2, torch.Tensor.backward, context=autocast)
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-4)
    for (name, one), other in zip(plain.named_parameters(), cached.parameters(), strict=True):
        if one.grad is not None:
            scale = float(one.grad.norm())
            assert float((one.grad - other.grad).norm()) <= 0.02 * scale + 1e-3, name


def test_a_batch_is_dealt_out_in_order_and_evenly() -> None:
    def dealt(count: int, size: int, processes: int, drop_last: bool = False) -> list[list[list[int]]]:
        parts = [list(DealtBatches(range(count), size, rank, processes, drop_last)) for rank in range(processes)]
        return [list(step) for step in zip(*parts, strict=True)]

    assert dealt(11, 6, 2) == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10]]]
    assert dealt(7, 7, 3) == [[[0, 1, 2], [3, 4], [5, 6]]]
    assert dealt(11, 6, 2, drop_last=True) == [[[0, 1, 2], [3, 4, 5]]]
    # Fewer than processes: the first mentions fill it up.
    assert dealt(7, 6, 3) == [[[0, 1], [2, 3], [4, 5]], [[6], [0], [1]]]
    assert dealt(1, 4, 3) == [[[0], [0], [0]]]
    for count, size, processes in ((11, 6, 2), (7, 7, 3), (7, 6, 3), (1, 4, 3), (12, 6, 2)):
        for rank in range(processes):
            stream = DealtStream(range(count), size, rank, processes)
            wanted = [number for step in dealt(count, size, processes) for number in step[rank]]
            assert list(stream) == wanted
            assert len(stream) == len(wanted)


def test_labels_that_fit_no_entity_are_an_error_of_all_processes(python: ForkingPython, tmp_path: Path) -> None:
    code = """
        import torch
        from mimic_el.training.gather import SharedBatch
        SharedBatch.of(2, 2, torch.tensor([0, 2 if rank == 1 else 1]), None)
    """
    outcomes, _ = outcomes_together(python, 2, code, tmp_path)
    assert [kind for kind, _ in outcomes] == ["error", "error"]
    assert all("processes [1] have others" in message for _, message in outcomes)
