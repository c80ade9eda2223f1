"""FFCV's loader against the torch loader: the same images, order and crops; damaged files; nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from idml.data.beton import BetonSettings, import_ffcv, sidecar_path
from idml.data.ffcv_write import write_beton
from idml.data.image_dataset import ImageDataset
from idml.data.torch_loader import Loader, TorchLoader
from idml.errors import TrainingError, UserError
from tests.test_train_cls import ROOT

PHOTOS = load_sample_images().images

EXACT = int(Image.__version__.split(".")[0]) <= 13
"""Whether Pillow's resizing is known to the last bit; for later versions a difference of 1 is let pass."""


@pytest.fixture(scope="module", autouse=True)
def ffcv_loader() -> Any:
    try:
        return import_ffcv()
    except UserError as error:
        pytest.skip(str(error))


def write(dataset: ImageDataset, path: Path, settings: BetonSettings) -> Path:
    write_beton(dataset, path, settings, source="a test", split="train", workers=2, progress=False)
    return path


@pytest.fixture(scope="module")
def small(fashion: dict[str, np.ndarray]) -> ImageDataset:
    """333 grey images of 28x28 in memory."""
    labels = fashion["train_labels"][:333].astype(np.int64)
    return ImageDataset(labels=labels, classes=tuple("abcdefghij"), images=fashion["train_images"][:333, ..., None])


@pytest.fixture(scope="module")
def small_beton(small: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(small, tmp_path_factory.mktemp("small") / "x.beton", BetonSettings())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """23 crops of two photos, of many sizes, one of them small; JPEG, and PNG in grey and with alpha."""
    rng, folder, paths = np.random.default_rng(0), tmp_path_factory.mktemp("photos"), []
    for index in range(23):
        height, width = (int(side) for side in rng.integers(150, 420, 2))
        pixels = PHOTOS[index % 2][-height:, -width:] if index else PHOTOS[0][:40, :30]
        mode, suffix = {5: ("L", "png"), 6: ("RGBA", "png"), 7: ("L", "jpg")}.get(index, ("RGB", "jpg"))
        paths.append(folder / f"{index}.{suffix}")
        Image.fromarray(pixels).convert(mode).save(paths[-1])
    return ImageDataset(labels=np.arange(23) % 2, classes=("china", "flower"), paths=tuple(paths))


@pytest.fixture(scope="module")
def photo_beton(photos: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[BetonSettings], Path]:
    folder, written = tmp_path_factory.mktemp("betons"), dict[BetonSettings, Path]()

    def with_settings(settings: BetonSettings) -> Path:
        if settings not in written:
            written[settings] = write(photos, folder / f"{len(written)}.beton", settings)
        return written[settings]

    return with_settings


def pair(dataset: ImageDataset, beton: Path, **arguments: Any) -> tuple[Loader, Loader]:
    """The torch loader and FFCV's with the same arguments."""
    defaults = {"batch_size": 32, "image_size": 28, "train": True, "seed": 5}
    theirs = TorchLoader(dataset, **defaults | arguments)
    return theirs, import_ffcv().FfcvLoader(dataset, beton=beton, workers=2, **defaults | arguments)


def differences(loaders: tuple[Loader, Loader], epoch: int = 0) -> tuple[float, int]:
    """Mean and largest difference of the images of an epoch; labels and shapes must be the same."""
    total, largest, count = 0.0, 0, 0
    for (a, a_labels), (b, b_labels) in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
        assert torch.equal(a_labels, b_labels) and b_labels.dtype == torch.int64
        assert a.shape == b.shape and a.stride() == b.stride() and b.dtype == torch.uint8
        difference = (a.int() - b.int()).abs()
        total, largest, count = total + difference.sum().item(), max(largest, int(difference.max())), count + a.numel()
    return total / count, largest


@pytest.mark.parametrize("batch_size", [32, 333, 1000])
def test_evaluation_of_raw_data_is_the_same_to_the_bit(small: ImageDataset, small_beton: Path, batch_size: int) -> None:
    loaders = pair(small, small_beton, train=False, batch_size=batch_size)
    assert differences(loaders) == (0, 0)
    assert len(loaders[0]) == len(loaders[1])
    labels = torch.cat([labels for _, labels in loaders[1].epoch(0)])
    np.testing.assert_array_equal(labels, small.labels)  # in order, the last partial batch kept


@pytest.mark.parametrize(("count", "batch_size"), [(333, 32), (321, 32), (64, 32), (33, 32), (65, 64), (7, 10), (2, 1)])
def test_training_has_the_same_batches(small: ImageDataset, tmp_path: Path, count: int, batch_size: int) -> None:
    some = small.subset(np.arange(count))
    loaders = pair(some, write(some, tmp_path / "x.beton", BetonSettings()), batch_size=batch_size)
    assert [differences(loaders, epoch) for epoch in (0, 1)] == [(0, 0)] * 2
    sizes = [len(labels) for _, labels in loaders[1].epoch(0)]
    assert len(sizes) == len(loaders[1]) and sum(sizes) == count


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch_size", [32, 166, 330])
def test_two_ranks_see_every_image_once(small: ImageDataset, small_beton: Path, train: bool, batch_size: int) -> None:
    sizes = []
    seen: list[np.ndarray] = []
    for rank in range(2):
        loaders = pair(small, small_beton, train=train, batch_size=batch_size, rank=rank, world_size=2)
        assert differences(loaders, epoch=3) == (0, 0)
        sizes.append([len(labels) for _, labels in loaders[1].epoch(3)])
        assert [len(indices) for indices in loaders[1].batches(3)] == sizes[-1]
        seen += loaders[1].batches(3)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(333))
    if train:
        assert len(sizes[0]) == len(sizes[1]) and min(sizes[0] + sizes[1]) >= 2


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["raw", "unchanged", "jpg", "proportion"])
def test_photos_are_cropped_and_resized_the_same(
    photos: ImageDataset, photo_beton: Callable, train: bool, mode: Any
) -> None:
    """Raw bytes, and JPEG files that are stored as they are, give the torch loader's images to the bit."""
    jpegs = np.array([index for index in range(23) if index not in (5, 6)])
    subset = np.arange(23) if mode in ("raw", "unchanged") else jpegs  # the others had to be encoded
    arguments = {"batch_size": 5, "image_size": 96, "train": train, "seed": 1}
    chosen = photos.subset(subset)
    loader = import_ffcv().FfcvLoader(
        chosen, beton=photo_beton(BetonSettings(mode=mode)), rows=subset, workers=3, **arguments
    )
    for epoch in (0, 7):
        mean, largest = differences((TorchLoader(chosen, **arguments), loader), epoch)
        assert (mean, largest) == (0, 0) if EXACT else (mean < 0.1 and largest <= 1)


@pytest.mark.parametrize(("share", "interpolation"), [(0.95, "bicubic"), (1.0, "bilinear"), (0.5, "bicubic")])
def test_evaluation_as_weights_expect_it_is_the_same(
    photos: ImageDataset, photo_beton: Callable, share: float, interpolation: Any
) -> None:
    """Another crop and filter than the usual ones are those of the torch loader, and training knows nothing of them."""
    arguments = {"batch_size": 5, "image_size": 96, "seed": 1}
    expected = {"crop_share": share, "interpolation": interpolation}
    path = photo_beton(BetonSettings(mode="unchanged"))
    mean, largest = differences(pair(photos, path, train=False, **arguments, **expected))
    assert (mean, largest) == (0, 0) if EXACT else (mean < 0.1 and largest <= 1)
    loader = import_ffcv().FfcvLoader
    usual = loader(photos, beton=path, train=False, **arguments)
    assert differences((usual, loader(photos, beton=path, train=False, **arguments, **expected)))[0] > 1
    usual = loader(photos, beton=path, train=True, **arguments)
    assert differences((usual, loader(photos, beton=path, train=True, **arguments, **expected))) == (0, 0)


@pytest.mark.parametrize("train", [True, False])
def test_encoded_photos_are_close(photos: ImageDataset, photo_beton: Callable, train: bool) -> None:
    for quality in (90, 95):
        path = photo_beton(BetonSettings(mode="jpg", quality=quality))
        mean, _ = differences(pair(photos, path, batch_size=5, image_size=96, train=train))
        assert 0 < mean < 2


def test_reduced_photos_are_cropped_at_the_same_places(photos: ImageDataset, photo_beton: Callable) -> None:
    path = photo_beton(BetonSettings(max_side=300))
    from idml.data import kernels

    whole, reduced = (import_ffcv().open_beton(p) for p in (photo_beton(BetonSettings()), path))
    assert (reduced.heights < whole.heights).sum() > 10
    shares = []
    for beton in (whole, reduced):
        plan = kernels.plan_train(beton.heights, beton.widths, np.arange(23), 1, 2, 96, 0.08, 1.0)
        sizes = np.stack([beton.heights, beton.widths] * 2, axis=1)
        shares.append(plan[:, :4] / sizes)
    assert np.abs(shares[0] - shares[1])[1:].max() < 2 / 150  # two pixels of the shortest side there is
    mean, _ = differences(pair(photos, path, batch_size=5, image_size=96))
    assert mean < 10  # blurred by the reduction, not shifted


def test_seed_and_epoch_decide_and_threads_do_not(photos: ImageDataset, photo_beton: Callable) -> None:
    path = photo_beton(BetonSettings())

    def images(epoch: int, **arguments: int) -> torch.Tensor:
        shared: dict[str, Any] = {"beton": path, "batch_size": 10, "image_size": 64, "train": True}
        loader = import_ffcv().FfcvLoader(photos, **shared, **{"seed": 1, "workers": 1} | arguments)
        return torch.cat([images for images, _ in loader.epoch(epoch)])

    first = images(0)
    assert torch.equal(first, images(0)) and torch.equal(first, images(0, workers=4))
    assert not torch.equal(first, images(1)) and not torch.equal(first, images(0, seed=2))


def test_batches_stay_what_they_are(small: ImageDataset, small_beton: Path) -> None:
    """A consumer may keep every batch: none is overwritten by a later one."""
    _, loader = pair(small, small_beton, batch_size=16)
    kept = list(loader.epoch(0))
    assert small.images is not None
    for (images, _), indices in zip(kept, loader.batches(0), strict=True):
        np.testing.assert_array_equal(images[:, 0], small.images[indices, :, :, 0])


def test_rows_of_a_larger_file(small: ImageDataset, small_beton: Path) -> None:
    rows = np.array([330, 3, 77, 4])
    theirs = TorchLoader(small.subset(rows), batch_size=3, image_size=28, train=True)
    ours = import_ffcv().FfcvLoader(
        small.subset(rows), beton=small_beton, rows=rows, batch_size=3, image_size=28, train=True
    )
    assert differences((theirs, ours)) == (0, 0)


def test_pictures(photos: ImageDataset, photo_beton: Callable) -> None:
    """Chosen images come as evaluation has them, from a training loader too."""
    for train in (True, False):
        _, loader = pair(photos, photo_beton(BetonSettings()), image_size=96, train=train)
        chosen = loader.images_at([4, 0, 22])
        evaluated = TorchLoader(photos, batch_size=23, image_size=96, train=False)
        assert (chosen.int() - evaluated.images_at([4, 0, 22]).int()).abs().max() <= (0 if EXACT else 1)


def copy_beton(source: Path, folder: Path, data: bytes | None = None, **sidecar: Any) -> Path:
    """A .beton with other bytes and a changed sidecar, which always gives the size right."""
    path, data = folder / "x.beton", source.read_bytes() if data is None else data
    path.write_bytes(data)
    values = json.loads(sidecar_path(source).read_text()) | {"bytes": len(data)} | sidecar
    sidecar_path(path).write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.0])
def test_truncated_file_is_one_line(small: ImageDataset, small_beton: Path, tmp_path: Path, kept: float) -> None:
    whole = small_beton.read_bytes()
    path = copy_beton(small_beton, tmp_path)
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=f"truncated or was replaced: expected {len(whole)} bytes") as caught:
        pair(small, path)
    assert "\n" not in str(caught.value)
    # Even where the sidecar was written for it, nothing outside the file is read.
    path = copy_beton(small_beton, tmp_path, whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=r"x\.beton is damaged; write it again"):
        pair(small, path)


def test_damaged_file_is_one_line(small: ImageDataset, small_beton: Path, tmp_path: Path) -> None:
    whole, rng = small_beton.read_bytes(), np.random.default_rng(0)
    noise = rng.integers(0, 256, 5000, np.uint8).tobytes()
    for start in (0, 1100, len(whole) - 5000):  # header, table of images, table of regions
        path = copy_beton(small_beton, tmp_path, whole[:start] + noise + whole[start + 5000 :])
        with pytest.raises(UserError, match=r"is damaged|labels"):
            pair(small, path)


def test_file_of_other_data_is_one_line(small: ImageDataset, small_beton: Path) -> None:
    other_classes = dataclasses.replace(small, classes=tuple("ABCDEFGHIJ"))
    with pytest.raises(UserError, match=r"holds other data \(a test, train\): expected 10 classes \(A, B, C, \.\.\.\)"):
        pair(other_classes, small_beton)
    with pytest.raises(UserError, match="expected 300 images, got 333"):
        pair(small.subset(np.arange(300)), small_beton)
    with pytest.raises(UserError, match=r"labels .* are not those of the data set"):
        pair(small.subset(np.arange(333)[::-1]), small_beton)
    with pytest.raises(UserError, match="holds images of 28 to 28 pixels, expected 32"):
        pair(small, small_beton, image_size=32)
    with pytest.raises(UserError, match=r"no file .*ffcv-write"):
        pair(small, small_beton.with_name("y.beton"))


def test_jpeg_damaged_later_ends_the_training_with_its_number(
    photos: ImageDataset, photo_beton: Callable, tmp_path: Path
) -> None:
    source = photo_beton(BetonSettings(mode="jpg", quality=90))
    opened, data = import_ffcv().open_beton(source), bytearray(source.read_bytes())
    start, size = int(opened.pointers[11]), int(opened.sizes[11])
    data[start + 100 : start + size] = bytes(size - 100)
    _, loader = pair(photos, copy_beton(source, tmp_path, bytes(data)), batch_size=4, image_size=64)
    with pytest.raises(TrainingError, match=r"image 11 in .*x\.beton does not decode; write the file again"):
        list(loader.epoch(0))


def test_stopping_half_way_leaves_nothing_running(small: ImageDataset, small_beton: Path) -> None:
    _, loader = pair(small, small_beton, batch_size=8)
    next(iter(loader.epoch(0)))
    before = threading.active_count()
    for epoch in range(20):
        next(loader.epoch(epoch))
    assert threading.active_count() <= before
    assert sum(len(labels) for _, labels in loader.epoch(0)) == 333


def resident() -> float:
    """Memory that this process holds, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_memory_stays_level_over_30_epochs(photos: ImageDataset, photo_beton: Callable) -> None:
    _, loader = pair(photos, photo_beton(BetonSettings(mode="jpg")), batch_size=5, image_size=224)
    for epoch in range(40):
        for number, _ in enumerate(loader.epoch(epoch)):
            if epoch % 2 and number == 2:
                break
        if epoch == 9:
            before = resident()
    assert resident() < before + 30  # a batch of all photos is 3.5 MiB


IMPORT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(3)
import numpy as np
from idml.data.beton import BetonSettings, import_ffcv
from idml.data.ffcv_write import write_beton
from idml.data.image_dataset import ImageDataset
images = np.random.default_rng(0).integers(0, 256, (20, 48, 48, 3), np.uint8)
dataset = ImageDataset(labels=np.arange(20), classes=tuple(map(str, range(20))), images=images)
settings = BetonSettings(mode="jpg", quality=90)
write_beton(dataset, Path(sys.argv[1]), settings, source="", split="", workers=2, progress=False)
loader = import_ffcv().FfcvLoader(dataset, beton=Path(sys.argv[1]), batch_size=6, image_size=48, train=True)
print(sum(len(labels) for _, labels in loader.epoch(0)), torch.get_num_threads())
"""


def test_import_leaves_torchs_threads_and_the_end_is_silent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORT, str(tmp_path / "x.beton")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "20 3\n", "")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to a CPU")
def test_a_process_bound_to_one_cpu_ends(tmp_path: Path) -> None:
    """numba's threads, which FFCV would start, keep such a process from ending."""
    for number in range(4):
        for split in ("train", "val"):
            for name in ("a", "b"):
                folder = tmp_path / "photos" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((24, 24), 10 + number).convert("RGB").save(folder / f"{number}.png")
    options = ["--dataset", "folder", "--data-dir", "photos", "--image-size", "16", "--model", "resnet8_cifar"]
    options += [
        "--batch-size",
        "8",
        "--loader",
        "ffcv",
        "--cache-dir",
        "cache",
        "--val-fraction",
        "0",
        "--max-steps",
        "1",
        "--output-dir",
        "run",
    ]
    start = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); import train_cls; train_cls.main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", start, *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/results.json").exists()
