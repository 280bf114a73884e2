"""One door for files: any of them that is bad is one error that names it, soon, whatever is wrong with it."""

import ast
import io
import json
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

import grafting
from grafting.errors import CheckpointError, DataError, RecipeError
from grafting.machine import reading

ROOT = Path(grafting.__file__).parent
DOOR = {"machine/reading.py", "machine/_yaml.py"}

# calls that open or parse files; writers of the same formats are not among them
OPENING = re.compile(
    r"(json\.loads?|yaml\.(safe_load|load|compose|parse)\w*|\w*\.?safe_open|(safetensors\.torch\.)?load_file|safetensors\.torch\.load"
    r"|(np|numpy)\.(load|fromfile|memmap|genfromtxt)|tarfile\.open|torch\.load|Image\.open|gzip\.(open|decompress)"
    r"|\w+\.(read_text|read_bytes|model_validate_json))"
)
# the package's own stub, JSON that was made a moment before, and the sums of a folder, which are compared and nothing else
ELSEWHERE = {
    ("__init__.py", "read_text"),
    ("weights/published.py", "json.loads"),
    ("machine/files.py", "read_bytes"),
}


def openings(text: str) -> set[str]:
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return {
        name
        for name in (ast.unparse(call.func) for call in calls)
        if OPENING.fullmatch(name) or _is_read(name)
    }


def _is_read(name: str) -> bool:
    return name.endswith((".read_text", ".read_bytes", ".model_validate_json"))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_opens_files(path):
    own = str(path.relative_to(ROOT))
    found = {
        name
        for name in openings(path.read_text())
        if (own, name) not in ELSEWHERE and (own, name.rpartition(".")[2]) not in ELSEWHERE
    }
    assert own in DOOR or not found


@pytest.mark.parametrize(
    "line",
    ["json.loads(text)", "yaml.safe_load(text)", "safe_open(path, 'pt')", "np.load(path)", "tarfile.open(path)", "torch.load(path)", "Image.open(path)", "(a / b).read_text()", "safetensors.torch.load_file(path)"],
)  # fmt: skip
def test_the_rule_sees_what_it_forbids(line):
    assert openings(line)


class Form(BaseModel):
    """A form of JSON."""

    count: int
    share: float = 0.0
    names: tuple[str, ...] = ()


def refused(read, *says, error=DataError):
    with pytest.raises(error) as caught:
        read()
    message = str(caught.value)
    assert len(message) < 1000
    for words in says:
        assert re.search(words, message), message


@pytest.mark.parametrize(
    "read",
    [
        lambda path: reading.read_json(path, Form, error=DataError),
        lambda path: reading.read_safetensors(path, error=DataError),
        lambda path: reading.read_header(path),
        lambda path: reading.read_torch(path, error=DataError),
        lambda path: reading.NpzFile(path),
        lambda path: list(reading.tar_members(path)),
        lambda path: reading.read_gzip(path),
        lambda path: reading.read_picture(path),
        lambda path: reading.read_stretches(path, [(np.empty(4, np.uint8), 0)]),
    ],
)
def test_what_is_no_file_of_a_kind_is_named_and_nothing_waits(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, why in {
        "absent": "missing",
        "": "folder",
        "pipe": "plain file",
        "empty": "",
        "loop": "links",
        "x" * 300: "long",
    }.items():
        refused(lambda name=name: read(tmp_path / name), re.escape(str(tmp_path)), why)


def test_json_has_a_form_and_a_boolean_is_no_number(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"count": 3, "share": 1, "names": ["a"]}')
    assert reading.read_json(path, Form) == Form(count=3, share=1.0, names=("a",))
    for content, why in {
        '{"count": true}': "count.*integer",
        '{"count": 3.5}': "integer",
        '{"count": ' + "9" * 5000 + "}": "Invalid JSON|integer",
        "[" * 5000: "Invalid JSON",
        '{"count": 3': "Invalid JSON.*line 1",
        "[]": "object",
        '{"share": 1}': "count: missing",
        '{"names": "' + "x" * 10_000 + '"}': r"\.\.\.",
    }.items():
        path.write_text(content)
        refused(lambda: reading.read_json(path, Form), "x.json", why, error=CheckpointError)


BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{b}'] * 10)}]\n" for b, c in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "aliases stand for more than"),
        ("<<: [" + BOMB.replace("\n", "\n  ") + "]", ""),
        ("a: &a [*a]", "holds itself"),
        ("[" * 1000, "more than 64 levels"),
        ("{a: " * 1000, "more than 64 levels"),
        ("a: " + "1" * 5000, "5000 characters"),
        ("a: 0x" + "f" * 5000, "5002 characters"),
        ("a: !!float abc", "float"),
        ("a: !!python/object/apply:os.system [x]", "line 1 has a value of type python"),
        ("a: !!binary aGk=", "binary"),
        ("a: 1:5", "1:5 means 65 in YAML 1.1; write 65, or '1:5' in quotes"),
        ("a: 1_3", "1_3 means 13"),
        ("a: 010", "010 means 8"),
        ("a: 1.5_0", "1.5_0 means 1.5"),
        ("a: 1\nb: 2\na: 3", "a is given twice, in lines 1 and 3"),
        ("a: [1,", "line 1"),
        ("? [a]\n: b", "unhashable"),
        ("a: \0", "not allowed"),
        ("x" * 300_000, "at most"),
    ],
)
def test_yaml_says_what_it_looks_like_and_does_not_grow(text, why, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    refused(lambda: reading.read_yaml(path, error=RecipeError), "x.yaml is not YAML", why, error=RecipeError)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("-7", -7), ("0.5", 0.5), ("00.5", 0.5), ("0x10", 16), ("1e-4", "1e-4"), ("1.0e+3", 1000.0), ("8-18:2", "8-18:2"),
        ("2001-99-99", "2001-99-99"), ("'1:5'", "1:5"), ("~", None), ("yes", True), ("0o17", "0o17"), ("[1, 3]", [1, 3]),
    ],
)  # fmt: skip
def test_yaml_that_is_usual_is_read_as_it_is_written(text, value, tmp_path):
    assert reading.parse_yaml(f"a: {text}", name="x", error=RecipeError) == {"a": value}


def test_every_flipped_bit_of_a_compressed_npz_is_one_error_or_no_change(tmp_path):
    right = {"a": np.arange(40).reshape(5, 8), "b": np.array("word")}
    np.savez_compressed(tmp_path / "right.npz", **right)
    content = (tmp_path / "right.npz").read_bytes()
    path, draw, refusals = tmp_path / "x.npz", np.random.default_rng(0), 0
    for place in draw.integers(0, 8 * len(content), 400):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            file = reading.NpzFile(path)
            found = {name: file.array(name) for name in file.names}
            assert all(np.array_equal(found[name], right[name]) for name in found.keys() & right.keys())
        except DataError:
            refusals += 1
    assert refusals > 200


def _npz(path: Path, header: bytes, body: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        magic = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        archive.writestr("a.npy", magic + body)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000000000)}",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (",
        b"(" * 500,
        b"\xff\xfe",
    ],
)
def test_an_array_is_as_large_as_its_file(header, tmp_path):
    file = reading.NpzFile(_npz(tmp_path / "x.npz", header, bytes(8)))
    refused(lambda: file.array("a"), "x.npz")
    refused(lambda: list(file.rows("a", 4)), "x.npz")
    refused(lambda: file.array("b"), "x.npz is not a complete .npz")


def test_an_npy_is_no_npz_and_arrays_are_read_as_they_were_written(tmp_path):
    np.save(tmp_path / "x.npy", np.ones(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    refused(lambda: reading.NpzFile(tmp_path / "x.npz"), "not a zip file")
    arrays = {
        "rows": np.arange(12.0).reshape(4, 3),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "one": np.float32(2),
    }
    np.savez(tmp_path / "y.npz", **arrays)
    file = reading.NpzFile(tmp_path / "y.npz")
    for name, array in arrays.items():
        assert np.array_equal(file.array(name), array)
    assert np.array_equal(np.concatenate(list(file.rows("rows", 3))), arrays["rows"])


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,8]}',
        '{"dtype":"F32","shape":[2],"data_offsets":[0,9000]}',
        '{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}',
        '{"dtype":"load","shape":[2],"data_offsets":[0,8]}',
        '{"dtype":"F32","shape":[2],"data_offsets":[8]}',
        "[]",
    ],
)
def test_tensors_are_as_large_as_their_file(entry, tmp_path):
    header = f'{{"a":{entry}}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(lambda: reading.read_header(path), "x.safetensors is not a complete safetensors file")
    refused(lambda: reading.read_safetensors(path), "x.safetensors is not a complete", error=CheckpointError)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.zeros(1).expand(10**9, 10**9),
    ],
    ids=["sparse", "meta", "quantised", "expanded"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_a_torch_file_have_a_value_for_each_element(make, tmp_path):
    torch.save({"a": [make()]}, tmp_path / "x.pt")
    refused(lambda: reading.read_torch(tmp_path / "x.pt"), "x.pt is not a torch file", error=CheckpointError)


def test_a_torch_file_that_is_compressed_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as right,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in right.namelist():
            small.writestr(name, right.read(name))
    refused(lambda: reading.read_torch(tmp_path / "y.pt"), "compressed", error=CheckpointError)


def _png(width: int, height: int) -> bytes:
    """A PNG that claims a size, of which no pixel is there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_a_picture_that_claims_many_pixels_is_refused_before_it_is_read():
    refused(lambda: reading.read_picture(_png(9000, 9000), name="x.png"), "x.png .*9000 x 9000 pixels")
    refused(lambda: reading.read_picture(_png(30_000, 30_000), name="x.png"), "x.png is not a picture")
    refused(lambda: reading.read_picture(_png(100, 100), name="x.png"), "x.png is not a picture")


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"P6 8 8 255\n" + bytes(192), b"GIF89a"]
)
def test_formats_that_are_not_named_are_not_opened(content, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)  # EPS would start Ghostscript
    (tmp_path / "x.png").write_bytes(content)
    refused(lambda: reading.read_picture(tmp_path / "x.png"), "x.png .*it is no PNG, JPEG, WEBP")


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(tmp_path / "x.png")
    for mode in ("L", "RGB"):
        assert np.unique(np.asarray(reading.read_picture(tmp_path / "x.png", mode=mode))).tolist() == [117]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_the_three_formats_are_read(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (250, 0, 0)).save(buffer, kind)
    picture = reading.read_picture(buffer.getvalue(), name="x")
    assert picture.size == (6, 4)
    assert picture.getpixel((3, 2))[0] > 200


def test_a_message_quotes_little():
    assert len(reading.shown({"x" * 10_000: ["y" * 10_000] * 1000})) < 250
    assert len(reading.shown(10**4000)) < 250
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    assert len(reading.shown(nested)) < 250


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "9" * 300, f"a/{'é' * 200}", "a\0b"])
def test_names_in_an_index_stay_in_its_folder_and_are_names(name):
    with pytest.raises(CheckpointError, match=r"leads out of the folder|longer than a file's name"):
        reading.parse_json(json.dumps(name), reading.Inside, name="index.json")


def test_a_name_in_an_index_may_have_folders():
    assert (
        reading.parse_json('"shards/00001.safetensors"', reading.Inside, name="index.json")
        == "shards/00001.safetensors"
    )
