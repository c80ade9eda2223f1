"""A run that was stopped and gone on with ends like one that was not, to the bit: weights, figures, curves."""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_cls
import train_dml
from idml.checkpoint import CHECKPOINT_KEYS
from idml.checkpoint_files import TO_GO_ON, newest_checkpoint
from idml.config_cls import METHODS
from idml.errors import UserError
from idml.losses import LOSSES
from idml.saving import Saver
from idml.signals import Interrupted
from tests.test_train_cls import read_tensorboard

CLS = ["--dataset", "digits", "--model", "resnet8_cifar", "--image-size", "16", "--batch-size", "240", "--epochs", "3"]
CLS += ["--log-every", "1", "--no-verbose", "--lr", "0.05", "--val-fraction", "0.1", "--no-introspect"]
DML = [
    "--model",
    "resnet8_cifar",
    "--image-size",
    "16",
    "--embedding-size",
    "16",
    "--batch-size",
    "240",
    "--epochs",
    "3",
]
DML += ["--log-every", "1", "--no-verbose", "--no-nmi", "--warm", "1", "--bn-freeze", "0", "--no-introspect"]
DML += ["--val-fraction", "0.1"]
TIMES = {"seconds", "images_per_second"}


def one_fast(names: Iterable[str], fast: str) -> list[Any]:
    """All of them as parameters, those but ``fast`` marked slow."""
    return [pytest.param(name, marks=() if name == fast else pytest.mark.slow) for name in names]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``stop_after(5)``: this process gets a signal in its fifth step, from then on none."""
    after_step = Saver.after_step

    def arm(step: int, number: int = signal.SIGTERM) -> None:
        def signalling(self: Saver, check: Callable[[], None]) -> None:
            if self.state.step == step and self.signals.received is None and not fired:
                fired.append(step)
                signal.raise_signal(number)
            after_step(self, check)

        fired: list[int] = []
        monkeypatch.setattr(Saver, "after_step", signalling)

    return arm


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value of a checkpoint by its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{name}/{number}")
    else:
        yield name, value


def same_end(one: Path, other: Path) -> None:
    """Checkpoints, metrics.jsonl and results.json of two runs are the same, but for times and names."""
    for checkpoint in ("last.pt", "best.pt"):
        states = [torch.load(run / "checkpoints" / checkpoint, weights_only=True) for run in (one, other)]
        for state in states:
            del state["config"], state["seconds"]
        first, second = (dict(leaves(state)) for state in states)
        assert first.keys() == second.keys()
        for name, value in first.items():
            if name.rsplit("/", 1)[-1] in TIMES:
                continue
            equal = torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
            assert equal, name
    lines = [
        [
            {name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for run in (one, other)
    ]
    assert lines[0] == lines[1]
    assert [line["epoch"] for line in lines[0]] == list(range(1, len(lines[0]) + 1))
    results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in (one, other)]
    for part in ("final", "best"):
        ends = [{name: value for name, value in result[part].items() if name not in TIMES} for result in results]
        assert ends[0] == ends[1]
    curves = [[(e.step, e.value) for e in read_tensorboard(run).Scalars("step/loss")] for run in (one, other)]
    assert curves[0] == curves[1]


def stop_and_go_on(
    main: Callable[[list[str]], Any], arguments: list[str], base: Path, arm: Callable[..., None], steps: list[int]
) -> None:
    """The run undisturbed, and again with a signal in each of ``steps``; both must end alike."""
    main([*arguments, "--output-dir", str(base / "undisturbed")])
    for step in steps:
        arm(step)
        with pytest.raises(Interrupted) as stopped:
            main([*arguments, "--output-dir", str(base / "stopped"), "--resume", "auto"])
        assert stopped.value.exit_code == 143
        assert f"stopped after step {step}" in str(stopped.value)
        assert not (base / "stopped/results.json").exists()
    main([*arguments, "--output-dir", str(base / "stopped"), "--resume", "auto"])
    same_end(base / "undisturbed", base / "stopped")


@pytest.mark.parametrize("method", one_fast(METHODS, "idml-cutmix"))
def test_every_method(tmp_path: Path, stop_after: Callable[..., None], method: str) -> None:
    """In the middle of an epoch, at its end, and within another one, with an average of the weights."""
    arguments = [*CLS, "--method", method, "--ema-decay", "0.9"]
    stop_and_go_on(train_cls.main, arguments, tmp_path, stop_after, [3, 6, 10])


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["torch", "ffcv"])
def test_both_loaders_and_random_depth(
    tmp_path: Path, image_folder: Path, stop_after: Callable[..., None], loader: str
) -> None:
    """Files, random crops, colours, a network that draws random numbers of its own, workers, several schedules."""
    arguments = ["--dataset", "folder", "--data-dir", str(image_folder), "--image-size", "32", "--model", "resnet10t"]
    arguments += ["--model-kwargs", "drop_path_rate=0.5", "drop_rate=0.3", "--color-jitter", "0.4", "--lighting", "0.1"]
    arguments += ["--batch-size", "7", "--epochs", "2", "--loader", loader, "--cache-dir", str(tmp_path / "cache")]
    arguments += ["--schedule", "cosine", "--warmup-epochs", "1", "--no-verbose", "--log-every", "1", "--lr", "0.01"]
    stop_and_go_on(train_cls.main, arguments, tmp_path, stop_after, [2, 7])


@pytest.mark.parametrize("loss", one_fast(LOSSES, "Proxy_Anchor"))
def test_every_retrieval_loss(tmp_path: Path, stop_after: Callable[..., None], loss: str) -> None:
    """Within the warm-up of the heads, at its end, and after it."""
    pairs = ["--IPC", "4"] if LOSSES[loss].needs_pairs else []
    stop_and_go_on(train_dml.main, [*DML, *pairs, "--loss", loss], tmp_path, stop_after, [3, 7, 12])


@pytest.mark.parametrize(("main", "arguments"), [(train_cls.main, CLS), (train_dml.main, DML)], ids=["cls", "dml"])
def test_stopped_between_the_last_epoch_and_the_introspection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[list[str]], Any], arguments: list[str]
) -> None:
    """The run goes on with the introspection alone, and ends with the same one, to the bit."""
    monkeypatch.setattr("idml.introspection.fit.LEAST_STEPS", 20)
    arguments = [*arguments, "--introspect", "--max-steps", "2"]
    main([*arguments, "--output-dir", str(tmp_path / "undisturbed")])
    end_epoch = Saver.end_epoch

    def signalled(self: Saver, metrics: Any, *, pick_by: str) -> None:
        end_epoch(self, metrics, pick_by=pick_by)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "end_epoch", signalled)
        with pytest.raises(Interrupted, match="stopped after step 2"):
            main([*arguments, "--output-dir", str(tmp_path / "stopped")])
    assert "introspection" not in torch.load(tmp_path / "stopped/checkpoints/last.pt", weights_only=True)
    assert not (tmp_path / "stopped/results.json").exists()
    main(["--resume", str(tmp_path / "stopped")])
    same_end(tmp_path / "undisturbed", tmp_path / "stopped")
    assert "introspection" in torch.load(tmp_path / "stopped/checkpoints/last.pt", weights_only=True)
    main(["--resume", str(tmp_path / "stopped")])  # there is nothing left to do: it is introspected again
    same_end(tmp_path / "undisturbed", tmp_path / "stopped")


def test_a_path_or_a_directory_needs_no_other_option(tmp_path: Path, stop_after: Callable[..., None]) -> None:
    train_cls.main([*CLS, "--output-dir", str(tmp_path / "undisturbed")])
    stop_after(8, signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        train_cls.main([*CLS, "--output-dir", str(tmp_path / "stopped")])
    assert stopped.value.exit_code == 130
    train_cls.main(["--resume", str(tmp_path / "stopped")])
    same_end(tmp_path / "undisturbed", tmp_path / "stopped")
    train_cls.main(["--resume", str(tmp_path / "stopped/checkpoints/last-1.pt")])
    same_end(tmp_path / "undisturbed", tmp_path / "stopped")
    train_cls.main(["--resume", str(tmp_path / "stopped"), "--output-dir", str(tmp_path / "elsewhere")])
    lines = [(tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8") for name in ("stopped", "elsewhere")]
    assert lines[0] == lines[1]


def test_saving_within_an_epoch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_cls.main(
        [*CLS, "--max-steps", "4", "--save-every-steps", "1", "--keep-checkpoints", "5", "--output-dir", str(run)]
    )
    steps = [torch.load(path, weights_only=True)["step"] for path in sorted((run / "checkpoints").glob("last*.pt"))]
    assert steps == [4, 4, 3, 2, 4]  # last-1 ... last-4, last: the end of the epoch was saved twice, evaluated or not
    run = tmp_path / "minutes"
    train_cls.main(
        [*CLS, "--max-steps", "3", "--save-every-minutes", "1e-9", "--keep-checkpoints", "3", "--output-dir", str(run)]
    )
    states = [torch.load(path, weights_only=True) for path in sorted((run / "checkpoints").glob("last-*.pt"))]
    assert [len(state["epoch_losses"]) for state in states] == [3, 3]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    train_cls.main([*CLS, "--output-dir", str(tmp_path / "undisturbed")])
    run = tmp_path / "damaged"
    train_cls.main([*CLS, "--output-dir", str(run), "--save-every-steps", "5", "--keep-checkpoints", "3"])
    newest = run / "checkpoints/last.pt"
    content = newest.read_bytes()
    newest.write_bytes(content.replace(content[200_000:200_100], bytes(100)))
    older = run / "checkpoints/last-1.pt"
    older.write_bytes(older.read_bytes()[:-1000])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"epoch": 4, "tor')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = newest_checkpoint(run)
    assert resumed is not None and resumed[0].name == "last-2.pt"
    messages = [str(w.message) for w in caught]
    assert any("last.pt is damaged" in m and "going on from last-2.pt" in m for m in messages)
    assert any("last-1.pt is damaged" in m for m in messages)
    train_cls.main(["--resume", "auto", "--output-dir", str(run)])
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    states = [
        torch.load(path / "checkpoints/last.pt", weights_only=True)["model"] for path in (tmp_path / "undisturbed", run)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read: .*last\.pt is damaged"):
        train_cls.main(["--resume", "auto", "--output-dir", str(run)])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of the first epoch."""
    run = tmp_path_factory.mktemp("short") / "run"
    train_cls.main([*CLS, "--method", "idml-cutmix", "--max-steps", "2", "--output-dir", str(run)])
    return run


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["--model", "resnet14_cifar"], "--model was resnet8_cifar, now resnet14_cifar"),
        (["--method", "mixup"], "--method was idml-cutmix, now mixup; --ism was live, now off; --mix was cutmix"),
        (["--batch-size", "120"], "--batch-size was 240, now 120"),
        (["--lr", "0.1"], "--lr was 0.05, now 0.1"),
        (["--val-fraction", "0.2"], "--val-fraction was 0.1, now 0.2; there were 1299 training images, now 1154"),
        (["--dataset", "fashion-mnist-mini"], "the classes are others: 10 before, now 10 ("),
        (["--max-steps", "1"], "2 steps are done, and only 1 asked for"),
        (["--eval-only"], "--resume or --eval-only, not both"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints: expected a value between 1 and 1000, got 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_run_is_refused_with_the_difference(short: Path, changed: list[str], expected: str) -> None:
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as refused:
        train_cls.main(["--resume", str(short), *changed])
    assert expected in str(refused.value)
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "no optimizer": ({"optimizer": None}, r"its optimizer is a NoneType"),
    "config of another type": ({"config": ["a"]}, r"not a checkpoint of train_cls.py .*: its config is a list"),
    "other random states": ({"random": [{"python": 1}]}, r"does not fit this run"),
    "no random states": ({"random": []}, r"does not fit this run"),
    "other weights": ({"model": {"a": torch.zeros(1)}}, r"does not fit this run"),
    "other optimizer": ({"optimizer": {"state": {}, "param_groups": []}}, r"does not fit this run"),
    "history that is none": ({"history": [1, 2]}, r"its history, cannot be"),
    "step of no number": ({"step": "many"}, r"its step is a str"),
    "steps below nothing": ({"step": -1}, r"its counts of epochs and steps"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_that_was_tampered_with_is_one_line(short: Path, tmp_path: Path, kind: str) -> None:
    """Whatever a file from elsewhere holds: a message, and nothing that the run has come to is changed."""
    changed, expected = FOREIGN[kind]
    run = tmp_path / "run"
    shutil.copytree(short, run)
    content = torch.load(run / "checkpoints/last.pt", weights_only=True)
    torch.save(content | changed, tmp_path / "foreign.pt")
    kept = [*(run / "checkpoints").iterdir(), run / "metrics.jsonl", run / "results.json"]
    before = [path.read_bytes() for path in kept]
    with pytest.raises(UserError, match=expected) as refused:
        train_cls.main(["--resume", str(tmp_path / "foreign.pt"), "--max-steps", "3", "--output-dir", str(run)])
    assert "foreign.pt" in str(refused.value)
    assert [path.read_bytes() for path in kept] == before


@pytest.mark.parametrize("key", [*CHECKPOINT_KEYS, *TO_GO_ON, "trained_model"])
def test_a_checkpoint_that_lacks_something_is_one_line(short: Path, tmp_path: Path, key: str) -> None:
    content = torch.load(short / "checkpoints/last.pt", weights_only=True)
    del content[key]
    torch.save(content, tmp_path / "lacks.pt")
    with pytest.raises(UserError, match=rf"lacks\.pt .*{key}"):
        train_cls.main(["--resume", str(tmp_path / "lacks.pt"), "--output-dir", str(tmp_path / "run")])


def test_a_checkpoint_of_the_other_script_is_refused(short: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a checkpoint of train_cls\.py; go on with that script"):
        train_dml.main(["--resume", str(short)])
    train_dml.main([*DML, "--max-steps", "1", "--output-dir", str(tmp_path / "dml")])
    with pytest.raises(UserError, match=r"is a checkpoint of train_dml\.py; go on with that script"):
        train_cls.main(["--resume", str(tmp_path / "dml")])


def test_a_run_may_be_made_longer(short: Path, tmp_path: Path) -> None:
    """What may change does: the length, threads, how often is logged. The schedule is then that of the longer run."""
    longer = ["--max-steps", "9", "--epochs", "4", "--log-every", "2", "--loader", "torch", "--threads", "1"]
    train_cls.main(["--resume", str(short), *longer, "--output-dir", str(tmp_path / "longer")])
    lines = [json.loads(line) for line in (tmp_path / "longer/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 2), (2, 8), (3, 9)]
    rates = {e.step: e.value for e in read_tensorboard(tmp_path / "longer").Scalars("step/lr")}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=9, cycle_momentum=False)
    expected = []
    for _ in range(9):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx({step: expected[step - 1] for step in (4, 6, 8)})


def test_auto_starts_where_there_is_nothing(tmp_path: Path) -> None:
    results = train_cls.main([*CLS, "--max-steps", "1", "--resume", "auto", "--output-dir", str(tmp_path / "new")])
    assert results is not None and results["final"]["step"] == 1
    with pytest.raises(UserError, match="--output-dir DIR, which was not given"):
        train_cls.main([*CLS, "--resume", "auto"])
    with pytest.raises(UserError, match="there is no such path"):
        train_cls.main(["--resume", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="there is no checkpoint"):
        train_cls.main(["--resume", str(tmp_path)])
