"""The scripts on a dask.distributed cluster: a real scheduler with two worker processes."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from raw_scenes import write_raw_set
from script_runs import SCRIPTS, read_tree, run

from a2d2.calibration import load_calibration
from a2d2.classes import CLASSES, class_colour
from a2d2.derive import look_up_classes
from preprocessing._cluster import ClusterError, map_units

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as running:
        yield running


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw_set(tmp_path_factory.mktemp("raw"))


def test_all_scripts_write_what_the_local_pool_writes(cluster, raw, tmp_path):
    for script in SCRIPTS:
        code, printed = run(script, raw, tmp_path / "cluster", "--cluster", cluster.scheduler_address)
        assert code == 0 and "8 done, 0 skipped, 0 missing input, 0 failed" in printed, printed
        assert run(script, raw, tmp_path / "pool")[0] == 0
    assert read_tree(tmp_path / "cluster") == read_tree(tmp_path / "pool")
    assert "0 done, 8 skipped" in run("camera", raw, tmp_path / "pool", "--cluster", cluster.scheduler_address)[1]


def find_process(unit):
    return os.getpid()


def test_units_go_to_both_workers(cluster):
    results = dict(map_units(find_process, range(40), cluster.scheduler_address))
    assert set(results) == set(range(40))
    assert len(set(results.values())) == 2 and os.getpid() not in results.values()


def die_or_square(number, victim):
    if number == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        raise ValueError("four")
    return number * number


def test_a_frame_that_kills_its_workers_is_named_and_the_others_done(cluster):
    results = dict(map_units(partial(die_or_square, victim=3), range(10), cluster.scheduler_address))
    assert isinstance(results[3], ClusterError) and "killed every worker" in str(results[3])
    assert isinstance(results[4], ValueError) and str(results[4]) == "four"
    assert all(results[number] == number * number for number in (0, 1, 2, 5, 6, 7, 8, 9))


def test_nobody_at_the_address_is_one_line(raw, tmp_path):
    code, printed = run("camera", raw, tmp_path, "--cluster", "tcp://127.0.0.1:9")
    assert code == 1 and "no dask scheduler responds at 'tcp://127.0.0.1:9'" in printed and "dask worker" in printed


def test_threads_of_one_worker_do_not_mix_their_labels(raw):
    """By default `dask worker` runs several threads in one process."""
    (camera,) = load_calibration(raw / "cams_lidars.json").cameras.values()
    camera = camera.resize((1024, 640))
    width, height = camera.recorded_size
    labels = [np.full((height, width, 3), class_colour(name), np.uint8) for name in CLASSES]
    alone = [look_up_classes(label, camera)[0] for label in labels]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda label: look_up_classes(label, camera)[0], 5 * labels))
    assert all(np.array_equal(found, wanted) for found, wanted in zip(together, 5 * alone, strict=True))
