"""Folders of encoded prompts: what is written comes back by number, in any order and batch; damage is named."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from grafting.conditions import ClassLabels
from grafting.data.images import ImageSet
from grafting.data.latents import LatentsConfig, write_latents
from grafting.data.promptfolder import Prompt, write_prompts
from grafting.data.prompts import INDEX_NAME, Prompts, PromptsConfig, check_bound, read_index
from grafting.errors import DataError, RunError
from grafting.machine.files import sha256_of

TEXT, MASK, SIZE = "encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs.resolution"
LENGTHS = (5, 3, 7, 1, 7, 2, 4)
WORDS = ("a red ring", "zwei Kühe", "一只猫\n\u2028", "", '"quoted"', "six", "seven")


def prompt(number: int, length: int, words: str = "", **settings) -> Prompt:
    draw = torch.Generator().manual_seed(number)
    tensors = {
        TEXT: torch.randn(length, 4, generator=draw).bfloat16(),
        "pooled_projections": torch.randn(6, generator=draw),
        SIZE: torch.randint(0, 999, (2,), generator=draw),
    }
    return Prompt(words, tensors, **settings)


ROWS = [prompt(i, length, words) for i, (length, words) in enumerate(zip(LENGTHS, WORDS, strict=True))]
NULL = prompt(99, 2, "nothing")


def write(folder: Path, rows: list[Prompt] = ROWS, **settings) -> Path:
    """7 prompts and a null, in shards of two or more."""
    facts = {"source": "toy", "nulls": [NULL], "lengths": {TEXT: MASK}, "dropout": 0.1, "shard_bytes": 150}
    write_prompts(folder, iter(rows), **facts | settings)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts")


def at(prompts: Prompts, *numbers: int, dtype: torch.dtype = torch.float32) -> dict:
    asked = torch.tensor(numbers, dtype=torch.int64)
    return prompts.at(asked, shape=(4, 8, 8), device=torch.device("cpu"), dtype=dtype)


def test_prompts_come_back_padded_with_their_masks(folder: Path):
    prompts = Prompts(folder)
    assert len(prompts.index.shards) > 2
    found = at(prompts, 3, 0, 7, 1, 0)
    assert found.keys() == {TEXT, MASK, "pooled_projections", "added_cond_kwargs"}
    assert (found[TEXT].shape, found[MASK].dtype) == ((5, 5, 4), torch.bool)
    for place, row in enumerate((ROWS[3], ROWS[0], NULL, ROWS[1], ROWS[0])):
        length = len(row.tensors[TEXT])
        assert torch.equal(found[TEXT][place, :length], row.tensors[TEXT].float())
        assert found[TEXT][place, length:].eq(0).all()
        assert found[MASK][place].tolist() == [True] * length + [False] * (5 - length)
        assert torch.equal(found["pooled_projections"][place], row.tensors["pooled_projections"])
        assert torch.equal(found["added_cond_kwargs"]["resolution"][place], row.tensors[SIZE])


def test_floats_are_cast_and_nothing_else(folder: Path):
    found = at(Prompts(folder), 0, 1, dtype=torch.float16)
    assert found[TEXT].dtype == found["pooled_projections"].dtype == torch.float16
    assert found[MASK].dtype == torch.bool
    assert found["added_cond_kwargs"]["resolution"].dtype == torch.int64


def test_words_and_sizes(folder: Path):
    prompts = Prompts(folder)
    assert len(prompts) == 7
    assert tuple(prompts.words(number) for number in range(8)) == (*WORDS, "nothing")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_masks_that_prompts_have_keep_their_dtype(tmp_path: Path, dtype: torch.dtype):
    rows = [
        row._replace(tensors=row.tensors | {MASK: torch.ones(len(row.tensors[TEXT])).to(dtype)})
        for row in (*ROWS, NULL)
    ]
    given = at(Prompts(write(tmp_path / "given", rows[:-1], nulls=rows[-1:])), *range(8))
    made = at(Prompts(write(tmp_path / "made", mask_dtype=dtype)), *range(8))
    assert given[MASK].dtype == made[MASK].dtype == dtype
    assert torch.equal(given[MASK], made[MASK])
    assert given[MASK].sum(1).tolist() == [*LENGTHS, 2]


def test_tensors_of_one_length_are_stacked(tmp_path: Path):
    rows = [prompt(number, 3) for number in range(4)]
    prompts = Prompts(write(tmp_path, rows, nulls=[], lengths={}, dropout=0.0))
    found = at(prompts, 2, 1)
    assert MASK not in found
    assert torch.equal(
        found[TEXT], torch.stack([rows[2].tensors[TEXT], rows[1].tensors[TEXT]]).to(torch.float32)
    )
    assert prompts.nulls(torch.tensor([0])) is None


def test_single_numbers_and_arguments_that_are_lists(tmp_path: Path):
    caps = [torch.randn(length, 2) for length in (2, 4, 0)]
    rows = [
        Prompt(str(i), {"cap_feats[]": cap, "ratio": torch.tensor(0.5 + i)}) for i, cap in enumerate(caps)
    ]
    write_prompts(tmp_path, rows, source="toy")
    found = at(Prompts(tmp_path), 1, 2, 0)
    assert all(torch.equal(a, caps[i]) for a, i in zip(found["cap_feats"], (1, 2, 0), strict=True))
    assert found["ratio"].tolist() == [1.5, 2.5, 0.5]


def test_what_all_prompts_share_is_stored_once(tmp_path: Path):
    ids, text_ids = torch.randn(7, 3), torch.arange(6).view(2, 3)
    constants = {"txt_ids": text_ids, "guidance": 3.5, "added_cond_kwargs.scale": None, "sizes": (1, 2)}
    prompts = Prompts(write(tmp_path, common={"img.ids": ids}, constants=constants))
    found = at(prompts, 0, 1, dtype=torch.bfloat16)
    assert torch.equal(found["img"]["ids"], ids.bfloat16().expand(2, 7, 3))
    assert torch.equal(found["txt_ids"], text_ids)
    assert (found["guidance"], found["sizes"]) == (3.5, [1, 2])
    assert found["added_cond_kwargs"].keys() == {"resolution", "scale"}
    found["sizes"].append(3)
    assert at(prompts, 0)["sizes"] == [1, 2]


def test_one_null_for_all(folder: Path):
    prompts = Prompts(folder)
    assert prompts.nulls(torch.tensor([0, 6, 7])).tolist() == [7, 7, 7]


def test_several_nulls(tmp_path: Path):
    rows = [prompt(number, 2, str(number), null=number % 2) for number in range(5)]
    nulls = [prompt(50 + number, 2, f"nothing {number}") for number in range(2)]
    prompts = Prompts(write(tmp_path, rows, nulls=nulls))
    assert prompts.nulls(torch.tensor([4, 1, 0, 5, 6])).tolist() == [5, 6, 5, 5, 6]
    assert prompts.words(6) == "nothing 1"
    assert torch.equal(at(prompts, 6)["pooled_projections"][0], nulls[1].tensors["pooled_projections"])


def test_numbers_out_of_range(folder: Path, tmp_path: Path):
    message = r"prompt 8 is out of range in .*: prompts are 0\.\.6, the null prompt is 7"
    with pytest.raises(DataError, match=message):
        at(Prompts(folder), 0, 8)
    with pytest.raises(DataError, match="prompt -1 is out of range"):
        Prompts(folder).words(-1)
    without = Prompts(write(tmp_path / "without", nulls=[], dropout=0.0))
    with pytest.raises(DataError, match=r"prompts are 0\.\.6, without a null prompt"):
        at(without, 7)
    several = Prompts(write(tmp_path / "several", nulls=[NULL, NULL]))
    with pytest.raises(DataError, match=r"prompts are 0\.\.6, null prompts 7\.\.8"):
        several.nulls(torch.tensor([9]))


def test_dropout_is_of_the_index_or_asked_for(folder: Path, tmp_path: Path):
    assert Prompts(folder).dropout == 0.1
    assert Prompts(folder, dropout=0.0).dropout == 0.0
    assert PromptsConfig(folder=folder, dropout=0.3).load().dropout == 0.3
    with pytest.raises(DataError, match="dropout is a share of the prompts, from 0 to 1; found 1.5"):
        Prompts(folder, dropout=1.5)
    message = "prompts are dropped in a share of 0.1, but no prompt asks for nothing"
    with pytest.raises(DataError, match=message):
        write(tmp_path / "without", nulls=[])
    without = write(tmp_path / "without", nulls=[], dropout=0.0)
    with pytest.raises(DataError, match=message):
        Prompts(without, dropout=0.1)


def test_the_hash_is_of_the_content(folder: Path, tmp_path: Path):
    prompts = Prompts(folder)
    assert prompts.identity == {"name": "prompts", "sha256": prompts.sha256, "dropout": 0.1}
    assert Prompts(write(tmp_path / "again", dropout=0.2, source="other")).sha256 == prompts.sha256
    assert Prompts(folder.rename(tmp_path / "moved"), dropout=0.0).sha256 == prompts.sha256
    others = {
        "words": write(tmp_path / "words", [ROWS[0]._replace(words="a blue ring"), *ROWS[1:]]),
        "tensors": write(tmp_path / "tensors", [prompt(50, 5, WORDS[0]), *ROWS[1:]]),
        "order": write(tmp_path / "order", ROWS[::-1]),
        "constants": write(tmp_path / "constants", constants={"guidance": 3.5}),
        "common": write(tmp_path / "common", common={"ids": torch.zeros(3)}),
        "nulls": write(tmp_path / "nulls", nulls=[NULL, NULL]),
    }
    hashes = {name: Prompts(path).sha256 for name, path in others.items()}
    assert len({prompts.sha256, *hashes.values()}) == 1 + len(others)


def test_the_hash_of_a_folder_stays(tmp_path: Path):
    """Latents are bound to it: a version of this package that gives another would refuse them."""
    file = {"bytes": 8, "sha256": "ab" * 32}
    index = {
        "source": "toy",
        "count": 2,
        "num_nulls": 1,
        "columns": {TEXT: {"dtype": "bfloat16", "shape": [4], "ragged": True}},
        "shards": [{"file": "prompts-00000.safetensors", "count": 3, "lengths": {TEXT: 9}, **file}],
        "words": {"file": "words.jsonl", **file},
        "values": {"guidance": 3.5},
    }
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    assert read_index(tmp_path).sha256[:16] == "a1e1a72728889f2a"


def test_prompts_written_in_another_order_are_the_same(folder: Path, tmp_path: Path):
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = Prompts(write(tmp_path / "shuffled", [ROWS[number] for number in order], shard_bytes=400))
    prompts = Prompts(folder)
    ours, theirs = at(prompts, *order), at(shuffled, *range(7))
    for name in (TEXT, MASK, "pooled_projections"):
        assert torch.equal(ours[name], theirs[name])
    assert [prompts.words(number) for number in order] == [shuffled.words(number) for number in range(7)]


def test_threads_read_at_once(folder: Path):
    prompts = Prompts(folder)
    batches = torch.randint(8, (64, 5), generator=torch.Generator().manual_seed(0)).tolist()
    want = [at(Prompts(folder), *numbers) for numbers in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda numbers: at(prompts, *numbers), batches))
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a[TEXT], b[TEXT])
        assert torch.equal(a["added_cond_kwargs"]["resolution"], b["added_cond_kwargs"]["resolution"])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


FILES = ("prompts-00001.safetensors", "words.jsonl", "common.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "is missing"), (_cut, r"is cut short or changed: \d+ bytes, not \d+")],
)
def test_files_that_are_gone_or_cut_are_named_at_once(tmp_path: Path, name: str, damage, message: str):
    damage(write(tmp_path, common={"ids": torch.zeros(3)}) / name)
    with pytest.raises(DataError, match=rf"the prompts in .* are incomplete or damaged:\n  {name} {message}"):
        Prompts(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_files_that_changed_are_named_when_they_are_read(tmp_path: Path, name: str):
    _flip(write(tmp_path, common={"ids": torch.zeros(3)}) / name)
    with pytest.raises(DataError, match=f"{name} is damaged: its sha256 is not"):
        PromptsConfig(folder=tmp_path).load()
    prompts = Prompts(tmp_path)
    with pytest.raises(DataError, match=rf"{name} is damaged: its sha256 is not"):
        at(prompts, *range(8))
        prompts.words(0)


def test_all_damaged_files_are_named(folder: Path):
    prompts = Prompts(folder)
    (folder / "words.jsonl").unlink()
    _flip(folder / "prompts-00000.safetensors")
    with pytest.raises(DataError, match=r"00000.safetensors is damaged: .*\n  words.jsonl is missing"):
        prompts.check()


def test_a_shard_that_goes_while_it_is_in_use_is_named(folder: Path):
    prompts = Prompts(folder)
    at(prompts, *range(8))
    (folder / "prompts-00001.safetensors").unlink()
    with pytest.raises(DataError, match="prompts-00001.safetensors is missing"):
        at(prompts, *range(8))


def _edit(folder: Path, **facts: object) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps(index | facts))


def test_folders_without_a_sound_index(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match=f"no prompts in {tmp_path}"):
        Prompts(tmp_path)
    text = (folder / INDEX_NAME).read_text()
    for damaged in ("{", '{"source": "toy"}', text.replace('"words.jsonl"', '"../words.jsonl"'), "\x00"):
        (folder / INDEX_NAME).write_text(damaged)
        with pytest.raises(DataError, match=f"{INDEX_NAME} is not an index of prompts"):
            Prompts(folder)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"count": 8}, "shards do not hold as many prompts"),
        (
            {"columns": {TEXT: {"dtype": "float32", "shape": [4]}}},
            "do not say the lengths of its ragged columns",
        ),
        ({"values": {"os.path": 1, "os": 2}}, r"arguments without names of their own: \['os'\]"),
        ({"values": {"a b": 1}}, r"arguments without names of their own: \['a b'\]"),
    ],
)
def test_indexes_that_contradict_themselves(folder: Path, facts: dict, message: str):
    _edit(folder, **facts)
    with pytest.raises(DataError, match=message):
        read_index(folder)


def test_shards_and_words_of_another_index(folder: Path):
    columns = json.loads((folder / INDEX_NAME).read_text())["columns"]
    _edit(folder, columns=columns | {SIZE: {"dtype": "int32", "shape": [2]}})
    with pytest.raises(
        DataError, match=r"holds .*resolution I64 \(\d, 2\).* says .*resolution I32 \(\d, 2\)"
    ):
        at(Prompts(folder), 0)
    words = folder / "words.jsonl"
    for content, message in (
        ('{"words": "one"}\n', "has 1 lines, not 8"),
        ("{}\n" * 8, "line 1 is not words"),
    ):
        words.write_text(content)
        _edit(folder, words={"file": words.name, "bytes": len(content), "sha256": sha256_of(words)})
        with pytest.raises(DataError, match=f"words.jsonl:? {message}"):
            Prompts(folder).words(0)


def test_lengths_that_do_not_add_up(folder: Path):
    shards = json.loads((folder / INDEX_NAME).read_text())["shards"]
    path = folder / shards[0]["file"]
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = 8 + size + json.loads(content[8 : 8 + size])[f"lengths:{TEXT}"]["data_offsets"][0]
    content[start] += 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"00000.* is damaged: the lengths of {TEXT} do not add up"):
        at(Prompts(folder, verify=False), 0)


def refused(tmp_path: Path, rows: list[Prompt], message: str, **settings) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path, rows, **settings)
    assert not (tmp_path / INDEX_NAME).exists()


def test_unequal_lengths_without_a_mask_are_refused(tmp_path: Path):
    message = (
        r"prompt 1, 'zwei Kühe', cannot be stored:\n  encoder_hidden_states is bfloat16 \[3, 4\], and of the first prompt "
        r"bfloat16 \[5, 4\]: name its mask, `lengths=\{'encoder_hidden_states': MASK\}`"
    )
    refused(tmp_path, ROWS, message, lengths={})


def test_prompts_that_are_not_like_the_first_are_refused(tmp_path: Path):
    def changed(**tensors) -> list[Prompt]:
        return [*ROWS[:2], ROWS[2]._replace(tensors=ROWS[2].tensors | tensors)]

    pooled = ROWS[2].tensors["pooled_projections"]
    refused(
        tmp_path, changed(other=pooled), r"prompt 2, .*\n  it has .*other.*, and the first prompt encoder"
    )
    refused(tmp_path, changed(pooled_projections=pooled.half()), "pooled_projections is float16 .* float32")
    refused(tmp_path, changed(pooled_projections=pooled * float("nan")), "pooled_projections holds NaN")
    refused(tmp_path, changed(**{MASK: torch.ones(3)}), r"\[7, 4\] and its mask .* \[3\] differ in length")
    refused(
        tmp_path, changed(**{"added_cond_kwargs": pooled}), "without names of their own: added_cond_kwargs"
    )
    refused(tmp_path, [ROWS[0]._replace(null=1)], "its null is number 1, and there are 1, counted from 0")
    refused(tmp_path, ROWS, "it has no clip, of which a mask is declared", lengths={"clip": "clip_mask"})


def test_names_that_are_there_twice_are_refused(tmp_path: Path):
    twice = {"pooled_projections": 1}
    refused(tmp_path, ROWS, "without names of their own: pooled_projections", constants=twice)
    twice = {"common": {"a": torch.ones(1)}, "constants": {"a": 1}}
    refused(tmp_path, ROWS, "without names of their own: a, a", **twice)
    refused(tmp_path, ROWS, "a constant is not a tensor or a JSON value", constants={"a": object()})


def test_nothing_to_write(tmp_path: Path):
    refused(tmp_path, [], "no prompts to write")


def test_a_folder_of_prompts_is_not_written_over(folder: Path):
    with pytest.raises(RunError, match="holds prompts already: name another folder"):
        write(folder)
    at(Prompts(folder), *range(8))


def test_a_folder_that_was_given_up_is_written_anew(tmp_path: Path):
    with pytest.raises(DataError):
        write(tmp_path, [*ROWS, NULL._replace(null=5)])
    assert (tmp_path / "prompts-00001.safetensors").exists()
    assert torch.equal(at(Prompts(write(tmp_path)), 6)[TEXT][0], ROWS[6].tensors[TEXT].float())


def test_parts_of_a_buffer_may_be_given(tmp_path: Path):
    """A writer that keeps views would store what the buffer holds last."""
    buffer = torch.zeros(7, 4, dtype=torch.bfloat16)

    def rows():
        for row in ROWS:
            length = len(row.tensors[TEXT])
            buffer[:length] = row.tensors[TEXT]
            yield row._replace(tensors=row.tensors | {TEXT: buffer[:length]})

    write(tmp_path, rows())
    found = at(Prompts(tmp_path), *range(7))[TEXT]
    assert all(torch.equal(found[i, :n], ROWS[i].tensors[TEXT].float()) for i, n in enumerate(LENGTHS))


def latents(folder: Path, **settings):
    facts = {"source": "toy", "vae": "toy", "scale": 1.0, "num_classes": 7} | settings
    write_latents(folder, [(torch.zeros(2, 4, 2, 2), torch.tensor([0, 6]))], **facts)
    return LatentsConfig(folder=folder).load()


def test_latents_go_with_the_prompts_that_they_are_of(folder: Path, tmp_path: Path):
    prompts = Prompts(folder)
    bound = latents(tmp_path / "bound", conditions_sha256=prompts.sha256)
    check_bound(bound, prompts)
    check_bound(bound, Prompts(folder, dropout=0.0))
    other = Prompts(write(tmp_path / "other", ROWS[::-1]))
    message = (
        f"the latents in .* are of the prompts {prompts.sha256[:12]}, and the model is asked by the prompts "
        f"{other.sha256[:12]}: name those that the data were made for"
    )
    with pytest.raises(DataError, match=message):
        check_bound(bound, other)
    with pytest.raises(DataError, match="and the model is asked by class"):
        check_bound(bound, ClassLabels(7))


def test_data_of_no_prompts_goes_with_any(folder: Path, tmp_path: Path):
    images = ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), 2, 4)
    for data in (latents(tmp_path / "free"), images):
        check_bound(data, Prompts(folder))
        check_bound(data, ClassLabels(7))
