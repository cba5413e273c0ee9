"""Twelve cycles of the soak: enough to see descriptors, threads or folders that are left behind."""

from pathlib import Path

from tests import soak

CYCLES = 12


def test_a_few_cycles_under_churn_leave_nothing_behind(tmp_path: Path, base: Path) -> None:
    with soak.running(tmp_path, base, real=False) as daemon:
        weights = list(soak.soak(daemon, CYCLES))
        assert daemon.stop() == 0
    # A connection may be open for a moment, and pools fill late on a busy machine: the least of three counts,
    # with room for a few. One left behind a cycle would be seven more.
    files, threads = [w.files for w in weights], [w.threads for w in weights]
    assert min(files[-3:]) <= max(files[:3]) + 2 * soak.FILES
    assert min(threads[-3:]) <= max(threads[:3]) + soak.THREADS
    adapters = list((tmp_path / "state/cycles").rglob("adapter_model.safetensors"))
    assert len(adapters) <= 1 + 2 + 1 + 1, "champion, former champions, a rejected one, one to be pruned"
    assert soak.findings(daemon) == []
