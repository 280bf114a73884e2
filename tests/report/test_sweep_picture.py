"""The picture of a sweep's table shows each line once, in its recipe's colour, and the pretrained model as a reference."""

import xml.etree.ElementTree as ET

from grafting.report import write_sweep_picture

SVG = "{http://www.w3.org/2000/svg}"


def line(recipe, design, stage, frechet):
    figures = {"frechet": frechet, "frechet_low": 0.9 * frechet, "frechet_high": 1.1 * frechet}
    return {"recipe": recipe, "design": design, "stage": stage, **figures}


LINES = [
    line("paper", "none", "pretrained", 0.2),
    line("paper", "<hyena>", "random", 50.0),
    line("paper", "<hyena>", "distilled", 4.0),
    line("paper", "<hyena>", "finetuned", 2.0),
    line("best", "<hyena>", "finetuned", 0.4),
]


def test_marks_names_and_reference(tmp_path):
    root = ET.parse(write_sweep_picture(tmp_path / "table.svg", LINES)).getroot()
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts.count("<hyena>") == 1
    assert {"paper", "best", "after stage 2", "after stage 1", "pretrained 0.200"} <= set(texts)
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles == ["4.00 (distilled)", "2.00 (finetuned)", "0.400 (finetuned)"]
    dots = [dot for dot in dots_of(root) if dot.get("class") != "hollow"]
    assert len({dot.get("fill") for dot in dots}) == len(dots) == 2
    paper, best = (float(dot.get("cx")) for dot in dots)
    (reference,) = (path for path in root.iter(f"{SVG}path") if path.get("class") == "reference")
    assert float(reference.get("d")[1:].partition(" ")[0]) < best < paper


def test_one_column_of_labels_names_the_lines(tmp_path):
    lines = [
        {
            "blocks": blocks,
            "stage": "distilled",
            "frechet": y,
            "frechet_low": 0.9 * y,
            "frechet_high": 1.1 * y,
        }
        for blocks, y in (("deep", 0.5), ("shallow", 0.7))
    ]
    root = ET.parse(write_sweep_picture(tmp_path / "table.svg", lines)).getroot()
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert (texts.count("deep"), texts.count("shallow")) == (1, 1)
    assert "after stage 1" in texts
    assert "after stage 2" not in texts
    deep, shallow = dots_of(root)
    assert deep.get("cy") != shallow.get("cy")
    assert deep.get("stroke") == shallow.get("stroke")


def dots_of(root):
    return [dot for group in root.iter(f"{SVG}g") for dot in group.iter(f"{SVG}circle")]
