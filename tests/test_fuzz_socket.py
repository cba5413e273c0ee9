"""Whatever is said to the control socket gets an answer in words, and the next client is served."""

import inspect
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import control
from daemon.commands import Commands
from daemon.control import Client, ControlServer
from storage.errors import ControlError, HoldfastError, StoreError
from tests.bots import commands, make_bot
from tests.fuzzing import JSON, examples

NAMES = sorted(name[3:] for name in dir(Commands) if name.startswith("do_"))
LONG = 1 << 16


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    serving = ControlServer(tmp_path / "control.sock", lambda request: {"args": request.args})
    serving.start()
    yield serving
    serving.close()


def say(server: ControlServer, sent: bytes) -> Any:
    """What comes back for the bytes, once the client has hung up its half."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(20)
        line.connect(str(server.path))
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR)
        with line.makefile("rb") as answers:
            return json.loads(answers.readline())


requests = (
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({"command": JSON, "args": JSON, "for": JSON}).map(
        lambda value: json.dumps(value).encode()
    )
)


@examples(150)
@given(sent=requests, end=st.sampled_from([b"\n", b"", b"\n\n", b"\n{}\n"]))
def test_any_bytes_get_one_answer_and_the_next_client_is_served(
    server: ControlServer, sent: bytes, end: bytes
) -> None:
    told = say(server, sent + end)
    assert set(told) in ({"result"}, {"error"})
    assert "error" not in told or told["error"]["type"] == "ControlError"
    assert "internal error" not in json.dumps(told)
    assert Client(server.path).call("x", a=1) == {"args": {"a": 1}}


class Untouched:
    """A daemon that is never reached, because no request here fits a command."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was looked at")


@examples(200)
@given(command=st.sampled_from(NAMES) | st.text(), args=st.dictionaries(st.text(), JSON, max_size=2))
def test_arguments_that_no_command_has_are_refused_before_anything_is_done(
    command: str, args: dict[str, Any]
) -> None:
    args = {f"{name} ": value for name, value in args.items()} or {"no such": 1}
    request: Any = SimpleNamespace(command=command, args=args, who="x", emit=lambda event: None)
    with pytest.raises(ControlError):
        Commands(Untouched())(request)  # type: ignore[arg-type]


@examples(200)
@given(value=JSON)
@pytest.mark.parametrize(
    ("command", "name", "kind"),
    [("show", "cycle", int), ("history", "limit", int), ("quarantine", "reason", str),
     ("retrain", "wait", bool), ("ingest", "paths", list), ("promote", "version", int),
     ("rollback", "why", str)],
)  # fmt: skip
def test_an_argument_of_another_type_is_refused_before_anything_is_done(
    command: str, name: str, kind: type, value: Any
) -> None:
    if isinstance(value, kind) or (value is None and name == "reason"):
        return
    request: Any = SimpleNamespace(command=command, args={name: value}, who="x", emit=lambda event: None)
    with pytest.raises(HoldfastError, match=command):
        Commands(Untouched())(request)  # type: ignore[arg-type]


# Of the right type, and nothing that anybody means.
NUMBERS = st.sampled_from([0, -1, 2**63 - 1, 2**63, -(2**63), -(2**70), 2**70, 10**400]) | st.integers()
TEXTS = (
    st.sampled_from(["\0", "a\0b", "\ud800", "\udcff", "'; DROP TABLE rows; --", '"', "$1", "%", "x" * LONG])
    | st.text()
    | st.text(st.characters(categories=["Cs", "Cc", "Cf"]), max_size=5)
)
WELL_TYPED = {int: NUMBERS, str: TEXTS, bool: st.booleans(), list[str]: st.lists(TEXTS, max_size=3)}
# These would wait for a cycle that nobody runs here.
ASKS = sorted(set(NAMES) - {"retrain", "follow"})


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The commands of a bot that has just been made."""
    home = tmp_path_factory.mktemp("bot")
    bot = make_bot(home)
    yield commands(bot)
    bot.store.close()


@st.composite
def well_typed(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    command = draw(st.sampled_from(ASKS))
    parameters = list(inspect.signature(getattr(Commands, f"do_{command}")).parameters.values())[2:]
    args = {}
    for one in parameters:
        kind = get_args(one.annotation)[0] if get_origin(one.annotation) is UnionType else one.annotation
        if one.default is one.empty or draw(st.booleans()):
            args[one.name] = draw(WELL_TYPED[kind])
    return command, args


@examples(300)
@given(asked=well_typed())
def test_values_that_nobody_means_are_answered_in_words(
    real: Commands, asked: tuple[str, dict[str, Any]]
) -> None:
    command, args = asked
    request = control.Request(command=command, args=args, who="ann", emit=lambda event: None)
    try:
        told = real(request)
    except StoreError:
        raise  # would blame the store, and send people to `daemon doctor`
    except HoldfastError as error:
        told = {"error": str(error)}
    assert "internal error" not in json.dumps(told)


def test_a_daemon_that_is_asked_to_prune_has_only_planned_it(real: Commands) -> None:
    told = [
        real(control.Request(command="prune", args={"dry_run": dry}, who="ann", emit=lambda event: None))
        for dry in (True, False)
    ]
    assert [one.get("later") for one in told] == [None, True]


def test_clients_that_say_half_a_line_do_not_keep_others_from_being_served(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there is room for, all silent: they are let go, and meanwhile others hear why they wait."""
    monkeypatch.setattr(control, "REQUEST_SECONDS", 1.0)
    lines = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(control.MAX_CLIENTS)]
    try:
        for line in lines:
            line.settimeout(20)
            line.connect(str(server.path))
            line.sendall(b'{"command": "x", "args": {"a": "')
        for line in lines:
            assert b"no complete request" in line.recv(4096)
    finally:
        for line in lines:
            line.close()
    assert Client(server.path).call("x", a=1) == {"args": {"a": 1}}


def test_many_clients_at_once_each_get_their_own_answer(server: ControlServer) -> None:
    heard: dict[int, Any] = {}

    def ask(number: int) -> None:
        heard[number] = Client(server.path).call("x", a="y" * LONG + str(number))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(told == {"args": {"a": "y" * LONG + str(number)}} for number, told in heard.items())
    assert len(heard) == 40
