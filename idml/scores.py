"""Scores of how unsure a model is of an image: those of the ISM, and those that any model gives for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from idml.foreign import ForeignClassifier
from idml.introspection.calibration import odds
from idml.models import ClassifierOutput, IntrospectiveClassifier
from idml.similarity import class_sq_distances, introspective_exponent

FREE_SCORES = ("1 - max softmax", "entropy", "margin", "-|feature|", "random")
"""What every classifier gives, with and without ISM, and nothing at all: whatever a head says must be better."""

ISM_SCORES = ("|u|", "beta/alpha", "confidence drop", "introspective entropy")

INTROSPECTION_SCORES = ("P(wrong)", "novelty", "belief", "foreseen loss")
"""Of the introspection: the probability of an error, how strange the image is, and what the heads themselves say."""


@torch.no_grad()
def classifier_scores(
    model: IntrospectiveClassifier | ForeignClassifier, output: ClassifierOutput, generator: torch.Generator
) -> dict[str, Tensor]:
    """Every score of a batch; high means "probably wrong".

    Args:
        model: which gave the output.
        output: of B images.
        generator: a CPU generator, for ``random``.

    Returns:
        (B,) float32 on the CPU for each of ``FREE_SCORES`` and, unless ISM is off, of ``ISM_SCORES`` and, with an
        introspection, of ``INTROSPECTION_SCORES``:

        - ``1 - max softmax``, ``entropy`` (nats), ``margin`` (less the gap between the two likeliest classes): of the
          plain logits.
        - ``-|feature|``: less the length of the semantic embedding.
        - ``|u|``: length of the uncertainty embedding; its square ranks alike.
        - ``beta/alpha``: the ISM exponent (over tau) at the predicted class.
        - ``confidence drop``: probability of the predicted class, plain less introspective.
        - ``introspective entropy``: of the ISM-weighted logits, in nats.
        - ``P(wrong)``: see ``Scores.p_wrong``; ``novelty``: ``Scores.strangeness``, which ranks alike and has no ties.
        - ``belief``: what the heads give to other classes than the predicted one, as log-odds.
        - ``foreseen loss``: what the heads expect, in nats.
    """
    plain = output.logits.float().softmax(1)
    largest = plain.topk(2, dim=1)
    predicted = largest.indices[:, :1]
    scores = {
        "1 - max softmax": 1 - largest.values[:, 0],
        "entropy": torch.special.entr(plain).sum(1),
        "margin": largest.values[:, 1] - largest.values[:, 0],
        "-|feature|": -output.semantic.float().norm(dim=1),
        "random": torch.rand(len(plain), generator=generator),
    }
    if model.ism != "off" and isinstance(model, IntrospectiveClassifier):
        classifier = model.classifier
        in_vector = model.ism == "released"
        alpha = class_sq_distances(
            output.logits, output.semantic, classifier.weight, classifier.bias, bias_in_class_vector=in_vector
        )
        beta = output.uncertainty.float().square().sum(1, keepdim=True)
        exponent = introspective_exponent(alpha.gather(1, predicted), beta, temperature=model.temperature)
        introspective = output.introspective_logits.float().softmax(1)
        scores["|u|"] = beta[:, 0].sqrt()
        scores["beta/alpha"] = exponent[:, 0]
        scores["confidence drop"] = (plain - introspective).gather(1, predicted)[:, 0]
        scores["introspective entropy"] = torch.special.entr(introspective).sum(1)
    if output.scores is not None:
        scores["P(wrong)"], scores["novelty"] = output.scores.p_wrong, output.scores.strangeness
        scores["belief"] = odds(1 - output.scores.belief.softmax(1).gather(1, predicted)[:, 0])
        scores["foreseen loss"] = output.scores.foreseen_loss
    return {name: score.float().cpu() for name, score in scores.items()}
