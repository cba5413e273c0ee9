"""The command `daemon`: thin, over the control socket, or over the store itself when no daemon runs.

Imports are inside the functions: `daemon --help` and `daemon status` start without torch, MLflow and
DuckDB. A user's mistake ends in one line on standard error and exit code 1, never in a traceback.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.journal import printable
from daemon.output import complain, print_json
from storage.errors import HoldfastError, StoreBusy

if TYPE_CHECKING:
    from daemon.settings import Settings

# How `retrain-now --wait` tells a script what became of the cycle.
EXIT_CODES = {"promoted": 0, "nothing-to-do": 0, "rejected": 3, "failed": 4, "cancelled": 5}
INTERRUPTED = 130

app = typer.Typer(
    name="daemon",
    help="Holdfast trains a question-answering bot on each day's new rows, without forgetting the old ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="Path of config.toml. Default: $HOLDFAST_CONFIG, ./config.toml or /etc/holdfast/config.toml.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
WhyOption = Annotated[str, typer.Option("--why", help="The reason, for whoever reads the history.")]

_chosen: Path | None = None  # the --config before the command


def _tell_version(wanted: bool) -> None:
    if wanted:
        from daemon import operations

        print(f"holdfast {operations.software_version()}")
        raise typer.Exit


@app.callback()
def _options(
    config: ConfigOption = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    global _chosen
    _chosen = config


# Setting up and running.


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where config.toml goes; made if need be.")],
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Where the state goes, for instance /var/lib/holdfast. Default: DIRECTORY/state."),
    ] = None,
) -> None:
    """Write config.toml and make the state directory."""
    from daemon import access

    path, settings = access.make_bot(directory, state_dir)
    print(f"wrote {path}; state goes to {settings.state_dir}")
    print(f"next: name your collector's DuckDB under [source], then `daemon -c {path} doctor`")


@app.command()
def run(config: ConfigOption = None) -> None:
    """Run the daemon in the foreground, as systemd does."""
    import logging

    from daemon import service

    try:
        code = service.run(_config_path(config))
    except StoreBusy as error:
        complain(error)
        code = service.BUSY
    except HoldfastError:
        raise
    except Exception:  # systemd restarts after this one, and not after a user's mistake
        logging.getLogger(__name__).critical(
            "the daemon broke down", exc_info=True, extra={"action": "broken"}
        )
        code = service.BROKEN
    raise typer.Exit(code)


@app.command("install-service")
def install_service(
    config: ConfigOption = None,
    show: Annotated[bool, typer.Option("--print", help="Only show the unit; change nothing.")] = False,
    user: Annotated[str | None, typer.Option(help="Account of the service; made if need be.")] = None,
) -> None:
    """Install the systemd service with this machine's paths. Needs root."""
    from daemon import config as loader
    from daemon import unit

    path = _config_path(config)
    settings = loader.load(path)
    account = unit.account_for(settings, user)
    text = unit.render(settings, path, account)
    if show:
        print(text, end="")
        return
    for done in unit.install(text, settings, account):
        print(done)
    print("next: `systemctl enable --now holdfast`, then `daemon status`")


@app.command()
def doctor(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check everything that a cycle needs. Says what to type where something is missing."""
    from dataclasses import asdict

    from daemon import console
    from daemon.doctor import Outcome, examine

    found = []
    for check in examine(_config_path(config, must_exist=False)):
        found.append(check)
        if not as_json:
            console.check(check)
    if as_json:
        print_json([asdict(check) for check in found])
    raise typer.Exit(int(any(check.outcome is Outcome.FAIL for check in found)))


@app.command()
def audit(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check everything that was done. Rows, suites, scores, verdicts, versions, files, MLflow."""
    from daemon import access, console

    told = access.audit(_settings(config))
    _show(told, as_json, console.audit)
    raise typer.Exit(int(bool(told["findings"])))


# Looking.


@app.command()
def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """What the bot knows, what runs, and what comes next."""
    from daemon import access, console

    _show(access.status(_settings(config)), as_json, console.status)


@app.command()
def history(
    config: ConfigOption = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Cycles to list.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """The newest cycles, and every change of champion."""
    from daemon import access, console

    settings = _settings(config)
    told = access.perform(settings, "history", access.reader(settings, "history", limit), limit=limit)
    _show(told, as_json, console.history)


@app.command()
def show(
    cycle: Annotated[int, typer.Argument(help="Number of the cycle, see `daemon history`.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """One cycle: what it learned, and the verdict in words. With the accuracy matrix."""
    from daemon import access, console

    settings = _settings(config)
    told = access.perform(settings, "show", access.reader(settings, "show", cycle), cycle=cycle)
    _show(told, as_json, console.show)


@app.command()
def quarantine(
    config: ConfigOption = None,
    reason: Annotated[str | None, typer.Option(help="Only rows with this reason.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows to list.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Rows that were not accepted, and why."""
    from daemon import access, console

    settings = _settings(config)
    told = access.perform(
        settings,
        "quarantine",
        access.reader(settings, "quarantine", limit, reason),
        limit=limit,
        reason=reason,
    )
    _show(told, as_json, console.quarantine)


@app.command()
def ask(
    question: Annotated[
        str | None, typer.Argument(help="Left out: one a line from standard input, by one loaded model.")
    ] = None,
    config: ConfigOption = None,
    task: Annotated[
        str | None, typer.Option(help="Task it belongs to; closed tasks answer with a label.")
    ] = None,
    context: Annotated[str, typer.Option(help="Text that the question is about.")] = "",
    version: Annotated[
        int | None, typer.Option(min=1, help="A model version other than the champion.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the champion a question. While there is none, the base model answers."""
    from daemon import access, asking, console

    settings = _settings(config)
    serving = access.serving(settings, version)
    answerer = asking.load(settings, serving, task)
    console.err().print(answerer.name, style="dim")
    for asked in [question] if question is not None else asking.questions():
        answer = answerer.answer(asked, context)
        if as_json:
            print_json({"question": asked, "answer": answer, "task": task, "version": serving["version"]})
        else:
            print(printable(answer), flush=True)


# Changing.


@app.command("retrain-now")
def retrain_now(
    config: ConfigOption = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Follow the cycle to its end. Exit code: 0 promoted or nothing to do, 3 rejected, 4 failed, "
            "5 cancelled. Ctrl-C only stops following.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask for a cycle now; queued while another one runs."""
    from daemon import access, console

    settings = _settings(config)
    started: dict[str, Any] = {}
    with console.Follower() as follower:

        def hear(event: dict[str, Any]) -> None:
            started.setdefault("cycle", event["cycle"])
            if wait and not as_json:
                follower.event(event)

        try:
            told = access.retrain(settings, hear, wait=wait)
        except KeyboardInterrupt:
            told = None
    if told is None:
        number = started.get("cycle")
        goes_on = f"cycle {number} goes on: `daemon show {number}`"
        unheard = "the daemon had not answered yet; see `daemon status` for whether a cycle was asked for"
        print(f"no longer following; {unheard if number is None else goes_on}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    _tell_retrained(told, wait, as_json)


@app.command()
def cancel(
    cycle: Annotated[
        int | None, typer.Argument(help="Default: the running cycle, else the queued one.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Stop the running cycle, or take one out of the queue. Its rows stay pending."""
    from daemon import access

    told = access.ask(_settings(config), "cancel", cycle=cycle)["cycle"]
    ended = told["state"] == "cancelled"
    print(
        f"cycle {told['id']} "
        + ("is cancelled" if ended else f"stops at its next step; see `daemon show {told['id']}`")
    )


@app.command()
def pause(config: ConfigOption = None) -> None:
    """Start no more cycles until `daemon resume`. Holds over a restart."""
    from daemon import access

    settings = _settings(config)
    told = access.perform(settings, "pause", access.writer(settings, "pause"))
    also = (
        f"; cycle {told['running']} is not disturbed, `daemon cancel` stops it" if told.get("running") else ""
    )
    print(f"{'was paused already' if told['already'] else 'paused'}{also}")


@app.command()
def resume(config: ConfigOption = None) -> None:
    """Let cycles start again."""
    from daemon import access

    settings = _settings(config)
    told = access.perform(settings, "resume", access.writer(settings, "resume"))
    print("was not paused" if told["already"] else "resumed")


@app.command()
def promote(
    version: Annotated[int, typer.Argument(help="Model version, see `daemon history`.")],
    why: WhyOption,
    config: ConfigOption = None,
) -> None:
    """Make a version the champion by hand, past the gate. Who, when and why stay on record."""
    _move(_settings(config), "promote", version=version, why=why)


@app.command()
def rollback(why: WhyOption, config: ConfigOption = None) -> None:
    """Back to the champion before this one. The rows learned since are pending again."""
    _move(_settings(config), "rollback", why=why)


@app.command()
def erase(
    why: WhyOption,
    config: ConfigOption = None,
    row: Annotated[str | None, typer.Option(help="Id in the collector's table, or hash, of one row.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=VALUE; task, source, question, answer or context. Repeatable: all hold."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only rows of this task.")] = None,
    before: Annotated[str | None, typer.Option(help="Only rows from before this date, in UTC.")] = None,
    contains: Annotated[str | None, typer.Option(help="Only rows with this text in them.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
) -> None:
    """Forget rows for ever, and every model that learned them."""
    from daemon import access, console, operations

    operations.check_why(why)
    settings = _settings(config)
    which = {"row": row, "task": task, "before": before, "contains": contains, "where": where or []}
    _show(access.erase(settings, why, which, dry_run=True), False, console.erasure_plan)
    if dry_run:
        return
    if not yes and not typer.confirm("This cannot be undone. Erase?"):
        raise typer.Exit(1)
    _show(access.erase(settings, why, which, dry_run=False), False, console.erased)


@app.command()
def prune(
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what [retention] lets go. A running daemon does it between two cycles, asked or not."""
    from daemon import access, console

    told = access.prune(_settings(config), dry_run=dry_run)
    _show(told, as_json, lambda told: console.removals(told, planned=dry_run))


@app.command()
def ingest(
    files: Annotated[
        list[Path], typer.Argument(help="JSONL, CSV or Parquet files with the columns of [source].")
    ],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take in labeled rows from files. Rows that are known already change nothing."""
    from daemon import access, console

    settings = _settings(config)
    with console.Follower() as follower:
        told = access.ingest(settings, [path.absolute() for path in files], follower.event)
    _show(told, as_json, console.intake)


@app.command()
def ui(
    config: ConfigOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
) -> None:
    """Open MLflow's own pages on what the daemon logged."""
    from daemon import statedir
    from daemon.mlflow_ui import serve

    settings = _settings(config)
    if settings.state_dir.exists():
        statedir.become_owner(settings.state_dir)
    serve(settings, port)


# What the commands share.


def _config_path(given: Path | None, *, must_exist: bool = True) -> Path:
    from daemon import access

    return access.config_path(given or _chosen, must_exist=must_exist)


def _settings(given: Path | None) -> "Settings":
    from daemon import config

    return config.load(_config_path(given))


def _move(settings: "Settings", operation: str, **args: Any) -> None:
    """Moves the champion and says where it is now."""
    from daemon import access

    told = access.move(settings, operation, **args)
    version = told["champion"]["version"]
    print(f"the champion is {f'version {version}' if version is not None else 'the bare base model'} now")
    if told["warning"]:
        print(printable(f"warning: {told['warning']}"), file=sys.stderr)


def _tell_retrained(told: dict[str, Any], waited: bool, as_json: bool) -> None:
    cycle = told["cycle"]
    if as_json:
        print_json(told)
    elif waited:
        print(printable(f"cycle {cycle['id']} {cycle['state']}: {cycle['reason'] or ''}".rstrip(": ")))
        print(f"more of it: `daemon show {cycle['id']}`")
    else:
        how = "joined the queued cycle" if told["joined"] else "asked for cycle"
        print(f"{how} {cycle['id']}; follow it with `daemon status`")
    raise typer.Exit(EXIT_CODES.get(cycle["state"], 0) if waited else 0)


def _show(told: dict[str, Any], as_json: bool, human: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        print_json(told)
    else:
        from daemon import console

        human(console.harmless(told))


def main() -> None:
    """The entry point of the command."""
    try:
        app(prog_name="daemon")
    except HoldfastError as error:
        complain(error)
        sys.exit(1)
    except BrokenPipeError:  # `daemon history | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a file of another account
        complain(HoldfastError(f"{error}; free space or fix the permissions, and see `daemon doctor`"))
        sys.exit(1)


if __name__ == "__main__":
    main()
