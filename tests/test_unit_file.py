"""The systemd unit: valid, hardened, and filled in with the right paths."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from daemon import config, unit
from daemon.service import START_PATIENCE, STOP_SECONDS, WORKER_STOP_SECONDS
from daemon.settings import Settings
from daemon.unit import Account
from storage.errors import ControlError

ROOT = Path(__file__).resolve().parent.parent
WORST_EXPOSURE = 1.5  # of 10


def make_settings(home: Path, text: str = "") -> Settings:
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(text)
    return config.load(home / "config.toml")


def lines(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def render(settings: Settings, path: Path = Path("/etc/holdfast/config.toml")) -> str:
    return unit.render(settings, path, Account(user="bot", group="bots"))


def analyze(tmp_path: Path, text: str, *command: str) -> subprocess.CompletedProcess[str]:
    """`systemd-analyze` on the unit, with a command that exists here."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not on this machine")
    path = tmp_path / "holdfast.service"
    path.write_text(text.replace(lines(text, "ExecStart")[0], "/bin/true"))
    return subprocess.run(
        [program, *command, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},  # else it has other signs for what is open
        check=False,
    )


def test_there_is_one_unit_and_deploy_points_to_it() -> None:
    assert (ROOT / "deploy" / "holdfast.service").resolve() == unit.TEMPLATE


@pytest.mark.parametrize("filled_in", [False, True])
def test_systemd_finds_no_fault_in_it(tmp_path: Path, filled_in: bool) -> None:
    text = unit.TEMPLATE.read_text()
    if filled_in:
        text = render(make_settings(tmp_path / "a bot", '[bot]\nstate_dir = "/srv/100% bot"\n'))
    ran = analyze(tmp_path, text, "verify", "--man=no")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_its_exposure_is_what_the_comment_says(tmp_path: Path) -> None:
    text = unit.TEMPLATE.read_text()
    ran = analyze(tmp_path, text, "security", "--no-pager", "--offline=true")
    overall = float(ran.stdout.split("Overall exposure level")[1].split(": ")[1].split()[0])
    assert overall <= WORST_EXPOSURE
    assert f"rates it {overall:g} of 10" in text


def test_what_it_leaves_open_is_explained(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "security.md").read_text().split("## The unit")[1]
    explained = {
        name for row in re.findall(r"^\| `.*? \|", page, re.MULTILINE) for name in re.findall(r"\w+", row)
    }
    at_home = render(make_settings(tmp_path, '[bot]\nstate_dir = "/home/ann/bot/state"\n'))
    for text in (unit.TEMPLATE.read_text(), at_home):
        ran = analyze(tmp_path, text, "security", "--no-pager", "--offline=true")
        left_open = set(re.findall(r"✗ (\w+)", ran.stdout))
        assert left_open, ran.stdout + ran.stderr
        assert left_open <= explained


def test_it_waits_longer_than_the_daemon_needs_to_stop() -> None:
    text = unit.TEMPLATE.read_text()
    assert int(lines(text, "TimeoutStopSec")[0]) > STOP_SECONDS + WORKER_STOP_SECONDS
    assert int(lines(text, "WatchdogSec")[0]) > WORKER_STOP_SECONDS


def test_a_long_ingest_does_not_use_up_its_starts() -> None:
    text = unit.TEMPLATE.read_text()
    burst, within, pause, start = (
        int(lines(text, key)[0])
        for key in ("StartLimitBurst", "StartLimitIntervalSec", "RestartSec", "TimeoutStartSec")
    )
    assert burst * (START_PATIENCE + pause) > within
    assert start > 2 * START_PATIENCE, "for the directory, then for the store"


def test_it_says_who_runs_what_with_which_config(tmp_path: Path) -> None:
    text = render(make_settings(tmp_path), Path("/etc/hold fast/100%.toml"))
    assert lines(text, "ExecStart")[0].endswith(' run --config "/etc/hold fast/100%%.toml"')
    assert lines(text, "User") == ["bot"]
    assert lines(text, "Group") == ["bots"]
    assert text.count("[Service]") == 1


def test_a_state_directory_of_its_own_is_made_writable(tmp_path: Path) -> None:
    standard = render(make_settings(tmp_path / "a", '[bot]\nstate_dir = "/var/lib/holdfast"\n'))
    assert not [p for p in lines(standard, "ReadWritePaths") if "/var/lib" in p]
    other = render(make_settings(tmp_path / "b", '[bot]\nstate_dir = "/srv/bot"\n'))
    assert lines(other, "ReadWritePaths") == ["/srv/bot"]
    assert other.index("ReadWritePaths") < other.index("[Install]")


def test_what_lies_in_a_home_directory_is_bound_in(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, '[bot]\nstate_dir = "/home/ann/bot/state"\n')
    source = settings.source.model_copy(update={"path": Path("/home/ann/data/qa.duckdb")})
    told = render(settings.model_copy(update={"source": source}))
    assert lines(told, "ProtectHome") == ["tmpfs"]
    assert "/home/ann/bot/state" in lines(told, "BindPaths")
    assert "-/home/ann/data" in lines(told, "BindReadOnlyPaths"), "it may be mounted later"


def test_the_network_opens_only_for_a_remote_mlflow_or_a_hub(tmp_path: Path) -> None:
    local = render(make_settings(tmp_path / "a", '[mlflow]\ntracking_uri = "http://127.0.0.1:5000"\n'))
    assert lines(local, "IPAddressDeny") == ["any"]
    remote = render(make_settings(tmp_path / "b", '[mlflow]\ntracking_uri = "https://mlflow.example.org"\n'))
    assert lines(remote, "IPAddressDeny") == ["any", ""]
    hub = render(make_settings(tmp_path / "c", '[model]\nbase = "HuggingFaceTB/SmolLM2-135M-Instruct"\n'))
    assert lines(hub, "IPAddressDeny") == ["any", ""]
    short = render(make_settings(tmp_path / "d", '[model]\nbase = "gpt2"\n'))
    assert lines(short, "IPAddressDeny") == ["any", ""]


def test_a_gpu_keeps_its_devices(tmp_path: Path) -> None:
    told = render(make_settings(tmp_path, '[model]\ndevice = "cuda:1"\n'))
    assert lines(told, "PrivateDevices") == ["no"]
    assert lines(told, "ProtectClock") == ["no"], "before systemd 253 it shuts out every device but the clock"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may install")
def test_installing_without_root_says_what_to_do(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    with pytest.raises(ControlError, match="sudo"):
        unit.install("", settings, Account(user="bot", group="bot"))


def test_the_account_is_the_one_asked_for_or_the_default(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, '[bot]\nstate_dir = "nowhere"\n')
    assert unit.account_for(settings).user == "holdfast"
    assert unit.account_for(settings, "nobody-here") == Account(user="nobody-here", group="nobody-here")
    assert unit.account_for(settings, "root").group == "root"
