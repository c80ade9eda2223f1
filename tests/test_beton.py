""".beton files: sidecars, writing whole or not at all, the command."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from idml.data import beton
from idml.data.beton import BetonSettings, beton_matches, check_beton, fingerprint, import_ffcv, sidecar_path
from idml.data.ffcv_write import ffcv_write, write_beton
from idml.data.image_dataset import ImageDataset
from idml.errors import UserError

PHOTOS = load_sample_images().images


@pytest.fixture(scope="module", autouse=True)
def _needs_ffcv() -> None:
    try:
        import_ffcv()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def small(fashion: dict[str, np.ndarray]) -> ImageDataset:
    """60 grey images of 28x28 in memory."""
    labels = fashion["train_labels"][:60].astype(np.int64)
    return ImageDataset(labels=labels, classes=tuple("abcdefghij"), images=fashion["train_images"][:60, ..., None])


@pytest.fixture
def files(tmp_path: Path) -> ImageDataset:
    """Eight photos of different sizes: JPEG in colour and grey, PNG with and without alpha, of two classes."""
    paths = []
    for index in range(8):
        height, width = 60 + 7 * index, 110 - 9 * index
        image = Image.fromarray(PHOTOS[index // 4][50 : 50 + height, 80 : 80 + width])
        mode, suffix = [("RGB", "jpg"), ("L", "jpg"), ("RGB", "png"), ("RGBA", "png")][index % 4]
        path = tmp_path / "photos" / "train" / str(index // 4) / f"{index}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert(mode).save(path)
        paths.append(path)
    return ImageDataset(labels=np.repeat([0, 1], 4), classes=("china", "flower"), paths=tuple(paths))


def write(dataset: ImageDataset, path: Path, settings: BetonSettings | None = None) -> None:
    write_beton(dataset, path, settings or BetonSettings(), source="a test", split="train", workers=2, progress=False)


def stored_images(path: Path) -> list[np.ndarray | bytes]:
    """Of each image in a .beton its pixels, or the bytes of its JPEG."""
    opened = import_ffcv().open_beton(path)
    parts = [opened.data[p : p + s] for p, s in zip(opened.pointers, opened.sizes, strict=True)]
    shapes = zip(opened.heights, opened.widths, strict=True)
    return [
        part.tobytes() if mode == 0 else part.reshape(*shape, 3)
        for part, shape, mode in zip(parts, shapes, opened.modes, strict=True)
    ]


def test_raw_file_holds_the_pixels(tmp_path: Path, small: ImageDataset, files: ImageDataset) -> None:
    write(small, tmp_path / "x.beton")
    assert small.images is not None
    for stored, image in zip(stored_images(tmp_path / "x.beton"), small.images, strict=True):
        np.testing.assert_array_equal(stored, np.repeat(image, 3, axis=2))
    write(files, tmp_path / "x.beton")
    for stored, path in zip(stored_images(tmp_path / "x.beton"), files.paths or (), strict=True):
        np.testing.assert_array_equal(stored, np.asarray(Image.open(path).convert("RGB")))


def test_jpeg_files_stay_byte_for_byte_unless_a_quality_is_asked_for(tmp_path: Path, files: ImageDataset) -> None:
    assert files.paths is not None
    originals = [path.read_bytes() for path in files.paths]
    write(files, tmp_path / "x.beton", BetonSettings(mode="jpg"))
    same = [stored == original for stored, original in zip(stored_images(tmp_path / "x.beton"), originals, strict=True)]
    assert same == [True, True, False, False] * 2  # PNGs are encoded
    write(files, tmp_path / "x.beton", BetonSettings(mode="unchanged"))
    for index, stored in enumerate(stored_images(tmp_path / "x.beton")):
        if same[index]:
            assert stored == originals[index]
        else:
            np.testing.assert_array_equal(stored, np.asarray(Image.open(files.paths[index]).convert("RGB")))
    write(files, tmp_path / "x.beton", BetonSettings(mode="jpg", quality=50))
    again = stored_images(tmp_path / "x.beton")
    assert all(isinstance(stored, bytes) for stored in again)
    assert not any(stored == original for stored, original in zip(again, originals, strict=True))


def test_larger_images_are_reduced_and_smaller_ones_are_not(tmp_path: Path, files: ImageDataset) -> None:
    write(files, tmp_path / "x.beton", BetonSettings(max_side=80))
    for stored, path in zip(stored_images(tmp_path / "x.beton"), files.paths or (), strict=True):
        assert isinstance(stored, np.ndarray)
        with Image.open(path) as image:
            ratio = min(1, 80 / max(image.size))
            assert stored.shape[:2] == (round(image.height * ratio), round(image.width * ratio))
            mean = np.asarray(image.convert("RGB")).mean()
        assert abs(stored.mean() - mean) < 1  # filters keep the mean


def test_proportion_is_a_mixture_and_the_same_file_each_time(tmp_path: Path, small: ImageDataset) -> None:
    settings = BetonSettings(mode="proportion", compress_probability=0.25)
    write(small, tmp_path / "x.beton", settings)
    jpegs = sum(isinstance(stored, bytes) for stored in stored_images(tmp_path / "x.beton"))
    assert 5 <= jpegs <= 25  # 15 expected, three standard deviations either side
    write_beton(small, tmp_path / "y.beton", settings, source="", split="", workers=5, progress=False)
    assert (tmp_path / "x.beton").read_bytes() == (tmp_path / "y.beton").read_bytes()


@pytest.mark.slow
def test_ffcvs_own_loader_reads_the_file(tmp_path: Path, small: ImageDataset) -> None:
    write(small, tmp_path / "x.beton", BetonSettings(mode="proportion", quality=100))
    loader = pytest.importorskip("ffcv.loader").Loader(str(tmp_path / "x.beton"), 60, num_workers=1)
    ((images, labels),) = loader
    assert small.images is not None
    np.testing.assert_array_equal(labels[:, 0], small.labels)
    assert np.abs(images.numpy().astype(int) - small.images).mean() < 1


def test_sidecar_says_what_the_file_holds(tmp_path: Path, small: ImageDataset) -> None:
    write(small, tmp_path / "x.beton", BetonSettings(mode="jpg", quality=80))
    values = json.loads((tmp_path / "x.beton.json").read_text())
    assert (values["source"], values["split"], values["count"]) == ("a test", "train", 60)
    assert values["bytes"] == (tmp_path / "x.beton").stat().st_size
    assert values["settings"] == {"mode": "jpg", "max_side": None, "quality": 80, "compress_probability": 0.5}
    assert values["classes"] == list("abcdefghij")
    spelled = b'["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]'
    assert values["classes_sha256"] == hashlib.sha256(spelled).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]


def test_fingerprint_changes_with_the_images_and_not_with_their_place(
    tmp_path: Path, small: ImageDataset, files: ImageDataset
) -> None:
    assert small.images is not None and files.paths is not None
    other = small.images.copy()
    other[59, 27, 27] ^= 1
    order = np.arange(60)[::-1]
    changed = ImageDataset(labels=small.labels, classes=small.classes, images=other)
    assert len({fingerprint(data) for data in (small, changed, small.subset(order))}) == 3
    before = fingerprint(files)
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    moved = [tmp_path / "elsewhere" / path.relative_to(tmp_path / "photos") for path in files.paths]
    assert fingerprint(ImageDataset(labels=files.labels, classes=files.classes, paths=tuple(moved))) == before
    os.utime(moved[3], ns=(0, 10**18))
    assert fingerprint(ImageDataset(labels=files.labels, classes=files.classes, paths=tuple(moved))) != before
    moved[3].unlink()
    with pytest.raises(UserError, match=r"3\.png cannot be read: No such file"):
        fingerprint(ImageDataset(labels=files.labels, classes=files.classes, paths=tuple(moved)))


def test_what_does_not_match_is_said(tmp_path: Path, small: ImageDataset, files: ImageDataset) -> None:
    path, settings = tmp_path / "x.beton", BetonSettings()
    assert "no file" in (beton_matches(path, small) or "")
    write(small, path)
    assert beton_matches(path, small) is None and beton_matches(path, small, settings) is None
    assert "other settings" in (beton_matches(path, small, BetonSettings(mode="jpg")) or "")
    assert "expected 59 images, got 60" in (beton_matches(path, small.subset(np.arange(59))) or "")
    assert "expected 2 classes (china, flower, ...), got 10" in (beton_matches(path, files) or "")
    assert "have changed since" in (beton_matches(path, small.subset(np.arange(60)[::-1])) or "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no x.beton.json beside it"),
        ("{", "is not a sidecar of this version"),
        ("[]", "is not a sidecar of this version"),
        ("{}", "is not a sidecar of this version"),
        ({"format": 99}, "expected a sidecar of format 2, got 99"),
        ({"bytes": 17}, "truncated or was replaced: expected 17 bytes"),
    ],
)
def test_bad_sidecar_is_one_line(tmp_path: Path, small: ImageDataset, text: object, message: str) -> None:
    path = tmp_path / "x.beton"
    write(small, path)
    if isinstance(text, dict):
        text = json.dumps(json.loads(sidecar_path(path).read_text()) | text)
    sidecar_path(path).unlink()
    if text is not None:
        sidecar_path(path).write_text(str(text))
    with pytest.raises(UserError, match="ffcv-write") as caught:
        check_beton(path, small.classes, 60)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unchanged_excludes_changes() -> None:
    with pytest.raises(UserError, match="--mode unchanged: neither --quality nor --max-side"):
        BetonSettings(mode="unchanged", max_side=100)


@pytest.mark.parametrize("values", [{"quality": 0}, {"quality": 101}, {"max_side": 7}, {"compress_probability": 1.5}])
def test_settings_out_of_range(values: dict) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(values)).replace('_', '-')}: expected .* got"):
        BetonSettings(**values)


def test_full_disk_leaves_the_old_file(tmp_path: Path, small: ImageDataset, fashion: dict[str, np.ndarray]) -> None:
    path = tmp_path / "x.beton"
    write(small, path)
    before = path.read_bytes(), sidecar_path(path).read_bytes()
    more = ImageDataset(
        labels=fashion["train_labels"].astype(np.int64),
        classes=small.classes,
        images=fashion["train_images"][..., None],
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 3 << 20, (4 << 20) + 1000):  # at once; in the first page; in a later one, where the write is short
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(
                UserError, match=r"cannot write .*x\.beton: there is no space left; nothing was changed"
            ):
                write(more, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(os.listdir(tmp_path)) == ["x.beton", "x.beton.json"]
        assert (path.read_bytes(), sidecar_path(path).read_bytes()) == before


def test_unwritable_folder_and_wrong_name(tmp_path: Path, small: ImageDataset) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory|cannot write .*: File exists"):
        write(small, tmp_path / "file" / "x.beton")
    with pytest.raises(UserError, match=r"--out: expected a name that ends in \.beton"):
        write(small, tmp_path / "x.bin")


def test_image_that_vanished_or_is_damaged_is_named(tmp_path: Path, files: ImageDataset) -> None:
    assert files.paths is not None
    path = files.paths[4]
    path.write_bytes(path.read_bytes()[:-300])
    for mode in ("raw", "jpg"):
        with pytest.raises(UserError, match=r"4\.jpg cannot be read: image file is truncated"):
            write(files, tmp_path / "x.beton", BetonSettings(mode=mode))
    path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"4\.jpg cannot be read: cannot identify"):
        write(files, tmp_path / "x.beton")
    assert not list(tmp_path.glob("x.beton*"))


def test_image_larger_than_the_format_allows(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.new("RGB", (70_000, 2)).save(path)
    wide = ImageDataset(labels=np.array([0]), classes=("a",), paths=(path,))
    with pytest.raises(UserError, match=r"too large for a \.beton; give --max-side"):
        write(wide, tmp_path / "x.beton")
    write(wide, tmp_path / "x.beton", BetonSettings(max_side=2048))
    (stored,) = stored_images(tmp_path / "x.beton")
    assert isinstance(stored, np.ndarray) and stored.shape == (1, 2048, 3)


HALF = """
import sys, time
from pathlib import Path
import numpy as np
from idml.data import ffcv_write
from idml.data.beton import BetonSettings
from idml.data.image_dataset import ImageDataset

def stops_half_way(samples, *_args, **_kwargs):
    for number, sample in enumerate(samples):
        if number == 1000:
            print("half", flush=True)
            time.sleep(600)
        yield sample

ffcv_write.tqdm = stops_half_way
dataset = ImageDataset(labels=np.zeros(2000, np.int64), classes=("a",), images=np.zeros((2000, 64, 64, 3), np.uint8))
ffcv_write.write_beton(dataset, Path(sys.argv[1]), BetonSettings(), source="", split="", workers=1)
"""


def test_killed_writer_leaves_the_old_file_and_is_cleaned_up(tmp_path: Path, small: ImageDataset) -> None:
    path = tmp_path / "x.beton"
    write(small, path)
    before = path.read_bytes()
    with subprocess.Popen([sys.executable, "-c", HALF, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "half\n"
        (unfinished,) = tmp_path.glob("x.beton.tmp-*")
        assert unfinished.stat().st_size > 1 << 20
        write(small, path)  # beside a living writer, whose file stays
        assert unfinished.exists()
        writer.send_signal(signal.SIGKILL)
    assert path.read_bytes() == before and check_beton(path, small.classes, 60) and unfinished.exists()
    write(small, path, BetonSettings(mode="jpg"))
    assert sorted(os.listdir(tmp_path)) == ["x.beton", "x.beton.json"]
    assert beton_matches(path, small, BetonSettings(mode="jpg")) is None


def test_unfinished_files_of_other_machines_are_removed_after_a_day(tmp_path: Path, small: ImageDataset) -> None:
    old, new, odd = (tmp_path / f"x.beton.tmp-{name}" for name in ("elsewhere-1", "elsewhere-2", "odd"))
    for path in (old, new, odd):
        path.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    write(small, tmp_path / "x.beton")
    assert not old.exists() and new.exists() and odd.exists()


def test_ffcv_that_does_not_import_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "idml.data.ffcv_loader", None)
    with pytest.raises(UserError, match=r"FFCV cannot be imported .*ModuleNotFoundError.* give --loader torch"):
        import_ffcv()


def test_command_writes_a_split(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "t.beton"
    ffcv_write(["--dataset", "folder", "--data-dir", str(image_folder), "--out", str(out), "-j", "2"])
    printed = capsys.readouterr().out
    assert "36 train images of 3 classes" in printed and "--split test" in printed
    ffcv_write(["--dataset", "folder", "--data-dir", str(image_folder), "--out", str(out), "--split", "test"])
    assert check_beton(out, ("bag", "boot", "coat"), 12).split == "test"
    one_folder = ["--dataset", "folder", "--data-dir", str(image_folder / "train"), "--val-fraction", "0.2"]
    ffcv_write([*one_folder, "--out", str(out)])
    assert check_beton(out, ("bag", "boot", "coat"), 36)  # with the images that are held out
    ffcv_write(["--out", str(out), "--mode", "jpg", "--quality", "90", "--image-size", "28"])
    sidecar = check_beton(out, beton.read_sidecar(out).classes, 5000)
    assert (sidecar.source, sidecar.settings) == ("fashion-mnist-mini", BetonSettings(mode="jpg", quality=90))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is missing"),
        (["--out", "x.beton", "--split", "val"], "--split: expected one of train, test, got 'val'"),
        (["--out", "x.beton", "--mode", "png"], "--mode: expected one of raw, jpg, proportion, unchanged, got 'png'"),
        (["--out", "x.beton", "--max-sied", "9"], "unknown option --max-sied; did you mean max-side"),
        (["--out", "x.beton", "--dataset", "folder"], "dataset folder needs"),
        (["--out", "x.beton", "--val-fraction", "2"], "--val-fraction: expected a value between 0 and 0.9, got 2"),
    ],
)
def test_command_mistakes(in_tmp: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ffcv_write(arguments)
    assert message in str(caught.value)
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("mode", ["raw", "unchanged"])
def test_truncated_at_any_offset_is_one_line(
    tmp_path: Path, small: ImageDataset, files: ImageDataset, mode: str
) -> None:
    """By its length, and where the sidecar was made to agree with that, by what is inside."""
    dataset = small if mode == "raw" else files
    path = tmp_path / "x.beton"
    write(dataset, path, BetonSettings(mode=mode))
    whole, sidecar = path.read_bytes(), json.loads(sidecar_path(path).read_text())
    ends = range(max(len(whole) - 100, 0), len(whole))
    offsets = sorted({*range(0, 100, 9), *np.linspace(0, len(whole) - 1, 80).astype(int).tolist(), *ends})
    for offset in offsets:
        path.write_bytes(whole[:offset])
        with pytest.raises(UserError, match="truncated or was replaced"):
            check_beton(path, dataset.classes, len(dataset))
        sidecar_path(path).write_text(json.dumps(sidecar | {"bytes": offset}))
        with pytest.raises(UserError, match="is damaged; write it again"):
            import_ffcv().open_beton(path)
        sidecar_path(path).write_text(json.dumps(sidecar))
    path.write_bytes(whole)
    assert len(import_ffcv().open_beton(path).labels) == len(dataset)
