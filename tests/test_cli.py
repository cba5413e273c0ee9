"""The command `daemon` without a daemon: what a person types first, and every way to get it wrong."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer import Exit

from daemon import access, config, console, operations, statedir, unit
from daemon import cli as command
from daemon.cli import EXIT_CODES
from storage import artifacts
from storage.errors import ConfigError, StoreBusy
from storage.records import State
from storage.rows import Row, Split
from storage.store import Store
from tests.bots import write_config
from tests.daemons import ROOT, cli, read_json

NOBODY = 65534
NOBODYS = unit.Account(user="nobody", group="nogroup")
COMMANDS = (
    "init", "run", "install-service", "doctor", "audit", "status", "history", "show", "quarantine", "ask",
    "retrain-now", "cancel", "pause", "resume", "promote", "rollback", "ingest", "ui",
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A config by `daemon init`."""
    return initialised(tmp_path)


def initialised(home: Path) -> Path:
    ran = cli(home / "none", "init", str(home / "bot"))
    assert ran.returncode == 0, ran.stderr
    (home / "bot").chmod(0o755)
    return home / "bot" / "config.toml"


def test_init_writes_a_config_that_loads_and_a_private_state_directory(path: Path) -> None:
    settings = config.load(path)
    assert settings.state_dir == path.parent / "state"
    assert settings.state_dir.stat().st_mode & 0o777 == 0o700
    again = cli(path, "init", str(path.parent))
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_init_can_put_the_state_elsewhere(tmp_path: Path) -> None:
    ran = cli(tmp_path / "none", "init", str(tmp_path / "etc"), "--state-dir", str(tmp_path / "var" / "bot"))
    assert ran.returncode == 0
    assert config.load(tmp_path / "etc" / "config.toml").state_dir == tmp_path / "var" / "bot"


@pytest.mark.parametrize("name", ["\U0001f916 bot", 'quo"te', "back\\slash", "del\x7f", "tab\tline\n"])
def test_init_writes_any_name_of_a_state_directory_as_toml(tmp_path: Path, name: str) -> None:
    path, settings = access.make_bot(tmp_path / "etc", tmp_path / name)
    assert settings.state_dir == config.load(path).state_dir == tmp_path / name
    assert path.read_text().replace(config._toml(tmp_path / name), '"state"') == config.render()


def test_init_leaves_nothing_where_a_name_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written in TOML"):
        access.make_bot(tmp_path / "etc", tmp_path / os.fsdecode(b"\xff"))
    assert list(tmp_path.iterdir()) == []


def test_a_pause_whose_record_is_damaged_has_no_date(path: Path) -> None:
    with Store.open(config.load(path).store_path) as store:
        store.set_meta(operations.PAUSED, "{")
        with pytest.raises(operations.ControlError, match=r"^paused by somebody \(the .* damaged\); `daemon"):
            operations.check_not_paused(store)
    said = " ".join(cli(path, "status").stdout.split())
    assert "by somebody (the record is damaged); `daemon resume` ends it" in said


@pytest.mark.parametrize(
    ("later", "planned", "head"),
    [
        ({}, True, "would be removed"),
        ({}, False, "removed"),
        ({"later": True}, False, "the daemon removes between two cycles"),
    ],
)
def test_prune_says_removed_of_what_is_gone_only(
    capsys: pytest.CaptureFixture[str], later: dict[str, bool], planned: bool, head: str
) -> None:
    told = {"removals": [{"path": "cycles/1/work", "why": "cycle 1"}], "pruned": 0, **later}
    console.removals(told, planned=planned)
    assert capsys.readouterr().out.startswith(head + " ")


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['daemon', '--help']\n"
        "from daemon.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'duckdb', 'pydantic', 'apscheduler'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    assert [name for name in COMMANDS if name not in ran.stdout] == []


def test_the_config_is_found_where_it_was_said(path: Path) -> None:
    for args, extra in (
        (["status", "-c", str(path)], {}),
        (["status"], {"HOLDFAST_CONFIG": str(path)}),
    ):
        ran = cli(Path("/nowhere/config.toml"), *args, **extra) if "-c" in args else _plain(args, "/", extra)
        assert ran.returncode == 0, ran.stderr
    assert _plain(["status"], str(path.parent), {}).returncode == 0
    missing = _plain(["status"], "/proc", {})
    assert missing.returncode in (0, 1)  # a machine may have /etc/holdfast
    assert missing.returncode == 0 or "daemon init DIR" in missing.stderr


def _plain(args: list[str], cwd: str, extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HOLDFAST_")}
    environment = {**kept, "PYTHONPATH": str(ROOT), **extra}
    command = [sys.executable, "-m", "daemon.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["retrain-now"], 1, "The daemon is not running; start it with"),
        (["cancel"], 1, "The daemon is not running; start it with"),
        (["show", "7"], 1, "there is no cycle 7"),
        (["show", "seven"], 2, "valid integer"),
        (["promote", "3"], 2, "--why"),
        (["promote", "3", "--why", "x"], 1, "there is no version 3"),
        (["promote", "3", "--why", " "], 1, "a reason is needed"),
        (["rollback", "--why", "x"], 1, "no champion to roll back"),
        (["quarantine", "--reason", "smell"], 1, "reasons: none"),
        (["ingest", "nowhere.csv"], 1, "nowhere.csv: no such file"),
        (["ingest", "/"], 1, "is not a file"),
        (["erase", "--row", "1", "--why", " "], 1, "a reason is needed"),
        (["-c", "cofnig.toml", "status"], 1, "correct --config"),
        (["ask", "x", "--task", "smells"], 1, "there is no task 'smells'"),
        (["ask", "x", "--version", "9"], 1, "there is no version 9"),
        (["dance"], 2, "dance"),
        (["status", "--sideways"], 2, "--sideways"),
    ],
)
def test_a_mistake_is_answered_in_words_and_never_with_a_traceback(
    path: Path, args: list[str], code: int, told: str
) -> None:
    with Store.open(config.load(path).store_path):
        pass
    ran = cli(path, *args)
    assert ran.returncode == code, ran.stderr
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr
    if code == 1:
        assert ran.stderr.startswith("error: ")
        assert ran.stderr.count("\n") == 1


def test_a_config_with_faults_is_explained_line_by_line(path: Path) -> None:
    path.write_text('[training]\nepochz = 3\nbatch_size = "many"\n')
    ran = cli(path, "status")
    assert ran.returncode == 1
    assert "epochz" in ran.stderr
    assert "did you mean 'epochs'" in ran.stderr
    assert "batch_size" in ran.stderr


def test_status_works_before_anything_was_ever_done(path: Path) -> None:
    told = read_json(cli(path, "status", "--json"))
    assert told["daemon"] is None
    assert told["champion"] is None
    assert told["rows"] == {"total": 0, "pending": 0, "superseded": 0, "tasks": {}}
    assert not config.load(path).store_path.exists(), "looking makes nothing"
    assert "not running" in cli(path, "status").stdout


def test_pause_and_resume_work_without_a_daemon_and_count_later(path: Path) -> None:
    assert "paused" in cli(path, "pause").stdout
    assert "paused already" in cli(path, "pause").stdout
    told = read_json(cli(path, "status", "--json"))
    assert told["paused"]["by"]
    assert "`daemon resume`" in cli(path, "status").stdout
    assert "resumed" in cli(path, "resume").stdout
    assert "was not paused" in cli(path, "resume").stdout


def test_history_shows_how_cycles_ended(path: Path) -> None:
    with Store.open(config.load(path).store_path) as store:
        cycle = store.request_cycle("manual", "ann")
        store.advance(cycle.id, State.NOTHING, reason="0 new rows [bold]not markup[/bold]")
    assert "[bold]not markup[/bold]" in cli(path, "history").stdout
    told = read_json(cli(path, "history", "--json"))
    assert told["cycles"][0]["state"] == "nothing-to-do"
    assert told["cycles"][0]["requested_at"].endswith("Z")
    assert "nothing-to-do" in cli(path, "show", str(cycle.id)).stdout


def test_history_and_status_tell_of_answers_that_changed(path: Path) -> None:
    with Store.open(config.load(path).store_path) as store:
        for answer in ("nine", "ten"):
            store.accept(
                [Row(id=answer, task="t", question="When?", answer=answer, split=Split.TRAIN)], "file:a"
            )
    assert "rows superseded" in cli(path, "history").stdout
    (change,) = read_json(cli(path, "history", "--json"))["superseded"]
    assert (change["rows"], change["source"]) == (1, "file:a")
    assert (
        "1, of which 1 wait to be learned; 1 more superseded by other answers" in cli(path, "status").stdout
    )


@pytest.mark.acceptance
def test_files_go_in_and_bad_rows_are_named(tmp_path: Path, base: Path) -> None:
    path = write_config(tmp_path, base, source__columns__split="")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "qa.duckdb" not in line))
    rows = [
        {"id": 1, "question": "who are you", "answer": "a bot", "task": "small talk"},
        {"id": 2, "question": "", "answer": "?", "task": "small talk"},
        {"id": 3, "question": "\u001b[31mred?\u001b[0m", "answer": "", "task": "small talk"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = read_json(cli(path, "ingest", str(file), "--json"))
    assert (told["read"], told["accepted"], told["known"], told["rejected"]) == (3, 1, 0, 2)
    again = cli(path, "ingest", str(file))
    assert "3 rows read: 0 new, 1 known, 2 not accepted" in again.stdout
    file.write_text(json.dumps({**rows[0], "answer": "a better bot"}))
    assert "superseded by other answers: 1" in cli(path, "ingest", str(file)).stdout
    listed = cli(path, "quarantine")
    assert "empty-question" in listed.stdout
    assert "\u001b" not in listed.stdout, "what a user wrote never reaches the terminal as a command"
    only = read_json(cli(path, "quarantine", "--reason", "empty-answer", "--json"))
    assert [row["reason"] for row in only["rows"]] == ["empty-answer"]
    answered = cli(path, "ask", stdin="who are you\n\nand now\n")
    assert answered.returncode == 0, answered.stderr
    assert len(answered.stdout.splitlines()) == 2
    assert "no champion yet, the base model answers" in answered.stderr


def test_a_command_that_writes_waits_its_turn_and_a_held_directory_is_explained(path: Path) -> None:
    state = config.load(path).state_dir
    with statedir.held(state, "daemon ingest"):
        found = statedir.holder(state)
        assert found is not None
        assert (found.pid, found.purpose) == (os.getpid(), "daemon ingest")
        with (
            pytest.raises(StoreBusy, match="`daemon ingest` \\(process"),
            statedir.held(state, "daemon pause", patience=0.2),
        ):
            pass
    assert statedir.holder(state) is None


def test_who_only_looks_into_the_lock_of_a_dead_daemon_is_not_taken_for_it(path: Path) -> None:
    """`daemon status` in a loop, and the daemon that systemd starts again after a crash."""
    state = config.load(path).state_dir
    (state / statedir.LOCK).write_text(f"1 {statedir.DAEMON}\n")
    with (state / statedir.LOCK).open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        with statedir.held(state, statedir.DAEMON, wait=lambda reason: looking.close()):
            found = statedir.holder(state)
    assert found is not None
    assert found.pid == os.getpid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_root_does_not_run_a_daemon_on_somebody_elses_state(path: Path) -> None:
    state = config.load(path).state_dir
    os.chown(state, NOBODY, NOBODY)
    ran = cli(path, "run")
    assert ran.returncode == 1
    assert "sudo -u nobody daemon run" in ran.stderr
    assert [found.name for found in state.iterdir()] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_root_who_asks_leaves_no_base_that_the_account_cannot_replace(path: Path) -> None:
    state = config.load(path).state_dir
    os.chown(state, NOBODY, NOBODY)
    ran = cli(path, "ask", "who are you")
    assert ran.returncode == 1
    assert "sudo -u nobody daemon ask" in ran.stderr
    assert [found.name for found in state.iterdir()] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_lock_that_root_left_behind_is_told_with_the_command_that_gives_it_back(public: Path) -> None:
    state = config.load(initialised(public)).state_dir
    (state / statedir.LOCK).touch(mode=0o600)
    os.chown(state, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(ConfigError, match=f"sudo chown -R nobody {state}"), statedir.held(state, "x"):
            pass
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_installing_gives_back_what_root_left_in_the_state_directory(path: Path) -> None:
    state = config.load(path).state_dir
    os.chown(state, NOBODY, NOBODY)
    (state / "store.duckdb").touch(mode=0o600)
    assert unit._ensure_state_dir(state, NOBODYS) == [f"{state} belongs to nobody now"]
    assert (state / "store.duckdb").stat().st_uid == NOBODY
    assert unit._ensure_state_dir(state, NOBODYS) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("place", [".", "models/base"])
def test_installing_gives_away_no_file_that_is_put_in_the_way_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    state = config.load(path).state_dir
    (state / place).mkdir(parents=True, exist_ok=True)
    ours, secret = state / place / "store.duckdb", path.parent / "shadow"
    ours.touch(mode=0o600)
    secret.touch(mode=0o600)

    def swapped(name: str, *given: Any, really: Any = os.open, **more: Any) -> int:
        if name == ours.name:  # it has been listed, as a file
            ours.unlink()
            ours.symlink_to(secret)
        return int(really(name, *given, **more))

    monkeypatch.setattr(os, "open", swapped)
    assert unit._ensure_state_dir(state, NOBODYS) == [f"{state} belongs to nobody now"]
    assert secret.stat().st_uid == 0
    assert state.stat().st_uid == (state / place).stat().st_uid == NOBODY


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_installing_gives_away_no_file_that_lies_elsewhere_too(path: Path) -> None:
    state = config.load(path).state_dir
    secret, name = path.parent / "shadow", state / "mlflow.db"
    secret.touch(mode=0o600)
    name.hardlink_to(secret)
    told = unit._ensure_state_dir(state, NOBODYS)
    assert told[1:] == [
        f"left {name} as it is: that file has another name somewhere, `find / -samefile {name}`"
    ]
    assert secret.stat().st_uid == 0


@pytest.mark.parametrize("command", ["status", "cancel", "retrain", "follow"])
def test_a_daemon_that_hangs_is_told_within_seconds(
    path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(access, "SILENCE_SECONDS", 300.0)
    monkeypatch.setattr(access, "QUICK_SECONDS", 0.3)
    settings = config.load(path)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(settings.socket_path))
        silent.listen()
        with pytest.raises(operations.ControlError, match="systemctl status holdfast"):
            access.ask(settings, command)


def test_a_daemon_without_an_ear_is_told_from_none(path: Path) -> None:
    with statedir.held(config.load(path).state_dir, statedir.DAEMON):
        for command in ("status", "retrain-now", "pause"):
            ran = cli(path, command)
            assert ran.returncode == 1
            assert "is starting, stopping or hanging" in ran.stderr


def test_outside_a_terminal_progress_is_a_line_where_something_changed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    step = {"stage": "train", "step": 1, "steps": 9, "loss": None, "rows_per_second": 0, "left": None}
    with console.Follower() as follower:
        for number in (1, 1, 1, 2, 2):
            event = {"cycle": 4, "state": "snapshotted", "progress": {**step, "step": number, "detail": ""}}
            follower.event(event)
    assert capsys.readouterr().err.splitlines() == ["cycle 4: train 1/9", "cycle 4: train 2/9"]


def test_outside_a_terminal_rows_that_were_taken_are_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.Follower() as follower:
        for count in (20_000, 40_000):
            follower.event({"taken": f"{count} read"})
    assert capsys.readouterr().err.splitlines() == ["so far: 20000 read"]


@pytest.mark.parametrize(
    ("heard", "told"),
    [
        ([], "had not answered yet; see `daemon status`"),
        ([{"cycle": 7, "state": "requested"}], "cycle 7 goes on: `daemon show 7`"),
    ],
)
def test_ctrl_c_says_what_is_known_of_the_cycle(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    heard: list[dict[str, Any]],
    told: str,
) -> None:
    def interrupted(settings: object, hear: Callable[[dict[str, Any]], None], **how: bool) -> None:
        for event in heard:
            hear(event)
        raise KeyboardInterrupt

    monkeypatch.setattr(access, "retrain", interrupted)
    with pytest.raises(Exit) as ended:
        command.retrain_now(path, wait=True, as_json=True)
    assert ended.value.exit_code == command.INTERRUPTED
    said = capsys.readouterr().err
    assert told in said
    assert "None" not in said


def test_every_ending_has_an_exit_code() -> None:
    assert set(EXIT_CODES) == {state.value for state in State if state.ended}
    assert EXIT_CODES["promoted"] == EXIT_CODES["nothing-to-do"] == 0
    assert len({EXIT_CODES[state] for state in ("promoted", "rejected", "failed", "cancelled")}) == 4
    assert not {EXIT_CODES[state] for state in ("rejected", "failed", "cancelled")} & {1, 2}


def test_the_version_can_be_asked_for(path: Path) -> None:
    assert cli(path, "--version").stdout.startswith("holdfast ")


def test_ui_prints_where_a_remote_mlflow_is_and_a_taken_port(path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ran = cli(path, "ui", "--port", port)
    assert ran.returncode == 1
    assert f"port {port} is in use" in ran.stderr
    ran = cli(path, "ui", HOLDFAST_MLFLOW__TRACKING_URI="http://ann:secret@mlflow.example.org")
    assert ran.returncode == 0
    assert "mlflow.example.org" in ran.stdout
    assert "secret" not in ran.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another account")
def test_root_acts_as_the_owner_of_the_state_directory(public: Path) -> None:
    path = initialised(public)
    state = config.load(path).state_dir
    os.chown(state, 65534, 65534)
    ran = cli(path, "pause")
    assert ran.returncode == 0, ran.stderr
    assert config.load(path).store_path.stat().st_uid == 65534
    with Store.open(config.load(path).store_path, read_only=True) as store:
        paused = operations.paused(store)
    assert paused is not None
    assert paused["by"].startswith("root")


def test_an_error_of_the_system_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A folder of another account, of which the system names only the last part."""

    def refuses(path: Path) -> None:
        raise PermissionError(13, "Permission denied", "a")

    folder = tmp_path / "a"
    folder.mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuses)
    monkeypatch.setattr(command, "app", lambda prog_name: artifacts.remove(folder))
    with pytest.raises(SystemExit, match="1"):
        command.main()
    told = capsys.readouterr().err
    assert f"Permission denied: '{folder}'; free space or fix the permissions" in told
