"""Scores of single images, against their definitions written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from idml import IntrospectiveClassifier
from idml.models import IsmVariant
from idml.scores import FREE_SCORES, ISM_SCORES, classifier_scores


def scored(ism: IsmVariant) -> tuple[IntrospectiveClassifier, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = IntrospectiveClassifier("resnet8_cifar", 5, uncertainty_dim=8, ism=ism).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    images = torch.rand(6, 3, 16, 16)
    with torch.no_grad():
        output = model(images)
    return model, images, classifier_scores(model, output, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ism", ["live", "released", "off"])
def test_scores_are_what_they_are_called(ism: IsmVariant) -> None:
    model, images, scores = scored(ism)
    assert list(scores) == [*FREE_SCORES, *(ISM_SCORES if ism != "off" else ())]
    assert all(score.shape == (6,) and score.dtype == torch.float32 for score in scores.values())
    with torch.no_grad():
        output = model(images)
    for image in range(6):
        p = output.logits[image].double().softmax(0)
        ordered = sorted(p.tolist(), reverse=True)
        expected = {
            "1 - max softmax": 1 - ordered[0],
            "entropy": -(p * p.log()).sum().item(),
            "margin": ordered[1] - ordered[0],
            "-|feature|": -output.semantic[image].norm().item(),
        }
        if ism != "off":
            top = int(p.argmax())
            u, h = output.uncertainty[image].double(), output.semantic[image].double()
            centre = model.classifier.weight[top].detach().double()
            if ism == "released":
                centre = centre + model.classifier.bias[top].detach().double()
            q = output.introspective_logits[image].double().softmax(0)
            expected["|u|"] = u.norm().item()
            expected["beta/alpha"] = (u.square().sum() / (model.temperature * (h - centre).square().sum())).item()
            expected["confidence drop"] = (p[top] - q[top]).item()
            expected["introspective entropy"] = -(q * q.log()).sum().item()
        found = {name: scores[name][image].item() for name in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_random_scores_come_from_the_generator_alone() -> None:
    first, second = scored("live")[2]["random"], scored("off")[2]["random"]
    assert torch.equal(first, second) and len(first.unique()) == 6
