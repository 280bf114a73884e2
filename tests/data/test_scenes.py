"""Scenes and their captions: pure functions of numbers, and lawful."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from grafting.conditions import ClassLabels
from grafting.contract import Conditions, TrainingData
from grafting.data import Captions, CaptionsConfig, Scenes, ScenesConfig, check_bound
from grafting.data.scenes import RELATIONS, TASKS, caption_of, draw_scene, mirrored
from grafting.errors import DataError, SettingsError


def test_every_caption_has_a_number_and_tasks_are_dealt_in_turn():
    captions = [caption_of(number) for number in range(len(Captions()))]
    assert [caption.task for caption in captions[:6]] == list(TASKS)
    found = {task: len(set(captions[k :: len(TASKS)])) for k, task in enumerate(TASKS)}
    assert found == {"single": 6, "two": 30, "counting": 24, "colour": 36, "position": 120, "binding": 900}


def test_captions_are_words():
    words = {caption_of(number).words for number in range(len(Captions()))}
    assert {
        "a ring",
        "a ring and a cross",
        "four crosses",
        "one bar",
        "a red ring",
        "a ring left of a cross",
    } <= words
    assert "a red ring and a blue cross" in words
    assert len(words) == 6 + 30 + 24 + 36 + 120 + 900
    assert Captions().words(len(Captions())) == ""


def test_scenes_of_a_seed_never_change():
    """What is published was measured on these."""
    drawn = [draw_scene(seed) for seed in [*range(60), 10**6, 2**40]]
    content = b"".join(scene.image.tobytes() + bytes([scene.caption % 251]) for scene in drawn)
    assert hashlib.sha256(content).hexdigest()[:16] == "51a07dedbe69aaf2"


def test_scenes_keep_their_laws():
    distances: Counter[tuple[int, int]] = Counter()
    for seed in range(300):
        scene = draw_scene(seed)
        caption, cells = caption_of(scene.caption), scene.cells
        assert caption.task == TASKS[seed % 6]
        said = {shape for shape, _ in caption.said}
        objects = [(r, c) for r in range(4) for c in range(4) if cells[r, c, 0] >= 0]
        unsaid = [place for place in objects if cells[place][0] not in said]
        assert len(objects) == len(caption.said) + 2
        assert len(unsaid) == 2
        assert unsaid[1] == mirrored(*unsaid[0])
        assert cells[unsaid[0]].tolist() == cells[unsaid[1]].tolist()
        distances[abs(unsaid[0][0] - unsaid[1][0]), abs(unsaid[0][1] - unsaid[1][1])] += 1
        for shape, colour in caption.said:
            standing = [cells[place][1] for place in objects if cells[place][0] == shape]
            assert len(standing) == (caption.count or 1)
            assert colour is None or standing == [colour]
        if caption.relation is not None:
            first, second = (
                next(p for p in objects if cells[p][0] == s) for s in (caption.shape, caption.other_shape)
            )
            lawful = {
                "left of": first[1] < second[1],
                "right of": first[1] > second[1],
                "above": first[0] < second[0],
                "below": first[0] > second[0],
            }
            assert lawful[RELATIONS[caption.relation]]
    assert set(distances) == {(1, 1), (1, 3), (3, 1), (3, 3)}
    assert min(distances.values()) > 40


def test_a_scene_can_be_drawn_by_another_caption():
    scene = draw_scene(7, caption=11)
    assert scene.caption == 11
    assert not np.array_equal(scene.image, draw_scene(7).image)


def test_as_training_data():
    data = ScenesConfig(seeds="10-12").load()
    assert isinstance(data, TrainingData)
    assert (len(data), data.num_classes) == (3, len(Captions()))
    x, numbers = data.batch(torch.tensor([2, 0]))
    assert numbers.tolist() == [draw_scene(12).caption, draw_scene(10).caption]
    assert torch.equal(
        ((x + 1) * 127.5).round().byte()[1].permute(1, 2, 0), torch.from_numpy(draw_scene(10).image)
    )


def test_as_conditions():
    captions = CaptionsConfig(dropout=0.2).load()
    assert isinstance(captions, Conditions)
    numbers = torch.tensor([0, 5])
    given = captions.at(numbers, shape=(3, 32, 32), device=torch.device("cpu"), dtype=torch.float64)
    tokens, mask = given["encoder_hidden_states"], given["encoder_attention_mask"]
    assert (tokens.shape, tokens.dtype, mask.tolist()) == ((2, 6, 32), torch.float64, [[1] * 6] * 2)
    assert torch.equal((tokens != 0).sum(-1), torch.full((2, 6), 2))
    assert captions.nulls(numbers).tolist() == [5400, 5400]
    null = captions.at(captions.nulls(numbers), shape=(), device=torch.device("cpu"), dtype=torch.float32)
    # the first caption, `a disc`, differs from none in one word
    assert (null["encoder_hidden_states"][0] != tokens[0]).any(-1).tolist() == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]


def test_unlike_captions_have_unlike_tokens():
    captions = Captions()
    numbers = torch.arange(len(captions))
    tokens = captions.at(numbers, shape=(), device=torch.device("cpu"), dtype=torch.float32)[
        "encoder_hidden_states"
    ]
    words = {}
    for number, row in zip(numbers.tolist(), tokens.flatten(1), strict=True):
        words.setdefault(captions.words(number), set()).add(row.numpy().tobytes())
    assert all(len(rows) == 1 for rows in words.values())
    assert len({row for rows in words.values() for row in rows}) == len(words)


@pytest.mark.parametrize("seeds", ["5-3", "0", "a-b", "-1-4", "0-99999999999999999999", ""])
def test_a_range_of_seeds_that_is_none(seeds):
    with pytest.raises(SettingsError, match=r"FIRST-LAST, such as 0-999999"):
        ScenesConfig(seeds=seeds)


@pytest.mark.parametrize("number", [-1, 5400])
def test_a_caption_that_does_not_exist(number):
    with pytest.raises(DataError, match=r"captions 0\.\.5399"):
        caption_of(number)


def test_scenes_are_bound_to_their_captions():
    check_bound(Scenes(range(3)), Captions(dropout=0.5))
    with pytest.raises(DataError, match="scenes are of the prompts .* asked by class"):
        check_bound(Scenes(range(3)), ClassLabels(5400))
