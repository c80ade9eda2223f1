"""Benchmarks in their quick form: that they run, and what they store."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from idml.models import IntrospectiveClassifier
from tests.test_train_cls import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # where its scripts find one another
bench_dml, bench_ism, other_data, timing = (
    importlib.import_module(name) for name in ("bench_dml", "bench_ism", "other_data", "timing")
)


@pytest.mark.slow
def test_what_introspection_is_worth(tmp_path: Path) -> None:
    """Every part on few images of the package; a page of documentation stays as it is."""
    page = tmp_path / "page.md"
    page.write_text("as it was", encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks/introspection.py"), "--quick"]
    command += ["--out", str(tmp_path / "figures.json"), "--docs", str(page)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert page.read_text(encoding="utf-8") == "as it was"
    stored = json.loads((tmp_path / "figures-quick.json").read_text(encoding="utf-8"))
    assert list(stored) == ["errors", "novelty", "promise", "labels", "memorised", "near"]
    for name, part in stored.items():
        assert part["hardware"] and part["versions"]["torch"] and "commit" in part and part["seeds"] == [1]
        assert f"\n{name}\n\n{part['table']}\n" in done.stdout
    ((setting, found),) = stored["errors"]["rows"].items()
    assert setting.startswith("Fashion-MNIST, plain")
    assert {"P(wrong)", "1 - max softmax", "temperature scaling", "flip averaging", "MC dropout"} <= set(found)
    assert found["P(wrong)"][0]["error_auroc"] > found["1 - max softmax"][0]["error_auroc"]
    assert 0.1 < found["P(wrong)"][0]["accuracy"] < 1
    ours, free = (stored["novelty"]["rows"][name] for name in ("novelty (ours)", "1 - max softmax"))
    assert list(ours) == list(other_data.SETS) and all(0 <= values[0] <= 1 for values in ours.values())
    assert ours["noise"][0] > free["noise"][0] and ours["noise"][0] > 0.8
    assert 0 <= stored["promise"]["rows"][setting][0]["broken"] <= 1
    assert stored["labels"]["rows"]["audit"][0] > 0.2, "a random ranking has 0.05 of them in its first 5 %"
    assert {"training images alone", "held-out images, cross-fitted", "by the rule"} <= set(stored["memorised"]["rows"])
    assert stored["near"]["rows"]["novelty (ours)"][0] > 0.6


def run_quick(script: str, out: Path, *options: str) -> dict[str, Any]:
    """The parts that a benchmark stores in its quick form."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--out", str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    for part in parts.values():
        assert part["hardware"] and part["versions"]["torch"] and "commit" in part
    return dict(parts)


def check_ratios(rows: dict[str, Any], *, to: str) -> None:
    """Ratios are finite and above zero, within their intervals, and 1 of what they are ratios to."""
    assert rows[to]["ratio"] == 1
    for row in rows.values():
        low, high = row["interval"]
        assert 0 < low <= row["ratio"] <= high < math.inf
        assert row["n"] >= 2 and row["seconds"] > 0


def test_times_of_a_slowed_machine_keep_their_ratio() -> None:
    walls = {"plain": [1.0, 1.0, 5.0, 5.0, 1.0, 1.0, 1.0], "dear": [2.0, 2.0, 10.0, 10.0, 2.0, 2.2, 1.8]}
    found = {name: [timing.Taken(wall, 2 * wall) for wall in each] for name, each in walls.items()}
    rows = timing.compared(found, to="plain")
    assert rows["dear"]["ratio"] == rows["dear"]["cpu_ratio"] == 2
    assert rows["dear"]["interval"] == [1.8, 2.2] and rows["dear"]["n"] == 7
    assert rows["plain"]["interval"] == [1, 1]


def test_alternatives_take_turns_at_being_first() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abc"}
    found = timing.in_turn(calls, budget=1, rounds=3, warmup=0)
    assert "".join(order) == "abcbcacab"
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_part_measured_anew_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results" / "figures.json"
    for part, seconds in (("a", 1), ("b", 2), ("a", 3)):
        timing.store(path, part, {"seconds": seconds}, {"hardware": "a desk"})
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert {name: part["seconds"] for name, part in parts.items()} == {"a": 3, "b": 2}
    assert parts["a"]["hardware"] == "a desk"


def test_the_restated_classifier_is_the_released_one() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"uncertainty_dim": 16, "ism": "released"}
    ours = IntrospectiveClassifier("resnet8_cifar", 10, **settings)
    restated = bench_ism.RestatedClassifier("resnet8_cifar", 10, **settings)
    restated.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(restated(images).introspective_logits, ours(images).introspective_logits)


def test_the_restated_loss_is_the_released_one() -> None:
    losses = bench_dml.losses(20, torch.device("cpu"), 16)
    losses["released, restated"].load_state_dict(losses["released"].state_dict())
    embeddings = torch.cat([torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2)], dim=1)
    labels = torch.arange(8)
    values = [
        bench_dml.forward_and_backward(losses[name], embeddings, labels) for name in ("released", "released, restated")
    ]
    gradients = [losses[name].proxies.grad for name in ("released", "released, restated")]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_what_the_ism_costs(tmp_path: Path) -> None:
    part = run_quick("bench_ism.py", tmp_path / "ism.json")["resnet8, cpu"]
    assert list(part["variants"]) == list(bench_ism.VARIANTS)
    check_ratios(part["variants"], to="off")
    for operations in part["profile"].values():
        assert operations[0]["operation"] and 0 < sum(each["share"] for each in operations) <= 1


@pytest.mark.slow
def test_what_a_retrieval_step_and_its_loss_cost(tmp_path: Path) -> None:
    parts = run_quick("bench_dml.py", tmp_path / "dml.json", "--device", "cpu")
    for rows in parts["step, cpu, 8 images"]["ism"].values():
        check_ratios(rows, to="one forward")
    assert list(parts["loss, cpu"]["by_classes"]) == ["10", "30"]
    for figures in parts["loss, cpu"]["by_classes"].values():
        check_ratios(figures["losses"], to="off")
        rows = figures["losses"]
        assert rows["released"]["loss"] == pytest.approx(rows["released, restated"]["loss"], rel=0.2)
        assert all(math.isfinite(row["loss"]) and row["peak_mib"] > 0 for row in rows.values())


@pytest.mark.slow
def test_the_curve_of_the_retrieval_figures(tmp_path: Path) -> None:
    options = ("--parts", "curve", "--rounds", "2", "--limit", "0")
    sizes = run_quick("bench_retrieval_metrics.py", tmp_path / "figures.json", *options)["curve"]["sizes"]
    assert list(sizes) == ["500", "1000", "2000"]
    assert len(sizes["500"]["seconds"]["ours"]) == 2 and sizes["500"]["peak_gib"] > 0
    assert "more than --limit 0" in sizes["1000"]["skipped"]


@pytest.mark.slow
def test_what_a_gpu_is_used_for(tmp_path: Path) -> None:
    parts = run_quick("bench_gpu.py", tmp_path / "gpu.json", "--device", "cpu", "--peak-tflops", "0.1")
    rate = parts["rate, cpu"]
    assert set(rate["variants"]) == {"off", "live"}
    for row in rate["variants"].values():
        images = sorted(row["images_per_second"])[1]
        assert row["n"] == 3 and row["operations_per_second"] == pytest.approx(images * rate["operations_per_image"])
        best, worst = (choose(rate["matrix_product"]["operations_per_second"]) for choose in (max, min))
        speeds = [each * rate["operations_per_image"] for each in row["images_per_second"]]
        assert min(speeds) / best <= row["share_of_matrix_product"] <= max(speeds) / worst
        assert row["share_of_data_sheet_peak"] == pytest.approx(row["operations_per_second"] / 1e11)
    assert {"R@1", "R@1000", "RP", "MAP@R", "NMI"} <= set(parts["figures, cpu"]["metrics"])


def test_the_page_of_speed_says_what_is_stored() -> None:
    paired, speed_page = importlib.import_module("paired"), importlib.import_module("speed_page")
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for name, make in speed_page.TABLES.items():
        begin, end = paired.markers(name, speed_page.SCRIPT)
        assert page.split(begin)[1].split(end)[0].strip() == make().strip(), name


@pytest.mark.slow
def test_scaling_over_processes(tmp_path: Path) -> None:
    parts = run_quick("bench_scaling.py", tmp_path / "scaling.json", "--device", "cpu")
    for rows in parts["processes, cpu"]["variants"].values():
        assert rows["1"]["efficiency"] == 1 and rows["1"]["sent_bytes"] == 0
        assert rows["2"]["efficiency"] > 0 and rows["2"]["sent_bytes"] == rows["2"]["gradient_bytes"]
    paper = parts["paper"]
    # He et al. 2016 give 3.8e9 products for the form with its stride in the 1x1 convolution; timm's has 4.1e9.
    assert paper["counted_per_image"]["forward"] == pytest.approx(2 * 4.09e9, rel=0.01)
    assert paper["counted_per_image"]["parameters"] == 25_557_032
    assert all(each["source"] for each in paper["assumed"].values())


@pytest.mark.slow
def test_the_guard_tells_what_moved_and_never_fails(tmp_path: Path) -> None:
    out = tmp_path / "quick.json"
    parts = ("--parts", "losses", "figures", "--seconds", "1")
    stored = run_quick("bench_quick.py", out, *parts)["ratios"]
    assert all(0 < row["ratio"] < math.inf for row in stored["ratios"].values())
    name = "ProxyAnchor loss: live / off"
    stored["ratios"][name]["ratio"] = 100.0
    out.write_text(json.dumps({"parts": {"ratios": stored}}), encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks/bench_quick.py"), "--quick", "--out", str(out), *parts]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("moved by more than 10 %"))
    assert name in line
    assert json.loads(out.read_text(encoding="utf-8"))["parts"]["ratios"]["ratios"][name]["ratio"] == 100
