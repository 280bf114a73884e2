"""The judge of scenes reads drawn scenes exactly, and damage is seen."""

import json

import numpy as np
import pytest
import torch
from jaxtyping import Float

from grafting.data.scenes import COLOURS, TASKS, caption_of, draw_scene, paint, shape_masks
from grafting.errors import DataError, ProtocolError
from grafting.evaluation import ScenesEvaluation, ScenesSuite
from grafting.evaluation.scenes import NO_OBJECT, NOTHING, judge, read_scenes

COUNT = 300
SCENES = [draw_scene(i, caption=i) for i in range(COUNT + 7)]
PIXELS = np.stack([scene.image for scene in SCENES]).astype(float)


def as_images(pixels: Float[np.ndarray, "b 32 32 3"]) -> torch.Tensor:
    return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def figures(images: torch.Tensor) -> ScenesEvaluation:
    origin = {"sampling": {}, "num_images": len(images), "labels": "i", "weights_dtype": "float32"}
    evaluator = ScenesSuite().open(origin)()
    for start in range(0, len(images), 70):
        part = images[start : start + 70]
        evaluator.update(part, torch.arange(start, start + len(part)))
    return evaluator.result()


def blurred(pixels: np.ndarray, times: int) -> np.ndarray:
    for _ in range(times):
        p = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
        around = p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:]
        pixels = (p[:, 1:-1, 1:-1] + around) / 5
    return pixels


def noisy(levels: float) -> np.ndarray:
    return PIXELS[:COUNT] + levels * np.random.default_rng(1).standard_normal((COUNT, 32, 32, 3))


def crowds() -> np.ndarray:
    """Images of an object in every cell."""
    rng, colours = np.random.default_rng(2), np.array(list(COLOURS.values()), float)
    pixels = np.full((COUNT, 32, 32, 3), 96.0)
    for image in pixels:
        for r in range(4):
            for c in range(4):
                mask = shape_masks()[rng.integers(6)][..., None]
                image[r * 8 : r * 8 + 8, c * 8 : c * 8 + 8] = (
                    96 * (1 - mask) + colours[rng.integers(6)] * mask
                )
    return pixels


def test_the_layout_of_a_thousand_drawn_scenes_is_read_exactly():
    drawn = [draw_scene(seed) for seed in range(5000, 6000)]
    seen = read_scenes(torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in drawn]))
    assert np.array_equal(seen.cells, np.stack([scene.cells for scene in drawn]))
    assert seen.readable.all()
    assert seen.background.max() < 2
    verdicts = [
        judge(c, caption_of(s.caption), readable=True) for c, s in zip(seen.cells, drawn, strict=True)
    ]
    assert all(verdict.true and verdict.exact for verdict in verdicts)


# true, exact, twins and background, each with the room that a version of numpy's noise needs; scenes that are damaged
DAMAGE = {
    "none": (lambda: PIXELS[:COUNT], (1, 1, 1), (0, 1)),
    "noise of 8 levels": (lambda: noisy(8), (1, 1, 1), (4, 6)),
    "noise of 16 levels": (lambda: noisy(16), (0.80, 0.75, 0.79), (8, 11)),
    "blurred": (lambda: blurred(PIXELS[:COUNT], 1), (0.77, 0.69, 0.84), (3, 6)),
    "blurred three times": (lambda: blurred(PIXELS[:COUNT], 3), (0.35, 0.26, 0.63), (7, 12)),
    "half of another": (
        lambda: np.concatenate([PIXELS[6 : COUNT + 6, :, :16], PIXELS[:COUNT, :, 16:]], 2),
        (0.40, 0.0, 0.0),
        (18, 28),
    ),
    "another of the task": (lambda: PIXELS[6 : COUNT + 6], (0.07, 0.0, 0.45), (0, 1)),
    "another": (lambda: PIXELS[7:], (0.14, 0.01, 0.48), (0, 1)),
    "a crowd": (crowds, (0.54, 0.0, 0.03), (18, 28)),
    "one colour": (lambda: np.full((COUNT, 32, 32, 3), [230.0, 40, 40]), (0, 0, 0), (20, 28)),
    "blank": (lambda: np.full((COUNT, 32, 32, 3), 96.0), (0, 0, 0), (23, 25)),
    "uniform noise": (
        lambda: np.random.default_rng(3).uniform(0, 255, (COUNT, 32, 32, 3)), (0, 0, 0), (45, 65),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(name):
    make, shares, (low, high) = DAMAGE[name]
    found = figures(as_images(make()))
    for figure, expected in zip(("true", "exact", "twins"), shares, strict=True):
        room = 0 if expected == 1 else 0.04
        assert abs(getattr(found, figure) - expected) <= room, figure
    assert low <= found.background <= high


def scene_of(task: str):
    return next(scene for scene in SCENES if caption_of(scene.caption).task == task)


def verdict_of(cells: np.ndarray, caption: int):
    """The verdict on a drawing of this layout."""
    image = torch.from_numpy(paint(cells, np.random.default_rng(0))).permute(2, 0, 1)
    seen = read_scenes(image[None])
    assert np.array_equal(seen.cells[0], cells)
    return judge(seen.cells[0], caption_of(caption), readable=bool(seen.readable[0]))


def places(cells: np.ndarray, caption: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Cells of what is said, and of the twins."""
    said = {shape for shape, _ in caption_of(caption).said}
    found = [tuple(map(int, place)) for place in np.argwhere(cells[..., 0] >= 0)]
    return [p for p in found if cells[p][0] in said], [p for p in found if cells[p][0] not in said]


def empty_place(cells: np.ndarray) -> tuple[int, int]:
    r, c = np.argwhere(cells[..., 0] == NOTHING)[0]
    return int(r), int(c)


@pytest.mark.parametrize("task", TASKS)
def test_a_twin_recoloured_moved_removed_or_doubled_is_not_exact(task):
    scene = scene_of(task)
    _, (twin, _) = places(scene.cells, scene.caption)
    recoloured, moved, removed, doubled = (scene.cells.copy() for _ in range(4))
    recoloured[twin][1] = (recoloured[twin][1] + 1) % 6
    free = empty_place(scene.cells)
    moved[free], moved[twin] = moved[twin].copy(), NOTHING
    removed[twin] = NOTHING
    doubled[free] = doubled[twin]
    assert verdict_of(scene.cells, scene.caption).exact
    for cells in (recoloured, moved, removed, doubled):
        verdict = verdict_of(cells, scene.caption)
        assert verdict.true
        assert not verdict.exact
    assert [stands for _, stands in verdict_of(removed, scene.caption).twins] == [False]
    assert sorted(stands for _, stands in verdict_of(doubled, scene.caption).twins) == [False, True, True]


@pytest.mark.parametrize("task", TASKS)
def test_a_said_object_removed_makes_the_caption_untrue(task):
    scene = scene_of(task)
    said, _ = places(scene.cells, scene.caption)
    cells = scene.cells.copy()
    cells[said[0]] = NOTHING
    assert not verdict_of(cells, scene.caption).true


@pytest.mark.parametrize("task", TASKS)
def test_a_said_object_doubled_is_not_exact(task):
    scene = scene_of(task)
    said, _ = places(scene.cells, scene.caption)
    cells = scene.cells.copy()
    cells[empty_place(cells)] = cells[said[0]]
    verdict = verdict_of(cells, scene.caption)
    assert not verdict.exact
    assert verdict.true == (task != "counting")


@pytest.mark.parametrize("task", ["colour", "binding"])
def test_a_said_object_recoloured_makes_the_caption_untrue(task):
    scene = scene_of(task)
    said, _ = places(scene.cells, scene.caption)
    cells = scene.cells.copy()
    cells[said[0]][1] = (cells[said[0]][1] + 1) % 6
    assert not verdict_of(cells, scene.caption).true


def test_objects_that_change_places_make_a_relation_untrue():
    scene = scene_of("position")
    (a, b), _ = places(scene.cells, scene.caption)
    cells = scene.cells.copy()
    cells[[a[0], b[0]], [a[1], b[1]]] = cells[[b[0], a[0]], [b[1], a[1]]]
    assert verdict_of(scene.cells, scene.caption).true
    assert not verdict_of(cells, scene.caption).true


def test_of_an_unreadable_image_nothing_is_true():
    scene = scene_of("single")
    image = scene.image.copy()
    r, c = empty_place(scene.cells)
    image[r * 8 : r * 8 + 8, c * 8 : c * 8 + 8] = [230, 40, 40]  # a full cell is no object
    seen = read_scenes(torch.from_numpy(image).permute(2, 0, 1)[None])
    assert (seen.cells[0, r, c] == NO_OBJECT).all()
    verdict = judge(seen.cells[0], caption_of(scene.caption), readable=bool(seen.readable[0]))
    assert not verdict.true
    assert not any(stands for _, stands in verdict.twins)


def test_figures_have_intervals_and_stay_in_json():
    found = figures(as_images(noisy(16)))
    for name in ("exact", "true", "twins", "background"):
        low, value, high = (getattr(found, name + end) for end in ("_low", "", "_high"))
        assert low < value < high
    tasks = [getattr(found, f"true_{task}") for task in TASKS]
    assert found.true == pytest.approx(np.mean(tasks))
    assert ScenesEvaluation.model_validate(json.loads(found.model_dump_json())) == found


def test_without_unsaid_objects_twins_by_distance_are_not_defined():
    found = figures(as_images(np.full((COUNT, 32, 32, 3), 96.0)))
    assert (found.twins, found.twins_near, found.twins_apart, found.twins_far) == (0, None, None, None)


def test_what_cannot_be_judged_is_refused():
    suite = ScenesSuite()
    assert suite.faults(600, (3, 32, 32)) == []
    assert suite.faults(11, (1, 32, 32)) == [
        "images of [1, 32, 32]; scenes are [3, 32, 32]",
        "11 images; the judge of scenes needs at least 12, two of each task",
    ]
    origin = {"sampling": {}, "num_images": 12, "labels": "i", "weights_dtype": "float32"}
    evaluator = suite.open(origin)()
    with pytest.raises(ProtocolError, match="no image"):
        evaluator.result()
    images = as_images(PIXELS[:2])
    with pytest.raises(DataError, match="without the number of a caption"):
        evaluator.update(images, None)
    with pytest.raises(DataError, match=r"scenes are images of 8 bits .* found torch.float32"):
        evaluator.update(images.float(), torch.arange(2))
    with pytest.raises(DataError, match="caption 5400 is out of range"):
        evaluator.update(images, torch.tensor([0, 5400]))
    evaluator.update(images, torch.arange(2))
    with pytest.raises(ProtocolError, match="says 12 images; got only 2"):
        evaluator.result()


def test_remarks_say_what_was_read_and_mark_what_is_wrong():
    scene = scene_of("colour")
    caption = caption_of(scene.caption)
    (said,), (twin, other) = places(scene.cells, scene.caption)
    wrong = scene.cells.copy()
    wrong[said][1] = (wrong[said][1] + 1) % 6
    wrong[twin] = NOTHING
    images = [scene.image, paint(wrong, np.random.default_rng(0)), np.zeros((32, 32, 3), np.uint8)]
    drawn, damaged, blank = ScenesSuite().remarks(
        torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images]),
        torch.full((3,), scene.caption),
    )
    assert drawn.text.startswith("exact: ")
    assert f"{caption.slots[1]} {caption.slots[2]}" in drawn.text
    assert drawn.marks == ()
    assert damaged.text.startswith("not true: ")
    frames = {(round(x * 4), round(y * 4), w, h) for x, y, w, h in damaged.marks}
    assert frames == {(col, row, 0.25, 0.25) for row, col in (said, other)}
    assert blank == ("not true: nothing", ())
