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
from tests.test_hpo.test_launcher import Study

ray = pytest.importorskip("ray", reason="needs muscale[ray]")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs nothing, and two nodes of one core."""
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    for _ in range(2):
        made.add_node(num_cpus=1, **store)
    yield made
    made.shutdown()


def holders(study: Study) -> dict[int, int]:
    """Process number of a worker -> the trial that it runs."""
    running = [t for t in study.trials if not t.state.is_finished()]
    return {int(t.user_attrs["worker"].split("/")[1]): t.number for t in running}


@pytest.mark.slow
def test_a_node_killed_in_mid_trial_costs_no_configuration(cluster: Any, tmp_path: Path) -> None:
    study = Study(tmp_path, pause=0.1)
    launcher = study.start("launch", "toy", "--executor", "ray", "--address", cluster.address)
    study.wait_until(lambda: study.trained().total() > 20 and len(holders(study)) == 2, launcher)
    node = cluster.list_all_nodes()[-1]
    raylet = next(p.process.pid for p in node.all_processes["raylet"])
    lost = [p for p in psutil.Process(raylet).children(recursive=True) if p.pid in holders(study)]
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    _, err = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, err
    assert lost, "no worker was on that node"
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in lost)
    study.check_whole()


@pytest.mark.slow
def test_a_launch_on_a_cluster_stops_and_goes_on_like_any_other(cluster: Any, tmp_path: Path) -> None:
    study = Study(tmp_path, pause=0.1)
    launcher = study.start("launch", "toy", "--executor", "ray", "--address", cluster.address)
    study.wait_until(lambda: study.trained().total() > 20, launcher)
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, err
    assert "hpo resume toy" in err
    study.run("resume", "toy")
    study.check_whole()
    assert set(study.trained().values()) == {1}, "each training kept its state"


@pytest.mark.slow
def test_a_killed_head_ends_the_launch_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "8")  # a minute by default
    cluster = request.getfixturevalue("cluster")
    study = Study(tmp_path, pause=0.1)
    launcher = study.start("launch", "toy", "--executor", "ray", "--address", cluster.address)
    study.wait_until(lambda: study.trained().total() > 20 and len(holders(study)) == 2, launcher)
    for kind in cluster.head_node.all_processes.values():
        for each in kind:
            each.process.kill()
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode not in (0, 2), err
    assert "the head of the Ray cluster does not answer" in err
    assert "hpo resume toy" in err
    study.run("resume", "toy")  # beside whatever workers still run on the nodes
    study.check_whole()


def test_what_is_no_cluster_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    toml = tmp_path / "a.toml"
    toml.write_text("")
    said = CliRunner().invoke(app, ["launch", str(toml), "--executor", "slurm"])
    assert said.exit_code == 2
    assert "needed --executor local or ray, got 'slurm'" in said.output
    assert [*tmp_path.iterdir()] == [toml]
