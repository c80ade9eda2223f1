"""What it costs to have the scores with the answers: P(wrong) and novelty beside the logits of one forward pass.

    python benchmarks/bench_scoring.py --quick        in seconds: ResNet-8
    python benchmarks/bench_scoring.py                ResNet-20 at 32 and ResNet-50 at 224 pixels, in batches and alone

Each network runs with and without its introspection, in turn (see timing.py), on real images that lie inside the
package. Weights are random, those of the introspection too: their values cost nothing. Prints tables, writes
benchmarks/results/scoring.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from timing import compared, conditions, in_turn, parser, print_comparison, results_path, store
from torch import Tensor, nn

from augment import normalise
from idml.data.image_dataset import Preprocessing
from idml.exporting import example_images
from idml.introspection.depths import vector_length
from idml.introspection.fit import FOLDS
from idml.introspection.introspected import Introspected
from idml.introspection.introspection import Introspection, IntrospectionSpec
from idml.introspection.layers import find_layers
from idml.runtime import choose_device
from idml.spec import ModelSpec
from idml.trained import TrainedModel

TARGET = 1.05
"""The pass with scores over the pass without, at most."""

HELD_OUT = 1_000
"""Images that the introspection is calibrated on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A network, its classes, and how many images of which size it is given."""

    model: str
    classes: int
    image_size: int
    batch_sizes: tuple[int, ...]


PARTS = {
    "resnet20": Part(model="resnet20_cifar", classes=10, image_size=32, batch_sizes=(128, 16, 1)),
    "resnet50": Part(model="resnet50", classes=1000, image_size=224, batch_sizes=(32, 8, 1)),
}
QUICK = {"resnet8": Part(model="resnet8_cifar", classes=10, image_size=32, batch_sizes=(16,))}


def build(part: Part, device: torch.device) -> tuple[TrainedModel, Introspection]:
    """The network, and an introspection of its shape, both with random weights."""
    torch.manual_seed(0)
    spec = ModelSpec(
        task="classification",
        model=part.model,
        model_kwargs={},
        classes=tuple(map(str, range(part.classes))),
        preprocessing=Preprocessing(image_size=part.image_size, fit="whole" if part.image_size < 64 else "crop"),
        ism="off",
        uncertainty_dim=1,
    )
    model = TrainedModel(spec.build(), spec, device=device, source=None)  # type: ignore[arg-type]  # nothing reads it
    layers = find_layers(model.network, torch.randn(2, 3, part.image_size, part.image_size, device=device))
    made = IntrospectionSpec(
        task="classification", layers=layers, classes=part.classes, folds=FOLDS, held_out=HELD_OUT, calibrated=True
    )
    introspection = Introspection(made)
    nn.init.normal_(introspection.novelty.projection, std=0.01)
    nn.init.normal_(introspection.novelty.means)
    return model, introspection.to(device).eval()


def passes(model: TrainedModel, introspection: Introspection, images: Tensor) -> dict[str, Callable[[], Any]]:
    """The pass without and with scores; hooks are there in both, as in use."""
    whole = Introspected(model.network, introspection).eval()

    def run(network: nn.Module) -> Callable[[], Any]:
        @torch.inference_mode()
        def forward() -> Any:
            return network(images)

        return forward

    return {"network": run(model.network), "with scores": run(whole)}


def measure(part: Part, device: torch.device, seconds: float) -> dict[str, Any]:
    """Figures of one network in each memory layout and batch size."""
    model, introspection = build(part, device)
    square = model.spec.preprocessing
    examples = normalise(example_images(model).to(device), square.mean, square.std)
    rows: dict[str, Any] = {}
    layouts = {"": torch.contiguous_format, ", channels_last": torch.channels_last}
    for name, layout in layouts.items():
        model.network.to(memory_format=layout)
        for size in part.batch_sizes:
            images = examples[torch.arange(size) % len(examples)].contiguous(memory_format=layout)
            found = in_turn(passes(model, introspection, images), budget=seconds, device=device)
            what = f"{size} {'image' if size == 1 else 'images'}{name}"
            rows[what] = compared(found, to="network")
            print_comparison(f"{part.model}, {device.type}, {what}", rows[what], to="network")
    stored = sum(each.numel() * each.element_size() for each in introspection.state_dict().values())
    return {
        "target": TARGET,
        "vector": vector_length(introspection.spec.layers),
        "introspection_megabytes": stored / 1e6,
        "batches": rows,
    }


def main() -> None:
    made = parser(__doc__, parts=[*PARTS, *QUICK])
    made.set_defaults(parts=None)
    made.add_argument("--seconds", type=float, default=40.0, help="for each network, layout and batch size")
    arguments = made.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    out = results_path("scoring", quick=arguments.quick, out=arguments.out)
    known = QUICK | PARTS
    for name in arguments.parts or (QUICK if arguments.quick else PARTS):
        made_with = conditions()
        figures = measure(known[name], device, 1.0 if arguments.quick else arguments.seconds)
        store(out, f"{name}, {device.type}", figures, made_with)
    print(f"\nfigures: {out}")


if __name__ == "__main__":
    main()
