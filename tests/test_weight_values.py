"""Weights that are not what a model is made of: NaN, infinities, integers, or of no use to it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_checkpoint import edit_json, names, refused, stored, tiny_tokenizer
from helpers_streaming import in_memory, stored_model
from safetensors.torch import load_file, save_file

from llmslim import api
from llmslim.cli.main import cli
from llmslim.storage import check_finite, finite, open_source
from llmslim.storage.finite import nonfinite_tensors

RULE = {"match": "*.mlp.*", "structure": "low_rank", "rank": 4}
RECIPE = {"name": "small", "replace": [RULE]}


# --------------------------------------------------------------------------- NaN and infinities


def poison(folder: Path, *values: float) -> list[str]:
    """Put values into as many tensors of a folder; return the tensors' names."""
    tensors = load_file(folder / "model.safetensors")
    hit = sorted(name for name in tensors if name.endswith("mlp.down_proj.weight"))[: len(values)]
    for name, value in zip(hit, values, strict=True):
        tensors[name][1, 2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return hit


def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    first, second = poison(folder, float("nan"), float("-inf"))
    said = refused(api.convert, folder, RECIPE, tmp_path / "out")
    assert "2 tensors hold NaN or infinities" in said
    assert f"{first} (1 of " in said
    assert second in said
    assert "--allow-nonfinite" in said
    assert names(tmp_path) == ["llama"]


def test_weights_that_are_not_finite_are_kept_and_reported_where_allowed(
    folder: Path, tmp_path: Path
) -> None:
    (name,) = poison(folder, float("nan"))
    recipe = {"name": "up", "replace": [{**RULE, "match": "*.up_proj"}]}
    made = api.convert(folder, recipe, tmp_path / "out", allow_nonfinite=True)
    assert any(name in problem for problem in made.report.problems)
    written = stored(made.path)[name]
    assert int(torch.isnan(written).sum()) == 1


@pytest.mark.parametrize("structure", ["low_rank", "pivoted_low_rank"])
def test_a_fit_to_weights_that_are_not_finite_is_reported_as_that(
    folder: Path, tmp_path: Path, structure: str
) -> None:
    (name,) = poison(folder, float("nan"))
    recipe = {"name": "r", "replace": [{"match": "*.down_proj", "structure": structure, "rank": 2}]}
    said = refused(api.convert, folder, recipe, tmp_path / "out", allow_nonfinite=True)
    assert name in said
    assert "Blocks cannot be fitted to them" in said
    assert names(tmp_path) == ["llama"]
    made = api.convert(folder, recipe, tmp_path / "out", allow_nonfinite=True, init="random")
    assert not any(torch.isnan(tensor).any() for tensor in stored(made.path).values())


def test_the_command_line_has_the_same_switch(folder: Path, tmp_path: Path) -> None:
    poison(folder, float("inf"))
    recipe = tmp_path / "up.yaml"
    recipe.write_text(json.dumps({"replace": [{**RULE, "match": "*.up_proj"}]}))
    words = ["convert", str(folder), "-r", str(recipe), "-o", str(tmp_path / "out")]
    ran = CliRunner().invoke(cli, words)
    assert ran.exit_code == 1
    assert "NaN or infinities" in ran.output
    ran = CliRunner().invoke(cli, [*words, "--allow-nonfinite"])
    assert ran.exit_code == 0, ran.output
    assert "NaN or infinities" in " ".join(ran.output.split())


def test_a_narrower_type_that_overflows_is_noticed(folder: Path, tmp_path: Path) -> None:
    poison(folder, 1e30)
    api.plan(folder, RECIPE)
    said = refused(api.convert, folder, RECIPE, tmp_path / "out", dtype="float16")
    assert "1 tensor holds NaN or infinities" in said


def test_every_piece_of_a_tensor_is_looked_at_and_integers_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finite, "_PIECE", 3)
    for place in range(8):
        weight = torch.zeros(8)
        weight[place] = float("nan")
        (said,) = check_finite([("w", weight)], "m", allow_nonfinite=True)
        assert "w (1 of 8)" in said
    whole = [("i", torch.ones(3, dtype=torch.int64)), ("none", torch.ones(0)), ("x", torch.ones(9))]
    assert check_finite(whole, "m") == ()
    wrong = torch.full((2, 2), float("inf"), dtype=torch.bfloat16)
    many = [(f"w{n}", wrong.clone()) for n in range(7)]
    said = refused(check_finite, many, "m")
    assert "7 tensors hold" in said
    assert "w2 (4 of 4) and 4 more;" in said
    (said,) = check_finite([("a", wrong), ("tied", wrong)], "m", allow_nonfinite=True)
    assert "tied" not in said


def test_weights_that_are_not_finite_are_refused_wherever_a_model_is_used(
    folder: Path, tmp_path: Path
) -> None:
    tiny_tokenizer().save_pretrained(folder)
    (name,) = poison(folder, float("nan"))
    rule = {"match": "*.up_proj", "structure": "low_rank", "rank": 4}
    slim = api.convert(folder, {"replace": [rule]}, tmp_path / "slim", allow_nonfinite=True).path
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "one two three"}\n' * 50)
    for call, args, options in (
        (api.load, (folder,), {}),
        (api.load, (slim,), {}),
        (api.export_dense, (slim, tmp_path / "dense"), {}),
        (api.heal, (slim, tmp_path / "healed"), {"data": str(data)}),
    ):
        assert f"1 tensor holds NaN or infinities: {name} (1 of" in refused(call, *args, **options)
    assert names(tmp_path) == ["llama", "slim", "text.jsonl"]
    ran = CliRunner().invoke(cli, ["generate", str(slim), "hello"])
    assert (ran.exit_code, "NaN or infinities" in ran.output) == (1, True)
    assert "--allow-nonfinite" not in ran.output  # there is none for this command
    assert torch.isnan(api.load(slim, allow_nonfinite=True).get_parameter(name)).any()
    words = ["export", "--dense", str(slim), "-o", str(tmp_path / "dense")]
    ran = CliRunner().invoke(cli, [*words, "--allow-nonfinite"])
    assert ran.exit_code == 0, ran.output
    assert torch.isnan(stored(tmp_path / "dense")[name]).any()


# ------------------------------------------------------------- numbers of another kind, no use


def change(folder: Path, changes: dict[str, Any]) -> None:
    """Replace tensors of a folder, by functions or by others; None removes one."""
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    for name, to in changes.items():
        tensors[name] = to(tensors[name]) if callable(to) else to
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("dtype", "called"), [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64")]
)
def test_a_weight_stored_as_another_kind_of_number_is_refused(
    folder: Path, tmp_path: Path, dtype: torch.dtype, called: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, {name: lambda weight: (100 * weight).to(dtype)})
    wanted = f"{folder}: {name} stored as {called}; allowed F16, BF16, F32, F64."
    assert wanted in refused(api.convert, folder, RECIPE, tmp_path / "out", init="random")
    assert wanted in refused(api.load, folder)
    other = "model.layers.2.mlp.up_proj.weight"
    change(folder, {other: lambda weight: weight.to(dtype)})
    assert f"{name} and 1 more stored as" in refused(api.load, folder)


def test_experts_stored_one_by_one_are_held_to_the_same(tmp_path: Path) -> None:
    model = stored_model(tmp_path / "m", "mixtral")
    first = next(name for name in stored(model) if "experts" in name)
    change(model, {first: lambda weight: (100 * weight).to(torch.int8)})
    for call in (lambda: api.convert(model, RECIPE, tmp_path / "out"), lambda: api.load(model)):
        assert f"{first} stored as I8" in refused(call)


def test_files_without_a_tensor_are_no_model(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")
    assert f"{folder}: its files of weights hold no tensor." in refused(open_source, folder)


def test_tensors_that_the_model_has_no_use_for_are_reported_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"name": "small", "init": "random", "replace": [RULE]}
    # What models work out by themselves is no loss.
    change(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    assert not api.convert(folder, recipe, tmp_path / "a").report.problems
    change(folder, {"extra.weight": torch.ones(2)})
    one = f"{folder}: 1 stored tensor is of no use to LlamaForCausalLM, such as extra.weight"
    for way, out in ((api.convert, "b"), (partial(in_memory, monkeypatch), "c")):
        reported = way(folder, recipe, tmp_path / out).report.problems
        assert any(one in problem for problem in reported)
    edit_json(folder / "config.json", num_hidden_layers=2)
    (reported,) = api.convert(folder, recipe, tmp_path / "d").report.problems
    assert "19 stored tensors are of no use to LlamaForCausalLM" in reported


def test_weights_that_become_larger_are_reported_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = [name for name in stored(folder) if "norm" in name]
    others = dict.fromkeys(stored(folder).keys() - set(norms), torch.Tensor.bfloat16)
    change(folder, others)
    recipe = {"name": "small", "init": "random", "replace": [RULE]}
    for way, out in ((api.convert, "a"), (partial(in_memory, monkeypatch), "b")):
        made = way(folder, recipe, tmp_path / out)
        assert {tensor.dtype for tensor in stored(made.path).values()} == {torch.float32}
        assert any(
            "types BF16, F32; written as float32, which holds them all" in problem
            for problem in made.report.problems
        )
    assert not api.convert(folder, recipe, tmp_path / "c", dtype="bfloat16").report.problems


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_one_bad_number_of_any_kind_is_counted(bad: float) -> None:
    tensor = torch.tensor([1.0, bad, 2.0])
    assert nonfinite_tensors([("a", tensor), ("b", torch.ones(3))]) == ["a (1 of 3)"]
    assert nonfinite_tensors([("a", tensor), ("tied to it", tensor)]) == ["a (1 of 3)"]
