"""What was kept and is read again may be damaged in any way: the answer is an error of ours, in words.

Every loader is given what is no longer what was written: bytes flipped, cut off, overwritten, and whole
files of the right kind with other things in them. None may end in another exception than a
`HoldfastError` that names the path and what to type.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from storage import artifacts, parquet, snapshots
from storage.errors import HoldfastError
from storage.rows import Row, Split
from strategies import base as bases
from strategies import blend, der, ewc_lora, quadratic, replay_memory
from strategies.checkpoint import INFO, Checkpoints, Course
from strategies.contract import CurvePoint, StrategySpec, TrainReport, result_files
from strategies.model import Base, adapter_config, load_base, with_adapter
from tests.fuzzing import JSON, damaged, examples, files_below
from tests.toys import tiny_model_spec
from tests.trainings import job, lesson, run, snapshot

EVERYTHING = StrategySpec(methods=("replay", "ewc", "der"), fisher_rows=4)


@pytest.fixture(scope="module")
def home(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real files of every kind: a result with memory, importances and opinions; a checkpoint; a snapshot."""
    home = tmp_path_factory.mktemp("kept")
    rows = snapshot(home / "rows", lesson("a", 8))
    run(job(base, rows, home / "result", strategy=EVERYTHING))
    lora = StrategySpec(methods=("ewc-lora",), fisher_rows=4)
    run(job(base, rows, home / "lora", strategy=lora))
    course = Course(steps=1, curve=[CurvePoint(step=1, loss=0.1, learning_rate=1e-4)], best_epoch=0)
    Checkpoints(home / "work", job(base, rows, home / "out")).save(course, {"a": torch.ones(3)})
    stored = [a_row(n) for n in range(4)]
    snapshots.write(
        home / "snapshots", train=stored, validation=[], memory=[], suites={},
        tasks=[{"name": "t", "kind": "free", "metric": "token_f1", "labels": []}], meta={},
    )  # fmt: skip
    return home


def a_row(n: int) -> Any:
    from storage.records import StoredRow, utcnow

    row = Row(id=str(n), task="t", question=f"q {n}", answer="a")
    return StoredRow(
        hash=row.hash, key=row.key, question_key=row.question_key, words_key=row.words_key,
        seq=n, id=row.id, task=row.task,
        question=row.question, answer=row.answer, context="", created_at=None, split=Split.TRAIN,
        source="x", accepted_at=utcnow(),
    )  # fmt: skip


def in_words(path: Path, load: Callable[[], object]) -> None:
    """It loads, or says what is wrong with what and what to do."""
    try:
        load()
    except HoldfastError as error:
        said = str(error)
    else:
        return
    assert str(path) in said
    assert "`" in said or "move" in said, f"no next command: {said}"


def two() -> dict[str, torch.Tensor]:
    return {"ids": torch.ones(2), "logprobs": torch.ones(2)}


# A file of a result, the loader that reads it, and whether it is JSON.
LOADERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "memory": ("result/state/replay.json", lambda path: replay_memory.load(path.parent)),
    "importances": ("result/state/ewc.safetensors", quadratic.load),
    "opinions": ("result/state/der.safetensors", der.load),
    "factors": ("lora/state/ewc_lora.safetensors", ewc_lora.load),
    "report": ("result/report.json", TrainReport.read),
    "manifest": ("result/manifest.json", lambda path: artifacts.verify(path.parent)),
    "made-for": ("result/manifest.json", lambda path: artifacts.made_for(path.parent, "x")),
    "rows": ("rows/train.parquet", parquet.read_rows),
}


@pytest.mark.parametrize("name", LOADERS)
@given(data=st.data())
def test_damaged_bytes_are_told_with_their_path(home: Path, name: str, data: st.DataObject) -> None:
    where, load = LOADERS[name]
    path, whole = home / where, (home / where).read_bytes()
    try:
        path.write_bytes(damaged(whole, data.draw))
        in_words(path.parent if name == "manifest" else path, lambda: load(path))
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["memory", "report", "manifest", "made-for"])
@given(data=st.data())
def test_json_with_other_things_in_it_is_told_with_its_path(
    home: Path, name: str, data: st.DataObject
) -> None:
    where, load = LOADERS[name]
    path, whole = home / where, (home / where).read_bytes()
    try:
        path.write_text(json.dumps(changed(json.loads(whole), data)))
        in_words(path.parent if name == "manifest" else path, lambda: load(path))
    finally:
        path.write_bytes(whole)


def changed(value: Any, data: st.DataObject) -> Any:
    """The value with one thing in it replaced, left out or added."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        return {**value, key: changed(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(value[place], data), *value[place + 1 :]]
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        gone = data.draw(st.sampled_from(sorted(value)))
        return {key: each for key, each in value.items() if key != gone}
    return data.draw(JSON)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"{}", b"null", b"\xff\xfe", b"1e999"])
def test_a_file_of_another_kind_is_told_with_its_path(home: Path, name: str, content: bytes) -> None:
    where, load = LOADERS[name]
    path, whole = home / where, (home / where).read_bytes()
    try:
        path.write_bytes(content)
        in_words(path.parent if name == "manifest" else path, lambda: load(path))
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "tensors", "metadata"),
    [
        ("opinions", two(), {"rows": "[[\"a\", 3], [\"b\", -1]]"}),
        ("opinions", two(), {"rows": "[[[], 2]]"}),
        ("opinions", two(), {"rows": "[[\"a\", \"2\"]]"}),
        ("opinions", {"ids": torch.ones(()), "logprobs": torch.ones(())}, {"rows": "[[\"a\", 1]]"}),
        ("opinions", two(), {"rows": "[" * 100_000}),
        ("opinions", {"ids": torch.ones(2)}, None),
        ("importances", {"constant": torch.ones(2)}, {"format": quadratic.FORMAT}),
        ("importances", {"constant": torch.ones(0)}, {"format": quadratic.FORMAT}),
        (
            "importances",
            {"constant": torch.ones(1), "curvature/a": torch.ones(2), "centre/a": torch.ones(3)},
            {"format": quadratic.FORMAT},
        ),
        ("factors", {"rows/a": torch.ones(2)}, None),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_together_are_told_with_their_path(
    home: Path, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    where, load = LOADERS[name]
    path, whole = home / where, (home / where).read_bytes()
    try:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(HoldfastError, match=f"{path.name} cannot be read"):
            load(path)
    finally:
        path.write_bytes(whole)


@examples(60)
@given(data=st.data())
def test_a_damaged_checkpoint_is_told_with_its_path(home: Path, base: Path, data: st.DataObject) -> None:
    checkpoints = Checkpoints(home / "work", job(base, home / "rows", home / "out"))
    path = data.draw(st.sampled_from(files_below(home / "work")))
    whole = path.read_bytes()
    try:
        if path.name == INFO and data.draw(st.booleans()):
            path.write_text(json.dumps(changed(json.loads(whole), data)))
        else:
            path.write_bytes(damaged(whole, data.draw))
        in_words(home / "work", checkpoints.load)
    finally:
        path.write_bytes(whole)


@examples(60)
@given(data=st.data())
def test_a_damaged_snapshot_is_told_with_its_path(home: Path, data: st.DataObject) -> None:
    (folder,) = (home / "snapshots").iterdir()
    path = data.draw(st.sampled_from(files_below(folder)))
    whole, manifest = path.read_bytes(), (folder / artifacts.MANIFEST).read_bytes()
    known = artifacts.verify(folder)["id"]
    try:
        if path.name == snapshots.INFO and data.draw(st.booleans()):
            path.write_text(json.dumps(changed(json.loads(whole), data)))
        else:
            path.write_bytes(damaged(whole, data.draw))
        if path.name != artifacts.MANIFEST and data.draw(st.booleans()):
            artifacts.write_manifest(folder, {"id": known})  # by someone who knows how: the hashes are right
        in_words(folder, lambda: snapshots.load(folder))
    finally:
        path.write_bytes(whole)
        (folder / artifacts.MANIFEST).write_bytes(manifest)


@pytest.fixture(scope="module")
def loaded(base: Path) -> Base:
    return load_base(tiny_model_spec(base))


@examples(25)
@given(data=st.data())
def test_a_damaged_adapter_is_told_with_its_path(home: Path, loaded: Base, data: st.DataObject) -> None:
    adapter = result_files(home / "result")["adapter"]
    path = data.draw(st.sampled_from([adapter / blend.CONFIG, adapter / blend.WEIGHTS]))
    whole = path.read_bytes()
    try:
        if path.name == blend.CONFIG and data.draw(st.booleans()):
            path.write_text(json.dumps(changed(json.loads(whole), data)))
        elif data.draw(st.booleans()):
            path.write_bytes(damaged(whole, data.draw))
        else:
            path.unlink()
        in_words(adapter, lambda: with_adapter(loaded, adapter, trainable=False).unload())
        in_words(adapter, lambda: adapter_config(adapter))
    finally:
        path.write_bytes(whole)


def test_a_pattern_in_an_adapter_that_is_none_is_told_with_its_path(home: Path, loaded: Base) -> None:
    """`make test-fuzz` found it."""
    adapter = result_files(home / "result")["adapter"]
    whole = (adapter / blend.CONFIG).read_bytes()
    try:
        (adapter / blend.CONFIG).write_text(json.dumps({**json.loads(whole), "alpha_pattern": {"[": 1}}))
        in_words(adapter, lambda: with_adapter(loaded, adapter, trainable=False).unload())
    finally:
        (adapter / blend.CONFIG).write_bytes(whole)


@examples(40)
@given(data=st.data())
def test_the_note_on_a_prepared_base_is_made_again_when_it_is_damaged(
    tmp_path: Path, data: st.DataObject
) -> None:
    record = tmp_path / bases.RECORD
    whole: dict[str, Any] = {"path": str(tmp_path), "source": str(tmp_path / "gone"), "stamp": "s"}
    whole |= {"fingerprint": "f", "tokenizer_file": "t"}
    whole |= dict.fromkeys(("template_tokens", "context_tokens", "parameters"), 1)
    record.write_text(json.dumps(whole))
    assert bases.prepared(tmp_path) is not None
    if data.draw(st.booleans()):
        record.write_text(json.dumps(changed(whole, data)))
    else:
        record.write_bytes(damaged(record.read_bytes(), data.draw))
    bases.prepared(tmp_path)
