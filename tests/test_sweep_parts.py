"""Parts of a sweep that need no cluster: its settings, places, names and figure."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest

from tt_fast.config import TrainConfig
from tt_fast.plots import plot_sweep
from tt_fast.sweep.runner import Cluster, open_cluster
from tt_fast.sweep.trial import SweepConfig, Trial


def test_models_are_not_scored_while_they_train():
    with pytest.raises(ValueError, match=r"^train.eval_every: expected None in a sweep, got 5$"):
        SweepConfig(train=TrainConfig(eval_every=5))


def test_budgets_of_numpys_numbers_are_json():
    budgets = SweepConfig(train=TrainConfig(max_tokens=np.int64(9))).budgets()
    assert json.loads(json.dumps(budgets))["max_tokens"] == 9


def test_places_of_a_cluster():
    here = {"CPU": 8.0, "GPU": 2.0}
    assert Cluster().places(here) == 8
    assert Cluster(cpus_per_trial=3).places(here) == 2
    assert Cluster(gpus_per_trial=0.5).places(here) == 4
    assert Cluster(gpus_per_trial=2).places(here) == 1
    assert Cluster(workers=5).places(here) == 5
    assert Cluster().places({}) == 1  # a cluster that grows when it is asked


class FakeRay:
    """Remembers how it was started."""

    started = None

    def is_initialized(self):
        return False

    def init(self, **options):
        self.started = options

    def cluster_resources(self):
        return {"CPU": 6.0}

    def shutdown(self):
        self.started = None


def test_a_cluster_of_our_own_is_started_and_ended():
    ray = FakeRay()
    with open_cluster(ray, Cluster(workers=3, cpus_per_trial=2)) as places:
        assert places == 3
        assert ray.started["address"] == "local"
        assert ray.started["num_cpus"] == 6
        assert not ray.started["include_dashboard"]
        assert not ray.started["log_to_driver"]
    assert ray.started is None


def test_a_cluster_is_joined_by_its_address():
    ray = FakeRay()
    with open_cluster(ray, Cluster(address="auto", cpus_per_trial=4)) as places:
        assert places == 1
        assert ray.started["address"] == "auto"
        assert "num_cpus" not in ray.started
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # nobody listens there
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        message = f"^address: expected that of a Ray cluster, got '{address}': "
        with (
            pytest.raises(ConnectionError, match=message),
            open_cluster(ray, Cluster(address=address)),
        ):
            pass


def test_folders_of_names_with_slashes():
    assert Trial("mujoco/hopper/medium-v0", "", 3).folder == "mujoco-hopper-medium-v0-seed3"
    assert Trial("../x", "", 0).folder == "x-seed0"


def test_the_figure_has_a_row_a_dataset():
    figure = plot_sweep(["a", "b"], [10.0, 20.0], [1.0, None], [[9.0, 11.0], [20.0]], label="score")
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    dots = [line.get_xdata().tolist() for line in axes.lines if len(line.get_xdata()) > 1]
    assert dots == [[9.0, 11.0]]
    figure.canvas.draw()
    with pytest.raises(ValueError, match="names, std_errors, seed_means: expected 1 each"):
        plot_sweep(["a"], [1.0], [], [[1.0]], label="score")
