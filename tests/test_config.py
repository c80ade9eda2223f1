"""Files and flags to one config: precedence, spellings, methods, errors with the nearest name, no-effect warnings."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import yaml

from idml.commands import options
from idml.commands.search import SearchOptions
from idml.config import dump_config
from idml.config_cls import METHODS, ClsConfig, parse_cls_config, parse_model_kwargs
from idml.errors import UserError
from idml.introspection_options import unused_introspection


def parse(*arguments: str) -> ClsConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return parse_cls_config(arguments, description="")[0]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_file_and_flags_in_that_order(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "lr: 0.3\nepochs: 7\nschedule: step\nlr_milestones: [3, 5]\n")
    config = parse("--config", file, "--lr", "0.4")
    assert (config.lr, config.epochs, config.lr_milestones, config.batch_size) == (0.4, 7, [3, 5], 64)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (("--mix-prob", "0.25"), "mix_prob", 0.25),
        (("--mix_prob", "0.25"), "mix_prob", 0.25),
        (("--mix_prob=0.25",), "mix_prob", 0.25),
        (("-b", "32"), "batch_size", 32),
        (("--lr-milestones", "3", "5", "--schedule", "step"), "lr_milestones", [3, 5]),
        (("--lr-milestones", "3,5", "--schedule", "step"), "lr_milestones", [3, 5]),
        (("--lr-milestones", "3,", "5", "--schedule", "step"), "lr_milestones", [3, 5]),
        (("--lr_milestones=3,5", "--schedule", "step"), "lr_milestones", [3, 5]),
        (("--lr-milestones", "3 5", "--schedule", "step"), "lr_milestones", [3, 5]),
        (("--lr-milestones", "[3, 5]", "--schedule", "step"), "lr_milestones", [3, 5]),
        (("--progressive", "96,160", "--dataset", "folder"), "progressive", [96, 160]),
        (("--pretrained", "w.pth", "--pretrained-allow-missing=fc,head"), "pretrained_allow_missing", ["fc", "head"]),
        (("--no-nesterov",), "nesterov", False),
        (("--no_nesterov",), "nesterov", False),
        (("--nesterov", "false"), "nesterov", False),
        (("--deterministic",), "deterministic", True),
        (("--no-flip",), "flip", False),
        (("--flip",), "flip", True),
        (("--flip", "false"), "flip", False),
        (("--lr", "1e-3"), "lr", 1e-3),
        (("--max-steps", "null"), "max_steps", None),
    ],
)
def test_spellings(arguments: tuple[str, ...], name: str, value: object) -> None:
    assert getattr(parse(*arguments), name) == value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["drop_path_rate=0.1,depth=3"], {"drop_path_rate": 0.1, "depth": 3}),
        (["drop_path_rate=1e-3,", "depth=3"], {"drop_path_rate": 0.001, "depth": 3}),
        (["layers=[2, 2, 2, 2],stem='a,b=1'"], {"layers": [2, 2, 2, 2], "stem": "a,b=1"}),
        (["layers=2,2,2,2,depth=3"], {"layers": [2, 2, 2, 2], "depth": 3}),
        (["act=relu,gelu"], {"act": "relu,gelu"}),
        (["first={a: 1, b: 2},second='3'"], {"first": {"a": 1, "b": 2}, "second": "3"}),
    ],
)
def test_commas_part_pairs_and_no_values(given: list[str], expected: dict[str, object]) -> None:
    assert parse_model_kwargs(parse("--model-kwargs", *given)) == expected


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("schedule: step\nlr_milestones: 3, 5\n", "lr_milestones", [3, 5]),
        ("schedule: step\nlr_milestones: 3 5\n", "lr_milestones", [3, 5]),
        ("schedule: step\nlr_milestones: 3\n", "lr_milestones", [3]),
        ("model_kwargs: depth=3, layers=[2,2]\n", "model_kwargs", ["depth=3", "layers=[2,2]"]),
        (
            "model_kwargs: {depth: 3, layers: [2, 2], act: relu}\n",
            "model_kwargs",
            ["depth=3", "layers=[2, 2]", "act=relu"],
        ),
    ],
)
def test_a_list_in_a_file_may_be_spelled_as_on_the_command_line(
    tmp_path: Path, text: str, name: str, value: object
) -> None:
    assert getattr(parse("--config", write(tmp_path / "a.yaml", text)), name) == value


def test_paths_are_not_parted() -> None:
    found = options.parse(SearchOptions, ["--query", "a,b.jpg", "c d.jpg", "-q=e,f.jpg"], name="search", description="")
    assert found is not None and found.query == ["e,f.jpg"]
    found = options.parse(SearchOptions, ["-q", "a,b.jpg", "c d.jpg", "-k", "3"], name="search", description="")
    assert found is not None and (found.query, found.k) == (["a,b.jpg", "c d.jpg"], 3)


@pytest.mark.parametrize(
    ("arguments", "val_fraction", "introspect"),
    [
        ((), 0.1, True),
        (("--method", "baseline"), 0.1, True),
        (("--dataset", "folder", "--data-dir", "x"), 0.1, True),
        (("--dataset", "digits", "--val-fraction", "0.3"), 0.3, True),
        (("--val-fraction", "0"), 0.0, False),
        (("--val-fraction", "0", "--introspect"), 0.0, True),
        (("--no-introspect",), 0.1, False),
        (("--dataset", "cifar10", "--data-dir", "x"), 0.0, False),
        (("--dataset", "cifar100", "--data-dir", "x", "--val-fraction", "0.2"), 0.2, True),
        (("--dataset", "imagenet", "--data-dir", "x"), 0.0, False),
    ],
)
def test_what_is_held_out_and_what_follows(arguments: tuple[str, ...], val_fraction: float, introspect: bool) -> None:
    """Own images give a tenth to the introspection; of published sets, every training image is trained on."""
    config = parse(*arguments)
    assert (config.val_fraction, config.introspect) == (val_fraction, introspect)


def test_a_config_of_an_earlier_version(tmp_path: Path) -> None:
    """What trained the head by loss prediction is dropped, and told of where it was used."""
    text = "val_fraction: 0.0\nuncertainty_share: 0.5\nuncertainty_shifts: 2\nuncertainty_loss: "
    with pytest.warns(UserWarning, match="uncertainty_loss loss-prediction was removed") as caught:
        config, _ = parse_cls_config(
            ["--config", write(tmp_path / "a.yaml", text + "loss-prediction\n")], description=""
        )
    assert len(caught) == 1 and config == parse("--config", write(tmp_path / "b.yaml", text + "none\n"))
    assert config == parse("--val-fraction", "0")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_the_same_through_ism_and_mix(method: str) -> None:
    ism, mix = METHODS[method]
    config = parse("--method", method)
    assert (config.method, config.ism, config.mix) == (method, ism, mix)
    assert config == parse("--ism", ism, "--mix", mix)
    assert config.mix_prob == {"none": 0.0, "mixup": 1.0, "cutmix": 0.5}[mix]


def test_a_method_in_a_later_layer_replaces_ism_and_mix(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "ism: released\nmix: cutmix\nmix_prob: 0.9\n")
    assert parse("--config", file).ism == "released"
    config = parse("--config", file, "--method", "mixup")
    assert (config.method, config.ism, config.mix, config.mix_prob) == ("mixup", "off", "mixup", 1.0)
    config = parse("--config", file, "--ism", "off")
    assert (config.method, config.ism, config.mix, config.mix_prob) == ("cutmix", "off", "cutmix", 0.9)


def test_the_variant_may_be_chosen_beside_a_method() -> None:
    config = parse("--method", "idml-mixup", "--ism", "released")
    assert (config.method, config.ism) == ("idml-mixup", "released")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--method", "baseline", "--ism", "live"),
        ("--method", "ism", "--ism", "off"),
        ("--method", "cutmix", "--mix", "mixup"),
    ],
)
def test_a_contradiction_is_an_error(arguments: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="contradicts"):
        parse(*arguments)


def test_yaml_off_is_a_word(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path / "a.yaml", "ism: off\nmix: none\n")).method == "baseline"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--method", "baseline"),
        ("--method", "ism", "--schedule", "step", "--lr-milestones", "2", "4"),
        ("--ism", "released", "--ema-decay", "0.9", "--max-steps", "3", "--seed", "5"),
    ],
)
def test_the_saved_config_reads_back_equal(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    config = parse(*arguments)
    assert parse("--config", write(tmp_path / "saved.yaml", dump_config(config))) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--mixprob", "1"), r"unknown option --mixprob; did you mean mix-prob"),
        (("--batch_sise=3",), r"unknown option --batch.sise; did you mean batch-size"),
        (("--method", "cutmx"), r"--method: expected one of baseline.*got 'cutmx'; did you mean cutmix"),
        (("--ism", "on"), r"--ism: expected one of live, released, off, got 'on'"),
        (("--lr", "fast"), r"--lr: expected float, got 'fast'"),
        (("--lr",), r"--lr: expected one argument"),
        (("--lr", "-1"), r"--lr: expected a positive number, got -1"),
        (("--lr", "nan"), r"--lr"),
        (("--mix-prob", "1.5"), r"--mix-prob: expected a value between 0 and 1, got 1.5"),
        (("--epochs", "2.5"), r"--epochs: expected int, got '2.5'"),
        (("--epochs", "0"), r"--epochs: expected a value at least 1, got 0"),
        (("--max-steps", "x"), r"--max-steps: expected int or null, got 'x'"),
        (("--schedule", "step", "--lr-milestones", "3", "x"), r"--lr-milestones.*'x'"),
        (
            ("--schedule", "step", "--lr-milestones", "3;5"),
            r"expected whole numbers separated by spaces or commas, got",
        ),
        (("--model-kwargs", "blocks=[1"), r"--model-kwargs: the value of 'blocks=\[1' cannot be read"),
        (("--schedule", "step", "--lr-milestones", "30"), r"between 1 and 10, got \[30\]"),
        (("--config", "no-such.yaml"), r"cannot read the config no-such.yaml: No such file"),
        (
            ("--uncertainty-loss", "none"),
            r"--uncertainty-loss was removed: P\(wrong\) and novelty are fitted after training",
        ),
        (("--uncertainty_share=0.5",), r"--uncertainty-share was removed: .*--introspect"),
        (("--cache-bytes", "100"), r"--cache-bytes: expected a value at least 1048576, got 100"),
        (("--val-fraction", "0.95"), r"--val-fraction: expected a value between 0 and 0.9, got 0.95"),
        (("stray",), r"stray"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 1\n", "unknown key 'learning_rate'"),
        ("batchsize: 3\n", "did you mean batch_size"),
        ("lr: fast\n", "--lr: expected float, got 'fast'"),
        ("epochs: null\n", "epochs: expected int, got null"),
        ("lr_milestones: {first: 3}\n", "expected a list, got {'first': 3}"),
        ("nesterov: 3\n", "expected true or false, got 3"),
        ("- a\n- b\n", "expected a YAML mapping"),
        ("a: [\n", "not a YAML file"),
        ("!!python/object/apply:os.system [true]\n", "not a YAML file"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path / "bad.yaml", text)
    with pytest.raises(UserError) as caught:
        parse("--config", file)
    assert expected in str(caught.value)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--method", "baseline", "--temperature", "3"), "temperature"),
        (("--method", "ism", "--mix-prob", "0.5"), "mix-prob"),
        (("--lr-milestones", "3"), "lr-milestones"),
        (("--workers", "7"), "workers"),
        (("--data-dir", "x"), "data-dir"),
        (("--no-introspect", "--cache-bytes", "2000000"), "cache-bytes"),
        (("--val-fraction", "0", "--cache-bytes", "2000000"), "cache-bytes"),
    ],
)
def test_an_option_without_effect_warns(arguments: tuple[str, ...], option: str) -> None:
    with pytest.warns(UserWarning, match=f"--{option} .* has no effect"):
        parse_cls_config(arguments, description="")


def test_every_config_file_parses_without_a_warning() -> None:
    files = sorted(Path(__file__).parents[1].glob("configs/**/*.yaml"))
    files = [file for file in files if "\nmethod:" in file.read_text(encoding="utf-8")]  # the others are train_dml's
    assert len(files) >= 22
    for file in files:
        config = parse("--config", str(file))
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name, value in given.items():
            assert getattr(config, name) == value, (file, name)


def test_every_option_has_help() -> None:
    for field in dataclasses.fields(ClsConfig):
        assert len(field.metadata["help"]) > 8, field.name


def test_eval_only_fits_nothing() -> None:
    """The config of such a call is that of its checkpoint, so an option that was given is looked at by itself."""
    unused = unused_introspection(ClsConfig(eval_only=True, introspect=True))
    assert set(unused) == {"introspect", "cache_bytes"} and "python -m idml introspect" in unused["introspect"]
    assert unused_introspection(ClsConfig(introspect=True)) == {}
