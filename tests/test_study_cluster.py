"""A study on a local Ray cluster of two nodes. Ray is large, hence not among the packages of development."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from softguard.study import load_grid, run_study
from softguard.study.workers import Task, open_workers, run_tasks
from tests.test_cli import refused
from tests.test_study import own_threads, timeless, tiny

__all__ = ["own_threads"]  # a fixture that runs by itself


def test_without_ray_the_address_is_one_clear_line(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = tiny(tmp_path, small_folder)
    line = refused(capsys, "study", recipe, "--out", tmp_path / "out", "--ray-address", "auto")
    assert "pip install ray" in line
    assert line == refused(capsys, "study", recipe, "--out", tmp_path / "out", "--ray-address", "auto", "--dry-run")
    assert "leave it out" in refused(capsys, "study", recipe, "--out", tmp_path, "--ray-address", "auto", "--workers", 2)


def test_a_cluster_that_is_not_there_is_one_clear_line_too(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # before the cluster below is there, which `auto` would find
    pytest.importorskip("ray", reason="Ray is not installed; pip install ray")
    line = refused(capsys, "study", tiny(tmp_path, small_folder), "--out", tmp_path / "out", "--ray-address", "auto")
    assert "no cluster could be joined" in line


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where a cluster of two nodes with one core each is found."""
    ray = pytest.importorskip("ray", reason="Ray is not installed; pip install ray")
    from ray.cluster_utils import Cluster

    os.environ.update(RAY_worker_niceness="0")  # at Ray's own, 15, workers hardly run beside anything else on a busy machine
    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def visit(folder: Path) -> None:
    import ray

    (folder / ray.get_runtime_context().get_node_id()).touch()
    time.sleep(3)


def test_tasks_go_to_both_nodes(address: str, tmp_path: Path) -> None:
    ended: list[str] = []
    with open_workers(1, address) as workers:
        run_tasks(
            [Task(str(i), partial(visit, tmp_path)) for i in range(4)], workers, lambda task, error, _: ended.append(error)
        )
    assert ended == [""] * 4
    assert len(list(tmp_path.iterdir())) == 2


def test_a_study_on_two_nodes_gives_the_table_of_one_machine(address: str, small_folder: Path, tmp_path: Path) -> None:
    recipe = tiny(tmp_path, small_folder)
    there = run_study(load_grid(recipe), tmp_path / "there", ray_address=address)
    assert timeless(there) == timeless(run_study(load_grid(recipe), tmp_path / "here"))
