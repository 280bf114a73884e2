"""Prompts encoded by a pipeline: what is stored is what the pipeline passes, and the folder is a table of conditions."""

import json
import logging

import pytest
import torch
from typer.testing import CliRunner

from grafting import Prompts
from grafting.cli import app
from grafting.errors import CheckpointError, DataError, HostError, RunError
from grafting.hosts import host_of
from grafting.hosts._grids import pack
from grafting.latents.capture import _equal, first_step, watch
from grafting.latents.prompting import Prompting, PromptingConfig, open_encoders, read_words
from latents.morepipelines import MORE
from latents.textpipelines import ALL, pixart, sd3, wan

WORDS = ["a red cat", "a blue dog on the mat", "three trees beside the sea", "sun"]
CPU = torch.device("cpu")


def encoded(pipe, folder, words=WORDS, **settings):
    config = PromptingConfig(**{"shard_size": 2, **settings})
    work = Prompting(pipe, words, folder, config, source="words")
    for _ in work.steps():
        pass
    return Prompts(folder)


def printed(*arguments):
    """A command's output on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def batch(prompts, numbers):
    return prompts.at(torch.tensor(numbers), shape=(4, 8, 8), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("name", ALL)
def test_rows_give_the_output_that_the_pipelines_own_arguments_give(name, tmp_path):
    pipe = ALL[name]()
    prompts = encoded(pipe, tmp_path / "prompts")
    host = host_of(pipe.transformer)
    x = torch.randn(
        1, *([4, 3, 8, 8] if name == "wan" else [4, 8, 8]), generator=torch.Generator().manual_seed(3)
    )
    t = torch.tensor([500.0 if host.time_scale == 1000 else 0.5])
    bins = {"use_resolution_binning": False} if name == "pixart" else {}
    calls = first_step(pipe, prompt=WORDS[1], **bins)
    own = [call[key] for call in calls for key in ("encoder_hidden_states", "cap_feats[]") if key in call]
    rows = [row for value in own for row in value]
    place = 1 if name in ("pixart", "sd3") else 0
    null = {"pixart": 0, "sd3": 0, "wan": 1, "lumina2": 1, "zimage": 1}.get(name)
    given = batch(prompts, [1])
    found = given.get("encoder_hidden_states", given.get("cap_feats"))[0]
    assert torch.equal(found, rows[place][: len(found)])
    if null is None:
        assert prompts.nulls(torch.tensor([1])) is None
        assert prompts.dropout == 0
    else:
        none = batch(prompts, [len(WORDS)])
        found = none.get("encoder_hidden_states", none.get("cap_feats"))[0]
        assert torch.equal(found, rows[null][: len(found)])
        assert prompts.nulls(torch.tensor([1])).tolist() == [len(WORDS)]
        assert prompts.dropout == 0.1
    # a padded prompt in a batch of unlike ones gives what it gives alone, and what the pipeline's own arguments give
    with torch.no_grad():
        alone = host.predict(pipe.transformer, x, t, given)
        both = host.predict(
            pipe.transformer, x.repeat(2, *[1] * (x.ndim - 1)), t.repeat(2), batch(prompts, [1, 3])
        )
    torch.testing.assert_close(both[:1], alone, atol=2e-5, rtol=1e-4)


def test_a_prompt_is_cut_to_its_own_length_only_where_that_changes_nothing(tmp_path):
    lengths = {}
    for name in ("pixart", "wan"):
        prompts = encoded(ALL[name](), tmp_path / name)
        lengths[name] = [len(batch(prompts, [n])["encoder_hidden_states"][0]) for n in range(4)]
    assert lengths["pixart"] == [4, 7, 6, 2]  # words, and the token that ends them
    assert len(set(lengths["wan"])) == 1
    assert lengths["wan"][0] > 7


@pytest.fixture(scope="module")
def qwen():
    """It passes a mask where prompts of unlike lengths are encoded together, and none where one is alone."""
    return MORE["qwen"]()


def test_a_prompt_whose_pipeline_passes_no_mask_gives_alone_and_padded_what_the_pipeline_gives(
    qwen, tmp_path
):
    prompts = encoded(qwen, tmp_path / "prompts")
    host, x, t = host_of(qwen.transformer), torch.randn(1, 4, 8, 12), torch.tensor([0.5])
    together = batch(prompts, [0, 1, 2, 3, len(WORDS)])
    assert together["encoder_hidden_states_mask"].sum(1).tolist() == [7, 10, 9, 5, 4]
    with torch.no_grad():
        padded = host.predict(qwen.transformer, x.expand(5, *x.shape[1:]), t.expand(5), together)
        for i, words in enumerate(WORDS):
            given = batch(prompts, [i])
            calls = first_step(qwen, prompt=words, negative_prompt=" ", height=64, width=96)
            own = {name: calls[0][name] for name in ("encoder_hidden_states", "img_shapes")}
            assert given.keys() == {"encoder_hidden_states"}
            assert torch.equal(given["encoder_hidden_states"], own["encoder_hidden_states"])
            alone = host.predict(qwen.transformer, x, t, given)
            packed = pack(x, 2)
            of_pipeline = qwen.transformer(hidden_states=packed, timestep=t, return_dict=False, **own)[0]
            assert torch.equal(pack(alone, 2), of_pipeline)
            torch.testing.assert_close(padded[i : i + 1], alone, atol=2e-6, rtol=1e-5)
    null = batch(prompts, [len(WORDS)])["encoder_hidden_states"]
    assert torch.equal(null, calls[1]["encoder_hidden_states"])


def otherwise(qwen, change):
    """That pipeline, which passes what it encodes otherwise: `change` takes and returns embeddings [B, T, C] and a mask."""

    class Pipeline(type(qwen)):
        def encode_prompt(self, *args, **kwargs):
            return change(*super().encode_prompt(*args, **kwargs))

    pipe = Pipeline(**qwen.components)
    pipe.prompt_template_encode = qwen.prompt_template_encode
    pipe.prompt_template_encode_start_idx = qwen.prompt_template_encode_start_idx
    return pipe


def padded_to_eights(embeds, mask):
    full = embeds.new_zeros(len(embeds), -(-embeds.shape[1] // 8) * 8, embeds.shape[2])
    full[:, : embeds.shape[1]] = embeds
    seen = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
    seen = torch.cat([seen, seen.new_zeros(len(seen), full.shape[1] - seen.shape[1])], 1)
    return full, None if seen.all() else seen


def test_lengths_may_be_of_another_axis_or_in_steps(qwen, tmp_path):
    words = [*WORDS, "a cat on"]  # with the template 8 tokens, which are not padded to eights
    layers = encoded(otherwise(qwen, lambda e, mask: (torch.stack([e, -e], 1), mask)), tmp_path / "a", words)
    eights = encoded(otherwise(qwen, padded_to_eights), tmp_path / "b", words)
    alone = [first_step(qwen, prompt=p, height=64, width=96)[0]["encoder_hidden_states"] for p in words]
    for i, own in enumerate(alone):
        given = batch(layers, [i])
        assert given.keys() == {"encoder_hidden_states"}
        assert torch.equal(given["encoder_hidden_states"], torch.stack([own, -own], 1))
        assert torch.equal(batch(eights, [i])["encoder_hidden_states"], own)
    together = batch(layers, [0, 1])
    assert together["encoder_hidden_states"].shape == (2, 2, 10, 24)
    assert together["encoder_hidden_states_mask"].sum(1).tolist() == [7, 10]


def test_lengths_without_any_mask_are_refused_at_once(qwen, tmp_path):
    pipe = otherwise(qwen, lambda embeds, _: (embeds, None))
    with pytest.raises(
        HostError, match="passes encoder_hidden_states as long as each prompt is, and no mask"
    ):
        encoded(pipe, tmp_path / "prompts")
    assert not (tmp_path / "prompts").exists()


def test_an_instruction_before_prompts_is_not_before_the_null():
    pipe = ALL["lumina2"]()
    found = watch(pipe, host_of(pipe.transformer), call={"system_prompt": "a tall house with"})
    lengths = [len(row.tensors["encoder_hidden_states"]) for row in (found.row("cat"), found.null_row(""))]
    assert lengths == [4 + 2 + 2, 1]  # the instruction, what the pipeline puts between, `cat` and the end


def test_the_transformer_needs_no_weights(tmp_path):
    whole = pixart()
    whole.save_pretrained(tmp_path / "pipe")
    for file in (tmp_path / "pipe").glob("transformer/*.safetensors"):
        file.unlink()
    for file in (tmp_path / "pipe").glob("vae/*.safetensors"):
        file.unlink()
    light = open_encoders(str(tmp_path / "pipe"), device=CPU, dtype="fp32")
    assert all(p.is_meta for p in light.transformer.parameters())
    a, b = encoded(whole, tmp_path / "a"), encoded(light, tmp_path / "b")
    assert a.sha256 == b.sha256


def test_a_killed_work_is_resumed_and_ends_in_the_same_bytes(tmp_path):
    pipe = pixart()
    whole = encoded(pipe, tmp_path / "whole")
    work = Prompting(pipe, WORDS, tmp_path / "cut", PromptingConfig(shard_size=2), source="words")
    steps = work.steps()
    for _ in range(4):  # the first shard, and a prompt of the second
        step = next(steps)
    assert step.done == 3
    steps.close()
    asked = []
    again = Prompting(pipe, WORDS, tmp_path / "cut", PromptingConfig(shard_size=2), source="words")
    row = again.capture.row
    object.__setattr__(again.capture, "row", lambda words: asked.append(words) or row(words))
    for _ in again.steps():
        pass
    assert asked == WORDS[2:]
    assert Prompts(tmp_path / "cut").index == whole.index


def test_processes_share_the_shards(tmp_path):
    pipe = pixart()
    whole = encoded(pipe, tmp_path / "whole")
    for rank in (1, 0):
        work = Prompting(pipe, WORDS, tmp_path / "shared", PromptingConfig(shard_size=2), source="words")
        for _ in work.steps(slice(rank, None, 2)):
            pass
    assert Prompts(tmp_path / "shared").index == whole.index


def test_other_weights_words_or_settings_are_another_work(tmp_path):
    pipe = pixart()
    encoded(pipe, tmp_path / "prompts")
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(1.1)
    with pytest.raises(RunError, match=r"holds prompts of another work(.|\n)*encoded_sha256"):
        encoded(pipe, tmp_path / "prompts")
    with pytest.raises(RunError, match="words_sha256"):
        encoded(pixart(), tmp_path / "prompts", ["a cat", *WORDS[1:]])


def test_latents_are_bound_to_them_and_dropout_needs_a_null(tmp_path):
    pipe = ALL["flux"]()
    with pytest.raises(DataError, match=r"dropped in a share of 0\.1, but no prompt asks for nothing"):
        encoded(pipe, tmp_path / "prompts", dropout=0.1)
    guided = encoded(pipe, tmp_path / "guided", negative="dog", guidance=3.5)
    assert guided.dropout == 0.1
    given = batch(guided, [0, 1])
    assert given["guidance"].tolist() == [3.5, 3.5]


def test_what_a_pipeline_does_not_take_is_refused_before_any_work(tmp_path):
    with pytest.raises(HostError, match="WanPipeline is not called with true_cfg; it takes prompt"):
        Prompting(wan(), WORDS, tmp_path / "x", PromptingConfig(), source="w", call={"true_cfg": 1})
    assert not (tmp_path / "x").exists()
    with pytest.raises(CheckpointError, match="is no pipeline of diffusers: it has no model_index.json"):
        open_encoders(str(tmp_path), device=CPU, dtype="fp32")


def test_a_pipeline_is_as_it_was_after_it_was_watched():
    pipe = pixart()
    before = pipe.transformer.forward
    watch(pipe, None, call={"use_resolution_binning": False})
    assert "forward" not in vars(pipe.transformer)
    assert pipe.transformer.forward == before
    assert "step" not in vars(pipe.scheduler)


def test_probes_do_not_warn_and_a_users_long_prompt_does(monkeypatch):
    said, handler = [], logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    pipeline = sd3()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        monkeypatch.setattr(logger, "handlers", [handler])
    levels = [logger.level for logger in loggers]
    capture = watch(pipeline, None, call={})
    assert not [line for line in said if "truncated" in line or "Token indices" in line]
    assert [logger.level for logger in loggers] == levels
    capture.row("a red cat " * 20)
    assert [line for line in said if "truncated" in line]


def test_words_come_from_lines_json_and_captions_beside_images(tmp_path):
    lines, rows, folder = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "images"
    lines.write_text("a red cat\n\n  a dog \n")
    assert read_words(lines) == ["a red cat", "a dog"]
    rows.write_text('{"prompt": "a red cat", "tag": "x"}\n{"prompt": "a dog", "tag": "y"}\n')
    assert read_words(rows) == ["a red cat", "a dog"]
    assert read_words(rows, column="tag") == ["x", "y"]
    folder.mkdir()
    (folder / "b.txt").write_text("a dog\n")
    (folder / "a.txt").write_text("a red\ncat")
    (folder / "a.png").write_bytes(b"")
    assert read_words(folder) == ["a red cat", "a dog"]
    rows.write_text('{"words": "a red cat"}\n')
    with pytest.raises(DataError, match=r"line 1: no text under prompt, caption, text; its keys are words"):
        read_words(rows)
    lines.write_text("\n")
    with pytest.raises(DataError, match="no prompts in .*: it has no line"):
        read_words(lines)


def test_command_line_encodes_a_folder_of_a_pipeline(tmp_path):
    pixart().save_pretrained(tmp_path / "pipe")
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    command = [
        "data",
        "prompts",
        tmp_path / "out",
        "--prompts",
        tmp_path / "words.txt",
        "--pipeline",
        tmp_path / "pipe",
    ]
    told = printed(*command, "--dry-run")
    assert "4 prompts and a null, a long one encoder_hidden_states[6, 24], encoder_attention_mask[6]" in told
    assert not (tmp_path / "out").exists()
    told = printed(*command, "--shard-size", "3")
    assert f"conditions: {{name: prompts, folder: {tmp_path / 'out'}}}" in told
    assert json.loads((tmp_path / "out" / "prompts.json").read_text())["count"] == 4


def test_arguments_that_are_tuples_of_tensors_are_compared():
    pair, other = (torch.ones(2), [torch.zeros(3), 1]), (torch.ones(2), [torch.zeros(3), 2])
    assert _equal(pair, (torch.ones(2), [torch.zeros(3), 1]))
    assert not _equal(pair, other)
    assert not _equal(pair, pair[:1])
