"""Time a layer of slim experts in each way that transformers runs experts.

    python benchmarks/bench_experts.py [--tokens 512] [--dtype bfloat16]

The layer is Qwen3-MoE's with random weights, 32 experts of width 256 on 512 channels, four for each
token. Milliseconds of processor time on one thread, medians over interleaved rounds: what else runs
on the machine lengthens them less than time on the clock. `batched_mm` copies a matrix for each
token and expert, so that it is timed with few tokens only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import torch
from _common import machine, markdown, medians, set_up
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from llmslim.modeling.experts import Experts
from llmslim.modeling.modeling_llmslim import set_module
from llmslim.modeling.structured import option_values, structure_class

HALF = {"keep_ratio": 0.5}
STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "low_rank": HALF,
    "pivoted_low_rank": HALF,
    "block_shuffle": HALF,
    "grouped_pointwise": {"groups": 4},
    "grouped_pointwise, learned": {"groups": 4, "channel_order": "learned"},
    "grouped_low_rank": HALF,
}
"""By label: a structure and its options."""
WAYS = ("eager", "grouped_mm", "batched_mm")
_FEW = 16  # tokens


def layer(label: str, dtype: torch.dtype, config: Qwen3MoeConfig) -> Qwen3MoeExperts:
    """Return the experts of a layer with random weights."""
    experts = Qwen3MoeExperts(config)
    for name, parameter in list(experts.named_parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
        if label != "dense":
            count, o, i = parameter.shape
            cls: Any = structure_class(label.partition(",")[0])
            options = cls.resolve(i, o, cls.read_options(STRUCTURES[label]))
            spec = {"structure": cls.name, "in_features": i, "out_features": o}
            set_module(experts, name, Experts(count, of={**spec, **option_values(options)}))
    return experts.to(dtype)


@click.command()
@click.option("--tokens", "counts", multiple=True, type=int, default=(1, 512), show_default=True)
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]))
@torch.no_grad()
def main(counts: tuple[int, ...], dtype: str) -> None:
    """Print a table."""
    set_up(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 1}
    config = Qwen3MoeConfig(**sizes, num_experts=32, num_experts_per_tok=4)
    lines = []
    for label in STRUCTURES:
        experts = layer(label, getattr(torch, dtype), config)
        for tokens in counts:
            x = torch.randn(tokens, 512).to(experts.down_proj.dtype)
            weight, chosen = torch.rand(tokens, 32).topk(4)

            def run(way: str, *given: Any, experts: Any = experts) -> object:
                config._experts_implementation = way
                return experts(*given)

            ways = WAYS if tokens <= _FEW else WAYS[:2]
            runs = [partial(run, way, x, chosen, weight) for way in ways]
            found = medians(runs, 100 if tokens <= _FEW else 12)
            lines.append([label, str(tokens), *(f"{each:.2f}" for each in found)])
            lines[-1] += ["-"] * (len(WAYS) - len(ways))
    click.echo(f"{machine('cpu')}, {dtype}")
    click.echo(markdown(["experts", "tokens", *WAYS], lines))


if __name__ == "__main__":
    main()
