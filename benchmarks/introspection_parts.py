"""The parts of `introspection.py`: each trains what it needs, measures, and gives its rows and their table."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion import subset_of_fashion_mnist
from introspection_peers import SCORES, detectors, free_scores
from introspection_runs import IMAGES, Look, about, as_dataset, look_at, open_run, options_of, train_all
from other_data import FAR, SETS
from paired import markdown_table, mean_cell
from torch import Tensor

from idml.introspection.fit import fit_classifier, wrong_answers
from idml.introspection.refusal import promised
from idml.metrics.uncertainty import auroc, selective_metrics

SPLITS = 500
MAX_RISK, CONFIDENCE = 0.05, 0.95
WRONG_LABELS = 0.05


def runs_of(setting: str, arguments: argparse.Namespace, *more: str, name: str = "") -> list[Path]:
    """A run for each seed, trained now unless the folder holds it whole."""
    options = [*options_of(setting, arguments.runs, arguments.weights, quick=arguments.quick), *more]
    stem = (name or setting).replace(", ", "-").replace(" ", "-")
    runs = [arguments.runs / f"{stem}-s{seed}" for seed in arguments.seeds]
    jobs = [(setting, [*options, "--seed", str(seed)], run) for seed, run in zip(arguments.seeds, runs, strict=True)]
    train_all(jobs, arguments.processes)
    return runs


def error_auroc(score: Tensor, wrong: Tensor) -> float:
    """That a wrong answer has the higher score."""
    return auroc(score[wrong].double(), score[~wrong].double())


def errors(arguments: argparse.Namespace) -> dict[str, Any]:
    """Error AUROC, accuracy and the share answered at 5 % risk, of every score in every setting."""
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    for setting in arguments.settings:
        found: dict[str, list[dict[str, float]]] = {}
        looks: list[Look] = []
        for run in runs_of(setting, arguments):
            model, data = open_run(run)
            assert data.val is not None
            looks.append(look_at(model, data.test))
            held_out = look_at(model, data.val)
            wrong = wrong_answers(looks[-1].features)
            labels_of = looks[-1].features.labels
            scores = {"P(wrong)": looks[-1].p_wrong} | free_scores(looks[-1], held_out)
            for name, score in scores.items():
                found.setdefault(name, []).append(_figures(score, wrong))
            flipped = (looks[-1].features.logits.softmax(1) + looks[-1].flipped.softmax(1)) / 2
            found.setdefault("flip averaging", []).append(_figures_of(flipped, labels_of))
            found.setdefault("introspection", []).append({k: float(v or 0) for k, v in _cost(model).items()})
        probabilities = [look.features.logits.softmax(1) for look in looks]
        for first in range(len(looks) if len(looks) >= 3 else 0):
            three = torch.stack([probabilities[(first + step) % len(looks)] for step in range(3)]).mean(0)
            found.setdefault("ensemble of three", []).append(_figures_of(three, looks[0].features.labels))
        if setting.startswith("Fashion-MNIST, plain"):
            found["MC dropout"] = _dropout(setting, arguments)
        rows[setting] = found
    return {"rows": rows, "table": _errors_table(rows)}


def _cost(model: Any) -> dict[str, Any]:
    stored = about(model)
    return {"seconds": stored["introspection"]["seconds"], "epoch_seconds": stored["epoch_seconds"]}


def _figures(score: Tensor, wrong: Tensor) -> dict[str, float]:
    figures = selective_metrics(score, ~wrong, risk=MAX_RISK)
    return {"accuracy": 1 - wrong.double().mean().item(), "error_auroc": figures["error_auroc"]} | {
        "answered": figures["coverage_at_risk"], "e_aurc": figures["e_aurc"],
    }  # fmt: skip


def _figures_of(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Of answers of their own: 1 - the largest probability is the score."""
    return _figures(1 - probabilities.amax(1), probabilities.argmax(1) != labels)


def _dropout(setting: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """A network trained with dropout before its last layer; 20 passes with it, averaged."""
    found = []
    for run in runs_of(setting, arguments, "--model-kwargs", "drop_rate=0.2", name=f"{setting}, dropout"):
        model, data = open_run(run)
        for module in model.network.modules():
            if "Dropout" in type(module).__name__:
                module.train()
        if hasattr(model.network.backbone, "drop_rate"):
            model.network.backbone.training = True  # timm's heads ask the network itself
        passes = 2 if arguments.quick else 20
        looks = [look_at(model, data.test, seed=number) for number in range(passes)]
        mean = torch.stack([look.features.logits.softmax(1) for look in looks]).mean(0)
        found.append(_figures_of(mean, looks[0].features.labels))
    return found


def _errors_table(rows: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    head = ["", "n", "score", "accuracy of its answers, %", "error AUROC", "answered at 5 % risk, %"]
    lines = []
    for setting, found in rows.items():
        first = setting
        for name, runs in found.items():
            if name == "introspection":
                continue
            cells = [mean_cell([run["accuracy"] for run in runs])]
            cells += [mean_cell([run["error_auroc"] for run in runs], as_percent=False)]
            cells += [mean_cell([run["answered"] for run in runs])]
            lines.append([first, str(len(runs)), name, *cells])
            first = ""
    return markdown_table(head, lines)


def novelty(arguments: argparse.Namespace) -> dict[str, Any]:
    """AUROC of clean test images against each other set, of every detector."""
    setting = next((name for name in arguments.settings if "CutMix" in name), arguments.settings[0])
    rows: dict[str, dict[str, list[float]]] = {}
    for run in runs_of(setting, arguments):
        model, data = open_run(run)
        known = look_at(model, data.test)
        count = 200 if arguments.quick else None
        other = {name: look_at(model, as_dataset(make()[:count], data.test)) for name, make in SETS.items()}
        scores = detectors(model, look_at(model, data.train))
        for name, score in scores.items():
            clean = score(known)
            for kind, look in other.items():
                rows.setdefault(name, {}).setdefault(kind, []).append(auroc(score(look), clean))
    return {"rows": rows, "setting": setting, "table": _novelty_table(rows)}


def _novelty_table(rows: dict[str, dict[str, list[float]]]) -> str:
    head = ["", *SETS, "mean", "least of the far ones"]
    lines = []
    for name, found in sorted(rows.items(), key=lambda row: -np.mean([np.mean(v) for v in row[1].values()])):
        means = {kind: float(np.mean(values)) for kind, values in found.items()}
        cells = [f"{means[kind]:.3f}" for kind in SETS]
        far = min(means[kind] for kind in FAR)
        lines.append([name, *cells, f"{np.mean(list(means.values())):.3f}", f"{far:.3f}"])
    return markdown_table(head, lines)


def promise(arguments: argparse.Namespace) -> dict[str, Any]:
    """Is the error rate of answers above what was promised? Of the stored promise, and of 500 splits of test images."""
    rows: dict[str, list[dict[str, float]]] = {}
    for setting in arguments.settings:
        for seed, run in zip(arguments.seeds, runs_of(setting, arguments), strict=True):
            model, data = open_run(run)
            assert data.val is not None and model.introspection is not None
            look = look_at(model, data.test)
            p_wrong, wrong = look.p_wrong, wrong_answers(look.features)
            figures = _split_often(p_wrong, wrong, len(data.val), seed)
            stored = model.introspection.promise(MAX_RISK, CONFIDENCE)
            figures["stored"] = float(stored is not None)
            if stored is not None:
                kept = p_wrong <= stored.threshold
                figures["stored answered"] = kept.double().mean().item()
                figures["stored risk"] = wrong[kept].double().mean().item()
            rows.setdefault(setting, []).append(figures)
    titles = {
        "stored answered": "answered by the stored promise, %",
        "stored risk": "errors among these, %",
        "given": "splits with a promise, %",
        "broken": "splits above 5 % risk, %",
        "answered": "answered, mean over splits, %",
    }
    lines = []
    for setting, found in rows.items():
        kept_of = [f"{int(sum(run['stored'] for run in found))} of {len(found)}"]
        cells = [mean_cell([run[name] for run in found if name in run]) for name in titles]
        lines.append([setting, *kept_of, *cells])
    return {"rows": rows, "table": markdown_table(["", "stored promises", *titles.values()], lines)}


def _split_often(p_wrong: Tensor, wrong: Tensor, held_out: int, seed: int) -> dict[str, float]:
    """Test images dealt out to held-out and new ones: shares of the splits with a promise, and with a broken one."""
    generator = torch.Generator().manual_seed(seed)
    held_out = min(held_out, len(wrong) // 2)
    broken, answered = 0, []
    for _ in range(SPLITS):
        order = torch.randperm(len(wrong), generator=generator)
        held, rest = order[:held_out], order[held_out:]
        found = promised(p_wrong[held], wrong[held], max_risk=MAX_RISK, confidence=CONFIDENCE)
        if found is not None:
            kept = p_wrong[rest] <= found.threshold
            broken += bool(kept.any()) and wrong[rest][kept].double().mean().item() > MAX_RISK
            answered.append(kept.double().mean().item())
    given = len(answered) / SPLITS
    return {"broken": broken / SPLITS, "given": given, "answered": float(np.mean(answered or [0.0]))}


def labels(arguments: argparse.Namespace) -> dict[str, Any]:
    """Wrong labels planted in the training images: the share of them in the first 5 % of each ranking."""
    setting = arguments.settings[0]
    rows: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        count = 1_500 if arguments.quick else IMAGES.get(setting, 20_000)
        folder = arguments.runs / f"planted-{count}-s{seed}"
        planted = subset_of_fashion_mnist(folder, count, wrong=WRONG_LABELS, seed=seed, embedded=arguments.quick)
        one = argparse.Namespace(**(vars(arguments) | {"seeds": [seed]}))
        run = runs_of(setting, one, "--data-dir", str(folder), name=f"{setting}, planted")[0]
        model, data = open_run(run)
        assert data.val is not None
        for name, score, hidden in _label_scores(model, data, planted, folder):
            first = np.argsort(-score, kind="stable")[: round(WRONG_LABELS * len(score))]
            rows.setdefault(name, []).append(float(hidden[first].sum() / hidden.sum()))
    lines = [[name, str(len(values)), mean_cell(values)] for name, values in rows.items()]
    return {"rows": rows, "table": markdown_table(["ranking", "n", "planted errors in its first 5 %, %"], lines)}


def _label_scores(model: Any, data: Any, planted: np.ndarray, folder: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(ranking, scores high where the label is probably wrong, which labels are), over training and held-out images."""
    from idml.audit.label_errors import class_doubt
    from idml.data.datasets import read_idx

    looks = [look_at(model, part) for part in (data.train, data.val)]
    logits = torch.cat([look.features.logits for look in looks])
    given = torch.cat([look.features.labels for look in looks])
    vectors = torch.cat([look.features.vectors for look in looks])
    originals = read_idx(folder / "train-images-idx3-ubyte")
    place = {image.tobytes(): index for index, image in enumerate(originals)}
    images = np.concatenate([data.train.images, data.val.images])[..., 0]
    margin = (images.shape[1] - originals.shape[1]) // 2
    inner = images[:, margin : margin + originals.shape[1], margin : margin + originals.shape[1]]
    hidden = planted[[place[np.ascontiguousarray(image).tobytes()] for image in inner]]
    with torch.no_grad():
        belief = torch.cat([model.introspection(part.float(), out).belief for part, out in
                            zip(vectors.split(4096), logits.split(4096), strict=True)])  # fmt: skip
    probabilities = logits.softmax(1)
    rankings = {
        "audit": class_doubt(probabilities, belief.softmax(1), given)[0].numpy(),
        "loss": torch.nn.functional.cross_entropy(logits, given, reduction="none").numpy(),
    }
    out_of_sample = SCORES.out_of_sample(vectors, given)
    rankings["out-of-sample loss"] = -np.log(out_of_sample[np.arange(len(given)), given.numpy()] + 1e-12)
    if (found := SCORES.cleanlab(given.numpy(), out_of_sample)) is not None:
        rankings["cleanlab, the same out-of-sample probabilities"] = found
    return [(name, score, hidden) for name, score in rankings.items()]


def memorised(arguments: argparse.Namespace) -> dict[str, Any]:
    """A network trained until it errs no more on its training images: what should the heads learn from?"""
    setting = "Fashion-MNIST, plain, 4 epochs"
    more = ["--epochs", "60", "--no-flip", "--crop-padding", "0", "--schedule", "cosine", "--lr", "0.05"]
    more += [] if arguments.quick else ["--max-steps", "960"]
    few = argparse.Namespace(**vars(arguments))
    rows: dict[str, list[float]] = {}
    from idml.introspection import fit

    folder = arguments.runs / "fashion-mnist-3000"
    if not folder.exists():
        subset_of_fashion_mnist(folder, 300 if arguments.quick else 3_000, embedded=arguments.quick)
    more += ["--data-dir", str(folder), "--val-fraction", "0.33", "--batch-size", "128"]
    for run in runs_of(setting, few, *more, name="memorised"):
        model, data = open_run(run)
        assert data.val is not None and model.introspection is not None
        looks = {name: look_at(model, part) for name, part in
                 (("train", data.train), ("held out", data.val), ("test", data.test))}  # fmt: skip
        test, layers = looks["test"].features, model.introspection.spec.layers
        wrong = wrong_answers(test)
        rows.setdefault("error rate on training images", []).append(
            wrong_answers(looks["train"].features).double().mean().item()
        )
        rows.setdefault("accuracy", []).append(1 - wrong.double().mean().item())
        rows.setdefault("1 - max softmax", []).append(error_auroc(1 - test.logits.softmax(1).amax(1), wrong))
        before = fit.MEMORISED
        kinds = {
            "training images alone": (looks["train"].features, None, before),
            "held-out images, cross-fitted": (None, looks["held out"].features, before),
            "both, held-out ones cross-fitted": (looks["train"].features, looks["held out"].features, -1.0),
            "by the rule": (looks["train"].features, looks["held out"].features, before),
        }
        for name, (train, held, limit) in kinds.items():
            fit.MEMORISED = limit
            found = fit_classifier(layers, 10, train, held).introspection
            with torch.no_grad():
                score = found(test.vectors.float(), test.logits).p_wrong
            rows.setdefault(name, []).append(error_auroc(score, wrong))
        fit.MEMORISED = before
    lines = [[name, str(len(values)), mean_cell(values, as_percent=False)] for name, values in rows.items()]
    return {"rows": rows, "table": markdown_table(["the heads learn from", "n", "error AUROC"], lines)}


def near(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two classes of clothes left out of training: AUROC of their test images against those of the other eight."""
    from idml.data.datasets import read_idx

    setting = next((name for name in arguments.settings if "CutMix" in name), arguments.settings[0])
    rows: dict[str, list[float]] = {}
    left_out = (4, 8)  # coats and bags
    for seed in arguments.seeds:
        source = arguments.runs / f"fashion-mnist-{1_500 if arguments.quick else 20_000}"
        options_of(setting, arguments.runs, arguments.weights, quick=arguments.quick)  # writes the source
        images, given = (read_idx(source / f"train-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        kept = ~np.isin(given, left_out)
        from PIL import Image

        folder = arguments.runs / f"eight-classes-{int(kept.sum())}"
        if not (folder / "val").exists():
            tests = [read_idx(source / f"t10k-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
            for part, values, names in (("train", images[kept], given[kept]), ("val", *_eight(tests, left_out))):
                for number, (image, label) in enumerate(zip(values, names, strict=True)):
                    place = folder / part / f"class-{label}"
                    place.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(place / f"{number}.png")
        one = argparse.Namespace(**(vars(arguments) | {"seeds": [seed]}))
        more = ["--dataset", "folder", "--data-dir", str(folder), "--crop-padding", "0"]
        run = runs_of(setting, one, *more, name="eight classes")[0]
        model, data = open_run(run)
        tests = [read_idx(source / f"t10k-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        other = tests[0][np.isin(tests[1], left_out)]
        unseen = arguments.runs / "two-classes"
        if not unseen.exists():
            unseen.mkdir()
            for number, image in enumerate(other):
                Image.fromarray(image).save(unseen / f"{number}.png")
        from idml.data.image_dataset import ImageDataset

        paths = tuple(sorted(unseen.glob("*.png")))
        strangers = ImageDataset(labels=np.zeros(len(paths), np.int64), classes=data.test.classes, paths=paths)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known, new = look_at(model, data.test), look_at(model, strangers)
        for name, score in detectors(model, look_at(model, data.train)).items():
            rows.setdefault(name, []).append(auroc(score(new), score(known)))
    ordered = sorted(rows.items(), key=lambda row: -np.mean(row[1]))
    lines = [[name, str(len(values)), mean_cell(values, as_percent=False)] for name, values in ordered]
    return {"rows": rows, "table": markdown_table(["", "n", "AUROC, two unseen classes"], lines)}


def _eight(tests: list[np.ndarray], left_out: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    kept = ~np.isin(tests[1], left_out)
    return tests[0][kept], tests[1][kept]
