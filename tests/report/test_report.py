"""The report of whole, partial and damaged runs: what it says, and that it is one safe file."""

import ast
import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from grafting import report
from grafting.data.scenes import draw_scene
from grafting.errors import FaultWarning, RunError
from grafting.runs.record import write_report
from report.pages import Page, page_of, tables_of
from report.synthetic_run import (
    FIGURES,
    SITES,
    distill_steps,
    finetune_steps,
    garments,
    metric_rows,
    protocol,
    write_log,
    write_run,
    write_samples,
)


def rewrite_rows(folder: Path, **changes: dict) -> None:
    """Change fields of rows, by the row's name."""
    rows = [row | changes.get(row["name"], {}) for row in metric_rows()]
    (folder / "metrics.json").write_text(json.dumps(rows))


def test_a_whole_run_is_told_in_one_sentence(run_folder):
    page = page_of(run_folder)
    assert (
        "4 of 8 attention operators replaced by hyena-x; "
        "Fréchet distance 5.12 (4.90\u20135.34) against 4.61 (4.42\u20134.80) pretrained: 1.11\u00d7."
        in page.text
    )
    assert "not complete" not in page.text
    assert "measured alike" not in page.text


def test_every_section_has_its_figures(run_folder):
    page = page_of(run_folder)
    for name in FIGURES:
        assert name in page.text
    for said in ("95.3 %", "2.63 M", "9.96 M", "\u22125.0 %", "133\u00d7"):  # results
        assert said in page.text, said
    assert "hyena-x (kernel_size 4, geometry centred, init inherit)" in page.text
    assert "0.430 → 0.0302" in page.text  # held-out loss of block 1
    assert "0.110 → 0.910" in page.text  # its R^2
    assert "feature_network.sha256" in page.text
    assert "9f" * 32 in page.text
    assert "grafting run recipe.yaml" in page.text
    assert "3 min 1 s" in page.text
    assert "blocks: odd" in page.text  # the recipe itself


def test_it_is_one_small_file_without_assets(run_folder):
    html = write_report(run_folder).read_text()
    page = Page(html)
    assert len(html) < 3_000_000
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "object"}
    assert all(src.startswith("data:image/png;base64,") for src in page.attributes("img", "src"))
    assert not re.search(r"https?:", html)
    assert "url(" not in html
    assert "@import" not in html


def test_the_page_allows_its_own_script_alone(bare_run):
    page = page_of(bare_run)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert policy.endswith(f"script-src 'sha256-{digest}'")


def test_every_table_is_offered_as_csv(bare_run):
    tables = tables_of(page_of(bare_run))
    assert list(tables) == ["figures.csv", "sites.csv", "protocol.csv", "stages.csv"]
    head, *rows = tables["figures.csv"]
    assert dict(zip(head, rows[-1], strict=True))["frechet"] == "5.12"
    assert [row[0] for row in rows] == list(FIGURES)
    assert tables["sites.csv"][1] == ["block 1, attention", "hyena-x", "0.430", "0.0302", "0.110", "0.910"]
    assert ["finetune", "done", "3 min 1 s"] in tables["stages.csv"]


def test_a_cell_of_csv_is_no_formula(bare_run):
    rewrite_rows(bare_run, random={"name": "=1+1"})
    assert tables_of(page_of(bare_run))["figures.csv"][2][0] == "'=1+1"


def test_a_site_that_failed_is_flagged(bare_run):
    assert "sites failed" not in page_of(bare_run).text
    steps = distill_steps()
    steps[-1]["r2/blocks.3.attn"] = 0.29
    steps[-1]["r2/blocks.5.attn"] = 0.3
    write_log(bare_run, "distill", steps)
    text = page_of(bare_run).text
    assert "1 of 4 sites failed" in text
    assert "of what it replaced. block 3, attention." in text
    assert "block 3, attention failedhyena-x" in text


def test_locality_stands_beside_r2(bare_run):
    assert "Attention within" not in page_of(bare_run).text
    sites = [{"path": "blocks.1.attn", "bands": {"2": 0.21, "16": 0.625}}]
    (bare_run / "locality.json").write_text(json.dumps({"grid": [8, 8], "sites": sites}))
    page = page_of(bare_run)
    assert "Attention within 16 tokens" in page.text
    assert tables_of(page)["sites.csv"][1][-1] == "62.5\u00a0%"
    assert tables_of(page)["sites.csv"][2][-1] == "\u2013"


def test_a_loss_of_one_part_is_drawn_once(bare_run):
    steps = [step | {"diffusion": step["loss"]} for step in finetune_steps()]
    write_log(bare_run, "finetune", steps)
    text = page_of(bare_run).text
    assert "Diffusion loss" not in text
    assert "Loss, the same as diffusion loss" in text


def test_the_loss_is_drawn_by_noise_level(bare_run):
    assert "Loss by noise level" not in page_of(bare_run).text  # a log of before has none
    levels = {"loss_at_noise/80-100": 0.1, "loss_at_noise/0-20": 0.8}
    fewer = {"loss_at_noise/0-20": 0.4, "loss_at_noise/20-40": "much"}
    steps = [step | (levels if step["step"] % 2 else fewer) for step in finetune_steps()]
    write_log(bare_run, "finetune", steps)
    page = page_of(bare_run)
    assert "Loss by noise level" in page.text
    assert sum("from clean to noise" in label for label in page.attributes("svg", "aria-label")) == 2
    head, first, *_ = lines = tables_of(page)["levels.csv"]
    assert head == ["step", "0\u201320\u00a0%", "80\u2013100\u00a0%"]
    assert (first, len(lines)) == (["9", "0.622222", "0.1"], 101)


def test_a_level_that_was_met_once_is_a_dot(bare_run):
    steps = list(finetune_steps())
    levels = {"loss_at_noise/0-20": 0.4, "loss_at_noise/80-100": 0.1}
    write_log(
        bare_run, "finetune", [steps[0] | levels, *(s | {"loss_at_noise/0-20": 0.5} for s in steps[1:])]
    )
    html = write_report(bare_run).read_text()
    many, once = (
        html.split(f"Loss {name}\u00a0% from clean to noise")[1].split("</svg>")[0]
        for name in ("0\u201320", "80\u2013100")
    )
    assert 'class="dot"' not in many
    assert once.count('class="dot"') == 2
    assert 'class="smooth"' in many
    assert 'class="smooth"' not in once


def test_a_trial_says_at_its_top_that_it_is_one(bare_run):
    said = "A trial: too few steps and images for its figures to mean anything."
    assert said not in page_of(bare_run).text
    recipe = (bare_run / "recipe.yaml").read_text()
    (bare_run / "recipe.yaml").write_text(f"{recipe}trial: true\n")
    text = page_of(bare_run).text
    assert text.index(said) < text.index("4 of 8 attention operators replaced")


def test_classes_have_names(run_folder):
    page = page_of(run_folder)
    assert page.text.count("Ankle boot") >= 10
    assert any("by class: T-shirt, Trouser" in alt for alt in page.attributes("img", "alt"))


def test_the_caveat_stands_beside_the_headline(bare_run):
    said = "2 000 images of each model; features of testbed-classifier, so this is no FID"
    assert said in page_of(bare_run).text
    (bare_run / "metrics.json").unlink()
    assert "trainings" not in page_of(bare_run).text


def test_quality_is_drawn_against_cost(bare_run):
    page = page_of(bare_run)
    assert "Fréchet distance against attention FLOPs" in page.attributes("svg", "aria-label")
    assert "pretrained: 4.61 at 10.5 M" in page.text
    rewrite_rows(
        bare_run,
        **{
            name: {"attention_flops": 1, "attention_mixing_flops": 1, "params": 1, "ms_per_image": 1}
            for name in FIGURES
        },
    )
    assert not any("against" in label for label in page_of(bare_run).attributes("svg", "aria-label"))


def test_pictures_have_words(run_folder):
    page = page_of(run_folder)
    assert all("images of" in alt for alt in page.attributes("img", "alt"))
    assert all(a.get("aria-label") or a.get("aria-hidden") for tag, a in page.tags if tag == "svg")
    assert len(page.attributes("img", "alt")) == 2 * len(FIGURES)


def test_the_same_run_gives_the_same_bytes(run_folder):
    assert write_report(run_folder).read_bytes() == write_report(run_folder).read_bytes()


def test_nothing_of_a_run_is_read_as_html(tmp_path):
    bad = '<script>alert("1")</script>'
    folder = write_run(tmp_path / "run", name=bad)
    rewrite_rows(
        folder,
        random={"name": bad, "notes": [bad]},
        distilled={"protocol": protocol() | {"labels": bad}},
    )
    operator = {"name": bad, "setting": f"'\"{bad}"}
    sites = [site | {"operator": operator, "path": f'" onload="{bad}'} for site in SITES[:2]]
    written = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(written | {"host": bad, "sites": sites}))
    (folder / "distill/log.jsonl").write_text(
        json.dumps({"step": 1, f"loss/{bad}": 1.0, f"r2/{bad}": 0.5}) + "\n"
    )
    manifest = {
        "recipe": bad,
        "library": bad,
        "stages": {bad: {"inputs": bad, "done": True, "outputs": {}}},
        "machine": {bad: bad},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_samples(folder, '"><b>', garments(1.0, 4))
    page = page_of(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert not any(attributes.get("alt", "x") == "" for _, attributes in page.tags)
    assert page.text.count(bad) > 8


def test_further_figures_are_explained_below_their_table(bare_run):
    rewrite_rows(bare_run, pretrained={"attention_mixing_flops": 1000})
    text = page_of(bare_run).text
    head, said = "Mixing FLOPs", "those of all attention operators without their projections"
    assert head in text.partition("Further figures")[2].partition(said)[0]
    assert f"{head}: {said}." in text


PARTS = [
    "recipe.yaml",
    "plan.json",
    "distill/log.jsonl",
    "finetune/log.jsonl",
    "metrics.json",
    "manifest.json",
]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named_and_the_rest_is_shown(run_folder, part):
    (run_folder / part).unlink()
    page = page_of(run_folder)
    assert f"Its folder has of this recipe no {part};" in page.text
    assert "The plan" in page.text


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone_is_enough(run_folder, part):
    for other in set(PARTS) - {part}:
        (run_folder / other).unlink()
    for samples in run_folder.glob("samples/*"):
        samples.unlink()
    page = page_of(run_folder)
    assert "samples/*.safetensors; the sections below" in page.text


def test_samples_alone_are_enough(tmp_path):
    write_samples(tmp_path, "pretrained", garments(1.0, 7))
    page = page_of(tmp_path)
    assert len(page.attributes("img", "src")) == 1
    assert "The plan is not known; not measured yet." in page.text


def test_a_stage_that_the_recipe_leaves_out_is_not_missing(run_folder):
    (run_folder / "finetune/log.jsonl").unlink()
    text = (run_folder / "recipe.yaml").read_text()
    (run_folder / "recipe.yaml").write_text(text.replace("finetune:\n  steps: 900", "finetune: null"))
    page = page_of(run_folder)
    assert "not complete" not in page.text
    assert "This recipe has none." in page.text


def test_a_run_stopped_after_stage_1_says_so(run_folder):
    (run_folder / "metrics.json").write_text(json.dumps(metric_rows()[:4]))
    assert (
        "Fréchet distance 18.2 (17.6\u201318.8) (distilled: after stage 1) against"
        in page_of(run_folder).text
    )


def test_unlike_protocols_are_not_compared(run_folder):
    rewrite_rows(run_folder, finetuned={"protocol": protocol(num_images=500)})
    page = page_of(run_folder)
    assert "Not all figures were measured alike." in page.text
    assert "num_images: 2000 (pretrained, random, inherited, distilled); 500 (finetuned)" in page.text
    assert "pretrained, measured differently." in page.text
    assert "1.11\u00d7" not in page.text
    assert "133\u00d7" in page.text


def test_batch_size_and_versions_do_not_make_protocols_unlike(run_folder):
    other = protocol(batch_size=7) | {"recorded": {"grafting": "9"}}
    rewrite_rows(run_folder, finetuned={"protocol": other})
    assert "measured alike" not in page_of(run_folder).text


def test_figures_that_are_missing_or_not_finite_are_dashes(run_folder):
    rewrite_rows(
        run_folder,
        random={"frechet": float("nan"), "agreement": None, "ms_per_image": None},
        distilled={"frechet_low": None, "frechet_high": float("inf"), "kid": None},
    )
    page = page_of(run_folder)
    assert "nan" not in page.text.lower()
    assert "None" not in page.text
    assert "18.2 3.95\u00d7" in page.text


def test_rows_of_a_name_alone_are_shown(run_folder):
    (run_folder / "metrics.json").write_text('[{"name": "pretrained"}, {"name": "mine"}]')
    assert "mine" in page_of(run_folder).text


def test_losses_that_are_not_finite_are_left_out(run_folder):
    steps = distill_steps(20)
    steps[5]["loss/blocks.1.attn"] = float("nan")
    steps[6]["loss/blocks.1.attn"] = float("inf")
    (run_folder / "distill/log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert not re.search(r"\b(nan|inf)\b", write_report(run_folder).read_text())


def test_a_last_line_that_was_cut_off_is_left_out(run_folder):
    with (run_folder / "finetune/log.jsonl").open("a") as log:
        log.write('{"step": 901, "lo')
    assert "Over 900 steps." in page_of(run_folder).text


def test_a_damaged_line_of_a_log_is_named_and_left_out(run_folder):
    path = run_folder / "finetune/log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "nonsense\n", *lines[4:]]))
    with pytest.warns(FaultWarning, match=r"log\.jsonl, line 4 is damaged and skipped"):
        assert "Over 900 steps." in page_of(run_folder).text


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("recipe.yaml", "a: [", "recipe.yaml is not YAML"),
        ("recipe.yaml", "- 1", "recipe.yaml is not a recipe: it is a list"),
        ("metrics.json", "{}", "metrics.json is not a list of rows"),
        ("plan.json", "{", "plan.json is not a plan"),
        ("samples/random.safetensors", "short", "is not a complete"),
    ],
)
def test_a_damaged_part_is_named_and_the_report_stays(run_folder, part, content, message):
    before = write_report(run_folder).read_bytes()
    (run_folder / part).write_text(content)
    with pytest.raises(RunError, match=message):
        write_report(run_folder)
    assert (run_folder / "report.html").read_bytes() == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_large_colour_images_are_shown_smaller(run_folder):
    images = np.random.default_rng(0).integers(0, 255, (100, 3, 256, 256), dtype=np.uint8)
    for name in FIGURES:
        write_samples(run_folder, name, images[:30])
    path = write_report(run_folder)
    page = Page(path.read_text())
    assert path.stat().st_size < 3_000_000
    assert len(page.attributes("img", "src")) == len(FIGURES)
    assert "Shown at 128 of 256 pixels" in page.text


def test_labels_that_differ_are_warned_of(run_folder):
    images = garments(1.0, 100)
    save_file(
        {"images": images, "labels": np.zeros(100, np.int64)}, run_folder / "samples/random.safetensors"
    )
    assert "labels of these files differ" in page_of(run_folder).text


def test_fewer_and_no_images_are_shown(run_folder):
    write_samples(run_folder, "random", garments(1.0, 3))
    write_samples(run_folder, "inherited", np.zeros((0, 1, 32, 32), np.uint8))
    page = page_of(run_folder)
    assert any("first 3 images of random" in alt for alt in page.attributes("img", "alt"))
    assert not any("inherited" in alt for alt in page.attributes("img", "alt"))


def test_it_needs_no_torch():
    for path in Path(report.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        modules += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        assert not any(module.split(".")[-1] == "torch" for module in modules), path


def test_images_by_caption_show_their_words_and_what_the_judge_read(tmp_path: Path):
    drawn = [draw_scene(number, caption=number).image for number in range(12)]
    damaged = [np.zeros((32, 32, 3), np.uint8), *drawn[1:]]
    for name, images in (("pretrained", drawn), ("finetuned", damaged)):
        write_samples(tmp_path, name, np.stack(images).transpose(0, 3, 1, 2).copy())
    (tmp_path / "recipe.yaml").write_text("name: scenes\nconditions: {name: scenes}\n")
    page = Page(write_report(tmp_path).read_text())
    assert "a disca disc and a squareone disca red disc" in page.text
    assert "a disc\nexact: " in "".join(page.words)
    assert "a disc\nnot true: nothing" in "".join(page.words)
    assert "Point at an image" in page.text
    # columns of eight, over all images of both models, short and long sheets
    views = page.attributes("svg", "viewbox")
    assert views.count(f"0 0 {8 * 33 - 1} {33 - 1}") == 2


def test_images_whose_prompts_are_gone_are_shown_by_number(tmp_path: Path):
    write_samples(tmp_path, "pretrained", garments(1.0))
    (tmp_path / "recipe.yaml").write_text("name: x\nconditions: {name: prompts, folder: /nowhere}\n")
    page = Page(write_report(tmp_path).read_text())
    assert "0123456789" in page.text
    assert "Point at an image" not in page.text
