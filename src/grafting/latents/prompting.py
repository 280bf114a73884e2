"""A list of prompts to a folder of encoded ones, by a pipeline that need not hold its transformer."""

import importlib.util
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue, PositiveInt
from torch import Tensor, nn

from ..contract import Kwargs, Step
from ..data.promptfolder import Prompt, PromptFolder
from ..data.prompts import INDEX_NAME, Dropout, PromptsConfig
from ..errors import CheckpointError, DataError, HostError
from ..hosts import Host, call_of, host_of, transformer_of
from ..machine.devices import default_device
from ..machine.files import atomic_folder, hash_json, link_weights, write_json
from ..machine.processes import ALL, barrier, is_main, share
from ..machine.reading import JsonObject, failure_of, parse_json, read_json, read_text
from ..machine.settings import Settings
from ..metrics.features import tensors_sha256
from ..weights.locate import PIPELINE_NAME, find_folder
from .capture import watch

FORMAT = 1
Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COLUMNS = ("prompt", "caption", "text")
_DONE_NAME = "encoded.json"
_LONGEST = 1 << 16  # characters of a prompt
_SUFFIXES = (".txt", ".caption")
# of a pipeline: all but the weights of its transformers and its autoencoder
_FILES = ("*.json", "*/*.json", "text_encoder*/*", "tokenizer*/*", "image_encoder/*", "feature_extractor/*")


class PromptingConfig(Settings):
    """Encoding of prompts by a pipeline."""

    negative: str | None = None
    """Prompt that asks for nothing. If omitted, what the pipeline takes for it."""
    guidance: float | None = None
    """Guidance that the pipeline is called with: of a distilled model what it is told. If omitted, the pipeline's default."""
    max_length: PositiveInt | None = None
    """Tokens of a prompt, where the pipeline takes `max_sequence_length`. If omitted, the pipeline's default."""
    dropout: Dropout | None = None
    """Share of prompts that training replaces by the null. If omitted, 0.1, or 0 without a null."""
    shard_size: PositiveInt = 256
    """Prompts per shard; a killed process loses at most one shard."""


class WordsConfig(PromptingConfig):
    """Prompts as words, which a run encodes first, into its folder, by the text encoders of a pipeline."""

    name: Literal["words"] = "words"
    file: Path
    """Text file with a prompt a line, JSONL, or a folder with captions (.txt) beside its images."""
    column: str | None = None
    """Key of the prompt in each line of JSONL; if omitted `prompt`, `caption` or `text`."""
    pipeline: str | None = None
    """Pipeline of diffusers: a folder, or owner/name on the Hub. If omitted, the source."""
    variant: str | None = None
    """Variant of its weights, such as fp16."""
    dtype: Dtype | None = None
    """Weights of the text encoders. If omitted, bf16 on an accelerator, else fp32."""
    call: dict[str, JsonValue] = {}
    """Further arguments of the pipeline."""

    def load(self) -> "PlannedPrompts":
        """The prompts before they are encoded.

        Raises:
            DataError: the file is missing, or has none.
        """
        return PlannedPrompts(read_words(self.file, column=self.column), self.dropout or 0.0)


class PlannedPrompts:
    """Prompts that are not encoded yet: their number and words, for checks and forecasts."""

    def __init__(self, words: Sequence[str], dropout: float):
        self._words, self.dropout = words, dropout

    def __len__(self) -> int:
        return len(self._words)

    @property
    def identity(self) -> dict[str, JsonValue]:
        return {"name": "words", "sha256": hash_json(list(self._words))}

    def nulls(self, numbers: Tensor) -> Tensor:
        return torch.full_like(numbers, len(self))

    def words(self, number: int) -> str:
        return self._words[number]

    def at(self, numbers: Tensor, *, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Any:
        raise DataError(
            "these prompts are not encoded: `grafting run` does so first, or `grafting data prompts`"
        )


def encoding_pipeline(config: WordsConfig, source: str | None) -> str:
    """The pipeline that encodes a recipe's words: the one that it names, else the source.

    Raises:
        DataError: neither is given. CheckpointError: the folder holds no pipeline.
    """
    pipeline = config.pipeline or source
    if pipeline is None:
        raise DataError("conditions: words are encoded by a pipeline: name one, `pipeline: ...`")
    if Path(pipeline).expanduser().exists():
        _index_in(find_folder(pipeline, patterns=_FILES), pipeline)
    return pipeline


def encode_words(
    config: WordsConfig,
    folder: Path,
    *,
    source: str | None,
    tell: Callable[[Step], None],
    others: Sequence[Path] = (),
) -> PromptsConfig:
    """Encode a recipe's words into a folder, by all processes together; what was encoded before is not again.

    Args:
        source: the recipe's, where that is a folder or a name.
        others: folders in which the same words may have been encoded; theirs are taken.

    Raises:
        DataError: no words, or no pipeline. CheckpointError, HostError: the pipeline cannot be read, or cannot be asked so.
        RunError: the folder holds other prompts.
    """
    pipeline = encoding_pipeline(config, source)
    words = read_words(config.file, column=config.column)
    asked: JsonObject = {"asked": _asked(config, words, pipeline)}
    done = folder / _DONE_NAME
    if is_main() and not folder.exists():
        other = next((other for other in others if _is_encoded(other, asked)), None)
        if other is not None:
            with atomic_folder(folder) as made:
                ignored = shutil.ignore_patterns("*.lock")
                shutil.copytree(other, made, copy_function=link_weights, ignore=ignored, dirs_exist_ok=True)
    barrier()
    missing = not _is_encoded(folder, asked)
    if missing:
        opened = open_encoders(pipeline, variant=config.variant, device=default_device(), dtype=config.dtype)
        work = Prompting(
            opened, words, folder, config, source=f"{config.file.name}, {pipeline}", call=config.call
        )
        for step in work.steps(share()):
            tell(step)
    barrier()
    if missing and is_main():
        write_json(done, asked)
    return PromptsConfig(folder=folder)


def _is_encoded(folder: Path, asked: JsonObject) -> bool:
    done = folder / _DONE_NAME
    return (folder / INDEX_NAME).is_file() and done.is_file() and read_json(done, JsonObject) == asked


def _asked(config: WordsConfig, words: Sequence[str], pipeline: str) -> str:
    """A hash of all that encoded words depend on; of the pipeline's files the sizes and times, since to read them is the work."""
    folder = find_folder(pipeline, patterns=_FILES)
    files = {path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()}
    stats = {str(path.relative_to(folder)): path.stat() for path in sorted(files)}
    return hash_json(
        {
            "settings": config.model_dump(mode="json", exclude={"file", "pipeline"}),
            "words": list(words),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "device": default_device().type,
            "versions": [FORMAT, *map(version, ("diffusers", "transformers", "torch"))],
        }
    )


def read_words(source: Path, *, column: str | None = None) -> list[str]:
    """Prompts of a text file with one a line, of a JSONL file, or of the captions beside the images in a folder, by name.

    Args:
        column: of a JSONL file: the key of each line's prompt; if omitted `prompt`, `caption` or `text`.

    Raises:
        DataError: no prompts, a line without one, or one that is too long.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
        words = [" ".join(read_text(path).split()) for path in files]
    else:
        lines = [line for line in read_text(source).splitlines() if line.strip()]
        is_json = source.suffix in (".jsonl", ".json")
        words = (
            [_of_json(line, column, f"{source}: line {n}") for n, line in enumerate(lines, 1)]
            if is_json
            else lines
        )
    words = [text.strip() for text in words]
    if not words:
        what = f"no file of {' or '.join(_SUFFIXES)} in it" if source.is_dir() else "it has no line"
        raise DataError(f"no prompts in {source}: {what}")
    if long := [n for n, text in enumerate(words) if not text or len(text) > _LONGEST]:
        raise DataError(f"{source}: prompt {long[0]} is empty, or longer than {_LONGEST:,} characters")
    return words


def _of_json(line: str, column: str | None, name: str) -> str:
    row = parse_json(line, JsonObject, name=name, error=DataError)
    found = next(
        (row[key] for key in ([column] if column else _COLUMNS) if isinstance(row.get(key), str)), None
    )
    if not isinstance(found, str):
        asked = f"no text under {column}" if column else f"no text under {', '.join(_COLUMNS)}"
        raise DataError(f"{name}: {asked}; its keys are {', '.join(list(row)[:12])}: name one with --column")
    return found


def _index_in(folder: Path, source: str) -> Path:
    index = folder / PIPELINE_NAME
    if not index.is_file():
        raise CheckpointError(
            f"{source} is no pipeline of diffusers: it has no {PIPELINE_NAME}. Name a pipeline's folder, or owner/name on the Hub"
        )
    return index


def open_encoders(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    device: torch.device,
    dtype: Dtype | None = None,
) -> Any:
    """A pipeline with its text encoders, whose transformers and autoencoder have no weights of their own: for prompts alone.

    Args:
        dtype: of its weights; by default bf16 on an accelerator, else fp32.

    Raises:
        CheckpointError: no pipeline is there, or diffusers cannot read it.
    """
    import diffusers

    kind_of_weights = DTYPES[dtype or ("fp32" if device.type == "cpu" else "bf16")]
    folder = find_folder(source, revision=revision, patterns=_FILES)
    parts = read_json(_index_in(folder, source), JsonObject)
    made: dict[str, nn.Module | None] = {name: None for name, part in parts.items() if part == [None, None]}
    try:
        for name, part in parts.items():
            if isinstance(part, list) and len(part) == 2 and part[0] == "diffusers":
                kind = getattr(diffusers, str(part[1]), None)
                if isinstance(kind, type) and issubclass(kind, nn.Module):
                    made[name] = _stand_in(kind, folder / name, device, kind_of_weights)
        with warnings.catch_warnings():
            # that `torch_dtype` is to be called `dtype`, which older versions do not know
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(folder), variant=variant, torch_dtype=kind_of_weights, **made
            )
    except Exception as error:
        advice = "name a whole pipeline"
        raise CheckpointError(
            f"{source} cannot be read as a pipeline of diffusers: {failure_of(error, advice)}"
        ) from error
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and not isinstance(part, _StandIn):
            part.to(device)
    return pipeline


class _StandIn:
    """Mark of a model without weights, whose device is said and not looked up."""


def _stand_in(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model made from its config on `meta`, which says that it is on this device."""
    config = kind.load_config(str(folder))
    with torch.device("meta"):
        model = kind.from_config(config).eval()
    properties = {"device": property(lambda _: device), "dtype": property(lambda _: dtype)}
    model.__class__ = type(kind.__name__, (kind, _StandIn), {**properties, "to": lambda self, *_, **__: self})
    return model


class Prompting:
    """Prompts of a pipeline on their way to a folder.

    Args:
        pipeline: whole, or with encoders alone, as of `open_encoders`.
        words: of all prompts.
        source: names the pipeline in the index.
        call: further arguments of the pipeline, by name.

    Raises:
        HostError: the pipeline does not run on this call, or passes prompts in a way that no table can hold.
        DataError: no prompts, or no null to drop them for.
    """

    def __init__(
        self,
        pipeline: Any,
        words: Sequence[str],
        folder: Path,
        config: PromptingConfig,
        *,
        source: str,
        call: Mapping[str, Any] | None = None,
    ):
        check_encodes(pipeline)
        self.words, self.source = words, source
        self.capture = watch(pipeline, _host(pipeline), call=_call(pipeline, config, call or {}))
        started = time.perf_counter()
        self.longest = self.capture.row(max(words[:64], key=len, default="a"))
        """The longest of the first prompts, encoded."""
        self.seconds_a_prompt = time.perf_counter() - started
        negative = "" if config.negative is None else config.negative
        null = self.capture.null_row(negative)
        dropout = config.dropout if config.dropout is not None else 0.1 if null else 0.0
        self.target = PromptFolder(
            folder,
            self._facts(pipeline),
            words=words,
            like=self.longest,
            nulls=[null] if null else [],
            per_shard=config.shard_size,
            lengths=self.capture.masks,
            forms=self.capture.forms,
            common=self.capture.common,
            constants=self.capture.constants,
            dropout=dropout,
        )

    def _facts(self, pipeline: Any) -> dict[str, int | str | list[str]]:
        """What the tensors depend on beside the words: by two prompts, so that other weights and other versions are told apart."""
        rows = {"prompt": self.capture.row("a red cat").tensors, "null": self.capture.null or {}}
        tensors = {f"{kind}.{name}": tensor for kind, row in rows.items() for name, tensor in row.items()}
        tensors |= {f"common.{name}": tensor for name, tensor in self.capture.common.items()}
        return {
            "format": FORMAT,
            "pipeline": type(pipeline).__name__,
            "arguments": sorted({*self.capture.axes, *self.capture.common, *self.capture.constants}),
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
            # weights, versions and settings that are told apart by nothing else
            "encoded_sha256": tensors_sha256(tensors),
        }

    def steps(self, share: slice = ALL) -> Iterator[Step]:
        """Fill the folder with this process's share of shards; a step is a prompt.

        Whatever was done before is not done again. The process that finds all shards done writes the index.
        """
        target = self.target
        target.check()
        with target.working(share) as missing:
            own = sum(len(target.words_of(n)) for n in range(target.num_shards)[share])
            done = own - sum(len(target.words_of(n)) for n in missing)
            yield Step(done=done, total=own)
            for number in missing:
                rows: list[Prompt] = []
                for words in target.words_of(number):
                    rows.append(self.capture.row(words))
                    if len(rows) < len(target.words_of(number)):
                        yield Step(done=done + len(rows), total=own)
                target.write(number, rows)
                done += len(rows)
                yield Step(done=done, total=own)
        target.finish(source=self.source)


def check_encodes(pipeline: Any) -> None:
    """Raises a HostError if a pipeline was loaded without text encoders or tokenizers; of several, one is enough."""
    missing = list[str]()
    for kind in ("text_encoder", "tokenizer"):
        parts = {name: part for name, part in pipeline.components.items() if name.startswith(kind)}
        if parts and not any(part is not None for part in parts.values()):
            missing += parts
    if missing:
        raise HostError(
            f"{type(pipeline).__name__} is to encode prompts, and its {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} None: "
            "load it whole, or encode the prompts by the whole pipeline with `grafting data prompts` and train by a recipe that names their folder"
        )


def _host(pipeline: Any) -> Host | None:
    try:
        return host_of(transformer_of(pipeline))
    except HostError:
        return None


def _call(pipeline: Any, config: PromptingConfig, call: Mapping[str, Any]) -> Kwargs:
    """What the pipeline is called with beside the prompt."""
    asked = {
        "negative_prompt": config.negative,
        "guidance_scale": config.guidance,
        "max_sequence_length": config.max_length,
    }
    given = {name: value for name, value in asked.items() if value is not None} | dict(call)
    takes = call_of(pipeline, given)
    host = _host(pipeline)
    # models that are not distilled are guided by it, if they are told what to lead away from
    guides = config.negative is not None or (host is not None and not host.distilled)
    if guides and "true_cfg_scale" in takes and "true_cfg_scale" not in given:
        given = {"negative_prompt": " ", **given, "true_cfg_scale": 4.0}
    # what the pipeline would do in any case, and say at each call
    cleans = all(importlib.util.find_spec(name) is not None for name in ("bs4", "ftfy"))
    usual = {"use_resolution_binning": False, "clean_caption": cleans}
    return {name: value for name, value in usual.items() if name in takes} | given
