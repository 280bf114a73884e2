"""What a recipe will take: counted figures are those of the published geometry, and of a real run."""

import json
import platform
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tinyrecipe
from grafting import cli
from grafting.cost.speed import matmul_tflops
from grafting.errors import RecipeError
from grafting.hosts import hosts
from grafting.machine.devices import default_device
from grafting.machine.precision import resolve_precision
from grafting.runs.file import load_recipe
from grafting.runs.forecast import Forecast, StageForecast, forecast
from grafting.runs.recipe import Recipe
from grafting.runs.run import run
from grafting.words import amount, duration
from latents.textpipelines import sd3

IMAGENET = Path(__file__).parents[2] / "recipes" / "imagenet"
TINY = tinyrecipe.TINY | {"save_every": 1}


def tiny(**changes) -> Recipe:
    return Recipe.model_validate(TINY | changes)


def stage(found: Forecast, name: str) -> StageForecast:
    return next(stage for stage in found.stages if stage.name == name)


@pytest.fixture(scope="module")
def published() -> Forecast:
    """Stage 1 and 2 of all 28 attentions of DiT-XL/2, on one H100."""
    return forecast(load_recipe(IMAGENET / "hyena_x_100.yaml"), device="h100")


def test_stage_1_of_all_attention_fits_in_one_h100_hour(published):
    distill = stage(published, "distill")
    assert distill.images == 25_000 * 64
    # the teacher's pass is 237.3 GFLOP an image; the 28 operators are 76.3 forward, three times that with the backward pass
    assert distill.flops == 1_600_000 * (237_301_563_392 + 3 * 76_316_147_712)
    assert distill.hours == pytest.approx(distill.flops / (989e12 * 0.3) / 3600)
    assert distill.hours < 1
    # below this share of the peak it does not
    assert distill.flops / (989e12 * 3600) == pytest.approx(0.2095, abs=1e-4)
    assert "computed" in distill.basis


def test_no_activation_is_kept_where_the_published_way_keeps_264_gb(published):
    assert published.dump == {"published": 264_241_152_000, "published_samples": 8000, "here": 0}
    assert stage(published, "distill").disk["activations"] == 0


def test_a_cache_is_counted():
    recipe = tiny(distill=TINY["distill"] | {"cache_samples": 100})
    assert forecast(recipe).dump["here"] == 100 * 16 * 32 * 2 * 4  # tokens, channels, in and out, float32


def test_training_memory_of_a_parameter_is_20_bytes(published):
    parts = stage(published, "finetune").memory
    params, positions = 675_613_472, 256 * 1152
    # what is not trained is the pretrained model's
    assert parts["operators"] + parts["copies of trained weights"] == 4 * (params - positions)
    assert parts["gradients"] == parts["moving average"] == 4 * (params - positions)
    assert parts["moments"] == 8 * (params - positions)
    assert 119e9 < parts["activations of 256 images"] < 120e9


def test_no_number_of_devices_is_faster_than_the_launches_of_a_step(published):
    """On 8 H100 the FLOPs of stage 1 would take 5 minutes; operators and the teacher's blocks are launched 25,000 times."""
    assert stage(published, "distill").flops / (989e12 * 0.3 * 8) < 330
    plan = [{"role": "attention", "operator": {"name": "hyena-x", "kernel_size": 3}}]
    source = {"host": "dit", "config": TINY["source"]["config"] | {"depth": 4}}
    recipe = tiny(plan=plan, source=source, distill=TINY["distill"] | {"steps": 25_000})
    found = stage(forecast(recipe, device="h100", processes=4), "distill")
    assert found.hours == pytest.approx(25_000 * 4 * (0.4 + 1.2) / 1000 / 3600)
    assert found.basis.startswith("computed, time to launch each step's operations; FLOPs at 30% of 989")
    spread = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"spread": "sites"})})
    at_sites = stage(forecast(spread, device="h100", processes=4), "distill")
    assert at_sites.hours == pytest.approx(25_000 * 4 * (0.4 + 1.2 / 4) / 1000 / 3600)
    stacked = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"stacked": True})})
    at_once = stage(forecast(stacked, device="h100", processes=4), "distill")
    assert at_once.hours == pytest.approx(25_000 * (4 * 0.4 + 1.2) / 1000 / 3600)


def test_stacked_sites_need_the_memory_of_all_their_graphs():
    plan = [{"role": "attention", "operator": {"name": "hyena-x", "kernel_size": 3}}]
    more = {}
    for depth in (2, 4):
        source = {"host": "dit", "config": TINY["source"]["config"] | {"depth": depth}}
        recipes = [
            tiny(plan=plan, source=source, distill=TINY["distill"] | {"stacked": stacked})
            for stacked in (False, True)
        ]
        one, stacked = (stage(forecast(recipe), "distill").memory for recipe in recipes)
        assert stacked["stacked operators and gradients"] == 2 * one["operators"]
        more[depth] = stacked["activations of 4 images"] - one["activations of 4 images"]
    assert more[4] == 3 * more[2] > 0  # one site's graph is there in any case


def test_processes_share_time_and_images():
    one, four = (stage(forecast(tiny(), peak_tflops=1e-6, processes=n), "finetune") for n in (1, 4))
    assert one.hours == pytest.approx(4 * four.hours)
    assert four.memory["activations of 1 images"] * 4 == one.memory["activations of 4 images"]
    assert four.disk == one.disk


def test_checkpointing_and_micro_batches_take_less():
    def activations(**changes) -> int:
        found = forecast(tiny(finetune=TINY["finetune"] | changes))
        return sum(v for k, v in stage(found, "finetune").memory.items() if k.startswith("activations"))

    whole = activations()
    assert activations(accumulate=2) * 2 == whole
    assert activations(gradient_checkpointing=True) < whole
    assert activations(precision="bf16") < whole


def test_what_is_not_trained_has_no_moments():
    found = stage(forecast(tiny(finetune=TINY["finetune"] | {"trainable": "new"})), "finetune")
    by_name = stage(
        forecast(tiny(finetune=TINY["finetune"] | {"trainable": ["blocks.1.attn.*"]})), "finetune"
    )
    assert 0 < found.memory["moments"] < found.memory["pretrained model"]
    assert found.memory["moments"] == 2 * found.memory["operators"]
    assert "copies of trained weights" not in found.memory
    assert by_name.memory["moments"] == found.memory["moments"]


def test_counted_activations_are_those_of_a_real_pass():
    """What torch keeps for the backward pass of the grafted model, with real tensors, for one image more."""
    from grafting.editing.surgery import build_operators, grafted
    from grafting.hosts import host_of
    from grafting.runs.job import skeleton
    from grafting.runs.shapes import saved_an_image

    recipe = tiny()
    model = skeleton(recipe.source).to_empty(device="cpu")
    host, operators = host_of(model), build_operators(model, recipe.edits)

    def kept(batch_size: int) -> int:
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in storages:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**host.example(model, rows=4, cols=4, batch_size=batch_size))
        return sum(storage.nbytes() for storage in found.values())

    with grafted(model, operators):
        assert saved_an_image(model, "fp32", host.sites(model)[0].grid) == pytest.approx(
            kept(2) - kept(1), rel=0.02
        )


def test_a_rate_that_the_run_has_logged_goes_before_a_computed_one(tmp_path):
    run(tiny(), tmp_path / "run", until="finetune")
    measured = stage(forecast(tiny(), folder=tmp_path / "run"), "finetune")
    log = [json.loads(line) for line in (tmp_path / "run/finetune/log.jsonl").read_text().splitlines()]
    rate = sum(line["images_per_s"] for line in log) / 2
    assert measured.hours == pytest.approx(8 / rate / 3600)
    assert measured.basis.startswith("measured, ")
    for elsewhere in ({"device": "h100"}, {"device": "h100", "processes": 8}, {"peak_tflops": 1.0}):
        computed = stage(forecast(tiny(), folder=tmp_path / "run", **elsewhere), "finetune")
        assert computed == stage(forecast(tiny(), **elsewhere), "finetune")
        assert computed.basis.startswith("computed, ")
    assert stage(forecast(tiny(), processes=2, folder=tmp_path / "run"), "finetune").hours is None


def test_disk_of_a_state_is_what_a_run_writes(tmp_path):
    class Stop(Exception):
        pass

    def on_step(name, step):
        if name == "finetune" and step.done == 2:
            raise Stop

    with pytest.raises(Stop):
        run(tiny(finetune=TINY["finetune"] | {"steps": 3}), tmp_path / "run", on_step=on_step)
    written = sum(p.stat().st_size for p in (tmp_path / "run/finetune").rglob("state.pt"))
    (counted,) = (v for k, v in stage(forecast(tiny()), "finetune").disk.items() if k.startswith("states"))
    # two states; files have names and shapes beside values, which count in a model this small
    assert written == pytest.approx(counted * 2 / 3, rel=0.5)


def test_guidance_doubles_sampling():
    plain = stage(forecast(tiny()), "sample finetuned")
    guided = stage(forecast(tiny(sample=TINY["sample"] | {"cfg_scale": 1.5})), "sample finetuned")
    assert guided.flops == 2 * plain.flops
    assert plain.disk == {"images (in shards, then in one file)": 2 * 20 * 32 * 32}


def test_a_device_without_a_known_peak_has_that_of_a_matrix_product(monkeypatch):
    monkeypatch.setattr("grafting.runs.forecast.device_at", lambda device: None)
    monkeypatch.setattr("grafting.runs.forecast.matmul_tflops", lambda dtype, device: 1e-6)
    found = stage(forecast(tiny()), "finetune")
    assert found.hours == pytest.approx(found.flops / (1e6 * 0.3) / 3600)
    precision = resolve_precision("auto", default_device())
    assert found.basis == f"computed, FLOPs at 30% of 1e-06 TFLOP/s ({precision}, a matrix product here)"
    assert stage(forecast(tiny(), peak_tflops=1.0), "finetune").hours < found.hours
    # several processes share its cores
    shared = stage(forecast(tiny(), processes=2), "finetune")
    assert shared.hours is None
    assert "set --device or --peak-tflops" in shared.basis


def test_the_rate_of_a_matrix_product_is_measured():
    rate = matmul_tflops(torch.float32, torch.device("cpu"))
    assert 1e-4 < rate < 100
    assert matmul_tflops(torch.float32, torch.device("cpu")) == rate


def test_an_unknown_device_is_named_with_those_that_are_known():
    with pytest.raises(RecipeError, match="no device 'h300'; there are a100, h100"):
        forecast(tiny(), device="h300")


def test_every_step_of_a_run_has_a_line_and_a_sum_says_what_it_leaves_out(tmp_path):
    sd3().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    settings = TINY | {
        "source": "./pipe",
        "conditions": {"name": "words", "file": "./prompts.txt"},
        "plan": [{"role": "attention", "blocks": "odd", "operator": "window-2d"}],
        "data": {"name": "teacher", "num_images": 10, "sampler": "euler", "steps": 2},
        "calibrate": {"samples": 16},
        "sample": {"sampler": "euler", "steps": 2, "num_images": 4},
        "vae": {"source": "./pipe/vae"},
        "rows": ["pretrained", "finetuned"],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings))
    found = forecast(load_recipe(path))
    run(load_recipe(path), tmp_path / "run")
    done = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
    names = [stage.name for stage in found.stages]
    assert names == ["prompts", *(name.replace("samples/", "sample ") for name in done), "report"]
    assert (tmp_path / "run/prompts").is_dir()
    assert stage(found, "prompts").work == "2 prompts, encoded"
    assert stage(found, "calibrate").work == "16 noised images of 10 latents, in one or two passes"
    assert [s.name for s in forecast(load_recipe(path), until="teach").stages] == ["prompts", "teach"]

    told = CliRunner().invoke(
        cli.app, ["run", str(path), "--dry-run", "--device", "h100"], env={"COLUMNS": "200"}
    )
    assert told.exit_code == 0, told.output
    of_h100 = forecast(load_recipe(path), device="h100")
    hours = sum(stage.hours for stage in of_h100.stages if stage.hours is not None)
    disk = sum(stage.disk_bytes for stage in of_h100.stages if stage.disk_bytes is not None)
    (total,) = (line.split("  ") for line in told.output.splitlines() if line.startswith("total "))
    total = [cell.strip() for cell in total if cell.strip()]
    assert (total[2], total[4]) == (duration(3600 * hours), f"{amount(disk)}B")
    assert "\nNot estimated, and not in the total: prompts, evaluate, report\n" in told.output


def test_a_shape_that_the_model_does_not_take_is_refused_at_once(tmp_path):
    with pytest.raises(RecipeError, match="sample.shape: dit makes inputs of"):
        forecast(tiny(sample=TINY["sample"] | {"shape": [1, 40, 48]}))
    recipe = {
        "name": "wan",
        "source": {"host": "wan", "config": hosts()["wan"].spec.tiny},
        "plan": [{"role": "attention", "blocks": "odd", "operator": "window-3d"}],
        "distill": {"steps": 1, "batch_size": 1},
    }
    data = {"name": "teacher", "num_images": 8, "sampler": "euler", "steps": 1}
    assert forecast(Recipe.model_validate(recipe | {"data": data})).data["bytes"] == 8 * 4 * 16 * 32 * 32 * 2
    long = Recipe.model_validate(recipe | {"data": data | {"shape": [4, 21, 32, 32]}})
    with pytest.raises(
        RecipeError, match="data.shape: 21 x 16 x 16 tokens; .* has positions for 16 x 16 x 16"
    ):
        forecast(long)
    path = tmp_path / "wan.yaml"
    path.write_text(json.dumps(recipe))
    told = CliRunner().invoke(cli.app, ["cost", str(path), "--grid", "4x17x16"])
    assert (told.exit_code, told.stderr.startswith("Error: 4 x 17 x 16 tokens; ")) == (1, True)


def test_dry_run_writes_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(TINY))
    arguments = ["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--dry-run"]
    told = CliRunner().invoke(cli.app, [*arguments, "--device", "h100", "--mfu", "0.5"])
    assert told.exit_code == 0, told.output
    assert "2 steps of 4 images" in told.output
    assert "FLOPs at 50% of 989 TFLOP/s (bf16)" in told.output
    as_json = CliRunner().invoke(cli.app, [*arguments, "--json"])
    facts = json.loads(as_json.output)
    assert [s["name"] for s in facts["stages"]][:2] == ["distill", "finetune"]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


PHASES = [
    {"steps": 3, "batch_size": 4, "trainable": "new"},
    {
        "steps": 5,
        "batch_size": 8,
        "trainable": ["new", {"lora": {"rank": 2}}],
        "gradient_checkpointing": True,
    },
    {"steps": 7, "batch_size": 4},
]


def test_each_phase_has_its_cost():
    pytest.importorskip("peft")
    found = forecast(tiny(finetune=PHASES), device="h100")
    new, lora, whole = (stage(found, f"finetune, phase {number}") for number in (1, 2, 3))
    assert [s.images for s in (new, lora, whole)] == [12, 40, 28]
    assert lora.work == "5 steps of 8 images, new + lora 2"
    # one attention of 32 channels and both MLPs, of rank 2: A and B of each linear layer
    layers = [(32, 96), (32, 32), *2 * [(32, 128), (128, 32)]]
    assert lora.memory["adapters"] == 4 * sum(2 * (wide + narrow) for wide, narrow in layers)
    assert new.memory["gradients"] == new.memory["operators"]
    assert lora.memory["gradients"] == lora.memory["operators"] + lora.memory["adapters"]
    assert whole.memory["gradients"] == whole.memory["operators"] + whole.memory["copies of trained weights"]
    # frozen weights need no inputs kept
    images = "activations of 4 images"
    assert new.memory[images] < whole.memory[images]
    ways = lora.activations
    assert lora.memory["activations of 8 images, checkpointed"] == ways["with gradient checkpointing"]
    assert ways["with gradient checkpointing"] < ways["without gradient checkpointing"]
    assert new.disk[next(iter(new.disk))] < whole.disk[next(iter(whole.disk))]


def test_a_teacher_held_in_bf16_takes_half_the_memory_of_its_blocks_linear_layers():
    full, held = (
        stage(
            forecast(tiny(distill={"frozen": frozen, "precision": "bf16"}), device="h100"), "distill"
        ).memory
        for frozen in ("fp32", "bf16")
    )
    # qkv, proj, both of the MLP and adaLN's of each of two blocks of 32 channels
    linears = 2 * sum(n * m + m for n, m in ((32, 96), (32, 32), (32, 128), (128, 32), (32, 192)))
    assert full["pretrained model"] - held["pretrained model"] == 2 * linears
    assert full["bf16 copies of weights"] - held["bf16 copies of weights"] == 2 * linears
    assert full["operators"] == held["operators"]


def test_phases_are_timed_by_their_own_lines(tmp_path):
    log = tmp_path / "finetune" / "log.jsonl"
    log.parent.mkdir()
    rates = enumerate([(1, 50.0), (1, 50.0), (2, 10.0)])
    lines = [{"step": step, "phase": phase, "images_per_s": rate} for step, (phase, rate) in rates]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    machine = {"host": platform.node(), "device": "cpu", "processes": 1}
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": "", "machine": machine}))
    phases = [{"steps": 3, "batch_size": 100, "trainable": "new"}, {"steps": 1, "batch_size": 100}]
    found = forecast(tiny(finetune=phases), folder=tmp_path)
    assert stage(found, "finetune, phase 1").hours == pytest.approx(300 / 50 / 3600)
    assert stage(found, "finetune, phase 2").hours == pytest.approx(100 / 10 / 3600)
