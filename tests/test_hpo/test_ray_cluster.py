"""Workers on a real Ray cluster of several nodes, one of which is killed in the middle of a trial."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from hpo.__main__ import app
from tests.test_hpo.toy_study import RunningCommand, ToyStudy, is_running

ray = pytest.importorskip("ray", reason="needs muscale[ray]")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Yield a cluster of a head that runs no worker and two nodes of one core each."""
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80_000_000}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    for _ in range(2):
        started.add_node(num_cpus=1, **store)
    yield started
    started.shutdown()


def launch_held(study: ToyStudy, address: str) -> RunningCommand:
    """Launch a study on a cluster, and return when both workers are in the middle of a training, where they wait."""
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy", "--executor", "ray", "--address", address)
    study.wait_until_held(2, launcher)
    return launcher


def list_busy_workers(study: ToyStudy) -> set[int]:
    """Return the process numbers of the workers that run a trial."""
    return {int(t.user_attrs["worker"].split("/")[1]) for t in study.trials if not t.state.is_finished()}


@pytest.mark.slow
def test_a_node_killed_during_a_trial_costs_no_configuration(cluster: Any, tmp_path: Path) -> None:
    study = ToyStudy(tmp_path, pause=0.0)
    launcher = launch_held(study, cluster.address)
    node = cluster.list_all_nodes()[-1]
    raylet = next(p.process.pid for p in node.all_processes["raylet"])
    busy = list_busy_workers(study)
    lost = [p for p in psutil.Process(raylet).children(recursive=True) if p.pid in busy]
    assert lost, "a worker runs on that node"
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    study.release()
    launcher.finish()
    assert not any(is_running(p.pid) for p in lost)
    study.check_whole()


@pytest.mark.slow
def test_a_launch_on_a_cluster_is_stopped_and_resumed_like_any_other(cluster: Any, tmp_path: Path) -> None:
    study = ToyStudy(tmp_path, pause=0.0)
    launcher = launch_held(study, cluster.address)
    launcher.process.send_signal(signal.SIGTERM)
    assert "hpo resume toy" in launcher.finish(130)
    study.release()
    study.run("resume", "toy")
    study.check_whole()
    assert set(study.count_steps().values()) == {1}, "each training kept its state"


@pytest.mark.slow
def test_a_killed_head_ends_the_launch_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # It is a minute by default.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "8")
    cluster = request.getfixturevalue("cluster")
    study = ToyStudy(tmp_path, pause=0.0)
    launcher = launch_held(study, cluster.address)
    for kind in cluster.head_node.all_processes.values():
        for each in kind:
            each.process.kill()
    log = launcher.finish(None)
    assert launcher.process.returncode not in (0, 2), log
    assert "the head of the Ray cluster does not answer" in log
    assert "hpo resume toy" in log
    study.release()
    # Workers may still run on the nodes.
    study.run("resume", "toy")
    study.check_whole()


def test_an_unknown_executor_is_refused_before_anything_is_created(tmp_path: Path) -> None:
    toml = tmp_path / "a.toml"
    toml.write_text("")
    result = CliRunner().invoke(app, ["launch", str(toml), "--executor", "slurm"])
    assert result.exit_code == 2
    assert "needed --executor local or ray, got 'slurm'" in result.output
    assert [*tmp_path.iterdir()] == [toml]
