"""Categories of class-agnostic segments by majority vote."""

import numpy as np

from ldmseg_fast.metrics.class_vote import category_map, vote_categories
from ldmseg_fast.metrics.pq import PanopticQuality


def test_category_map_of_a_panoptic_map():
    ids = np.array([[0, 7, 7], [300, 4, 9]], np.int32)
    segments = [{"id": 300, "category_id": 2}, {"id": 7, "category_id": 5}, {"id": 4, "category_id": 5}]
    assert category_map(ids, segments).tolist() == [[0, 5, 5], [2, 5, 0]]
    assert category_map(ids, []).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_majority_ties_and_void():
    ids = np.array([[1, 1, 1, 2, 2, 3, 0]], np.int32)
    categories = np.array([[5, 5, 9, 9, 4, 0, 4]], np.int32)
    segments = [{"id": i, "category_id": 1, "score": 0.5} for i in (1, 2, 3)]
    voted_ids, voted = vote_categories(ids, segments, categories)
    assert voted_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0]]
    assert voted == [{"id": 1, "category_id": 5, "score": 0.5}, {"id": 2, "category_id": 4, "score": 0.5}]


def test_votes_of_the_ground_truth_make_a_perfect_map_perfect():
    rng = np.random.default_rng(0)
    ids = np.kron(rng.permutation(16).reshape(4, 4), np.ones((8, 8), int))
    truth = [{"id": i, "category_id": int(rng.integers(1, 4))} for i in range(1, 16)]
    agnostic = [{"id": i, "category_id": 1} for i in range(1, 16)]
    voted_ids, voted = vote_categories(ids, agnostic, category_map(ids, truth))
    stat = PanopticQuality([{"id": i, "isthing": 1} for i in (1, 2, 3)])
    stat.add(ids, truth, voted_ids, voted)
    assert stat.compute()["All"]["pq"] == 1.0
