"""What LoRA is added to in a slim model, in words that peft knows.

peft finds maps by their names and adapts `nn.Linear`. A block has the name of the map that it took
the place of and is none: named by itself it is refused, and by `all-linear` it is passed over. But
what it holds can be adapted: the linear layers inside by their own names, and the parameters of
grouped blocks as `target_parameters`. A `LoraConfig` that says so is an ordinary one: the adapter
is saved, loaded and merged by peft alone, on whatever machine.

Experts in blocks are left out: their parameters are read by their structure, past what peft adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import Conv1D

from llmslim.anatomy.sites import outer_modules
from llmslim.errors import TargetError
from llmslim.modeling.structured import StructuredLinear

ALL = "all-linear"
"""peft's word for every map but the output head."""


def lora_config(model: Any, target_modules: str | Iterable[str] = ALL, **options: Any) -> Any:
    """Return a `peft.LoraConfig` that reaches a slim model's blocks as well as its dense maps.

    Args:
        model: slim or not; looked at only.
        target_modules: as peft takes it: names, or ends of names, of the maps (`q_proj`), a regular
            expression for whole names, or `all-linear`.
        options: of `peft.LoraConfig`: `r`, `lora_alpha`, `task_type`, ... Grouped blocks take no
            `lora_dropout` and no `use_dora`; peft says so.

    Raises:
        TargetError: if nothing that LoRA can be added to has one of the names.

    Example:
        >>> import llmslim, transformers
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        >>> config = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=9, **sizes)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> rule = {"match": "*.up_proj", "structure": "low_rank", "rank": 2}
        >>> _ = llmslim.slim(model, {"name": "thin", "init": "random", "replace": [rule]})
        >>> sorted(lora_config(model, ["up_proj"], r=4).target_modules)
        ['model.layers.0.mlp.up_proj.down', 'model.layers.0.mlp.up_proj.up']
    """
    from peft import LoraConfig

    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    maps = dict(_maps(model))
    found = {name: module for name, module in maps.items() if _is_meant(name, wanted)}
    each = [] if isinstance(wanted, str) else wanted
    missing = [one for one in each if not any(_is_meant(name, [one]) for name in maps)]
    if missing or not found:
        given = missing[0] if missing else wanted
        leaves = sorted({name.rpartition(".")[2] for name in maps})
        raise TargetError(f"target_modules: {given!r}; allowed {', '.join(leaves)}, or {ALL}.")
    modules, parameters = [], []
    for name, module in found.items():
        if isinstance(module, StructuredLinear):
            linears, rest = _inside(name, module)
            modules += linears
            parameters += rest
        else:
            modules.append(name)
    return LoraConfig(
        target_modules=modules or None, target_parameters=parameters or None, **options
    )


def _maps(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield blocks and dense maps, without the output head."""
    head = model.get_output_embeddings()
    for name, module in outer_modules(model):
        if isinstance(module, nn.Linear | Conv1D | StructuredLinear) and module is not head:
            yield name, module


def _is_meant(name: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return wanted == ALL or re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _inside(name: str, block: StructuredLinear) -> tuple[list[str], list[str]]:
    """Return the names of a block's linear layers, and of its own matrices and stacks of them."""
    linears, parameters = [], []
    for inner, module in block.named_modules(prefix=name):
        if isinstance(module, nn.Linear):
            linears.append(inner)
        else:
            own = module.named_parameters(prefix=inner, recurse=False)
            parameters += [each for each, parameter in own if parameter.dim() in (2, 3)]
    return linears, parameters
