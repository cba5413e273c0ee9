"""A real MLflow server that is refused, errs, hangs, or does the work and then cannot say so."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests import soak
from tests.bots import write_config
from tests.daemons import DaemonProcess, cli
from tests.mlflow_server import HOST, Deed, Proxy, free_port, mlflow_server

pytestmark = pytest.mark.acceptance

TIMEOUT = "15"  # seconds until the client gives up a request that hangs
REGISTER, RUN = "model-versions/create", "runs/create"


@dataclass(kw_only=True)
class Bench:
    """One bot for the whole module: its cycles follow one another through all faults."""

    daemon: DaemonProcess
    proxy: Proxy
    client: MlflowClient  # straight to the server
    cycles: int = 0

    def begin(self) -> int:
        """A cycle with something to learn; its number."""
        self.cycles += 1
        soak.ingest(self.daemon, f"{self.cycles}", self.cycles)
        return self.daemon.retrain()

    def waits(self, cycle: int) -> str:
        """Why the cycle waits, in the words of `daemon status`."""
        told = self.daemon.until(waiting)
        (unfinished,) = told["unfinished"]
        assert (unfinished["id"], unfinished["state"]) == (cycle, "decided")
        seen = cli(self.daemon.config_path, "status")
        assert seen.returncode == 0, seen.stderr
        return " ".join(seen.stdout.split())

    def goes_on(self, cycle: int) -> None:
        """Nothing but `daemon resume` is said, which spares the test the wait for the next try."""
        self.daemon.call("resume")
        self.is_published_once(cycle)

    def is_published_once(self, cycle: int) -> None:
        assert self.daemon.ended(cycle)["state"] in ("promoted", "rejected")
        (experiment,) = self.client.search_experiments(filter_string="name = 'test-bot'")
        runs = self.client.search_runs([experiment.experiment_id], f"tags.`holdfast.cycle` = '{cycle}'")
        assert [run.info.status for run in runs] == ["FINISHED"]
        versions = self.client.search_model_versions(f"tags.`holdfast.cycle` = '{cycle}'")
        assert [version.run_id for version in versions] == [run.info.run_id for run in runs]
        assert self.daemon.call("audit")["findings"] == []


def waiting(told: dict[str, Any]) -> bool:
    return (told["daemon"]["activity"] or {}).get("waiting") is not None


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Bench]:
    home = tmp_path_factory.mktemp("bot")
    port = free_port()
    with mlflow_server(tmp_path_factory.mktemp("server"), port) as address:
        proxy = Proxy(port)
        proxy.up()
        config = write_config(
            home, base, source__path="", rescue__attempts=0, strategy__replay_size=50,
            mlflow__tracking_uri=f"http://{HOST}:{proxy.port}",
        )  # fmt: skip
        argv = [sys.executable, "-m", "tests.toy_worker", "daemon", "--config", str(config), "run"]
        with DaemonProcess(config, argv=argv, MLFLOW_HTTP_REQUEST_TIMEOUT=TIMEOUT) as daemon:
            yield Bench(daemon=daemon, proxy=proxy, client=MlflowClient(address))
            assert daemon.stop() == 0
        proxy.down()


@pytest.fixture(autouse=True)
def mended(bench: Bench) -> Iterator[None]:
    yield
    bench.proxy.mend()


def test_a_server_that_is_down_is_waited_for(bench: Bench) -> None:
    bench.proxy.down()
    cycle = bench.begin()
    said = bench.waits(cycle)
    assert "nothing answers at 127.0.0.1" in said
    assert "published when MLflow is back" in said
    bench.proxy.mend()
    bench.goes_on(cycle)


@pytest.mark.parametrize(
    ("deed", "where", "words"),
    [
        ("error", "", "500"),
        ("error", REGISTER, "500"),
        ("hang", REGISTER, "timed out"),
        ("hang", "artifacts", "timed out"),
    ],
)
def test_a_server_that_does_not_do_its_work_is_waited_for(
    bench: Bench, deed: Deed, where: str, words: str
) -> None:
    bench.proxy.breaks(deed, where)
    cycle = bench.begin()
    assert words in bench.waits(cycle)
    assert bench.proxy.met.is_set()
    bench.proxy.mend()
    bench.goes_on(cycle)


@pytest.mark.parametrize("deed", ["cut", "gateway"])
@pytest.mark.parametrize("where", [REGISTER, RUN])
def test_what_was_made_before_the_connection_broke_is_not_made_again(
    bench: Bench, deed: Deed, where: str
) -> None:
    """The server has made the version, or the run, and the client does not know."""
    bench.proxy.breaks(deed, where, times=1)
    cycle = bench.begin()
    bench.daemon.until(lambda told: waiting(told) or not told["unfinished"])
    assert bench.proxy.met.is_set()
    bench.goes_on(cycle)


@pytest.mark.parametrize(
    "where",
    ["runs/log-batch", "artifacts", "runs/update", "registered-models/alias", "model-versions/search"],
)
def test_a_connection_that_breaks_anywhere_else_is_tried_again(bench: Bench, where: str) -> None:
    bench.proxy.breaks("cut", where, times=1)
    bench.is_published_once(bench.begin())
    assert bench.proxy.met.is_set()
