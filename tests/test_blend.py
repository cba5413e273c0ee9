"""Blends: exact arithmetic on real adapters, whole results, and refusals; and protection turned up."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storage.artifacts import made_for, sha256_file, verify, write_manifest
from storage.errors import IntegrityError, Interrupted, ModelError
from strategies.blend import between, blend
from strategies.combinations import METHODS, complaint
from strategies.contract import BlendJob, LoraSpec, Progress, StrategySpec, blended, result_files
from strategies.model import load_base, with_adapter
from strategies.strengthen import changes, strengthened
from tests.toys import tiny_model_spec
from tests.trainings import adapter, job, lesson, run, snapshot

SHARES = (0.9, 0.25)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A champion, and a candidate that continued from it."""
    folder = tmp_path_factory.mktemp("trained")
    for name, task, parent in (("one", "a", None), ("two", "b", folder / "one")):
        run(job(base, snapshot(folder / f"rows-{name}", lesson(task, 8)), folder / name, parent))
    return folder / "one", folder / "two"


def asked(trained: tuple[Path, Path], out: Path) -> BlendJob:
    hashes = [sha256_file(result_files(end)["adapter"] / "adapter_model.safetensors") for end in trained]
    return BlendJob(
        out=str(out),
        champion=str(trained[0]),
        champion_adapter=hashes[0],
        candidate=str(trained[1]),
        candidate_adapter=hashes[1],
        shares=SHARES,
    )


def test_a_blend_is_the_champion_and_a_share_of_the_way_to_the_candidate(
    trained: tuple[Path, Path], tmp_path: Path, base: Path
) -> None:
    wanted = asked(trained, tmp_path / "out")
    blend(wanted, lambda progress: None)
    verify(wanted.out)
    assert made_for(wanted.out, wanted.digest)
    champion, candidate = (adapter(end) for end in trained)
    for share in SHARES:
        found = load_file(blended(wanted.out, share) / "adapter_model.safetensors")
        assert found.keys() == champion.keys()
        for name, tensor in found.items():
            exact = champion[name].double() + share * (candidate[name].double() - champion[name].double())
            assert tensor.dtype == champion[name].dtype
            torch.testing.assert_close(tensor.double(), exact, rtol=0, atol=1e-7)
        with_adapter(load_base(tiny_model_spec(base)), blended(wanted.out, share), trainable=False)


def test_the_ends_of_the_line_are_the_adapters_themselves(trained: tuple[Path, Path]) -> None:
    champion, candidate = (adapter(end) for end in trained)
    for share, end in ((0.0, champion), (1.0, candidate)):
        found = between(champion, candidate, share)
        assert all(torch.equal(found[name], end[name]) for name in end)


def test_the_same_blend_has_the_same_bytes_and_is_not_made_twice(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two = asked(trained, tmp_path / "one"), asked(trained, tmp_path / "two")
    for wanted in (one, two, one):
        blend(wanted, lambda progress: None)
    files = [blended(wanted.out, 0.9) / "adapter_model.safetensors" for wanted in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()
    before = files[0].stat().st_mtime_ns
    blend(one, lambda progress: None)
    assert files[0].stat().st_mtime_ns == before
    blend(replace(one, champion_adapter="another"), lambda progress: None)  # after a restore: other work
    assert files[0].stat().st_mtime_ns != before


def test_a_blend_that_is_stopped_leaves_nothing(trained: tuple[Path, Path], tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 1:
            raise Interrupted()

    with pytest.raises(Interrupted):
        blend(asked(trained, tmp_path / "out"), stop)
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_another_rank_are_refused(trained: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    other = job(base, snapshot(tmp_path / "rows", lesson("c", 8)), tmp_path / "c", lora=LoraSpec(rank=4))
    run(other)
    with pytest.raises(ModelError, match="adapters of other shapes cannot be blended: the champion's r is 2"):
        blend(asked((trained[0], tmp_path / "c"), tmp_path / "out"), lambda progress: None)


def with_config(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    path = result_files(folder)["adapter"] / "adapter_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_adapters_that_differ_in_a_tensor_are_refused(
    trained: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    other = job(
        base, snapshot(tmp_path / "rows", lesson("c", 8)), tmp_path / "c",
        lora=LoraSpec(rank=2, alpha=4, targets="q_proj"),
    )  # fmt: skip
    run(other)
    whole = json.loads((result_files(trained[0])["adapter"] / "adapter_config.json").read_text())
    with_config(tmp_path / "c", lambda values: values.update(whole))
    with pytest.raises(IntegrityError, match="was changed"):
        blend(asked((trained[0], tmp_path / "c"), tmp_path / "out"), lambda progress: None)
    write_manifest(tmp_path / "c")
    with pytest.raises(ModelError, match="they differ in base_model"):
        blend(asked((trained[0], tmp_path / "c"), tmp_path / "out"), lambda progress: None)


@pytest.mark.parametrize(
    ("key", "other"), [("lora_alpha", 8), ("use_rslora", True), ("alpha_pattern", {"q_proj": 1})]
)
def test_adapters_of_another_scale_are_refused(
    trained: tuple[Path, Path], tmp_path: Path, key: str, other: object
) -> None:
    """Their tensors do not show it."""
    candidate = tmp_path / "candidate"
    shutil.copytree(trained[1], candidate)
    with_config(candidate, lambda values: values.update({key: other}))
    write_manifest(candidate)
    with pytest.raises(ModelError, match=f"other shapes cannot be blended: the champion's {key} is"):
        blend(asked((trained[0], candidate), tmp_path / "out"), lambda progress: None)


@pytest.mark.parametrize("end", [0, 1], ids=["champion", "candidate"])
def test_an_end_that_was_changed_is_not_blended(trained: tuple[Path, Path], tmp_path: Path, end: int) -> None:
    ends = (tmp_path / "champion", tmp_path / "candidate")
    for whole, copy in zip(trained, ends, strict=True):
        shutil.copytree(whole, copy)
    path = result_files(ends[end])["adapter"] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(IntegrityError, match="was changed"):
        blend(asked(ends, tmp_path / "out"), lambda progress: None)


def test_protection_is_turned_up_method_by_method() -> None:
    spec = StrategySpec(methods=("replay", "ewc"), replay_ratio=0.5, ewc_lambda=100.0)
    stronger = strengthened(spec)
    assert stronger == replace(spec, replay_ratio=1.0, ewc_lambda=400.0)
    assert changes(spec, stronger) == "replay_ratio 0.5 → 1.0, ewc_lambda 100.0 → 400.0"
    only = strengthened(replace(spec, methods=("ewc",)))
    assert only is not None
    assert (only.replay_ratio, only.ewc_lambda) == (0.5, 400.0)


STRONGER = {  # method → its setting, what it is, and what it becomes
    "replay": ("replay_ratio", 0.5, 1.0),
    "agem": ("replay_ratio", 1.5, 3.0),
    "der": ("der_weight", 0.25, 0.5),
    "lwf": ("lwf_weight", 0.75, 1.5),
    "ewc": ("ewc_lambda", 3.0, 12.0),
    "ewc-lora": ("ewc_lambda", 3.0, 12.0),
    "si": ("si_lambda", 2.0, 8.0),
    "olora": ("olora_lambda", 0.5, 2.0),
    "merge": ("merge_weight", 0.75, 0.375),
}
NOTHING_TO_TURN_UP = {"joint"}  # has the whole past already


@pytest.mark.parametrize("method", STRONGER)
def test_each_method_is_turned_up_by_its_own_setting_and_no_other(method: str) -> None:
    setting, before, after = STRONGER[method]
    spec = replace(StrategySpec(methods=(method,)), **{setting: before})
    stronger = strengthened(spec)
    assert stronger == replace(spec, **{setting: after})
    assert changes(spec, stronger) == f"{setting} {before} → {after}"


def test_a_new_method_is_turned_up_or_named_as_one_that_cannot_be() -> None:
    assert set(METHODS) == STRONGER.keys() | NOTHING_TO_TURN_UP
    for method in NOTHING_TO_TURN_UP:
        assert strengthened(StrategySpec(methods=(method,))) is None


def test_methods_that_go_together_never_turn_the_same_setting_up_twice() -> None:
    for one, other in itertools.combinations(STRONGER, 2):
        together = ("replay", one, other) if "der" in (one, other) else (one, other)
        if STRONGER[one][0] == STRONGER[other][0]:
            assert complaint(tuple(dict.fromkeys(together))) is not None


def test_all_methods_of_a_combination_are_turned_up_at_once() -> None:
    spec = StrategySpec(methods=("replay", "der", "lwf", "ewc", "merge"))
    assert complaint(spec.methods) is None
    assert strengthened(spec) == replace(
        spec, replay_ratio=1.0, der_weight=1.0, lwf_weight=1.0, ewc_lambda=4.0, merge_weight=0.35
    )


@pytest.mark.parametrize(
    "spec",
    [
        StrategySpec(methods=()),
        StrategySpec(methods=("replay",), replay_ratio=4.0),
        StrategySpec(methods=("replay",), replay_ratio=9.0),
        StrategySpec(methods=("agem",), replay_ratio=4.0),
        StrategySpec(methods=("ewc",), ewc_lambda=0.0),
        StrategySpec(methods=("ewc-lora",), ewc_lambda=0.0),
        StrategySpec(methods=("replay", "der"), replay_ratio=4.0, der_weight=0.0),
    ],
)
def test_what_cannot_be_turned_up_is_not_trained_again(spec: StrategySpec) -> None:
    assert strengthened(spec) is None


def test_replay_stops_at_four_rows_for_each_new_one() -> None:
    stronger = strengthened(StrategySpec(methods=("replay",), replay_ratio=3.0))
    assert stronger is not None
    assert stronger.replay_ratio == 4.0
