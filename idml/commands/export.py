"""``python -m idml export``: a trained model in the formats that production reads."""

from __future__ import annotations

import dataclasses
import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import timm
import torch

from augment import normalise
from idml.config import build_config, check_within, dump_config, option, parse_command_line
from idml.data.collection import read_collection
from idml.errors import UserError
from idml.exporting import (
    EXAMPLES,
    INPUT,
    ExportedGraph,
    InputType,
    Runner,
    check,
    check_free,
    describe,
    example_images,
    output_names,
    written_whole,
)
from idml.loading import write_folder
from idml.run import write_text
from idml.runtime import seed_everything
from idml.timm_folder import write_timm_folder
from idml.trained import CONFIG, TrainedModel, load

Format = Literal["onnx", "torchscript", "safetensors", "timm"]

GRAPHS = ("onnx", "torchscript")
"""Formats that are one file with the whole computation; the others are folders of weights."""

OPSET = 18
"""Of ONNX: what torch's exporter writes by itself, and every runtime since 2023 reads."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Options of ``export``."""

    checkpoint: str | None = option(None, "run directory, checkpoint file, or folder that export wrote")
    format: Format | None = option(None, "onnx, torchscript (one file), safetensors or timm (a folder)")
    out: str | None = option(None, "file or folder to write", "-o")
    input_type: InputType = option(
        "uint8", "of the images that onnx and torchscript take: uint8 from 0 to 255, or float32 from 0 to 1"
    )
    opset: int = option(OPSET, "of onnx")
    data_dir: str | None = option(
        None, "folder of images that the export is compared with the model on; default: 16 inside the package"
    )
    overwrite: bool = option(False, "replace what is at --out")
    trust_module: bool = option(
        False, "let the function that the folder of a model of your own names make its network, which runs code"
    )
    workers: int = option(4, "threads that decode them", "-j")
    threads: int | None = option(None, "CPU threads for torch; default: torch's own choice")


def export(arguments: Sequence[str]) -> None:
    """``python -m idml export --checkpoint C --format F --out PATH``.

    Whatever is written has been read back and compared with the model on real images; otherwise nothing is written.

    Raises:
        UserError: bad options, no such model, a package is missing, or the export does not give the model's numbers.
    """
    file, flags, print_config = parse_command_line(
        ExportConfig, arguments, prog="python -m idml export", description=__doc__ or ""
    )
    config = build_config(ExportConfig, file | flags)
    if print_config:
        print(dump_config(config), end="")
        return
    checkpoint, kind, out = _check_options(config, set(file) | set(flags))
    seed_everything(0, threads=config.threads)
    model = load(checkpoint, device="cpu", trust_module=config.trust_module)
    if config.data_dir is None:
        images = example_images(model)
    else:
        collection = read_collection(config.data_dir, workers=config.workers)
        loader = model.loader(collection.dataset, batch_size=2 * EXAMPLES)
        images, _ = next(loader.epoch(0))
    about = describe(model, config.input_type)
    with written_whole(out) as place:
        runner = WRITERS[kind](model, place, about, config)
        checked = check(runner, model, images, config.input_type, what=f"the {kind} export")
        about["checked"] = checked._asdict()
        if kind not in GRAPHS:
            _amend(place / CONFIG, {"checked": about["checked"]})
    beside = out.with_name(f"{out.name}.json") if kind in GRAPHS else out / CONFIG
    if kind in GRAPHS:
        write_text(beside, json.dumps(about, indent=2) + "\n")
    print(
        f"{out}: {kind}, {model.task}, outputs {', '.join(output_names(model))}; on {checked.images} real images "
        f"at most {checked.largest_difference:.1e} away from the model\ndescribed in {beside}"
    )


def _check_options(config: ExportConfig, given: set[str]) -> tuple[str, Format, Path]:
    """(model, format, where to write); UserError for what is missing, a warning for what has no effect."""
    if config.checkpoint is None:
        raise UserError("--checkpoint is missing: a run directory, a checkpoint file, or a folder that export wrote")
    if config.format is None:
        raise UserError("--format is missing: onnx, torchscript, safetensors or timm")
    if config.out is None:
        example = {"onnx": "model.onnx", "torchscript": "model.pt"}.get(config.format, "model")
        raise UserError(f"--out is missing: where to write, {example} for example")
    check_within(config, {"workers": (0, float("inf")), "threads": (1, float("inf")), "opset": (13, 26)})
    out = Path(config.out)
    beside = out.with_name(f"{out.name}.json")
    for path in (out, beside) if config.format in GRAPHS else (out,):
        check_free(path, overwrite=config.overwrite)
    if config.format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require_onnx(package)
    unused = {"opset": "it is of --format onnx"} if config.format != "onnx" else {}
    if config.format not in GRAPHS:
        unused["input_type"] = f"--format {config.format} holds weights, not a graph"
    if config.data_dir is None:
        unused["workers"] = "no --data-dir is given"
    for name in sorted(given & set(unused)):
        flag = name.replace("_", "-")
        warnings.warn(f"--{flag} {getattr(config, name)} has no effect: {unused[name]}", UserWarning, stacklevel=2)
    return config.checkpoint, config.format, out


def require_onnx(package: str) -> ModuleType:
    """One of the packages that ONNX takes; UserError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"--format onnx needs the package {package}: pip install 'idml[onnx]'") from None


def write_onnx(model: TrainedModel, place: Path, about: dict[str, Any], config: ExportConfig) -> Runner:
    """Write an ONNX file with any number of images a batch, what describes it in its metadata; and run it."""
    graph, size = ExportedGraph(model, config.input_type), model.spec.preprocessing.image_size
    example = torch.zeros(2, 3, size, size, dtype=getattr(torch, config.input_type))
    try:
        program = torch.onnx.export(
            graph,
            (example,),
            input_names=[INPUT],
            output_names=list(graph.names),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            opset_version=config.opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except Exception as error:
        raise _not_exported(model, "onnx", error) from None
    assert program is not None
    about["opset"] = config.opset
    program.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    program.save(str(place))
    runtime = require_onnx("onnxruntime")
    about["versions"]["onnxruntime"] = runtime.__version__
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {INPUT: images}), strict=True))


def write_torchscript(model: TrainedModel, place: Path, about: dict[str, Any], config: ExportConfig) -> Runner:
    """Write a traced module, what describes it inside the file as ``idml.json``; and run it."""
    graph, size = ExportedGraph(model, config.input_type), model.spec.preprocessing.image_size
    example = torch.zeros(2, 3, size, size, dtype=getattr(torch, config.input_type))
    with warnings.catch_warnings(), torch.no_grad():
        # Of shapes that the code looks at, and that tracing is deprecated: the file is run on other shapes below.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            traced = torch.jit.trace(graph, (example,), strict=False, check_trace=False)  # not strict: a dict
        except Exception as error:
            raise _not_exported(model, "torchscript", error) from None
        torch.jit.save(traced, str(place), _extra_files={"idml.json": json.dumps(about)})
        loaded = torch.jit.load(str(place), map_location="cpu")

    @torch.no_grad()
    def run(images: Any) -> dict[str, Any]:
        return {name: value.numpy() for name, value in loaded(torch.from_numpy(images)).items()}

    return run


def write_safetensors(model: TrainedModel, place: Path, about: dict[str, Any], config: ExportConfig) -> Runner:
    """Write a folder that ``idml.load`` reads; and read it."""
    write_folder(model, place, about)
    return _read_back(place, config)


def write_timm(model: TrainedModel, place: Path, about: dict[str, Any], config: ExportConfig) -> Runner:
    """Write a folder in timm's layout that ``idml.load`` reads too; and read it in both ways."""
    kept = ("method", "dataset", "score", "introspection", "fingerprint", "versions")
    write_timm_folder(model, place, {name: about[name] for name in kept})
    run_ours, square = _read_back(place, config), model.spec.preprocessing
    plain = timm.create_model(f"local-dir:{place}", pretrained=True).eval()

    @torch.inference_mode()
    def run(images: Any) -> dict[str, Any]:
        found = run_ours(images)
        if "logits" in found:
            found["logits"] = plain(normalise(torch.from_numpy(images), square.mean, square.std)).numpy()
        return found

    return run


def _read_back(place: Path, config: ExportConfig) -> Runner:
    """The model in a folder, through the same graph as the other formats."""
    graph = ExportedGraph(load(place, device="cpu", trust_module=config.trust_module), config.input_type)

    @torch.inference_mode()
    def run(images: Any) -> dict[str, Any]:
        return {name: value.numpy() for name, value in graph(torch.from_numpy(images)).items()}

    return run


def _not_exported(model: TrainedModel, name: str, error: Exception) -> UserError:
    """That torch cannot make this format of a model."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"torch cannot write {model.spec.model} as {name}: {reason}; take --format safetensors")


def _amend(path: Path, values: dict[str, Any]) -> None:
    """Add values to a JSON file."""
    write_text(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | values, indent=2) + "\n")


WRITERS: dict[Format, Callable[[TrainedModel, Path, dict[str, Any], ExportConfig], Runner]] = {
    "onnx": write_onnx,
    "torchscript": write_torchscript,
    "safetensors": write_safetensors,
    "timm": write_timm,
}
