"""Structured blocks in the place of a stack of expert matrices.

A mixture of experts holds each of its projections as one parameter, (E, O, I) or transposed
(E, I, O), and every architecture has its own loop around it. This module takes the
parameter's place and its name. What the loop asks of the parameter, `weight[expert]`,
`F.linear(x, weight)`, `x @ weight`, `torch.bmm(x, weight)`, is answered with the block's product
(`__torch_function__`), so that the architecture's own forward runs as it is: routing, activations
and biases stay where they were.

The blocks of all experts are one block whose parameters and buffers have a leading dimension E; any
structure will do. The rival, a module for each expert, would be thousands of small ones.

transformers runs the experts of most architectures in one of several ways, which a config names.
What two of them ask for is answered as well, and needs no loop over experts, so that it can be
compiled and exported: `batched_mm`, which picks a matrix for each row, and `grouped_mm`, which
sorts the rows by expert. A structure takes part if it has `product_by`; it then multiplies with
the weights of E blocks, stacked in one tensor each, by `Gathered` or `Sorted`. Where no graph is
traced, a processor loops over the experts that have rows, where that is faster.

What it leaves out: transformers' other kernels, which read the parameter's memory. Under these,
and with a structure that takes no part, the module that holds the experts is kept on its loop, and
the other layers are not.

Shapes: E = experts, I = in_features, O = out_features, N = rows of x, G = groups, K = channels in,
C = channels chosen from.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .compat import GROUPED_PRODUCTS, ExpertsConfig, Initialized, grouped_product
from .structured import Products, StructuredLinear, build, take_channels

ANSWERED = ("batched_mm", "grouped_mm")
"""How transformers can run slim experts beside one by one."""
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm)


class Experts(Initialized, nn.Module):
    """E blocks of one kind, seen by the module that holds it as the parameter it replaces.

    Args:
        experts: how many matrices E the parameter stacks.
        of: spec of one expert's block, as `build` takes it; without bias.
        transposed: whether the parameter is (E, I, O), for `x @ weight`, and not (E, O, I).
        device: where the parameters live.
        dtype: the parameters' type.

    Raises:
        ValueError: if the block cannot be built.

    Example:
        >>> block = {"structure": "low_rank", "in_features": 6, "out_features": 4, "rank": 2}
        >>> experts = Experts(8, of=block)
        >>> torch.nn.functional.linear(torch.ones(3, 6), experts[5]).shape
        torch.Size([3, 4])
        >>> experts.down.weight.shape
        torch.Size([8, 2, 6])
    """

    name: ClassVar[str] = "experts"

    def __init__(
        self,
        experts: int,
        *,
        of: dict[str, Any],
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.transposed, self.block_spec = experts, transposed, dict(of)
        block = build(of, device="meta", dtype=dtype)
        if not isinstance(block, StructuredLinear) or block.bias is not None:
            raise ValueError("an expert is a structured block without bias")
        # In a tuple: a block without weights, not one of this module's children.
        self._one = (block,)
        for name, parameter in block.named_parameters():
            holder, leaf = _holder(self, name)
            shape = (experts, *parameter.shape)
            empty = torch.empty(shape, device=device, dtype=parameter.dtype)
            holder.register_parameter(leaf, nn.Parameter(empty))
        for name, buffer in block.named_buffers():
            holder, leaf = _holder(self, name)
            shape = (experts, *buffer.shape)
            empty = torch.empty(shape, device=device, dtype=buffer.dtype)
            holder.register_buffer(leaf, empty)
        self.reset_parameters()

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter that it stands for."""
        return _Matrix(self, None, self.transposed).shape

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type; while a model is compiled, one that transformers compiles."""
        dtype = next(self.parameters()).dtype
        # With bfloat16 it would call torch's grouped product, of which the compiler does not tell
        # `__torch_function__`; of transformers' own it does. The cast to and fro loses nothing.
        renamed = dtype == torch.bfloat16 and torch.compiler.is_compiling()
        return torch.float32 if renamed else dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights for every expert, in place, as its structure does."""
        if self.device.type != "meta":
            for expert in range(self.experts):
                block = self.block(expert)
                block.reset_parameters()
                self.store(expert, block)

    @torch.no_grad()
    def block(self, expert: int) -> StructuredLinear:
        """Return a block of one expert's own, with a copy of its weights."""
        block = build(self.block_spec, device=self.device, dtype=self.dtype)
        assert isinstance(block, StructuredLinear)
        for name, tensor in block.state_dict().items():
            tensor.copy_(self._stacked()[name][expert])
        return block

    @torch.no_grad()
    def store(self, expert: int, block: StructuredLinear) -> None:
        """Take over the weights of one expert's block, in place."""
        stacked = self._stacked()
        for name, tensor in block.state_dict().items():
            stacked[name][expert].copy_(tensor)

    def to_dense(self) -> Tensor:
        """Return the parameter that it stands for, (E, O, I) or transposed (E, I, O)."""
        dense = torch.stack([self.block(expert).to_dense() for expert in range(self.experts)])
        return dense.transpose(1, 2).contiguous() if self.transposed else dense

    def product(self, x: Tensor, expert: int | None) -> Tensor:
        """Multiply x (N, I) with one expert's matrix, or x (E, N, I) with each its own."""
        one, stacked = self._one[0], self._stacked()

        def multiply(tensors: dict[str, Tensor], rows: Tensor) -> Tensor:
            y: Tensor = functional_call(one, tensors, (rows,), tie_weights=False)
            return y

        if expert is not None:
            return multiply({name: tensor[expert] for name, tensor in stacked.items()}, x)
        if not self.takes_rows:
            each: Tensor = torch.vmap(multiply)(stacked, x)
            return each
        end_E = torch.arange(1, len(x) + 1, device=x.device, dtype=torch.int32) * x.shape[1]
        return self.product_of_rows(x.flatten(0, 1), end_E).reshape(*x.shape[:2], -1)

    @property
    def takes_rows(self) -> bool:
        """Whether rows of several experts can be multiplied at once."""
        return type(self._one[0]).product_by is not StructuredLinear.product_by

    def product_of_rows(
        self, x_NI: Tensor, end_E: Tensor | None = None, expert_N: Tensor | None = None
    ) -> Tensor:
        """Multiply each row with its expert's matrix.

        Args:
            x_NI: rows.
            end_E: where each expert's rows end, if they are sorted by expert.
            expert_N: each row's expert otherwise.
        """
        tensors = self._stacked()
        by: Products
        if end_E is not None:
            by = Sorted(tensors, end_E)
        else:
            assert expert_N is not None
            by = Gathered(tensors, expert_N)
        return self._one[0].product_by(x_NI, by)

    def __getitem__(self, expert: int | Tensor) -> _Matrix:
        """Return one expert's matrix, or of each row its expert's, as a multiplication sees it."""
        if isinstance(expert, Tensor) and expert.dim() == 1:
            return _Matrix(self, expert, self.transposed)
        return _Matrix(self, int(expert), self.transposed)

    def data_ptr(self) -> int:
        """Return what is asked of a parameter before a kernel is chosen: the blocks choose."""
        return 0

    def transpose(self, dim0: int, dim1: int) -> _Matrix:
        """Return all experts' matrices, transposed, as a multiplication sees them."""
        return _Matrix(self, None, self.transposed).transpose(dim0, dim1)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        whole = tuple(
            _Matrix(arg, None, arg.transposed) if isinstance(arg, cls) else arg for arg in args
        )
        return _Matrix.__torch_function__(func, types, whole, kwargs)

    def adapt(self, holder: nn.Module) -> None:
        """Give the module that holds the parameter a config of its own, in place.

        It follows the model's in how experts are run, as far as all of them can be run so.
        """
        config: Any = getattr(holder, "config", None)
        if config is not None:
            stacks = [child for child in holder.children() if isinstance(child, Experts)]
            answered = ANSWERED if all(stack.takes_rows for stack in stacks) else ()
            config = config.config if isinstance(config, ExpertsConfig) else config
            vars(holder)["config"] = ExpertsConfig(config, answered)

    def spec(self) -> dict[str, Any]:
        """Return what `build` needs to make an empty module like this one; JSON values only."""
        return {
            "structure": self.name,
            "experts": self.experts,
            "transposed": self.transposed,
            "of": dict(self.block_spec),
        }

    def extra_repr(self) -> str:
        """Show the spec."""
        return f"{self.experts} of {self.block_spec}, transposed={self.transposed}"

    def _stacked(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


class Gathered:
    """Products of rows in any order, each with the weights of its own expert.

    Args:
        tensors: all experts' parameters and buffers by their names, E in front.
        expert_N: the expert of each row.
        inside: where in the block the names begin.
    """

    def __init__(self, tensors: dict[str, Tensor], expert_N: Tensor, inside: str = "") -> None:
        self.tensors, self.expert_N, self.inside = tensors, expert_N, inside

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Multiply each row with a matrix of its own."""
        weight_NOK = self.tensors[f"{self.inside}{name}.weight"][self.expert_N]
        return torch.bmm(weight_NOK, x.unsqueeze(-1)).squeeze(-1)

    def bmm(self, x_GNK: Tensor, name: str) -> Tensor:
        """Multiply each row's groups with matrices of their own."""
        weight_NGKO = self.tensors[self.inside + name][self.expert_N]
        y_NG1O = torch.matmul(x_GNK.transpose(0, 1).unsqueeze(-2), weight_NGKO)
        return y_NG1O.squeeze(-2).transpose(0, 1)

    def take(self, x_NC: Tensor, name: str) -> Tensor:
        """Choose each row's channels by an order of its own."""
        return x_NC.gather(-1, self.tensors[self.inside + name].flatten(1)[self.expert_N])

    def of(self, name: str) -> Gathered:
        """Go inside."""
        return Gathered(self.tensors, self.expert_N, f"{self.inside}{name}.")


class Sorted:
    """Products of rows that are sorted by expert.

    Args:
        tensors: all experts' parameters and buffers by their names, E in front.
        end_E: where each expert's rows end.
        inside: where in the block the names begin.
    """

    def __init__(self, tensors: dict[str, Tensor], end_E: Tensor, inside: str = "") -> None:
        self.tensors, self.end_E, self.inside = tensors, end_E, inside
        self.counts: list[int] | None = None
        # Not in a traced graph, which must hold for any rows, and not where contents are not known.
        if (
            end_E.device.type == "cpu"
            and type(end_E) is Tensor
            and not torch.compiler.is_compiling()
        ):
            ends = end_E.tolist()
            self.counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Multiply the rows of each expert with its matrix."""
        return grouped_product(x, self.tensors[f"{self.inside}{name}.weight"].mT, self.end_E)

    def bmm(self, x_GNK: Tensor, name: str) -> Tensor:
        """Multiply the rows of each expert with its matrices."""
        weight_EGKO = self.tensors[self.inside + name]
        if self.counts is None:
            pairs = zip(x_GNK, weight_EGKO.unbind(1), strict=True)
            return torch.stack([grouped_product(x, weight, self.end_E) for x, weight in pairs])
        parts = enumerate(x_GNK.split(self.counts, dim=1))
        # Indexed one by one: of a quantised stack, only experts that have tokens are dequantised.
        each = [torch.bmm(x, weight_EGKO[expert]) for expert, x in parts if x.shape[1]]
        return torch.cat(each, dim=1)

    def take(self, x_NC: Tensor, name: str) -> Tensor:
        """Choose the channels of each expert's rows by its order."""
        order_EK = self.tensors[self.inside + name].flatten(1)
        if self.counts is None:
            row_N = torch.arange(x_NC.shape[0], device=x_NC.device)
            expert_N = (row_N.unsqueeze(1) >= self.end_E).sum(1)
            return x_NC.gather(-1, order_EK[expert_N])
        parts = zip(x_NC.split(self.counts), order_EK.unbind(), strict=True)
        return torch.cat([take_channels(x, order) for x, order in parts if len(x)])

    def of(self, name: str) -> Sorted:
        """Go inside."""
        return Sorted(self.tensors, self.end_E, f"{self.inside}{name}.")


class _Matrix:
    """The matrix of one expert, of all, or of each row its expert's, to multiply with.

    It is never in memory.
    """

    def __init__(self, experts: Experts, expert: int | Tensor | None, transposed: bool) -> None:
        self.experts, self.expert, self.transposed = experts, expert, transposed

    @property
    def shape(self) -> torch.Size:
        spec = self.experts.block_spec
        sizes = (spec["out_features"], spec["in_features"])
        if isinstance(self.expert, Tensor):
            stack = tuple(self.expert.shape)
        else:
            stack = () if self.expert is not None else (self.experts.experts,)
        return torch.Size((*stack, *(reversed(sizes) if self.transposed else sizes)))

    @property
    def dtype(self) -> torch.dtype:
        return self.experts.dtype

    @property
    def device(self) -> torch.device:
        return self.experts.device

    def data_ptr(self) -> int:
        return self.experts.data_ptr()

    def transpose(self, dim0: int, dim1: int) -> _Matrix:
        rank = len(self.shape)
        if {dim0 % rank, dim1 % rank} != {rank - 2, rank - 1}:
            raise TypeError("of slim experts only the last two dimensions can be transposed")
        return _Matrix(self.experts, self.expert, not self.transposed)

    @property
    def T(self) -> _Matrix:  # noqa: N802  (the tensors' name for it)
        return self.transpose(-2, -1)

    mT = T

    def t(self) -> _Matrix:
        return self.T

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        x, weight = args[:2] if len(args) > 1 else (None, None)
        if any(isinstance(one, cls) and isinstance(one.expert, Tensor) for one in (x, weight)):
            if func is torch.bmm and not named:
                return _of_rows(x, weight)
            weight = None
        if func in GROUPED_PRODUCTS and isinstance(weight, cls) and weight.expert is None:
            named = {name: value for name, value in named.items() if value is not None}
            if weight.transposed and named.keys() == {"offs"}:
                return weight.experts.product_of_rows(x, named["offs"])
        # F.linear takes the matrix as (O, I), a product as (I, O).
        fits = isinstance(weight, cls) and isinstance(x, Tensor)
        if fits and func is nn.functional.linear and not weight.transposed:
            bias = args[2] if len(args) > 2 else named.get("bias")
            y = weight.experts.product(x, weight.expert)
            return y if bias is None else y + bias
        if fits and func in _MATMULS and weight.transposed and not named:
            return weight.experts.product(x, weight.expert)
        raise TypeError(
            f"slim experts: {getattr(func, '__name__', func)}; they answer F.linear(x, weight), "
            "x @ weight, torch.bmm(x, weight) and grouped products only. Keep these experts dense."
        )


def _of_rows(left: Any, right: Any) -> Tensor:
    """Return the batched product of a row, or a column, for each matrix, with these.

    Raises:
        TypeError: if they are not that.
    """
    if isinstance(left, Tensor) and right.transposed and left.shape[1] == 1:
        y: Tensor = right.experts.product_of_rows(left.squeeze(1), expert_N=right.expert)
        return y.unsqueeze(1)
    if isinstance(right, Tensor) and not left.transposed and right.shape[2] == 1:
        y = left.experts.product_of_rows(right.squeeze(2), expert_N=left.expert)
        return y.unsqueeze(2)
    raise TypeError("slim experts, picked for rows: they are multiplied with a row each")


def _holder(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a dotted name, made where it is missing, and the last part."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            setattr(root, part, nn.Module())
        root = getattr(root, part)
    return root, leaf
