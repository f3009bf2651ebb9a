"""Arrays as a dataset file holds them."""

from __future__ import annotations

import numpy as np

HOPPER_SCORES = (-20.272305, 3234.3)


def make_arrays(num_steps=6, observation_dim=3, action_dim=2, terminals=(), timeouts=(), seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.standard_normal((num_steps, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (num_steps, action_dim)).astype(np.float32),
        "rewards": rng.standard_normal(num_steps).astype(np.float32),
        "terminals": np.zeros(num_steps, bool),
        "timeouts": np.zeros(num_steps, bool),
    }
    arrays["terminals"][list(terminals)] = True
    arrays["timeouts"][list(timeouts)] = True
    return arrays


def without(arrays, *keys):
    return {key: values for key, values in arrays.items() if key not in keys}


def rows(dataset):
    return [(episode.start, episode.stop) for episode in dataset.episodes]
