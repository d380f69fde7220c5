"""Experts as sites: stacks of matrices replaced by stacks of blocks, the models' own loops kept."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from every_architecture import config_classes, logits, tiny_model
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from llmslim import fitting, planning
from llmslim.anatomy.sites import find_experts
from llmslim.export import dense_copy
from llmslim.modeling import compat
from llmslim.modeling.experts import Experts
from llmslim.modeling.low_rank import LowRank
from llmslim.modeling.structured import StructuredLinear, build
from llmslim.recipe import Recipe

E, I, O = 5, 8, 6  # noqa: E741
BLOCKS = [
    {"structure": "low_rank", "rank": 3},
    {"structure": "pivoted_low_rank", "rank": 3},
    {"structure": "block_shuffle", "blocks": 2, "inner_features": 4},
    {"structure": "grouped_pointwise", "groups": 2},
    {"structure": "grouped_pointwise", "groups": 2, "channel_order": "learned"},
    {"structure": "grouped_low_rank", "groups": 2, "rank": 2, "channel_order": "learned"},
]
MIXTURES = [
    "qwen3_moe", "mixtral", "gpt_oss", "olmoe", "granitemoe", "deepseek_v3", "llama4_text",
    "jetmoe", "nemotron_h", "inkling_text", "longcat_flash", "aria_text",
]  # fmt: skip
EXPERTS = ["*experts.*", "*put_linear.*"]
CLASSES = config_classes()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def stack(block: dict[str, Any], *, transposed: bool = False) -> Experts:
    torch.manual_seed(0)
    spec = {"in_features": I, "out_features": O, "bias": False, **block}
    experts = Experts(E, of=spec, transposed=transposed)
    if "order" in dict(experts.named_buffers()) and block["structure"] == "grouped_pointwise":
        for expert in range(E):  # each expert reads channels of its own
            experts.order[expert] = torch.stack([torch.randperm(I), torch.randperm(I)])
    return experts


ALL_BLOCKS = [
    *BLOCKS,
    {"structure": "grouped_pointwise", "groups": 1},
    {"structure": "grouped_pointwise", "groups": 2, "variant": "residual", "activation": "silu"},
]


def slim_mixture(
    name: str = "mixtral", match: str = "*experts.*", structure: str = "low_rank", **options: Any
) -> Any:
    model = tiny_model(CLASSES[name])
    rule = {"match": match, "structure": structure, **(options or {"keep_ratio": 0.5})}
    fitting.rewrite(model, planning.plan(model, Recipe.of({"init": "random", "replace": [rule]})))
    return model


def recipe(**rule: Any) -> Recipe:
    return Recipe.of({"init": "project", "replace": [{"match": EXPERTS, **rule}]})


def exact(model: Any) -> Recipe:
    """Low rank without loss: the full rank of every stack."""
    ranks = {min(s.in_features, s.out_features) for s in find_experts(model).values()}
    rules = [
        {
            "match": [n for n, s in find_experts(model).items() if _least(s) == rank],
            "structure": "low_rank",
            "rank": rank,
        }
        for rank in ranks
    ]
    return Recipe.of({"init": "project", "replace": rules})


def _least(site: Any) -> int:
    return min(site.in_features, site.out_features)


# ----------------------------------------------------------------------------- the module


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: "-".join(map(str, b.values())))
@pytest.mark.parametrize("transposed", [False, True])
def test_it_multiplies_as_the_parameter_it_stands_for(
    block: dict[str, Any], transposed: bool
) -> None:
    experts = stack(block, transposed=transposed)
    dense = experts.to_dense()
    assert dense.shape == experts.shape == ((E, I, O) if transposed else (E, O, I))
    x, each, bias = torch.randn(7, I), torch.randn(E, 7, I), torch.randn(O)
    for expert in (0, torch.tensor(3)):
        ours, theirs = experts[expert], dense[expert]
        assert ours.shape == theirs.shape
        if transposed:
            pairs = [(x @ ours, x @ theirs), (torch.mm(x, ours), x @ theirs)]
            pairs.append((linear(x, ours.T), linear(x, theirs.T)))
        else:
            pairs = [(linear(x, ours), linear(x, theirs)), (x @ ours.t(), x @ theirs.t())]
            pairs.append((linear(x, ours, bias), linear(x, theirs, bias)))
            pairs.append((linear(x, ours, bias=bias), linear(x, theirs, bias)))
        for one, other in pairs:
            torch.testing.assert_close(one, other)
    whole = experts if transposed else experts.transpose(1, 2)
    right = dense if transposed else dense.transpose(1, 2)
    torch.testing.assert_close(torch.bmm(each, whole), torch.bmm(each, right))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: "-".join(map(str, b.values())))
def test_every_tensor_has_the_experts_in_front(block: dict[str, Any]) -> None:
    experts = stack(block)
    one = build(experts.block_spec).state_dict()
    assert {k: t.shape for k, t in experts.state_dict().items()} == {
        key: (E, *tensor.shape) for key, tensor in one.items()
    }
    again = build(experts.spec())
    again.load_state_dict(experts.state_dict())
    assert torch.equal(again.to_dense(), experts.to_dense())
    assert torch.equal(experts.block(2).to_dense(), experts.to_dense()[2])


def test_each_expert_learns_by_itself() -> None:
    experts = stack(BLOCKS[0])
    linear(torch.randn(3, I), experts[2]).sum().backward()
    touched = [bool(gradient.abs().sum()) for gradient in experts.down.weight.grad]
    assert touched == [False, False, True, False, False]


def one_by_one(experts: Experts, x: Tensor, expert_N: Tensor) -> Tensor:
    rows = [experts.product(row[None], int(e)) for row, e in zip(x, expert_N, strict=True)]
    return torch.cat(rows)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", ALL_BLOCKS, ids=lambda b: "-".join(map(str, b.values())))
def test_rows_of_all_experts_at_once(
    block: dict[str, Any], transposed: bool, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers asks for them, values and gradients; one expert has no row, one has all."""
    experts = stack(block, transposed=transposed).double()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    for expert_N in (torch.tensor([0, 0, 0, 2, 4, 4]), torch.tensor([3, 3])):
        x = torch.randn(len(expert_N), I, dtype=torch.float64, requires_grad=True)
        weights = [x, *experts.parameters()]
        wanted = one_by_one(experts, x, expert_N)
        if "activation" not in block:
            dense = experts.to_dense()[expert_N]
            dense = dense if transposed else dense.mT
            torch.testing.assert_close(wanted, torch.bmm(x.unsqueeze(1), dense).squeeze(1))
        slope = torch.randn_like(wanted)
        wanted_gradients = torch.autograd.grad(wanted, weights, slope)
        end_E = torch.tensor([int((expert_N <= e).sum()) for e in range(E)], dtype=torch.int32)
        whole: Any = experts if transposed else experts.transpose(-2, -1)
        picked: Any = experts[expert_N]
        assert picked.shape == (len(expert_N), *experts.shape[1:])
        found = [product(x, whole, offs=end_E) for product in compat.GROUPED_PRODUCTS if product]
        if transposed:
            found.append(torch.bmm(x.unsqueeze(1), picked).squeeze(1))
        else:
            found.append(torch.bmm(picked, x.unsqueeze(-1)).squeeze(-1))
        for one in found:
            torch.testing.assert_close(one, wanted)
            gradients = torch.autograd.grad(one, weights, slope)
            for mine, right in zip(gradients, wanted_gradients, strict=True):
                torch.testing.assert_close(mine, right)


def test_another_operation_is_refused() -> None:
    experts = stack(BLOCKS[0])
    x = torch.randn(3, O)
    with pytest.raises(TypeError, match="matmul"):
        torch.matmul(x, experts[0])  # (O, I) is not for a product
    with pytest.raises(TypeError):
        torch.nn.functional.linear(torch.randn(3, I), experts[0].T)  # nor (I, O) for F.linear
    with pytest.raises(TypeError, match="einsum"):
        torch.einsum("eoi,ni->eno", experts, x)
    with pytest.raises(TypeError):
        experts.transpose(0, 1)
    ids, ends = torch.tensor([0, 1, 1]), torch.tensor([1, 3, 3, 3, 3], dtype=torch.int32)
    rows = torch.randn(3, I)
    with pytest.raises(TypeError):
        torch.bmm(rows.unsqueeze(1), experts[ids])  # (O, I), which takes a column
    with pytest.raises(TypeError):
        torch.bmm(experts[ids], torch.randn(3, I, 2))  # more than a row for a matrix
    with pytest.raises(TypeError, match="linear"):
        linear(rows, experts[ids])
    with pytest.raises(TypeError, match="grouped_mm"):
        compat.GROUPED_PRODUCTS[-2](rows, experts, offs=ends)  # (O, I) is not for a product
    with pytest.raises(ValueError, match="bias"):
        Experts(2, of={**experts.block_spec, "bias": True})


# ----------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", MIXTURES)
def test_blocks_of_full_rank_compute_what_the_dense_experts_do(name: str) -> None:
    model = tiny_model(CLASSES[name])
    dense, sites = logits(model), find_experts(model)
    report = fitting.rewrite(model, planning.plan(model, exact(model)))
    errors = [row.init_error for row in report.rows if row.action == "replaced"]
    assert len(errors) == len(sites) > 0
    assert all(error is not None and error < 1e-9 for error in errors)
    torch.testing.assert_close(logits(model), dense, rtol=1e-3, atol=1e-4)


def test_the_error_is_that_of_all_experts_together() -> None:
    model = tiny_model(CLASSES["mixtral"])
    dense = {name: model.get_parameter(name).detach().clone() for name in find_experts(model)}
    for weight in dense.values():
        weight[1] *= 3  # experts of different sizes
    model.load_state_dict(dense, strict=False)
    report = fitting.rewrite(model, planning.plan(model, recipe(structure="low_rank", rank=8)))
    errors = {row.name: row.init_error for row in report.rows if row.name in dense}
    for name, weight in dense.items():
        blocks: Any = model.get_submodule(name)
        left = torch.stack([blocks.block(expert).to_dense() for expert in range(len(weight))])
        lost = (left.mT if blocks.transposed else left) - weight
        expected = float(lost.square().sum() / weight.square().sum())
        assert errors[name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        *(pytest.param("*gate_up*", name) for name in MIXTURES),
        *(
            pytest.param("*attn*", name, marks=() if name == "mixtral" else pytest.mark.slow)
            for name in MIXTURES
        ),
    ],
)
def test_part_of_a_mixture_loads_back(name: str, part: str, tmp_path: Path) -> None:
    names = {"nemotron_h": "*up_proj", "jetmoe": "*mlp.input*", "inkling_text": "*gate_*"}
    match = names.get(name, part) if part == "*gate_up*" else ["*attn*", "*attention*", "*mixer*"]
    rules = [{"match": match, "structure": "low_rank", "keep_ratio": 0.5}]
    if part == "*attn*":
        rules.insert(0, {"match": EXPERTS, "keep": True})
    model = tiny_model(CLASSES[name])
    fitting.rewrite(model, planning.plan(model, Recipe.of({"init": "random", "replace": rules})))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "zamba"])
def test_export_gives_the_base_class_with_the_same_function(name: str, tmp_path: Path) -> None:
    model = tiny_model(CLASSES[name])
    base, shapes = type(model), {k: t.shape for k, t in model.state_dict().items()}
    rule = {"match": ["*experts.*", "*attn*"], "structure": "low_rank", "keep_ratio": 0.5}
    fitting.rewrite(model, planning.plan(model, Recipe.of({"init": "random", "replace": [rule]})))
    dense = dense_copy(model)
    assert type(dense) is base
    assert {k: t.shape for k, t in dense.state_dict().items()} == shapes
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-3, atol=1e-4)
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-4, atol=1e-4)


class Counted(nn.Module):
    """Counts how often slim experts multiply for one expert, and for rows of several."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found = {"product": 0, "product_of_rows": 0}
        for name in self.found:
            monkeypatch.setattr(Experts, name, self.counting(name, getattr(Experts, name)))

    def counting(self, name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.found[name] += 1
            return method(*args, **kwargs)

        return call


@pytest.mark.parametrize("match", ["*experts.*", "*gate_up*"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_slim_experts_are_run_as_the_model_is(
    name: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = slim_mixture(name, match)
    assert model.get_experts_implementation()[""] == "grouped_mm"  # transformers' default
    counted = Counted(monkeypatch).found
    logits(model)
    assert counted["product_of_rows"] > counted["product"] == 0
    model.set_experts_implementation("eager")
    eager = logits(model)
    assert counted["product"] > 0
    counted["product"] = 0
    for way in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(way)
        for same in (model, copy.deepcopy(model)):
            torch.testing.assert_close(logits(same), eager, rtol=1e-4, atol=1e-4)
    assert counted["product"] == 0


def test_what_slim_experts_cannot_do_leaves_them_on_their_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = slim_mixture(match="*.0.*experts.*")
    slim, dense = (model.model.layers[n].mlp.experts for n in (0, 1))
    wanted = logits(model)
    kernel = compat.moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(compat.moe.ALL_EXPERTS_FUNCTIONS, "sonicmoe", kernel)
    model.set_experts_implementation("sonicmoe")  # the dense ones of the other layers follow
    assert dense.config._experts_implementation == "sonicmoe"
    assert slim.config._experts_implementation == "eager"
    assert slim.config.hidden_size == dense.config.hidden_size
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    # A structure of another package may multiply in `product` only.
    monkeypatch.setattr(LowRank, "product_by", StructuredLinear.product_by)
    monkeypatch.setattr(LowRank, "product", lambda self, x: self.up(self.down(x)))
    model = slim_mixture(match="*.0.*experts.down_proj")
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "eager"
    assert model.model.layers[1].mlp.experts.config._experts_implementation == "grouped_mm"
    found = logits(model)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # in transformers
@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_compiled_and_exported_in_one_graph(way: str, dtype: torch.dtype) -> None:
    options: Any = {"groups": 2, "rank": 3, "channel_order": "learned"}
    model = slim_mixture(structure="grouped_low_rank", **options).to(dtype)
    # Rounded otherwise, a token may go to other experts: in bfloat16 no other way is the truth.
    model.set_experts_implementation("eager" if dtype == torch.float32 else way)
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    close = dict.fromkeys(("rtol", "atol"), 1e-4 if dtype == torch.float32 else 0.05)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        model.set_experts_implementation(way)
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, wanted, **close)
        kwargs = {"input_ids": torch.ones(2, 5, dtype=torch.long), "use_cache": False}
        shapes = {"input_ids": {1: torch.export.Dim("n")}, "use_cache": None}
        graph = torch.export.export(model, (), kwargs, dynamic_shapes=shapes, strict=False).module()
        torch.testing.assert_close(graph(input_ids=ids, use_cache=False).logits, wanted, **close)


@pytest.mark.slow
def test_it_loads_where_llmslim_is_not_installed(tmp_path: Path) -> None:
    model = tiny_model(CLASSES["mixtral"])
    rule = {"match": "*experts.*", "structure": "grouped_low_rank", "keep_ratio": 0.5}
    fitting.rewrite(model, planning.plan(model, Recipe.of({"init": "random", "replace": [rule]})))
    model.save_pretrained(tmp_path / "slim")
    torch.save(logits(model), tmp_path / "expected.pt")
    code = textwrap.dedent("""
        import sys
        sys.modules["llmslim"] = None  # an import of it fails
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("slim", trust_remote_code=True)
        ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, torch.load("expected.pt"))
        print(type(model).__name__)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "SlimMixtralForCausalLM", done.stderr[-2000:]
