"""Models for production: one graph from image to logits, embedding and uncertainty, checked against the model it is of.

Letters in shapes: N images, C classes, D semantic and E uncertainty dimensions, S pixels.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from idml._version import __version__
from idml.embedder import EmbedderOutput
from idml.errors import UserError
from idml.introspection_report import describe_introspection
from idml.models import ClassifierOutput, uncertainty_score
from idml.trained import CONFIG, TrainedModel

InputType = Literal["uint8", "float32"]
"""Of the images that a graph takes: 0 to 255, or 0 to 1. Either is normalised inside the graph."""

TOLERANCE = 1e-4
"""How far an exported model's numbers may be from the model's own, in units of max(1, |number|)."""

EXAMPLES = 8
"""Images of each of the two data sets inside the package that an export is checked on."""

INPUT = "images"

Runner: TypeAlias = "Callable[[np.ndarray], dict[str, np.ndarray]]"
"""An exported model: (N, 3, S, S) images of its input type -> its named outputs."""


def output_names(model: TrainedModel) -> tuple[str, ...]:
    """What an exported graph gives, in order; see ``ExportedGraph``."""
    names = ["logits"] if model.task == "classification" else []
    names.append("semantic")
    if model.score_name != "none":
        names.append("uncertainty")
    if model.spec.ism != "off":
        names.append("uncertainty_embedding")
    if model.introspection is not None:
        names.append("novelty")
    return tuple(names)


class ExportedGraph(nn.Module):
    """A model from images as they are to what is used of it; in evaluation mode, on the CPU.

    Args:
        model: what is exported.
        input_type: of the images.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, model: TrainedModel, input_type: InputType) -> None:
        super().__init__()
        self.network = model.whole
        self.names = output_names(model)
        self.plain = model.spec.ism == "off"
        # Buffers, not constants: a loaded graph that is moved to another device takes them along.
        top = 255.0 if input_type == "uint8" else 1.0
        square = model.spec.preprocessing
        for name, values in (("shift", square.mean), ("scale", square.std)):
            self.register_buffer(name, (top * torch.tensor(values, dtype=torch.float32)).view(1, 3, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, S, S) of the input type -> what ``output_names`` lists, float32.

        - ``logits``: (N, C), of a classifier.
        - ``semantic``: (N, D).
        - ``uncertainty``: (N,), the score that ``TrainedModel.score_name`` names: P(wrong) of an introspected model.
        - ``uncertainty_embedding``: (N, E), where ISM is on.
        - ``novelty``: (N,) in [0, 1], where the model was introspected.
        """
        output = self.network((images.float() - self.shift) / self.scale)
        found = named_outputs(output, plain=self.plain)
        return {name: found[name] for name in self.names}


def named_outputs(output: ClassifierOutput | EmbedderOutput, *, plain: bool) -> dict[str, Tensor]:
    """All that a graph may give, by name; ``plain`` where ISM is off."""
    found = {"semantic": output.semantic, "uncertainty_embedding": output.uncertainty}
    if isinstance(output, ClassifierOutput):
        found["logits"] = output.logits
    if output.scores is not None:
        return found | {"uncertainty": output.scores.p_wrong, "novelty": output.scores.novelty}
    if not plain:
        return found | {"uncertainty": uncertainty_score(output)}
    return found | ({"uncertainty": 1 - found["logits"].softmax(1).amax(1)} if "logits" in found else {})


def example_images(model: TrainedModel) -> Tensor:
    """(16, 3, S, S) uint8: real images inside the package, clothes in grey and emoji in colour, as the model sees them.

    Any real image serves to compare two ways of computing; these are there without the data that the model knows.
    """
    from idml.data.emoji import load_embedded

    embedded = resources.files("idml.data.embedded").joinpath("fashion_mnist_mini.npz")
    with embedded.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        clothes = arrays["test_images"][:EXAMPLES]
    emoji = load_embedded().images
    chosen = emoji[np.linspace(0, len(emoji) - 1, EXAMPLES, dtype=int)]
    return model.prepare([Image.fromarray(image) for image in (*clothes, *chosen)])


class Checked(NamedTuple):
    """What a comparison has shown.

    Attributes:
        images: how many were compared.
        batch_sizes: in which they went through.
        largest_difference: over all outputs, in units of max(1, |number|).
    """

    images: int
    batch_sizes: tuple[int, ...]
    largest_difference: float


def novelty_bounds(model: TrainedModel, strangeness: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(N,) least and largest novelty of strangeness that is up to ``TOLERANCE`` of itself away: a novelty has steps."""
    assert model.introspection is not None
    rank = model.introspection.novelty.novelty
    low, high = (rank(strangeness * (1 + sign * TOLERANCE)).numpy() for sign in (-1, 1))
    return low, high


def check(run: Runner, model: TrainedModel, images: Tensor, input_type: InputType, *, what: str) -> Checked:
    """Compare an exported model with the model itself, one image at a time and all at once.

    Args:
        run: the exported model.
        model: on the CPU.
        images: (N, 3, S, S) uint8, as ``TrainedModel.prepare`` makes them.
        input_type: what ``run`` takes.
        what: name of it for the error.

    Raises:
        UserError: an output is missing, has another shape, is not finite, or is further than ``TOLERANCE`` away.
    """
    sizes = tuple(sorted({1, min(3, len(images)), len(images)}))
    worst = 0.0
    for size in sizes:
        part = images[:size]
        with torch.inference_mode():
            output = model.outputs(part)
            expected = {n: v.numpy() for n, v in named_outputs(output, plain=model.spec.ism == "off").items()}
            bounds = None if output.scores is None else novelty_bounds(model, output.scores.strangeness)
        given = part.numpy() if input_type == "uint8" else part.numpy().astype(np.float32) / 255
        try:
            found = run(given)
        except Exception as error:  # the runtimes have a great many of them
            raise UserError(f"{what} does not run on {size} images: {str(error).splitlines()[0]}") from None
        if bounds is not None and (given_novelty := found.get("novelty")) is not None:
            expected["novelty"] = np.clip(given_novelty, *bounds)
        for name in output_names(model):
            worst = max(worst, _difference(found.get(name), expected[name], f"{what}: {name} of {size} images"))
    return Checked(len(images), sizes, worst)


def _difference(found: np.ndarray | None, expected: np.ndarray, what: str) -> float:
    """The largest difference in units of max(1, |expected|); UserError where it is too large."""
    if found is None or found.shape != expected.shape:
        shape = None if found is None else found.shape
        raise UserError(f"{what}: expected an array of shape {expected.shape}, got {shape}")
    difference = float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max())
    if not difference <= TOLERANCE:  # NaN too
        raise UserError(f"{what} is {difference:.2g} away from the model, more than {TOLERANCE:g}: nothing was written")
    return difference


def describe(model: TrainedModel, input_type: InputType) -> dict[str, Any]:
    """What somebody who has the exported file alone must know, as plain values."""
    spec, square = model.spec, model.spec.preprocessing
    size, top = square.image_size, 255 if input_type == "uint8" else 1
    fitted = {
        "crop": f"shorter side resized to {square.resized_side} pixels ({square.interpolation}, antialiased), "
        f"centre of {size} x {size} cropped",
        "whole": f"central square brought to {size} x {size} pixels: up to 4 missing pixels are padded with zeros, "
        "evenly, else it is resized (bilinear, antialiased)",
    }
    outputs: dict[str, Any] = {
        "logits": {"shape": ["batch", len(spec.classes)], "meaning": "softmax gives the probabilities of the classes"},
        "semantic": {"shape": ["batch", spec.embedding_size or model.network.feature_dim], "meaning": "embedding"},
        "uncertainty": {"shape": ["batch"], "meaning": score_meaning(model)},
        "uncertainty_embedding": {"shape": ["batch", spec.uncertainty_dim], "meaning": "u of the ISM"},
        "novelty": {"shape": ["batch"], "meaning": "share of held-out known images that are less strange, in [0, 1]"},
    }
    return {
        "task": spec.task,
        "model": spec.model,
        "method": spec.method,
        "dataset": spec.dataset,
        "classes": list(spec.classes),
        "input": {
            "name": INPUT,
            "dtype": input_type,
            "shape": ["batch", 3, size, size],
            "layout": "NCHW, RGB",
            "range": [0, top],
            "normalisation": f"inside the model: (image / {top} - {list(square.mean)}) / {list(square.std)}",
            "preparation": fitted[square.fit],
        },
        "outputs": {name: {"dtype": "float32"} | outputs[name] for name in output_names(model)},
        "score": {"name": model.score_name, "calibrated_on": model.calibrated_on},
        "introspection": describe_introspection(model.introspection),
        "fingerprint": model.fingerprint,
        "versions": {"idml": __version__, **{name: metadata.version(name) for name in ("torch", "timm")}},
        "idml": spec.as_json(),
    }


def score_meaning(model: TrainedModel) -> str:
    """What the output ``uncertainty`` is, in a sentence; empty where there is none."""
    wrong = "the top class is wrong" if model.task == "classification" else "the nearest neighbour is of another class"
    return {
        "P(wrong)": f"probability in [0, 1] that {wrong}",
        "|u|": "length of the uncertainty embedding, without unit: higher for a more ambiguous image",
        "1 - max softmax": "1 - the probability of the top class",
        "none": "",
    }[model.score_name]


def check_free(path: Path, *, overwrite: bool) -> None:
    """UserError where there is something that may not be replaced: a folder, only if it is an exported model."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another --out, or --overwrite to replace it")
    if path.is_dir() and not (path / CONFIG).is_file():
        raise UserError(f"{path} is a folder, but no exported model: it is not replaced; give another --out")


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A place beside ``out`` to write a file or a folder to; it becomes ``out`` if nothing goes wrong, else it is gone.

    Raises:
        UserError: it cannot be written.
    """
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # of an export that was killed
        yield temporary
        _remove(out)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
