"""The commands that a report gives for its model are run: they make the same weights."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from helpers_calibrated import RECIPES, model_folder
from helpers_calibrated import text as text
from helpers_checkpoint import hashes
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import ok

import llmslim
from llmslim.options import ConvertOptions, fields
from llmslim.report.read import read_report

TEXT = ("--calibration", "text.txt", "--calibration-tokens", 256)
CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "seed and types": (
        "low_rank",
        ("--init", "random", "--seed", 7, "--dtype", "bf16", "--max-shard-size", "60KB"),
    ),
    "text": ("low_rank", (*TEXT, "--no-own-text")),
    "own text": ("low_rank", (*TEXT, "--base-model", "who/dense")),
    "measured sizes": ("auto", (*TEXT, "--no-own-text", "--dtype", "fp32")),
}


def from_text(folder: Path) -> list[str]:
    return [line.strip() for line in ok("report", folder).splitlines() if "llmslim " in line[:10]]


def from_card(folder: Path) -> list[str]:
    card = (folder / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", card, re.M | re.S)
    return str(block).splitlines()


def from_page(folder: Path) -> list[str]:
    page = ok("report", folder, "--format", "html")
    (block,) = re.findall(r'<pre id="reproduce">(.*?)</pre>', page, re.S)
    return unescape(block).split("\n")[:-1]


def from_markdown(folder: Path) -> list[str]:
    (block,) = re.findall(r"^```bash\n(.*?)^```$", ok("report", folder, "-f", "md"), re.M | re.S)
    return str(block).splitlines()


VIEWS: dict[str, Callable[[Path], list[str]]] = {
    "text": from_text, "card": from_card, "page": from_page, "markdown": from_markdown,
}  # fmt: skip


def converted(recipe: str, *options: Any) -> Path:
    """Convert the model `m` of the working directory into the folder `out` by the command."""
    Path("given.yaml").write_text(json.dumps({"name": "again", **RECIPES[recipe]}))
    ok("-q", "convert", "m", "out", "--recipe", "given.yaml", *options)
    return Path("out")


def elsewhere(monkeypatch: pytest.MonkeyPatch, made: Path, *beside: str) -> None:
    """Go to a new folder that has the recipe of a checkpoint, and copies of files from here."""
    new = Path("elsewhere").resolve()
    new.mkdir()
    shutil.copy(made / "recipe.yaml", new)
    for name in beside:
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, new / name)
    monkeypatch.chdir(new)


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(folder).items() if "safetensors" in name}


def run_all(commands: list[str]) -> None:
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "llmslim"
        ok("-q", *words)


@pytest.mark.parametrize("case", CASES)
def test_the_command_makes_the_same_weights(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder()
    made = converted(CASES[case][0], *CASES[case][1])
    before = hashes(made)
    commands = VIEWS["page"](made)
    elsewhere(monkeypatch, made, "m", "text.txt")
    run_all(commands)
    assert hashes(Path("again")) == before


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_has_the_command(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder()
    made = converted("low_rank", "--init", "random", "--seed", 5)
    (command,) = VIEWS[view](made)
    plain = llmslim.convert("m", {"name": "p", **RECIPES["low_rank"]}, "plain", init="random").path
    assert weights(plain) != weights(made)  # the seed decides
    shutil.copy(made / "recipe.yaml", ".")
    run_all([command])
    assert hashes(Path("again")) == hashes(made)


def test_a_model_of_random_weights_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    next(model_folder().glob("*.safetensors")).unlink()
    made = converted("low_rank", "--init", "random", "--seed", 3, "--dtype", "bf16")
    commands = VIEWS["card"](made)
    elsewhere(monkeypatch, made, "m")
    run_all(commands)
    assert hashes(Path("again")) == hashes(Path("../out"))


def test_a_healed_model_is_healed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    model_folder()
    slim = converted("low_rank", *TEXT, "--no-own-text", "--seed", 2)
    Path("texts").mkdir()
    rows = [json.dumps({"text": f"tree {n} and so it is"}) for n in range(60)]
    Path("texts/rows.jsonl").write_text("\n".join(rows))
    options = ("--data", "texts/rows.jsonl", "--teacher", "m", "--tokens", 300, "--seed", 9)
    options += ("--context-length", 48, "--batch-size", 2, "--learning-rate", 0.01)
    ok("-q", "heal", slim, "healed", *options, "--set", "held_out=4")
    made = Path("healed")
    assert weights(slim) != weights(made)
    commands = VIEWS["card"](made)
    assert commands == VIEWS["page"](made)
    elsewhere(monkeypatch, made, "m", "text.txt", "texts")
    run_all(commands)
    assert weights(Path("again-healed")) == weights(Path("../healed"))


def test_folders_of_this_machine_are_not_in_the_report(tmp_path: Path) -> None:
    model_folder()
    Path("given.yaml").write_text(json.dumps({"name": "again", **RECIPES["low_rank"]}))
    options = ("--calibration", tmp_path / "text.txt", "--calibration-tokens", 256)
    ok("-q", "convert", tmp_path / "m", "out", "--recipe", "given.yaml", *options)
    report = read_report("out").report
    assert report.given == "m"
    assert report.options == {
        "calibration": ["text.txt"], "calibration_tokens": 256, "device": "cpu",
    }  # fmt: skip
    for name in ("README.md", "llmslim_report.json"):
        assert str(tmp_path) not in Path("out", name).read_text(encoding="utf-8")


def test_a_model_of_the_hub_is_named_with_its_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--who--dense" / "snapshots" / "0a1b2c"
    snapshot.parent.mkdir(parents=True)
    model_folder().rename(snapshot)
    made = llmslim.convert(snapshot, {"name": "again", **RECIPES["low_rank"]}, "out")
    assert made.report.given == "who/dense@0a1b2c"
    assert made.report == read_report("out").report


def test_what_decides_a_resume_is_on_record() -> None:
    decide = {one.name for one in fields(ConvertOptions) if one.metadata.get("in_key")}
    recorded = {one.name for one in fields(ConvertOptions) if one.metadata.get("recorded")}
    assert recorded - decide == {"device", "trust_remote_code", "allow_nonfinite"}
    assert decide <= recorded
    assert ConvertOptions("r", "o", resume=True, overwrite=True).recorded() == {}


def test_a_plan_and_a_model_in_memory_have_no_command() -> None:
    model_folder()
    ok("plan", "m", "--recipe", "mlp-half", "--json", "plan.json")
    assert "make it again" not in ok("report", "plan.json")
    model = llmslim.load("m")
    report = llmslim.slim(model, {"name": "s", **RECIPES["low_rank"]})
    llmslim.save(model, "saved", report=report)
    assert "make it again" not in ok("report", "saved")
