"""The control socket: who may talk, what is answered, and that nothing said to it ends it."""

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import control
from daemon.control import Client, ControlServer, Request
from storage.errors import ControlError, DaemonNotRunning, StoreError


def answer(request: Request) -> dict[str, Any]:
    """A daemon of few words."""
    match request.command:
        case "echo":
            return request.args
        case "who":
            return {"who": request.who}
        case "count":
            for number in range(request.args["to"]):
                request.emit({"number": number})
            return {}
        case "fail":
            raise StoreError("the store is on fire; call someone")
        case "bug":
            raise KeyError("oops")
        case "disk":
            raise FileNotFoundError(2, "No such file", "x.csv")
        case _:
            raise ControlError(f"there is no command {request.command!r}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    serving = ControlServer(tmp_path / "control.sock", answer)
    serving.start()
    yield serving
    serving.close()


def raw(server: ControlServer, sent: bytes, *, hang_up: bool = True) -> dict[str, Any]:
    """What the server says to these bytes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(20)
        line.connect(str(server.path))
        try:
            line.sendall(sent)
            if hang_up:
                line.shutdown(socket.SHUT_WR)
        except BrokenPipeError:  # it had heard enough
            pass
        with line.makefile("rb") as answers:
            return dict(json.loads(answers.readline()))


def test_a_call_brings_the_result_and_hears_the_events_before_it(server: ControlServer) -> None:
    assert Client(server.path).call("echo", a=1, b=["x"]) == {"a": 1, "b": ["x"]}
    heard: list[int] = []
    Client(server.path).call("count", lambda event: heard.append(event["number"]), to=100)
    assert heard == list(range(100))


def test_an_error_keeps_its_type_and_words_across_the_socket(server: ControlServer) -> None:
    with pytest.raises(StoreError, match="on fire"):
        Client(server.path).call("fail")


def test_a_bug_in_a_command_is_an_answer_and_not_the_end(server: ControlServer) -> None:
    with pytest.raises(ControlError, match="internal error: KeyError"):
        Client(server.path).call("bug")
    with pytest.raises(ControlError, match=r"x\.csv"):
        Client(server.path).call("disk")
    assert server.alive()


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\n",
        b"\n",
        b"{}\n",
        b"[]\n",
        b'{"command": 3}\n',
        b'{"command": "echo", "args": []}\n',
        b'{"command": "echo", "for": 1}\n',
        b'{"command": "echo"',
        b"\xff\xfe\x00\n",
        b"[" * 100_000 + b"\n",
        b'{"command": "echo"}\n{"command": "echo"}\n',
        b"",
    ],
)
def test_a_malformed_request_gets_an_error_and_the_next_one_an_answer(
    server: ControlServer, sent: bytes
) -> None:
    assert raw(server, sent)["error"]["type"] == "ControlError"
    assert Client(server.path).call("echo", a=1) == {"a": 1}


def test_a_request_beyond_the_limit_is_refused_without_being_read(server: ControlServer) -> None:
    told = raw(server, b'{"command": "echo", "args": {"x": "' + b"y" * (2 * control.MAX_REQUEST))
    assert "1048576 bytes" in told["error"]["message"]


def test_a_request_near_the_limit_is_answered(server: ControlServer) -> None:
    text = "y" * (control.MAX_REQUEST - 100)
    assert Client(server.path).call("echo", x=text) == {"x": text}


def test_a_client_that_says_nothing_is_let_go(server: ControlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_SECONDS", 0.2)
    assert "no complete request" in raw(server, b'{"comm', hang_up=False)["error"]["message"]


def test_clients_that_hang_up_early_harm_nobody(server: ControlServer) -> None:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.connect(str(server.path))
            line.sendall(b'{"command": "count", "args": {"to": 10000}}\n')
    assert Client(server.path).call("echo", a=1) == {"a": 1}
    assert server.alive()


def test_many_clients_at_once_are_all_answered(server: ControlServer) -> None:
    results: list[dict[str, Any]] = []

    def talk(number: int) -> None:
        results.append(Client(server.path).call("echo", n=number))

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result["n"] for result in results) == list(range(30))


def test_a_client_beyond_the_limit_is_told_so_and_gets_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_CLIENTS", 2)
    started: list[str] = []
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: (started.append(thread.name), start(thread))
    )
    serving = ControlServer(tmp_path / "control.sock", answer)
    serving.start()
    held = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
    for line in held:
        line.connect(str(serving.path))
    for _ in range(20):
        with pytest.raises(ControlError, match="2 clients are connected; try again later"):
            Client(serving.path).call("echo")
    assert started.count("client") == 2
    for line in held:
        line.close()
    serving.close()


def test_without_a_thread_for_a_client_the_next_one_is_answered(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account's processes are at their limit for a moment."""

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        for _ in range(control.MAX_CLIENTS + 1):
            with pytest.raises(ControlError, match="cannot take another client now"):
                Client(server.path, timeout=10).call("echo")
    assert server.alive()
    assert Client(server.path).call("echo", a=1) == {"a": 1}


def test_the_kernel_says_who_asks_and_only_root_may_speak_for_another(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    expected = control.account(os.geteuid(), "alice")
    assert Client(server.path).call("who") == {"who": expected}
    assert control.account(0, "alice") == "root for alice"
    assert control.account(0, "not a name\n") == "root"
    assert control.account(12345, "alice") == "uid 12345"


def test_the_socket_is_for_its_owner_alone(server: ControlServer) -> None:
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")
def test_another_account_is_kept_out(server: ControlServer) -> None:
    server.path.parent.chmod(0o711)
    pid = os.fork()
    if pid == 0:  # no pytest in here
        try:
            os.setuid(65534)
            Client(server.path).call("who")
            os._exit(1)
        except ControlError as error:
            os._exit(0 if "only its own account" in str(error) else 2)
        except BaseException:
            os._exit(3)
    # The directories above are pytest's own and closed to others: that is a refusal as well.
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_socket_left_over_from_a_crash_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with pytest.raises(DaemonNotRunning):
        Client(path).call("echo")
    serving = ControlServer(path, answer)
    serving.start()
    assert Client(path).call("echo", a=1) == {"a": 1}
    serving.close()
    assert not path.exists()


def test_a_socket_that_answers_is_left_alone(server: ControlServer) -> None:
    with pytest.raises(ControlError, match="another daemon"):
        ControlServer(server.path, answer)
    assert Client(server.path).call("echo", a=1) == {"a": 1}


def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("precious")
    with pytest.raises(ControlError, match="not a socket"):
        ControlServer(path, answer)
    assert path.read_text() == "precious"


def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120) / "state"
    deep.mkdir(parents=True)
    serving = ControlServer(deep / "control.sock", answer)
    serving.start()
    assert Client(deep / "control.sock").call("echo", a=1) == {"a": 1}
    serving.close()
    with pytest.raises(DaemonNotRunning):
        Client(deep / "control.sock").call("echo")


def test_without_a_daemon_the_client_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(DaemonNotRunning, match="daemon run"):
        Client(tmp_path / "nowhere" / "control.sock").call("status")
