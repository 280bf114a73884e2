"""GenEval's rules on made-up detections, its folders, and the wiring of tiny random models."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from grafting.cli import app
from grafting.errors import CheckpointError, DataError
from grafting.evaluation.geneval import TAGS, GenevalEvaluator, GenevalSuite
from grafting.evaluation.geneval_folder import open_folder, write_folder
from grafting.evaluation.geneval_rules import CLASSES, Detection, Prompt, PromptFile, judge, relations
from grafting.evaluation.protocol import Identity, Protocol
from grafting.sampling.files import open_samples, write_samples

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "cat", "count": 1}],
     "prompt": "a photo of a bench and a cat"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
     "prompt": "a photo of two cats"},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"},
    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cat", "count": 1, "position": ["left of", 0]}],
     "prompt": "a photo of a cat left of a dog"},
    {"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"},
                                      {"class": "bowl", "count": 1, "color": "blue"}],
     "prompt": "a photo of a red cup and a blue bowl"},
]  # fmt: skip


def prompt(number: int) -> Prompt:
    return Prompt.model_validate(LINES[number])


def seen(name: str, score: float = 0.99, box: tuple[float, ...] = (0.0, 0.0, 10.0, 10.0)) -> Detection:
    return Detection(name, score, box)


def no_colours(name, objects):
    raise AssertionError("no colour is asked for")


@pytest.mark.parametrize(
    ("number", "found", "reasons"),
    [
        (0, [seen("bench", 0.31)], ()),
        (0, [seen("bench", 0.3)], ("expected bench>=1, found 0",)),  # the threshold itself is not enough
        (0, [seen("cat")], ("expected bench>=1, found 0",)),
        (0, [seen("bench"), seen("bench"), seen("cat")], ()),  # more than asked for does not matter
        (2, [seen("bench"), seen("cat", 0.5)], ()),
        (2, [seen("cat")], ("expected bench>=1, found 0",)),
        (3, [seen("cat"), seen("cat", 0.91)], ()),
        (
            3,
            [seen("cat"), seen("cat", 0.9)],
            ("expected cat>=2, found 1",),
        ),  # where counted, 0.9 is the threshold
        (3, [seen("cat")] * 3, ("expected cat<3, found 3",)),
        (3, [seen("cat")] * 2 + [seen("cat", 0.8)], ()),
    ],
)
def test_objects_and_numbers(number, found, reasons):
    verdict = judge(found, prompt(number), no_colours)
    assert verdict.reasons == reasons
    assert verdict.correct == (not reasons)


def test_only_the_surest_are_looked_at():
    verdict = judge([seen("bench", 0.5 + 0.01 * i) for i in range(20)], prompt(0), no_colours)
    scores = [found.score for found in verdict.found["bench"]]
    assert len(scores) == 16
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] == pytest.approx(0.54)


def test_the_colour_of_the_surest_object_counts():
    found = [seen("cup", 0.6), seen("cup", 0.9, (20.0, 0.0, 30.0, 10.0))]

    def colours(name, objects):
        assert name == "cup"
        return ["red" if d.score > 0.8 else "blue" for d in objects]

    assert judge(found, prompt(4), colours).correct
    assert judge([seen("cup", 0.7)], prompt(4), colours).reasons == ("expected red cup>=1, found 1 blue",)


def test_two_objects_have_their_own_colours():
    found = [seen("cup"), seen("bowl")]
    assert judge(found, prompt(6), lambda name, objects: ["red" if name == "cup" else "blue"]).correct
    swapped = judge(found, prompt(6), lambda name, objects: ["blue" if name == "cup" else "red"])
    assert swapped.reasons == ("expected red cup>=1, found 1 blue", "expected blue bowl>=1, found 1 red")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}),
        ((50, 0, 60, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 40, 10, 50), {"above"}),
        ((0, 40, 10, 50), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        (
            (0, 0, 10, 10),
            (2, 0, 12, 10),
            set(),
        ),  # an offset of a tenth of both sizes together has no direction
        ((0, 0, 10, 10), (2.5, 0, 12.5, 10), set()),  # 0.5 left of 2.5: less than half of the offset
        ((0, 0, 10, 10), (5, 0, 15, 10), {"left of"}),  # 3 left of 5
        ((0, 0, 10, 10), (30, 30, 40, 40), {"left of", "above"}),
        ((0, 0, 10, 10), (30, 12, 40, 22), {"left of"}),  # 28 and 10 of 32.3: the second is too little
    ],
)
def test_relations(a, b, expected):
    assert relations([float(x) for x in a], [float(x) for x in b]) == expected


def test_position_is_judged_against_every_object_found():
    dog = seen("dog", box=(50.0, 0.0, 60.0, 10.0))
    cat = seen("cat")
    assert judge([dog, cat], prompt(5), no_colours).correct
    wrong = judge([dog, seen("cat", box=(80.0, 0.0, 90.0, 10.0))], prompt(5), no_colours)
    assert wrong.reasons == ("expected cat left of target, found right of",)
    over = judge([dog, seen("cat", box=dog.box)], prompt(5), no_colours)
    assert over.reasons == ("expected cat left of target, found no direction",)
    alone = judge([cat], prompt(5), no_colours)
    assert alone.reasons == ("expected dog>=1, found 0", "no target for cat to be left of")


def test_classes_are_cocos_in_their_order():
    assert len(set(CLASSES)) == 80
    assert [CLASSES[i] for i in (0, 13, 15, 41, 64, 65, 66, 79)] == [
        "person", "bench", "cat", "cup", "computer mouse", "tv remote", "computer keyboard", "toothbrush",
    ]  # fmt: skip


@pytest.fixture
def prompts(tmp_path: Path) -> PromptFile:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return PromptFile.read(path)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({**LINES[0], "tag": "poetry"}, "line 1 is not a prompt: tag"),
        ({**LINES[0], "include": [{"class": "unicorn", "count": 1}]}, "line 1: no class 'unicorn'"),
        ({**LINES[4], "include": [{"class": "cup", "count": 1, "color": "mauve"}]}, "no colour 'mauve'"),
        ({**LINES[5], "include": LINES[5]["include"][1:]}, "position names object 0"),
        ("not JSON", "line 1 is not a prompt: Invalid JSON"),
    ],
)
def test_a_file_of_other_prompts_is_refused(tmp_path, line, fault):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(DataError, match=fault):
        PromptFile.read(path)


def evaluator_of(prompts: PromptFile, verdicts: dict[int, list[bool]]) -> GenevalEvaluator:
    """An evaluator that was given an image for each verdict, by prompt; the first pixel says what is found in it."""
    labels = [number for number, right in verdicts.items() for _ in right]
    right = [value for values in verdicts.values() for value in values]
    origin = {"sampling": {}, "num_images": len(labels), "labels": "in turn", "weights_dtype": "float32"}
    identity = Identity(name="made up", sha256="0")

    def detect(images):
        everything = [
            seen(name, box=(60.0, 0.0, 70.0, 10.0) if name == "dog" else (0.0, 0.0, 10.0, 10.0))
            for name in ("bench", "cat", "cat", "cup", "bowl", "dog")
        ]
        return [everything if image[0, 0, 0] else [] for image in images]

    made = GenevalEvaluator(
        detect,
        lambda image, name, objects: ["red" if name == "cup" else "blue"] * len(objects),
        prompts,
        Protocol.of(identity, identity, **origin),
    )
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    images[torch.tensor(right), 0, 0, 0] = 1
    made.update(images, torch.tensor(labels))
    return made


def test_the_score_is_the_mean_over_tasks(prompts):
    right = {0: [True, True], 1: [True, False], 2: [True, False], 3: [False, False], 4: [True, True], 5: [True, False],
             6: [False, True]}  # fmt: skip
    result = evaluator_of(prompts, right).result()
    shares = {
        "single_object": 0.75,
        "two_object": 0.5,
        "counting": 0.0,
        "colors": 1.0,
        "position": 0.5,
        "color_attr": 0.5,
    }
    assert {tag: getattr(result, f"geneval_{tag}") for tag in TAGS} == shares
    assert result.geneval == pytest.approx(sum(shares.values()) / 6)
    assert result.geneval_low < result.geneval < result.geneval_high
    assert any("4 images" in note for note in result.notes)
    assert any("mmdet" in note for note in result.notes)


def test_influences_are_the_change_of_a_figure_with_the_weight_of_an_image(prompts):
    right = {0: [True, True, False], 1: [True, False], 2: [True, False], 3: [False, True], 4: [True, True], 5: [True, False],
             6: [False, True]}  # fmt: skip
    evaluator = evaluator_of(prompts, right)
    per_image, n = evaluator.per_image(), evaluator.num_images
    scores = torch.tensor([v.correct for v in evaluator.verdicts]).double()
    tags = per_image.strata

    def weighted(weights):
        return sum(
            (weights * scores)[tags == t].sum() / weights[tags == t].sum() for t in tags.unique()
        ) / len(TAGS)

    step = 1e-6
    for image in range(n):
        weights = torch.ones(n, dtype=torch.float64)
        weights[image] += step
        change = (weighted(weights) - weighted(torch.ones(n, dtype=torch.float64))) / step * n
        assert float(per_image.influences["geneval"][image]) == pytest.approx(float(change), abs=1e-4)


def test_without_all_tasks_there_is_no_score(prompts):
    result = evaluator_of(prompts, {0: [True], 4: [True, False]}).result()
    assert result.geneval is None
    assert (result.geneval_single_object, result.geneval_colors, result.geneval_counting) == (1.0, 0.5, None)


def test_results_have_the_official_form(prompts):
    line = evaluator_of(prompts, {3: [True, False]}).details()[1]
    assert line["tag"] == "counting"
    assert line["correct"] is False
    assert line["reason"] == "expected cat>=2, found 0"
    assert json.loads(line["metadata"]) == LINES[3]
    assert json.loads(line["details"]) == {}


def test_official_folders_hold_the_same_images(tmp_path, prompts):
    images = torch.randint(0, 256, (6, 3, 8, 12), dtype=torch.uint8)
    labels = torch.tensor([3, 0, 3, 6, 0, 0])
    path = tmp_path / "samples.npz"
    write_samples(path, [(images, labels)], num_images=6, shape=(3, 8, 12), origin=ORIGIN)
    write_folder(tmp_path / "images", open_samples(path), prompts)
    assert json.loads((tmp_path / "images/00003/metadata.jsonl").read_text()) == LINES[3]
    assert len(list((tmp_path / "images/00000/samples").iterdir())) == 3
    again = open_folder(tmp_path / "images")
    order = labels.argsort(stable=True)
    read, numbers = map(torch.cat, zip(*again.batches(4), strict=True))
    assert torch.equal(read, images[order])
    assert torch.equal(numbers, labels[order])
    with pytest.raises(DataError, match="exists"):
        write_folder(tmp_path / "images", open_samples(path), prompts)
    write_samples(path, [(images, labels + 1)], num_images=6, shape=(3, 8, 12), origin=ORIGIN)
    with pytest.raises(DataError, match="prompts 0 to 6"):
        write_folder(tmp_path / "others", open_samples(path), prompts)
    assert not (tmp_path / "others").exists()


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A tiny random Mask2Former and CLIP, as folders."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    for name, classes in (("detector", 80), ("other", 5)):
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone, hidden_dim=32, mask_feature_size=32, feature_size=32, encoder_layers=1, decoder_layers=2,
            num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16, num_queries=6, num_labels=classes,
        )  # fmt: skip
        transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / name)
        size = {"shortest_edge": 64, "longest_edge": 96}
        transformers.Mask2FormerImageProcessor(size=size).save_pretrained(folder / name)
    common = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {
        "vocab_size": 40,
        "max_position_embeddings": 16,
        "bos_token_id": 3,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    clip = transformers.CLIPConfig(
        text_config=common | words,
        vision_config=common | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(clip).save_pretrained(folder / "clip")
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(folder / "clip")
    names = ["<pad>", "</s>", "<unk>", "<s>", "a", "photo", "of", "red", "blue", "cup"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(names)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    ).save_pretrained(folder / "clip")
    return folder


def test_random_networks_from_end_to_end(tmp_path, prompts, networks):
    images = torch.randint(0, 256, (14, 3, 48, 64), dtype=torch.uint8)
    path = tmp_path / "samples.npz"
    write_samples(path, [(images, torch.arange(14) % 7)], num_images=14, shape=(3, 48, 64), origin=ORIGIN)
    words = ["evaluate", str(path), "--suite", "geneval", "--set", f"prompts={prompts.path}"]
    words += ["--set", f"detector={networks / 'detector'}", "--set", f"colours={networks / 'clip'}"]
    details = tmp_path / "results.jsonl"
    run = CliRunner().invoke(app, [*words, "--json", "--details", str(details)])
    assert run.exit_code == 0, run.output
    figures = json.loads(run.stdout)
    lines = [json.loads(line) for line in details.read_text().splitlines()]
    assert len(lines) == 14
    by_task = {tag: [line["correct"] for line in lines if line["tag"] == tag] for tag in TAGS}
    shares = [sum(right) / len(right) for right in by_task.values()]
    assert figures["geneval"] == pytest.approx(sum(shares) / 6)
    assert lines[0]["filename"] == f"{path}:0"


def test_masks_and_colours_of_random_networks(networks):
    from grafting.evaluation.geneval_vision import ColourReader, Detector, _instances

    detector = Detector(str(networks / "detector"))
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    assert len(detector(images)) == 2
    classes = torch.full((2, 81), -9.0)
    classes[0, 41], classes[1, 15] = 9.0, 9.0
    masks = torch.full((2, 48, 64), -8.0)
    masks[0, 5:20, 10:30], masks[1, 0:4, 0:8] = 8.0, 8.0
    cup, cat = _instances(classes, masks)
    assert {(d.name, d.box) for d in (cup, cat)} == {
        ("cup", (10.0, 5.0, 30.0, 20.0)), ("cat", (0.0, 0.0, 8.0, 4.0)),
    }  # fmt: skip
    assert min(cup.score, cat.score) > 0.99
    reader = ColourReader(str(networks / "clip"))
    red = torch.zeros(3, 48, 64, dtype=torch.uint8)
    colours = reader(red, "cup", [cup, cat])
    assert len(colours) == 2
    assert set(colours) <= {
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "pink",
        "brown",
        "black",
        "white",
    }


def test_a_detector_of_other_classes_is_refused(networks, prompts):
    suite = GenevalSuite(
        prompts=str(prompts.path), detector=str(networks / "other"), colours=str(networks / "clip")
    )
    with pytest.raises(CheckpointError, match="tells 5 classes apart"):
        suite.identity()
    missing = GenevalSuite(prompts=str(prompts.path), detector=str(networks / "nowhere"), colours="")
    with pytest.raises(CheckpointError, match="nowhere"):
        missing.identity()


class Words:
    """Conditions of which only the words matter."""

    dropout, identity, nulls, at = 0.0, {}, len, len

    def __init__(self, words):
        self.said = words

    def __len__(self):
        return len(self.said)

    def words(self, number):
        return self.said[number]


def test_conditions_are_the_prompts_of_the_file(prompts):
    suite = GenevalSuite(prompts=str(prompts.path))
    said = [line["prompt"] for line in LINES]
    assert suite.misfits(Words(said)) == []
    assert "7 prompts" in suite.misfits(Words(said[1:]))[0]
    assert "line 1" in suite.misfits(Words(["a photo of a dog", *said[1:]]))[0]


ORIGIN = {"sampling": {}, "labels": "in turn", "weights_dtype": "float32"}
