"""Label regimes, and streams that are endless, fair and the same after a stop."""

import itertools
import random
from collections import Counter

import pytest

from training.sampling import (
    CycleSampler,
    assign_labels,
    build_streams,
    draw_budget,
    find_repeat_factors,
    hash_assignment,
    read_assignment,
    write_assignment,
)

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
    sampler = CycleSampler(build_streams(frames, "one_task", micro_batch), repeats, 0, 0, 30)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 30 * sampler.count_micro_batches(0) == 60 * repeats
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
    streams = build_streams(assignment, regime, 3)
    whole = list(CycleSampler(streams, 2, 0, 0, 12))
    halves = [list(CycleSampler(streams, 2, 0, *ends)) for ends in ((0, 5), (5, 12))]
    assert halves[0] + halves[1] == whole
    assert list(CycleSampler(streams, 2, 1, 0, 12)) != whole


def test_streams_bring_the_labels_of_their_regime():
    has = draw_labels()
    single = [("a",), ("b",), ("c",)]
    regimes = {"as_is": [NAMES] * 3, "symmetric": [NAMES], "one_task": single, "one_at_a_time": single}
    for regime, streams in regimes.items():
        sampler = CycleSampler(build_streams(assign_labels(has, regime, 0), regime, 2), 2, 0, 0, 1)
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


FRAMES = [f"scene{index % 7}/front_center/{index:09d}" for index in range(400)]


def draw_flags(share=0.6, seed=1):
    rng = random.Random(seed)
    return [rng.random() < share for _ in FRAMES]


def test_a_budget_draws_its_share_evenly_over_scenes_and_smaller_ones_are_part_of_larger_ones():
    has = {"a": draw_flags(0.6), "b": draw_flags(0.3), "c": draw_flags(0.9)}
    before = {name: set() for name in has}
    for share in (0.01, 0.1, 0.25, 0.5, 0.9, 1.0):
        found = draw_budget(FRAMES, has, {"a": share, "b": share}, 3)
        assert found["c"] == [index for index, there in enumerate(has["c"]) if there]  # without a budget all
        for name in ("a", "b"):
            kept, all_of_it = set(found[name]), [index for index, there in enumerate(has[name]) if there]
            assert len(kept) == max(1, round(share * len(all_of_it))) and kept <= set(all_of_it)
            assert before[name] <= kept
            before[name] = kept
            for scene in {FRAMES[index].partition("/")[0] for index in all_of_it}:
                members = [index for index in all_of_it if FRAMES[index].startswith(scene)]
                assert abs(len(kept & set(members)) - share * len(members)) < 2
    other = draw_budget(FRAMES, has, {"a": 0.25}, 4)
    assert other["a"] != draw_budget(FRAMES, has, {"a": 0.25}, 3)["a"]
    # what a task draws is no business of the others
    assert draw_budget(FRAMES, {"a": has["a"]}, {"a": 0.25}, 4)["a"] == other["a"]
    assert set(other["a"]) != set(draw_budget(FRAMES, {"z": has["a"]}, {"z": 0.25}, 4)["z"])


def test_an_assignment_is_written_and_read_again(tmp_path):
    has = {"a": draw_flags(), "b": draw_flags(0.2)}
    assignment = draw_budget(FRAMES, has, {"a": 0.3}, 0)
    path = tmp_path / "assignment.json"
    path.write_text(write_assignment(FRAMES, assignment))
    assert read_assignment(path, FRAMES, has) == assignment
    # written on another machine, whose frames come in another order
    order = list(range(len(FRAMES)))
    random.Random(0).shuffle(order)
    turned = read_assignment(
        path, [FRAMES[i] for i in order], {name: [flags[i] for i in order] for name, flags in has.items()}
    )
    assert {name: sorted(order[i] for i in indices) for name, indices in turned.items()} == assignment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("scene1", "scene77"), "are no training frames of this run, such as scene77/"),
        (lambda text: text.replace('"a"', '"x"'), "assigns labels of x, b, and the tasks are a, b"),
        (lambda text: text[:-30], "is no assignment of labels"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "format 9"),
        (lambda text: "[]", "is no assignment of labels"),
        (lambda text: text.replace("000000015", "000000008"), "frames are named twice, such as scene1/"),
    ],
)
def test_an_assignment_that_does_not_fit_is_refused(tmp_path, change, message):
    has = {"a": [True] * 50, "b": [True] * 50}
    path = tmp_path / "assignment.json"
    path.write_text(change(write_assignment(FRAMES[:50], {"a": list(range(50)), "b": [1, 8]})))
    with pytest.raises(ValueError, match=message):
        read_assignment(path, FRAMES[:50], has)
    with pytest.raises(ValueError, match=r"nothing\.json cannot be read: No such file"):
        read_assignment(tmp_path / "nothing.json", FRAMES, has)


def test_an_assignment_of_labels_that_are_not_there_is_refused(tmp_path):
    path = tmp_path / "assignment.json"
    path.write_text(write_assignment(FRAMES[:9], {"a": [3, 4]}))
    with pytest.raises(ValueError, match=r"a: 1 frames have no label of it, such as scene4/front_center/000000004"):
        read_assignment(path, FRAMES[:9], {"a": [index != 4 for index in range(9)]})


def test_rare_categories_are_drawn_as_often_as_their_factor_says():
    """f = 1/25 of the frames show "rare": sqrt(0.25 / 0.04) = 2.5 times as often as the others."""
    categories = [{"common", "rare"} if index % 25 == 0 else {"common"} for index in range(100)]
    factors = find_repeat_factors(categories, 0.25)
    assert factors == pytest.approx([2.5 if index % 25 == 0 else 1.0 for index in range(100)])
    assert find_repeat_factors([set(), {"x"}], 0.1) == [1.0, 1.0]
    streams = build_streams({"a": list(range(100))}, "one_task", 10, factors={"a": factors})
    sampler = CycleSampler(streams, 1, 0, 0, 1000)
    drawn = Counter(index for batch in sampler for index, _, _ in batch)
    rare = sum(drawn[index] for index in range(0, 100, 25))
    assert rare / 10000 == pytest.approx(4 * 2.5 / (4 * 2.5 + 96), rel=0.02)
    # in every epoch each frame comes its share of times, rounded up or down
    for epoch in range(5):
        times = Counter(
            index for batch in itertools.islice(sampler, 10 * epoch, 10 * epoch + 10) for index, _, _ in batch
        )
        assert all(times[index] in ((2, 3) if index % 25 == 0 else (0, 1)) for index in range(100))
    assert list(CycleSampler(streams, 1, 0, 500, 501)) == list(sampler)[500:501]


def test_streams_have_micro_batches_and_steps_of_their_own():
    assignment = {"a": [0, 1, 2], "b": [3, 4], "c": [5]}
    streams = build_streams(assignment, "as_is", {"a": 2, "b": 1, "c": 5}, {"b": (2, None), "c": (0, 3)})
    sampler = CycleSampler(streams, 1, 0, 0, 5)
    steps = [list(itertools.islice(iter(CycleSampler(streams, 1, 0, step, step + 1)), 9)) for step in range(5)]
    assert [[len(batch) for batch in step] for step in steps] == [[2, 5], [2, 5], [2, 1, 5], [2, 1], [2, 1]]
    brought = [{names for batch in step for _, _, names in batch} for step in steps]
    assert brought == [{("a", "c")}] * 2 + [{("a", "b", "c")}] + [{("a", "b")}] * 2
    assert [sampler.count_micro_batches(step) for step in range(5)] == [2, 2, 3, 2, 2] and sampler.find_fewest() == 2
    assert len(sampler) == 11 and [batch for step in steps for batch in step] == list(sampler)
    # a stream that rests does not change what it draws later
    always = CycleSampler(build_streams(assignment, "as_is", {"a": 2, "b": 1, "c": 5}), 1, 0, 4, 5)
    assert [[draw[:2] for draw in batch] for batch in list(always)[:2]] == [
        [draw[:2] for draw in batch] for batch in steps[4]
    ]
    none = build_streams({"a": [0]}, "symmetric", 1, {"a": (3, None)})
    assert CycleSampler(none, 1, 0, 0, 5).find_fewest() == 0


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_the_micro_batches_of_one(world, merge):
    streams = build_streams({"a": [0, 1, 2], "b": [3, 4], "c": [5]}, "one_task", {"a": 2, "b": 1, "c": 3})
    whole = list(CycleSampler(streams, 4, 0, 3, 6, merge))
    parts = [CycleSampler(streams, 4, 0, 3, 6, merge, rank, world) for rank in range(world)]
    dealt = [iter(part) for part in parts]
    again = []
    for step in range(3, 6):
        numbers = range(parts[0].count_micro_batches(step))
        assert sorted(number for part in parts for number in part.list_own(step)) == list(numbers)
        again += [next(dealt[number % world]) for number in numbers]
    assert again == whole and sum(map(len, parts)) == len(whole) == 3 * (4 if merge else 12)
    if merge:  # the same draws, in fewer micro-batches
        apart = [draw for batch in CycleSampler(streams, 4, 0, 3, 6) for draw in batch]
        assert Counter(draw for batch in whole for draw in batch) == Counter(apart)
        assert {len(batch) for batch in whole} == {6}
