"""Label regimes, and streams that are endless, fair and the same after a stop."""

import itertools
import random
from collections import Counter

import pytest

from training.sampling import CycleSampler, assign_labels, hash_assignment

NAMES = ("a", "b", "c")


def draw_labels(count=40, seed=0):
    rng = random.Random(seed)
    return {
        name: [rng.random() < share for _ in range(count)] for name, share in zip(NAMES, (0.9, 0.6, 0.3), strict=False)
    }


def list_draws(sampler, name):
    """Draws of the stream of one name, in order."""
    return [draw for batch in sampler for draw in batch if draw[2] == (name,)]


def test_which_labels_the_regimes_keep_but_for_one_task():
    has = draw_labels()
    indices = {name: [index for index, there in enumerate(flags) if there] for name, flags in has.items()}
    assert assign_labels(has, "as_is", 0) == assign_labels(has, "one_at_a_time", 0) == indices
    full = sorted(set.intersection(*map(set, indices.values())))
    assert full and assign_labels(has, "symmetric", 0) == dict.fromkeys(NAMES, full)


def test_one_task_gives_each_frame_one_of_its_own_labels():
    has = draw_labels()
    kept = assign_labels(has, "one_task", 0)
    assert all(has[name][index] for name in NAMES for index in kept[name])
    times = Counter(index for indices in kept.values() for index in indices)
    assert times == Counter(index for index in range(40) if any(has[name][index] for name in NAMES))
    assert assign_labels(has, "one_task", 0) == kept != assign_labels(has, "one_task", 1)


@pytest.mark.parametrize("seed", range(10))
def test_one_task_is_balanced_where_labels_allow_it(seed):
    kept = assign_labels({name: [True] * 31 for name in NAMES}, "one_task", seed)
    assert sorted(map(len, kept.values())) == [10, 10, 11]


@pytest.mark.parametrize("seed", range(40))
def test_one_task_never_leaves_a_rare_label_out(seed):
    has = {"a": [True] * 10, "b": [True] + [False] * 9}
    assert assign_labels(has, "one_task", seed)["b"] == [0]


def test_unknown_regimes_say_which_there_are():
    with pytest.raises(ValueError, match=r"'half': choose as_is, symmetric, one_task or one_at_a_time"):
        assign_labels(draw_labels(), "half", 0)


@pytest.mark.parametrize(("micro_batch", "repeats"), [(4, 1), (3, 2), (50, 1)])
def test_a_stream_draws_each_frame_once_an_epoch_in_ever_new_order(micro_batch, repeats):
    frames = {"a": [2, 3, 5, 7, 11, 13, 17], "b": [1]}
    sampler = CycleSampler(frames, "one_task", micro_batch, repeats, 0, 0, 30)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 30 * sampler.batches_per_step
    assert all(len(batch) == micro_batch for batch in batches)
    drawn = [index for index, _, _ in list_draws(sampler, "a")]
    assert len(drawn) == 30 * repeats * micro_batch
    epochs = [tuple(drawn[start : start + 7]) for start in range(0, len(drawn) - 6, 7)]
    assert all(sorted(epoch) == frames["a"] for epoch in epochs)
    assert len(set(epochs)) > 1
    assert {index for index, _, _ in list_draws(sampler, "b")} == {1}
    # a frame that comes again is augmented anew
    seeds = [seed for _, seed, _ in list_draws(sampler, "a")]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("regime", ["as_is", "symmetric", "one_task", "one_at_a_time"])
def test_a_resumed_run_draws_what_the_whole_one_would_have(regime):
    assignment = assign_labels(draw_labels(), regime, 0)
    whole = list(CycleSampler(assignment, regime, 3, 2, 0, 0, 12))
    halves = [list(CycleSampler(assignment, regime, 3, 2, 0, *ends)) for ends in ((0, 5), (5, 12))]
    assert halves[0] + halves[1] == whole
    assert list(CycleSampler(assignment, regime, 3, 2, 1, 0, 12)) != whole


def test_streams_bring_the_labels_of_their_regime():
    has = draw_labels()
    single = [("a",), ("b",), ("c",)]
    regimes = {"as_is": [NAMES] * 3, "symmetric": [NAMES], "one_task": single, "one_at_a_time": single}
    for regime, streams in regimes.items():
        sampler = CycleSampler(assign_labels(has, regime, 0), regime, 2, 2, 0, 0, 1)
        brought = [{names for _, _, names in batch} for batch in sampler]
        assert brought == [{names} for names in streams for _ in range(2)]


def test_the_fingerprint_tells_assignments_apart_and_not_their_order():
    assignment = {"a": [0, 1], "b": [1]}
    print_of = hash_assignment(["x", "y"], assignment)
    assert print_of == hash_assignment(["x", "y"], {"b": [1], "a": [0, 1]})
    assert print_of != hash_assignment(["x", "y"], {"a": [0], "b": [1]})
    assert print_of != hash_assignment(["x", "z"], assignment)


def test_one_task_starves_no_task_that_a_full_assignment_serves():
    """Three frames, three names: greedy choices can leave "c" without its only frame, or "b" without any."""
    has = {"a": [True, True, True], "b": [True, True, False], "c": [True, False, False]}
    for seed in range(20):
        found = assign_labels(has, "one_task", seed)
        assert {name: len(indices) for name, indices in found.items()} == {"a": 1, "b": 1, "c": 1}, seed


@pytest.mark.parametrize("seed", range(8))
def test_one_task_is_as_equal_as_the_labels_allow(seed):
    """The least and the greatest number of frames are those of the best of all assignments of a small set."""
    rng = random.Random(seed)
    has = {name: [rng.random() < share for _ in range(7)] for name, share in (("a", 0.9), ("b", 0.4), ("c", 0.3))}
    choices = [[name for name in has if has[name][index]] or [None] for index in range(7)]
    best = max(
        (sorted(given.count(name) for name in has) for given in itertools.product(*choices)),
    )
    found = assign_labels(has, "one_task", seed)
    assert sorted(map(len, found.values())) == best
    assert all(has[name][index] for name, indices in found.items() for index in indices)
