"""Compute how much memory a healing takes on one device, before it begins.

Memory that is always in use follows from the parameters. What a forward pass keeps for the backward
pass is measured: the pass runs on tensors with sizes and no contents (torch's FakeTensor), and the
sizes of what autograd saves are summed. This covers every architecture and structure, autocast's
copies and the masks of packed rows included, in seconds and without memory.

The peak is at one of three moments:

    loss    all that the forward pass kept, logits and their gradient, some chunks of float32
    layer   in the backward pass; with gradient checkpointing, one layer's activations once more
    step    all gradients, and what the optimiser updates

Not counted: the process itself (Python, torch, CUDA's context: 0.5 to 1 GiB), fragmentation, and
buffers of single operations.

Shapes: N = rows of a pass, L = tokens of a row, V = vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.anatomy.predictions import logits_at_once
from llmslim.anatomy.sites import find_layers
from llmslim.compat import CAST, FakeTensorMode, TorchDispatchMode, attention_of
from llmslim.healing.packing_check import takes_position_ids
from llmslim.recipe import Heal
from llmslim.report import wording

MASTER = 4
"""Bytes of a weight, its gradient and each of AdamW's two moments."""
_CHUNKS = {False: 4, True: 7}
"""Float32 copies of a chunk of logits in a loss: cross-entropy, and against a teacher."""
_PASSING = 3
"""Gradients of the largest activation's size on their way through a layer."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one healing on one device."""

    weights: int
    """All of the model's, in float32."""
    moments: int
    gradients: int
    held: int
    """Gradients in memory during a forward pass: all, or none where a step is one pass."""
    teacher: int
    copies: int
    """Weights in bfloat16, which autocast makes in each forward pass."""
    kept: int
    """Activations from forward to backward pass."""
    again: int
    """Activations of a layer that gradient checkpointing computes again."""
    passing: int
    """Gradients of activations."""
    logits: int
    """The model's, their gradient, and the teacher's."""
    chunks: int
    """Float32 work on some of the logits."""

    @property
    def moments_of_peak(self) -> dict[str, int]:
        """Bytes at each of the three moments, without weights, AdamW's moments and teacher."""
        deep = max(self.kept + self.held, self.gradients)
        return {
            "loss": self.held + self.kept + self.copies + self.logits + self.chunks,
            "layer": deep + self.again + self.passing,
            "step": self.gradients,
        }

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return self.weights + self.moments + self.teacher + max(self.moments_of_peak.values())

    def facts(self) -> list[tuple[str, str]]:
        """Return names and sizes of the parts and the peak, for people."""
        shown = {
            "weights, float32": self.weights,
            "gradients": self.gradients,
            "AdamW's moments": self.moments,
            "teacher": self.teacher,
            "weights in bfloat16": self.copies,
            "activations": self.kept + self.again,
            "logits and loss": self.logits + self.chunks,
            "peak, without the process itself": self.peak,
        }
        return [(name, wording.size(size)) for name, size in shown.items() if size]


def healing_memory(
    model: Any,
    spec: Heal,
    *,
    length: int,
    accumulate: int,
    bf16: bool,
    device: torch.device,
    teacher: Any = None,
) -> Memory:
    """Compute the memory of a healing.

    An error of any class means that the forward pass depends on values, not only on shapes.

    Args:
        model: on any device, also meta; what is trained requires gradients. It is unchanged.
        spec: `micro_batch`, `gradient_checkpointing` and `store_teacher` matter.
        length: tokens in a row.
        accumulate: passes of a step.
        bf16: whether the arithmetic is bfloat16.
        device: where the training is.
        teacher: the dense model, if any, on any device.
    """
    weights = sum(weight.numel() for weight in model.parameters())
    gradients = MASTER * sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = _forward(model, spec.micro_batch, length, bf16=bf16)
    live = teacher is not None and not spec.store_teacher
    kept, again = found.outside + sum(found.layers), 0
    if spec.gradient_checkpointing:
        kept, again = found.outside + sum(found.inputs), max(found.layers, default=0)
    return Memory(
        weights=weights * MASTER,
        moments=2 * gradients,
        gradients=gradients,
        held=gradients if accumulate > 1 else 0,
        # A teacher keeps its stored type where the arithmetic is bfloat16.
        teacher=sum(
            weight.numel() * (weight.element_size() if bf16 else MASTER)
            for weight in (teacher.parameters() if live else ())
        ),
        copies=found.copies,
        kept=kept,
        again=again,
        passing=_PASSING * found.largest,
        logits=(3 if live else 2) * found.logits,
        chunks=_CHUNKS[teacher is not None] * min(4 * logits_at_once(device), found.float_logits),
    )


@dataclass
class _Found:
    """What a forward pass allocates, in bytes."""

    layers: list[int]
    """What each decoder layer saves for its backward pass."""
    inputs: list[int]
    """Hidden states that go into each decoder layer."""
    outside: int = 0
    largest: int = 0
    copies: int = 0
    logits: int = 0
    float_logits: int = 0


def _forward(model: Any, rows: int, length: int, *, bf16: bool) -> _Found:
    """Run a forward pass on tensors without contents, and sum what it allocates."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = _without_contents(model)
    layers = list(fake.get_submodule(find_layers(fake).path))
    found = _Found([0] * len(layers), [0] * len(layers))
    masters = {weight.untyped_storage() for weight in fake.parameters()}
    casts = _Casts(masters)
    seen: set[Any] = set()
    current: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in seen and storage not in masters and storage not in casts.made:
            seen.add(storage)
            size = storage.nbytes()
            found.largest = max(found.largest, size)
            if current:
                found.layers[current[-1]] += size
            else:
                found.outside += size
        return tensor

    def enter(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
            hidden = given[0] if given else options["hidden_states"]
            found.inputs[index] = hidden.numel() * hidden.element_size()
            current.append(index)

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(index), with_kwargs=True)
        layer.register_forward_hook(lambda *_: current.clear())
    saving = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    with mode, casts, saving, autocast:
        inputs = {"input_ids": torch.ones(rows, length, dtype=torch.long)}
        if takes_position_ids(fake):
            inputs["position_ids"] = torch.arange(length).repeat(rows, 1)
        logits_NLV = fake(**inputs, use_cache=False).logits
    found.copies = sum(storage.nbytes() for storage in casts.made)
    found.logits = logits_NLV.nbytes
    found.float_logits = logits_NLV.numel() * 4
    return found


def _without_contents(model: Any) -> Any:
    """Return a copy of a model, in training mode, whose float32 weights have sizes only."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        empty = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        memo[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    fake = copy.deepcopy(model, memo).train()
    if attention_of(fake.config) == "flash_attention_2":  # its kernel needs contents
        fake.set_attn_implementation("sdpa")
    return fake


class _Casts(TorchDispatchMode):
    """Records the copies of weights that autocast makes."""

    def __init__(self, masters: set[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.masters, self.made = masters, set[Any]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if (
            func is CAST
            and args[0].untyped_storage() in self.masters
            and made.dtype == torch.bfloat16
        ):
            self.made.add(made.untyped_storage())
        return made
