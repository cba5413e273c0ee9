"""`daemon doctor`: what it finds, and what it says to type."""

import json
from functools import partial
from pathlib import Path

import pytest

from daemon import config, doctor
from daemon.base import prepare_base
from daemon.executor import Stop
from storage.errors import ConfigError, HoldfastError
from storage.rows import Row
from storage.store import Store
from tests.bots import lesson, make_bot, write_config
from tests.daemons import cli
from tests.faults.bench import can_mount, mounted
from tests.toys import tiny_base


def test_doctor_says_what_is_missing_and_what_to_type(tmp_path: Path) -> None:
    assert cli(tmp_path, "init", str(tmp_path)).returncode == 0
    path = tmp_path / "config.toml"
    found = {check["name"]: check for check in json.loads(cli(path, "doctor", "--json").stdout)}
    assert found["torch"]["outcome"] == "ok"
    assert found["config"]["outcome"] == "ok"
    assert found["daemon"]["next"].startswith("systemctl start")
    assert found["source"]["next"].startswith("daemon ingest")
    path.write_text('[source]\npath = "nowhere.duckdb"\n[gate]\n[bot]\nname = "a b"\n')
    ran = cli(path, "doctor")
    assert ran.returncode == 1
    assert "bot.name" in ran.stdout


def test_doctor_finds_what_the_first_cycle_would_fail_at(tmp_path: Path) -> None:
    def told(check: str, **overrides: object) -> tuple[str, str]:
        settings = config.load(write_config(tmp_path, tmp_path, **overrides))
        checks = {"base": doctor.base, "store": doctor.store, "device": partial(doctor.device, {"gpus": 1})}
        try:
            found = checks[check](settings)
        except HoldfastError as error:
            return "raises", str(error)
        return found.outcome.value, found.message

    assert told("base")[1].endswith("holds no .safetensors weights; pickled weights are not loaded")
    assert "it carries 0 .gguf files" in told("base", model__base="package:json")[1]
    assert told("device", model__device="cuda:1") == ("fail", 'model.device = "cuda:1", but torch sees 1 GPU')
    assert told("device", model__device="cuda") == ("ok", "cuda: GPU 0")
    assert told("device", model__device="cpu") == ("ok", "cpu: the CPU")
    with Store.open(tmp_path / "state" / "store.duckdb") as store:
        row = Row(id="1", task="Intent", question="q", answer="a")
        store.accept([row], "test", shares=(0.1, 0.1))
    assert told("store", tasks__intent__kind="labels")[0] == "ok"
    outcome, message = told("store", tasks__intnt__kind="labels")
    assert outcome == "warn"
    assert message.endswith("[tasks.intnt], but no row is of that task; tasks: Intent")


def test_doctor_says_that_another_base_is_not_the_champions(tmp_path: Path, base: Path) -> None:
    bot = make_bot(tmp_path, base)
    bot.collect(lesson("colours"))
    bot.run()
    bot.store.close()
    assert doctor.base(bot.settings).outcome is doctor.Outcome.OK
    other = config.load(write_config(tmp_path, tiny_base(tmp_path / "other", seed=1)))
    found = doctor.base(other)
    assert found.outcome is doctor.Outcome.WARN
    assert "fail unless it is the very base of champion version 1" in found.message
    prepare_base(other, bot.executor, lambda progress: None, Stop())
    with pytest.raises(ConfigError, match="is not the base of champion version 1"):
        doctor.base(other)


def test_a_mismatch_of_torch_and_torchvision_is_found_in_a_child_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.torch(doctor._ask_torch())
    assert found.outcome is doctor.Outcome.FAIL
    assert "torchvision::nms" in found.message
    assert "torch torchvision" in (found.next or "")


@pytest.mark.parametrize(
    ("options", "told", "typed"),
    [
        ("size=2g,nr_inodes=50", "more files fit", "df -i"),
        ("size=1m", "GiB free", "du -sh"),
        ("ro", "cannot be written to: read-only file system", "journalctl -k"),
    ],
)
def test_doctor_says_what_is_wrong_with_the_disk_of_the_state(
    tmp_path: Path, options: str, told: str, typed: str
) -> None:
    settings = config.load(write_config(tmp_path, tmp_path))
    settings.state_dir.mkdir(mode=0o700)
    if not can_mount(settings.state_dir):
        pytest.skip("needs an account that may mount a tmpfs")
    with mounted(settings.state_dir, "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs"):
        found = [doctor.state_dir(settings), doctor.disk(settings)]
    (failed,) = [check for check in found if check.outcome is doctor.Outcome.FAIL]
    assert told in failed.message
    assert str(failed.next).startswith(typed)
