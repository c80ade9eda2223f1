"""What ``torch.hub`` offers of this repository.

model = torch.hub.load("path/to/clone", "introspective", checkpoint="runs/x", source="local")
network = torch.hub.load("path/to/clone", "introspective_classifier", "resnet50", num_classes=10, source="local")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from idml.backbones import create_backbone
from idml.embedder import IntrospectiveEmbedder
from idml.models import IntrospectiveClassifier
from idml.trained import TrainedModel, load

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "yaml", "jsonargparse", "tqdm"]


def introspective(checkpoint: str | Path, device: str = "auto") -> TrainedModel:
    """A trained model with its preprocessing and classes; see ``idml.load``.

    Args:
        checkpoint: run directory, checkpoint file, or a folder that ``python -m idml export`` wrote.
        device: auto (cuda, then mps, then cpu), cpu, cuda or mps.
    """
    return load(checkpoint, device=device)


def introspective_classifier(
    model: str = "resnet50", num_classes: int = 1000, pretrained: bool = False, **options: Any
) -> IntrospectiveClassifier:
    """A classifier to be trained.

    Args:
        model: timm's name of the backbone, or one of this project.
        num_classes: at least 2.
        pretrained: take timm's weights for the backbone; random otherwise.
        options: further arguments of ``IntrospectiveClassifier``.
    """
    return IntrospectiveClassifier(create_backbone(model, pretrained=pretrained), num_classes, **options)


def introspective_embedder(
    model: str = "resnet50", embedding_dim: int = 512, pretrained: bool = False, **options: Any
) -> IntrospectiveEmbedder:
    """An embedding for retrieval, to be trained.

    Args:
        model: timm's name of the backbone, or one of this project.
        embedding_dim: length of the semantic embedding.
        pretrained: take timm's weights for the backbone; random otherwise.
        options: further arguments of ``IntrospectiveEmbedder``.
    """
    return IntrospectiveEmbedder(create_backbone(model, pretrained=pretrained), embedding_dim, **options)
