"""Structures, methods and objectives of other packages: by entry point, and registered directly."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from tiny import logits, tiny_config, tiny_model, tokens
from torch import Tensor, nn

import llmslim
from llmslim import CheckpointError, PluginError, RecipeError, SizeError, StructuredLinear, fitting
from llmslim.fitting.calibration import TokenWindows
from llmslim.healing import objective_named
from llmslim.init import Target, initialise, method_named, method_names
from llmslim.modeling.structured import build, structure_class
from llmslim.plugins import INITS, OBJECTIVES, STRUCTURES
from llmslim.recipe import Recipe, json_schema

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "llmslim-kronecker"
RECIPE = """\
replace:
  - match: "*.o_proj"
    structure: kronecker
    side: 4
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test registers or imports outlives it."""
    for registry in (STRUCTURES, INITS, OBJECTIVES):
        monkeypatch.setattr(registry, "registered", {})
    yield
    sys.modules.pop("llmslim_kronecker", None)


def entry_points(site: Path, distribution: str, text: str) -> None:
    """Make what pip leaves of a distribution: its metadata, with entry points."""
    info = site / f"{distribution.replace('-', '_')}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(text)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The example, as if pip had installed it; undo to remove it again."""
    site = tmp_path / "site"
    text = (EXAMPLE / "pyproject.toml").read_text().partition('entry-points."')[2]
    entry_points(site, "llmslim-kronecker", "[" + text.replace('"]', "]", 1).replace('"', ""))
    (site / "llmslim_kronecker.py").write_bytes((EXAMPLE / "llmslim_kronecker.py").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield patch


def remove(installed: pytest.MonkeyPatch) -> None:
    installed.undo()
    STRUCTURES.registered.clear()
    del sys.modules["llmslim_kronecker"]


def nearest_kronecker(weight_OI: Tensor, side: int) -> Tensor:
    """Return the squared distance of the nearest A ⊗ B, by the rearranged matrix's spectrum."""
    o, i = (size // side for size in weight_OI.shape)
    rearranged = weight_OI.reshape(side, o, side, i).transpose(1, 2).reshape(side * side, o * i)
    return torch.linalg.svdvals(rearranged)[1:].square().sum()


# The example, from its recipe to a loaded checkpoint.


@pytest.mark.usefixtures("installed")
def test_a_plug_in_is_planned_fitted_reported_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    model, ids = tiny_model("llama", num_hidden_layers=2), tokens()
    weights = {
        n: m.weight.detach().clone() for n, m in model.named_modules() if n.endswith("o_proj")
    }
    planned = llmslim.plan(model, path).report()
    report = llmslim.slim(model, path)
    rows = {row.name: row for row in report.rows if row.action == "replaced"}
    assert rows.keys() == weights.keys()
    for name, weight_OI in weights.items():
        row, block = rows[name], model.get_submodule(name).requires_grad_(False)
        assert (row.structure, row.options) == ("kronecker", {"side": 4})
        assert row.params_after == 4 * 4 + 48 * 48 // 16
        # The block is the matrix that it says it is, and the nearest of its kind.
        kron = torch.kron(block.outer[0], block.inner[0].t().contiguous())
        torch.testing.assert_close(block.to_dense(), kron)
        best = nearest_kronecker(weight_OI, 4)
        assert (kron - weight_OI).square().sum() == pytest.approx(float(best), rel=1e-3)
        assert row.init_error == pytest.approx(float(best / weight_OI.square().sum()), rel=1e-3)
    assert planned.totals == report.totals

    expected = logits(model, ids)
    llmslim.save(model, tmp_path / "slim", report=report)
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["llmslim"]["plugins"] == {"kronecker": "llmslim_kronecker"}
    assert torch.equal(logits(llmslim.load(tmp_path / "slim"), ids), expected)


@pytest.mark.usefixtures("installed")
def test_a_plug_in_is_converted_from_a_folder_and_exported_again(
    folder: Path, tmp_path: Path
) -> None:
    recipe = Recipe.of({"replace": [{"role": "mlp", "structure": "kronecker", "side": 4}]})
    llmslim.convert(folder, recipe, tmp_path / "slim")
    assert llmslim.verify(tmp_path / "slim").ok
    model = llmslim.load(tmp_path / "slim")
    llmslim.export_dense(tmp_path / "slim", tmp_path / "dense")
    dense = llmslim.load(tmp_path / "dense")
    assert not any(isinstance(module, StructuredLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense, tokens()), logits(model, tokens()), atol=1e-4, rtol=0)


def test_a_checkpoint_names_the_package_that_is_missing(
    installed: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    llmslim.slim(model, {"init": "random", **Recipe.of(_written(tmp_path)).model_dump()})
    llmslim.save(model, tmp_path / "slim")
    remove(installed)
    with pytest.raises(CheckpointError) as caught:
        llmslim.load(tmp_path / "slim")
    (sentence,) = caught.value.problems
    assert "'kronecker'" in sentence
    assert "package 'llmslim_kronecker'" in sentence
    assert not llmslim.verify(tmp_path / "slim").ok
    assert "llmslim_kronecker" not in sys.modules  # nor was the checkpoint's own copy run

    @llmslim.register_structure
    class Other(Kept):  # of another package, under the same name
        name: ClassVar[str] = "kronecker"

    with pytest.raises(CheckpointError) as caught:
        llmslim.load(tmp_path / "slim")
    assert "llmslim_kronecker" in caught.value.problems[0]


def _written(folder: Path) -> Path:
    path = folder / "mine.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_a_file_that_stands_alone_loads_without_llmslim(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    llmslim.slim(model, _written(tmp_path))
    llmslim.save(model, tmp_path / "slim")
    torch.save((tokens(), logits(model, tokens())), tmp_path / "expected.pt")
    code = """
        import sys
        sys.modules["llmslim"] = sys.modules["llmslim_kronecker"] = None
        import torch
        from transformers import AutoModelForCausalLM
        ids, expected = torch.load("expected.pt")
        for place in ("slim", "again"):
            model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
            with torch.no_grad():
                assert torch.equal(model(ids, use_cache=False).logits, expected), place
            model.save_pretrained("again")
    """
    lines = "\n".join(
        line.strip() if not line.startswith(" " * 12) else line[8:] for line in code.splitlines()
    )
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


# What a recipe says of it.


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("lines", "where", "error"),
    [
        ("    sde: 4\n    side: 4\n", "mine.yaml:4 replace[0].sde", RecipeError),
        ("    side: four\n", "mine.yaml:4 replace[0].side", RecipeError),
        ("    side: 4\n    keep_ratio: 0.5\n", "mine.yaml:5 replace[0].keep_ratio", RecipeError),
        ("    terms: 2\n", "mine.yaml:2 replace[0].side", RecipeError),  # the one that it needs
        ("    side: 7\n", "mine.yaml:4 replace[0].side", SizeError),
        ("    side: 4\n    terms: 0\n", "mine.yaml:5 replace[0].terms", SizeError),
    ],
)
def test_wrong_options_are_found_in_plan_with_file_line_and_key(
    tmp_path: Path, lines: str, where: str, error: type[Exception]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f'replace:\n  - match: "*.o_proj"\n    structure: kronecker\n{lines}')
    with pytest.raises(error) as caught:
        llmslim.plan(tiny_config("llama"), path)
    (sentence,) = caught.value.problems
    assert sentence.removeprefix(f"{tmp_path}/").partition(": ")[0] == where
    assert sentence.endswith("Did you mean side?") is ("sde" in where)


@pytest.mark.usefixtures("installed")
def test_names_and_schema_hold_a_plug_in() -> None:
    assert "kronecker" in STRUCTURES.names()
    assert "llmslim_kronecker" not in sys.modules
    (rule,) = (
        rule["properties"]
        for rule in json.loads(json_schema())["$defs"]["Rule"]["anyOf"]
        if rule["properties"]["structure"].get("const") == "kronecker"
    )
    assert rule["side"]["description"] == "Side a of the outer factors; must divide both sizes."
    assert rule["terms"]["default"] == 1
    with pytest.raises(RecipeError) as caught:
        Recipe.of({"replace": [{"match": "*", "structure": "kroneker", "side": 4}]})
    assert caught.value.problems[0].endswith("Did you mean kronecker?")


@pytest.mark.usefixtures("installed")
def test_auto_takes_a_plug_in_that_asks_to_be_tried_where_it_is_best() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    projection = model.model.layers[0].self_attn.o_proj
    torch.manual_seed(0)
    with torch.no_grad():
        projection.weight.copy_(torch.kron(torch.randn(2, 2), torch.randn(24, 24)) / 10)
    ids = tokens(12, 16)
    rule = {"match": "*.o_proj", "structure": "auto"}
    chosen = fitting.allocate(
        model,
        Recipe.of({"budget": 0.5, "replace": [rule]}),
        TokenWindows(ids[:8], ids[8:]),
    )
    (picked,) = chosen.replace
    assert picked.structure == "kronecker"
    assert picked.options()["side"] == 2


# Registering directly.


class Kept(StructuredLinear):
    """A full matrix scaled by an option, with no more than what it must have."""

    name: ClassVar[str] = "kept"

    @dataclass(frozen=True)
    class Options:
        scale: Annotated[float, "What the product is multiplied with."]
        exact: bool = True

    def create(self, **kind: Any) -> None:
        self.weight = nn.Parameter(torch.empty(self.in_features, self.out_features, **kind))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=(3 * self.in_features) ** -0.5)

    def product(self, x: Tensor) -> Tensor:
        return self.options.scale * x @ self.weight


def test_a_registered_class_is_built_by_name_and_stored_by_what_differs() -> None:
    assert llmslim.register_structure(Kept) is Kept
    assert structure_class("kept") is Kept
    block = Kept(4, 6, scale=2.0)
    assert block.spec() == {
        "structure": "kept",
        "in_features": 4,
        "out_features": 6,
        "bias": False,
        "scale": 2.0,
    }
    twin = build(block.spec())
    twin.load_state_dict(block.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(twin(x), block(x))
    recipe = {"replace": [{"match": "*.o_proj", "structure": "kept", "scale": "1/2"}]}
    (first, *_) = llmslim.plan(tiny_config("llama"), recipe).sites
    assert first.spec["scale"] == 0.5
    with pytest.raises(ValueError, match="scale"):
        build({"structure": "kept", "in_features": 4, "out_features": 6})
    with pytest.raises(ValueError, match="exact"):
        Kept(4, 6, scale=1.0, exact="yes")


@pytest.mark.parametrize("taken", ["init", "neurons", "options", "bias"])
def test_an_option_cannot_have_the_name_of_a_key_that_every_rule_has(taken: str) -> None:
    options = dataclasses.make_dataclass("Options", [(taken, int)], frozen=True)
    llmslim.register_structure(type("Other", (Kept,), {"name": "other", "Options": options}))
    with pytest.raises(PluginError) as caught:
        Recipe.of({"replace": [{"match": "*", "structure": "other", taken: 1}]})
    assert repr(taken) in caught.value.problems[0]


def test_methods_and_objectives_are_registered_too() -> None:
    @llmslim.register_init("ones", fits=False)
    def fit(block: StructuredLinear, target: Target) -> None:
        for parameter in block.parameters():
            parameter.fill_(1.0)

    @llmslim.register_objective("nothing", needs_teacher=True)
    def loss(step: Any) -> Tensor:
        return torch.zeros(())

    assert "ones" in method_names()
    block = Kept(4, 6, scale=1.0)
    assert initialise(block, Target(torch.zeros(6, 4)), method_named("ones")) is None
    assert torch.equal(block.to_dense(), torch.ones(6, 4))
    assert "nothing" in OBJECTIVES.names()
    assert objective_named("nothing").needs_teacher
    # What fits nothing fills a block that no matrix equals, whatever its name.
    rule = {"structure": "grouped_pointwise", "groups": 4, "variant": "residual"}
    recipe = {"replace": [{"match": "*.o_proj", **rule, "activation": "silu"}]}
    assert llmslim.plan(tiny_config("llama"), recipe, init="ones").sites
    with pytest.raises(SizeError):
        llmslim.plan(tiny_config("llama"), recipe, init="least_squares")


def test_a_name_is_given_once() -> None:
    llmslim.register_structure(Kept)
    llmslim.register_structure(Kept)  # a cell that is run again
    for name in ("kept", "low_rank", "linear", "structured", "auto", "Kept", "a.b"):
        other = type("Other", (Kept,), {"name": name})
        with pytest.raises(PluginError):
            llmslim.register_structure(other)
    with pytest.raises(PluginError):
        llmslim.register_init("random")(lambda block, target: None)
    with pytest.raises(PluginError):
        llmslim.register_objective("logits")(lambda step: step)
    with pytest.raises(PluginError):
        llmslim.register_structure(nn.Linear)


@pytest.mark.usefixtures("installed")
def test_the_name_of_an_entry_point_is_taken() -> None:
    class Mine(Kept):
        name: ClassVar[str] = "kronecker"

    with pytest.raises(PluginError) as caught:
        llmslim.register_structure(Mine)
    assert "llmslim-kronecker" in caught.value.problems[0]


def test_options_must_be_frozen() -> None:
    options = dataclasses.make_dataclass("Options", [("scale", float)])
    with pytest.raises(PluginError):
        llmslim.register_structure(type("Other", (Kept,), {"name": "other", "Options": options}))


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("broken = no_such_module:Thing", "ModuleNotFoundError"),
        ("broken = torch.nn:Linear", "StructuredLinear"),
        ("broken = math:pi", "gives no structure"),
        ("low_rank = math:pi", "llmslim has that name"),
    ],
)
def test_a_broken_plug_in_is_named_with_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, about: str
) -> None:
    entry_points(tmp_path, "some-broken-thing", f"[llmslim.structures]\n{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError) as caught:
        Recipe.of({"replace": [{"match": "*", "structure": "broken"}]})
    (sentence,) = caught.value.problems
    assert sentence.startswith("some-broken-thing: entry point llmslim.structures ")
    assert text in sentence
    assert about in sentence


def test_two_plug_ins_of_one_name_are_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for distribution in ("first-one", "second-one"):
        text = f"[llmslim.inits]\nmine = {distribution.replace('-', '_')}:fit\n"
        entry_points(tmp_path, distribution, text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError) as caught:
        method_names()
    assert {"first-one", "second-one"} <= set(
        caught.value.problems[0].replace(":", " ").replace(";", " ").split()
    )
