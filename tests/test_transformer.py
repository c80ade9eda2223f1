"""IntrospectiveTransformer as scikit-learn uses it, on real images."""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline

import idml
from idml import IntrospectiveTransformer, UserError
from tests.tiny_models import train_tiny, write_searched

QUICK: dict[str, Any] = {"model": "resnet8_cifar", "epochs": 1, "batch_size": 32, "options": {"max_steps": 4}}


@pytest.fixture(scope="module")
def clothes() -> tuple[np.ndarray, np.ndarray]:
    """(120, 28, 28) uint8 and names of three classes."""
    from idml.config_cls import ClsConfig
    from idml.data.datasets import read_fashion_mnist_mini

    data = read_fashion_mnist_mini(ClsConfig(image_size=28)).train
    chosen = np.concatenate([np.flatnonzero(data.labels == label)[:40] for label in (1, 5, 8)])
    assert data.images is not None
    return data.images[chosen, :, :, 0], np.array([data.classes[label] for label in data.labels[chosen]])


@pytest.fixture(scope="module")
def fitted(clothes: tuple[np.ndarray, np.ndarray]) -> IntrospectiveTransformer:
    return IntrospectiveTransformer(**QUICK).fit(*clothes)


def test_a_pipeline_learns(clothes: tuple[np.ndarray, np.ndarray]) -> None:
    """Trousers, sandals and bags: eight steps of a small network, then a logistic regression."""
    images, labels = clothes
    steps = IntrospectiveTransformer("resnet8_cifar", epochs=3, batch_size=32, options={"lr": 0.05})
    pipeline = Pipeline([("idml", steps), ("clf", LogisticRegression(max_iter=1000))])
    pipeline.fit(images[::2], labels[::2])
    assert pipeline.score(images[1::2], labels[1::2]) > 0.8
    assert list(pipeline[:-1].get_feature_names_out()[:2]) == ["introspectivetransformer0", "introspectivetransformer1"]
    assert len(pipeline[:-1].get_feature_names_out()) == 64
    assert pipeline.named_steps["idml"].score_uncertainty(images[1::2]).shape == (60,)


def test_what_fit_leaves(fitted: IntrospectiveTransformer, clothes: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = clothes
    embedded, scores = fitted.transform(images), fitted.score_uncertainty(images)
    assert embedded.shape == (120, 64) and embedded.dtype == np.float32 and np.isfinite(embedded).all()
    assert ((scores >= 0) & (scores <= 1)).all() and fitted.model_.score_name == "P(wrong)"
    assert fitted.classes_.tolist() == sorted(set(labels)) and fitted.model_.classes == tuple(fitted.classes_)
    assert fitted.model_.calibrated_on == 0, "12 held-out images are too few"
    assert {"top1", "val_top1", "error_auroc"} <= set(fitted.results_)
    assert fitted.model_.spec.preprocessing.image_size == 32
    whole = fitted.embed(images)
    assert (whole.semantic == embedded).all() and (whole.uncertainty == scores).all()


def test_a_seed_is_one_result_and_global_state_stays(clothes: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = clothes
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    expected = (torch.rand(2).tolist(), random.random(), np.random.rand())  # noqa: NPY002
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    first = IntrospectiveTransformer(**QUICK).fit_transform(images, labels)
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected  # noqa: NPY002
    torch.manual_seed(99)
    second = clone(IntrospectiveTransformer(**QUICK)).fit_transform(images, labels)
    assert (first == second).all()
    other = IntrospectiveTransformer(**QUICK, seed=2).fit_transform(images, labels)
    assert np.abs(first - other).max() > 1e-3


def test_images_in_every_form(
    fitted: IntrospectiveTransformer, clothes: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    images = clothes[0][:3]
    expected = fitted.transform(images)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    pictures = [Image.fromarray(image) for image in images]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    channels = np.repeat(images[..., None], 3, axis=3)
    forms = [images[..., None], channels, channels / 255, pictures, paths, list(map(str, paths)), np.array(paths)]
    forms += [
        np.array(list(map(str, paths))),
        torch.from_numpy(images)[:, None],
        list(images),
        [pictures[0], *paths[1:]],
    ]
    for form in forms:
        np.testing.assert_allclose(fitted.transform(form), expected, atol=1e-5)


def test_nothing_is_done_or_kept_before_fit(in_tmp: Path) -> None:
    transformer = IntrospectiveTransformer("no such model", method=3, options={"nothing": 1})  # type: ignore[arg-type]
    assert transformer.get_params()["model"] == "no such model" and not list(in_tmp.iterdir())
    again = clone(transformer.set_params(epochs=7, options={"lr": 1}))
    assert again.get_params() == transformer.get_params() and again.epochs == 7
    for method in ("transform", "score_uncertainty", "embed"):
        with pytest.raises(NotFittedError):
            getattr(transformer, method)(np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(NotFittedError):
        transformer.get_feature_names_out()


def test_pickles_and_clones(fitted: IntrospectiveTransformer, clothes: tuple[np.ndarray, np.ndarray]) -> None:
    images = clothes[0][:5]
    for again in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        assert (again.transform(images) == fitted.transform(images)).all()
        assert (again.score_uncertainty(images) == fitted.score_uncertainty(images)).all()
    with pytest.raises(NotFittedError):
        clone(fitted).transform(clothes[0])


def test_where_runs_are_kept(
    clothes: tuple[np.ndarray, np.ndarray],
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (in_tmp / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(in_tmp / "temporary"))
    IntrospectiveTransformer(**QUICK).fit(*clothes)
    assert not list((in_tmp / "temporary").iterdir()) and capsys.readouterr().out == ""
    kept = IntrospectiveTransformer(**QUICK, output_dir=in_tmp / "run", verbose=True).fit(*clothes)
    assert "epoch   1" in capsys.readouterr().out
    again = IntrospectiveTransformer(checkpoint=in_tmp / "run").fit(clothes[0])
    assert (again.transform(clothes[0][:4]) == kept.transform(clothes[0][:4])).all()
    assert again.classes_.tolist() == kept.classes_.tolist() and again.results_ == {}
    with pytest.raises(UserError, match="already holds a run"):
        IntrospectiveTransformer(**QUICK, output_dir=in_tmp / "run").fit(*clothes)


def test_a_checkpoint_needs_no_images(tmp_path: Path, clothes: tuple[np.ndarray, np.ndarray]) -> None:
    run = train_tiny("retrieval off", write_searched(tmp_path / "searched"), tmp_path / "run")
    transformer = IntrospectiveTransformer(checkpoint=run, device="cpu").fit(None)
    expected = idml.load(run, device="cpu").embed(list(clothes[0][:4])).semantic
    assert (transformer.transform(clothes[0][:4]) == expected).all()
    assert len(transformer.get_feature_names_out()) == 16
    with pytest.raises(UserError, match="plain retrieval model"):
        transformer.score_uncertainty(clothes[0][:4])
    with pytest.warns(UserWarning, match="epochs=3 has no effect: the checkpoint is loaded as it is"):
        IntrospectiveTransformer(checkpoint=run, epochs=3).fit(None)
    with pytest.raises(UserError, match="no model at"):
        IntrospectiveTransformer(checkpoint=tmp_path / "none").fit(None)


def test_labels_of_any_kind_and_no_image_held_out(clothes: tuple[np.ndarray, np.ndarray]) -> None:
    images, names = clothes
    numbers = np.unique(names, return_inverse=True)[1] * 10 - 5
    transformer = IntrospectiveTransformer(**QUICK | {"val_fraction": 0, "method": "mixup"}).fit(
        images, numbers.tolist()
    )
    assert transformer.classes_.tolist() == [-5, 5, 15] and transformer.model_.classes == ("-5", "5", "15")
    assert "val_top1" not in transformer.results_ and transformer.model_.score_name == "1 - max softmax"


def test_the_size_of_the_input(clothes: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = clothes
    wide = [Image.fromarray(image).resize((70, 45)) for image in images]
    few = {**QUICK, "options": {"max_steps": 1}}
    assert IntrospectiveTransformer(**few).fit(wide, labels).model_.spec.preprocessing.image_size == 64
    sized = IntrospectiveTransformer(**few, image_size=40).fit(images, labels)
    assert sized.model_.spec.preprocessing.image_size == 40
    assert sized.transform(wide[:2]).shape == (2, 64)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model": "resnet9_cifar"}, "unknown model 'resnet9_cifar'; did you mean"),
        ({"method": "ismm"}, "--method: expected one of .*got 'ismm'; did you mean"),
        ({"epochs": 0}, "--epochs: expected a value at least 1, got 0"),
        ({"epochs": "many"}, "--epochs: expected int, got 'many'"),
        ({"val_fraction": 2}, "--val-fraction: expected a value between 0 and 0.9"),
        ({"options": {"lrr": 1}}, "unknown option --lrr; did you mean"),
        ({"options": {"epochs": 1, "data_dir": "x"}}, "options: data_dir, epochs cannot be given there"),
    ],
)
def test_bad_parameters(
    clothes: tuple[np.ndarray, np.ndarray], in_tmp: Path, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        IntrospectiveTransformer(**parameters).fit(*clothes)
    assert not list(in_tmp.iterdir())


def test_bad_images_and_labels(
    fitted: IntrospectiveTransformer, clothes: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    images, labels = clothes
    (tmp_path / "text.png").write_text("text", encoding="utf-8")
    for bad, message in (
        (images.reshape(120, -1), r"got an array of shape \(120, 784\); reshape rows of pixels"),
        (images[:0], "at least one image, got none"),
        ([], "at least one image, got none"),
        ("photo.png", "got one str"),
        (Image.fromarray(images[0]), "got one Image"),
        (None, "got one NoneType"),
        ([tmp_path / "none.png"] * 2, r"none\.png is no image that can be read"),
        ([str(tmp_path / "text.png")] * 2, r"text\.png is no image that can be read"),
        (images * 1.0, "between 0 and 1, got"),
        (np.full((2, 28, 28), np.nan), "got nan"),
        (torch.zeros(3, 28, 28), r"tensor \(N, 1 or 3, H, W\), got shape \(3, 28, 28\)"),
    ):
        with pytest.raises(UserError, match=message):
            fitted.transform(bad)
        count = len(bad) if hasattr(bad, "__len__") else 120
        with pytest.raises(UserError, match=message):
            IntrospectiveTransformer(**QUICK).fit(bad, labels[np.linspace(0, 119, count, dtype=int)])
    for y, message in (
        (None, "fit needs y, the labels of the images; or give checkpoint"),
        (labels[:-1], r"expected y of shape \(120,\).*got \(119,\)"),
        (np.zeros(120), "at least 2 classes in y, got"),
        (np.where(np.arange(120) < 60, np.nan, 1.0), "not finite"),
        (np.arange(120), "no class has two images"),
    ):
        with pytest.raises(UserError, match=message):
            IntrospectiveTransformer(**QUICK).fit(images, y)


@pytest.mark.slow
def test_cross_validation_in_processes(clothes: tuple[np.ndarray, np.ndarray]) -> None:
    pipeline = make_pipeline(IntrospectiveTransformer(**QUICK), LogisticRegression(max_iter=1000))
    scores = cross_val_score(pipeline, *clothes, cv=2, n_jobs=2)
    assert (scores > 0.5).all()
