"""Hold in 8 or 4 bit what quantisers of linear layers pass by: the weights of grouped blocks.

bitsandbytes, torchao and quanto replace `nn.Linear`. A grouped block's weights are a parameter
(G, K, O), an expert's have one dimension more, so a model that those tools quantised keeps these in
the type they had. Here such a parameter becomes a tensor that holds codes and scales and is
dequantised by each product, for as long as the product takes: memory is saved, not time. To
everything around it stays a parameter of its name, shape and type.

The rounding is that of ggml's Q4_0, in 8 bits too: blocks of 32 weights with a scale of 16 bits,
4.5 or 8.5 bits a weight in all. NF4 as bitsandbytes has it takes as much memory; it rounds normally
distributed weights a little worse (9.1 % against 8.6), those of SmolLM2 a little better.

Left out: codes on disk, kernels that multiply with codes, training. Why no library does it:
docs/decisions.md.

Shapes: D = first dimension, B = blocks in each of D, S = 32 weights in a block.
Source: `quantize_row_q4_0_ref` of https://github.com/ggml-org/ggml; its scales are float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.compat import CAST, PLAIN_FUNCTIONS, changes_arguments, tensor_of_parts, tree_map
from llmslim.errors import SizeError, SlimError, TargetError
from llmslim.modeling.experts import Experts
from llmslim.modeling.structured import StructuredLinear

_BITS = (4, 8)
_BLOCK = 32
_ATEN = torch.ops.aten
_SAME = (_ATEN.detach.default, _ATEN.alias.default, _ATEN.clone.default)


class QuantizedWeight(Tensor):
    """A weight in 8 or 4 bit that every operation sees in its own shape and type.

    Args:
        codes: whole numbers, int8 (D, B, S); or uint8 (D, B, S/2), two of 4 bits and 8 too large,
            the block's first half in the low bits.
        scales: (D, B, 1), bfloat16: what a code of 1 stands for.
        shape: the weight's. Of a stack, three dimensions or more, the first is D; else D is 1.
        dtype: the weight's.
    """

    is_in_memory_only = True
    """Read by what saves a model: its files would hold codes, which no model loads."""
    codes: Tensor
    scales: Tensor

    __torch_function__ = PLAIN_FUNCTIONS

    @staticmethod
    def __new__(
        cls: type[QuantizedWeight],
        codes: Tensor,
        scales: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> QuantizedWeight:
        """Make a tensor without memory of its own."""
        made: QuantizedWeight = tensor_of_parts(cls, shape, dtype, codes.device)
        made.codes, made.scales = codes, scales
        return made

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> QuantizedWeight:
        """Return a weight rounded to whole numbers of its scales.

        Args:
            weight: two dimensions or more, of a floating type.
            bits: 4 or 8.
        """
        stacked = len(weight) if weight.dim() > 2 else 1
        values_DN = weight.detach().float().reshape(stacked, -1)
        missing = -values_DN.shape[1] % _BLOCK
        values_DBS = nn.functional.pad(values_DN, (0, missing)).unflatten(1, (-1, _BLOCK))
        # The largest value gets the lowest code, of whose kind there is one more: a scale may be
        # negative, and what is as large with the other sign is off by a step.
        lowest = -(2 ** (bits - 1))
        largest = values_DBS.gather(-1, values_DBS.abs().argmax(-1, keepdim=True))
        scales = (largest / lowest).to(torch.bfloat16)
        # By the scale as it is kept. In a block of zeros that is zero, and any code will do.
        codes = (values_DBS / scales.float()).round_().clamp_(lowest, -lowest - 1)
        if bits == 8:
            return cls(codes.to(torch.int8), scales, weight.shape, weight.dtype)
        low, high = codes.add_(8).to(torch.uint8).chunk(2, dim=-1)
        return cls(low | high << 4, scales, weight.shape, weight.dtype)

    def dequantize(self) -> Tensor:
        """Return an ordinary tensor of the same shape, type and values."""
        return self._unpacked(self.codes, self.scales).reshape(self.shape)

    def _unpacked(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the values of all of a stack or some, (..., N)."""
        if codes.dtype == torch.uint8:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1).view(torch.int8) - 8
        values = codes.to(self.dtype).mul_(scales).flatten(-2)
        return values[..., : self.numel() // len(self.codes)]

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> QuantizedWeight:
        return type(self)(change(self.codes), change(self.scales), self.shape, dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Return the names of the tensors inside, as torch.compile asks for them, and the rest."""
        return ["codes", "scales"], (self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], rest: Any, *_: Any) -> QuantizedWeight:
        """Undo that."""
        return QuantizedWeight(parts["codes"], parts["scales"], *rest)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's has no types
        """Show what it is, without the values."""
        bits = 4 if self.codes.dtype == torch.uint8 else 8
        return f"QuantizedWeight({bits} bit, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is a stand-in without `func`
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[0]
        if changes_arguments(func) and any(
            isinstance(each, cls) for each in (weight if isinstance(weight, list) else [weight])
        ):
            raise SlimError(
                f"{func}: quantised weights cannot be changed. Train or load the model before "
                "quantize_blocks."
            )
        if isinstance(weight, cls):
            if func in _SAME:
                return weight._with(func, weight.dtype)
            dtype = kwargs.pop("dtype", None) or weight.dtype if func is CAST else None
            if dtype is not None and dtype.is_floating_point:  # moved, or seen in another type
                return weight._with(lambda part: func(part, **kwargs), dtype)
            if _picks_from_stack(func, args):
                codes, scales = (func(part, *args[1:]) for part in (weight.codes, weight.scales))
                return weight._unpacked(codes, scales).unflatten(-1, weight.shape[1:])
        args, kwargs = tree_map(
            lambda each: each.dequantize() if isinstance(each, cls) else each, (args, kwargs)
        )
        return func(*args, **kwargs)


def _picks_from_stack(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operation takes some of a stack by their numbers: `weight[expert]`."""
    if args[0].dim() < 3:
        return False
    by_number = func is _ATEN.select.int and args[1] == 0
    return by_number or (func is _ATEN.index.Tensor and len(args[1]) == 1)


def outside_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the weights of blocks that belong to no `nn.Linear`: module, name in it, weight.

    Args:
        model: a model, or what stands for one of its modules.
    """
    blocks = [each for each in model.modules() if isinstance(each, StructuredLinear | Experts)]
    # A block may be inside another one.
    inside = dict.fromkeys(module for block in blocks for module in block.modules())
    for module in inside:
        for name, weight in module.named_parameters(recurse=False):
            if not isinstance(module, nn.Linear) and weight.dim() > 1:
                yield module, name, weight


def quantize_blocks(model: nn.Module, bits: int) -> None:
    """Quantise what other quantisers pass by in a slim model, in place.

    These are the weights of grouped blocks, of `block_shuffle` and of slim experts. Whatever is in
    an `nn.Linear` stays as it is, quantised by bitsandbytes, torchao or quanto, or not. Weights are
    held in blocks of 32 with a scale, 8.5 or 4.5 bits each, and dequantised for each product: this
    saves memory and costs time. They cannot be trained or saved any more.

    Args:
        model: slim, on any device; read with `from_pretrained`, or made by `slim`.
        bits: 8 or 4.

    Raises:
        SizeError: if `bits` is another number.
        TargetError: if there are no such weights, or they are quantised already.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import llmslim
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes))
        >>> rule = {"match": "*.up_proj", "structure": "grouped_pointwise", "groups": 4}
        >>> _ = llmslim.slim(model, {"name": "thin", "init": "random", "replace": [rule]})
        >>> quantize_blocks(model, bits=4)
        >>> model.model.layers[0].mlp.up_proj.weight
        QuantizedWeight(4 bit, (4, 16, 16), torch.float32, cpu)
    """
    if bits not in _BITS:
        raise SizeError(f"bits: {bits!r}; allowed 4, 8.")
    found = list(outside_linears(model))
    todo = [each for each in found if not isinstance(each[2], QuantizedWeight)]
    if not todo:
        blocks = any(isinstance(each, StructuredLinear | Experts) for each in model.modules())
        if found:
            reason = "its blocks are quantised already"
        elif blocks:
            reason = (
                "all weights of its blocks are in linear layers. Let bitsandbytes, torchao or "
                "quanto quantise these"
            )
        else:
            reason = "it has no slim blocks. Load a slim checkpoint, or call llmslim.slim first"
        raise TargetError(f"{type(model).__name__}: nothing to quantise; {reason}.")
    for module, name, weight in todo:
        quantized = QuantizedWeight.of(weight, bits)
        setattr(module, name, nn.Parameter(quantized, requires_grad=False))
