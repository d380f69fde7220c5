"""Find the kind of a module's parameters, and why a dense map cannot be replaced by a block.

The report names the kind of everything that stays as it is: a norm, a router, a position table.
Kinds follow from class and parameter names, which transformers uses consistently; no model family
is listed.

A dense map can be replaced only where it is called. Some architectures read its weight themselves
(fused kernels, torch's MultiheadAttention), which is found in their compiled methods; some classes
derive from `nn.Linear` and compute something else, which is found by running them.

Shapes: I = in_features, O = out_features.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")

_RECURRENCE = r"mamba|ssm|lru|rwkv|delta|recurrent|forgetgate|mixer"
_MIXERS = rf"attention|attn|indexer|mla$|lstm|shortconv|{_RECURRENCE}"
_ATTENTION_LEAF = r"(\w+_)?(attn|attention)"
_ROUTER = r"router|topk|moegate|moestatics"
_BY_CLASS = (
    (_ROUTER, "a router: it chooses the experts"),
    (r"norm", "a norm"),
    (r"embedding", "an embedding"),
    (_RECURRENCE, "parameters of a recurrence"),
    (r"hyper", "mixes the residual streams"),
)
"""Patterns of class names, in lower case, and the kind of such a module's parameters."""
_BY_PARAMETER = (
    (r"pos|position", "a position table"),
    (r"a_log|dt_|time_|decay", "parameters of a recurrence"),
    (r"sink", "attention sinks"),
)


def module_kind(module: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    """Return the kind of parameters that are no dense map.

    Args:
        module: the module that holds them.
        parameters: some of its parameters, by their names in it.

    Example:
        >>> norm = nn.LayerNorm(4)
        >>> module_kind(norm, dict(norm.named_parameters()))
        'a norm'
    """
    name = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "a convolution"
    for pattern, what in _BY_CLASS:
        if re.search(pattern, name.lower()):
            return what
    if isinstance(module, nn.Linear):
        return f"{name} computes more than a dense map"
    if "expert" in name.lower() and all("bias" in leaf for leaf in parameters):
        return "biases of the experts"
    for pattern, what in _BY_PARAMETER:
        if all(re.search(pattern, leaf.lower()) for leaf in parameters):
            return what
    if all(max(p.shape, default=1) == p.numel() for p in parameters.values()):
        return "scales or biases"
    return f"{name} multiplies with it in its own way"


def mixes_tokens(module: nn.Module) -> bool:
    """Return whether a module is attention, an indexer of attention, or a recurrence."""
    name = type(module).__name__.lower()
    # MLPs of models whose names match: RecurrentGemmaMlp, RwkvFeedForward.
    return not _is_mlp(module) and re.search(_MIXERS, name) is not None


def _is_mlp(module: nn.Module) -> bool:
    return re.search("mlp|feedforward|ffn", type(module).__name__.lower()) is not None


def token_mixer(modules: dict[str, nn.Module], name: str, top: str) -> str | None:
    """Return the name of the module around a dense map that mixes tokens, None if none does.

    Args:
        modules: all modules of the model by name.
        name: of the dense map.
        top: name of the decoder layer around it.
    """
    found = None
    for outer in _around(name, top):
        module = modules[outer]
        if _is_mlp(module):
            break
        if isinstance(module, nn.ModuleList):
            continue
        leaf = re.sub(r"(\.\d+)+$", "", outer).rpartition(".")[2]
        named = mixes_tokens(module) or (outer != top and re.fullmatch(_ATTENTION_LEAF, leaf))
        inner = (each for each in module.modules() if each is not module)
        # A decoder layer may be named after its kind of attention, and holds an MLP as well.
        holds = any(map(mixes_tokens if outer == top else _is_mlp, inner)) if named else False
        if named and not holds:
            found = outer
    return found


def is_recurrent(mixer: nn.Module, families: Iterable[str]) -> bool:
    """Return whether what mixes tokens is a recurrence, linear attention or a convolution.

    Args:
        mixer: a module that mixes tokens.
        families: the model types; class names begin with them, which says nothing of the class.
    """
    name = type(mixer).__name__.lower()
    for family in families:
        name = name.removeprefix(family.replace("_", "").replace("-", ""))
    held = [key.rpartition(".")[2].lower() for key, _ in mixer.named_parameters()]
    held += [key.rpartition(".")[2].lower() for key, _ in mixer.named_buffers()]
    if any(re.search(r"a_log|time_|decay", leaf) for leaf in held):
        return True
    return re.search(r"delta|lightning|linearatt", name) is not None or not re.search(
        r"att|mla$|indexer", name
    )


def serves_router_or_norm(modules: dict[str, nn.Module], name: str, top: str) -> bool:
    """Return whether a dense map serves a router or a norm, not the hidden states."""
    classes = [type(modules[outer]).__name__.lower() for outer in _around(name, top)]
    return any(re.search(rf"{_ROUTER}|(?<!attention)norm$", each) for each in classes[:-1])


def _around(name: str, top: str) -> Iterator[str]:
    """Yield the names of the modules around another one, from the inside up to `top`."""
    outer = name.rpartition(".")[0]
    while len(outer) > len(top):
        yield outer
        outer = outer.rpartition(".")[0]
    yield top


def is_dense_map(cls: Any) -> bool:
    """Return whether a class computes what `nn.Linear` does.

    A subclass that overrides `forward` is tried on a small example.
    """
    return issubclass(cls, nn.Linear) and (cls.forward is nn.Linear.forward or _multiplies(cls))


@functools.cache
def _multiplies(cls: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.rand(size, generator=generator) for size in ((2, 3), (5, 3), 5))
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.in_features, module.out_features = 3, 5
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    with torch.no_grad():
        try:
            y = module(x)
        except Exception:  # it needs something else: no plain dense map
            return False
        right = nn.functional.linear(x, weight, bias)
    return isinstance(y, torch.Tensor) and y.shape == right.shape and torch.allclose(y, right)


def obstacle(modules: dict[str, nn.Module], name: str, choices: dict[str, int]) -> str | None:
    """Return why a dense map must stay as it is, None if it can be replaced.

    Args:
        modules: all modules of the model by name.
        name: of the dense map.
        choices: number of experts by the name of the module around them.
    """
    parts = name.split(".")
    around = [".".join(parts[:n]) for n in range(len(parts))]
    experts = {choices[outer] for outer in around if outer in choices}
    if {"gate", "router"} & set(parts) and getattr(modules[name], "out_features", 0) in experts:
        return "a router: it chooses the experts"
    for outer in around:
        holder: Any = type(modules[outer])
        if any(tuple(parts[-len(path) :]) == path for path in _reads(holder)):
            return f"{holder.__name__} reads its weight instead of calling it"
    return None


@functools.cache
def _reads(cls: Any) -> frozenset[tuple[str, ...]]:
    """Return the paths of children whose weight a class's methods read without calling them."""
    found: set[tuple[str, ...]] = set()
    last = PreTrainedModel if issubclass(cls, PreTrainedModel) else nn.Module
    for base in cls.__mro__[: cls.__mro__.index(last)]:
        for key, value in vars(base).items():
            code = getattr(inspect.unwrap(value) if callable(value) else None, "__code__", None)
            if code is not None and "init" not in key and key != "_reset_parameters":
                found |= _weights_read(code)
    return frozenset(found)


def _weights_read(code: CodeType) -> set[tuple[str, ...]]:
    """Return every path of names in `x.path.weight`."""
    # Weights are read in slices only where tensor parallelism is imitated; by default the module is
    # called.
    if "pretraining_tp" in code.co_names:
        return set()
    found: set[tuple[str, ...]] = set()
    path: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname not in _LOADS:
            path = []
        elif step.argval == "weight" and path:
            found.add(tuple(path))
        else:
            path.append(step.argval)
    return found
