"""Fit a plan's blocks layer by layer, each to the inputs that it will have in the slim model.

Two streams of hidden states go through the model side by side: the dense model's, and that of the
model with every block put in place so far. One decoder layer's copy and the two streams are all the
memory it takes. What is fitted in a layer, and to what: see `layer_fit`. How much a token counts
follows the size of the stream, see `importance`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.anatomy.layer_calls import Extra, fast_type, record_calls, run_layer, type_taken
from llmslim.anatomy.sites import find_layers, find_mlps, find_sites
from llmslim.editing.blocks import fill_site
from llmslim.editing.plans import Plan
from llmslim.fitting.calibration import early_layers, windows_per_batch, with_random_tokens
from llmslim.fitting.layer_fit import FitContext, LayerFit
from llmslim.fitting.layer_pair import LayerPair
from llmslim.fitting.layer_store import DenseStates, Fitted, LayerStore, Streams
from llmslim.init import method_named
from llmslim.modeling.modeling_llmslim import other_names, set_module


@torch.no_grad()
def fit_sequentially(
    model: Any,
    plan: Plan,
    windows: Tensor,
    held_out: Tensor,
    *,
    seed_of: Callable[[str], int],
    progress: Callable[[str], None],
    store: LayerStore | None = None,
) -> Fitted:
    """Put a plan's blocks in place and fit them, in place.

    Args:
        model: the dense model.
        plan: its sites inside decoder layers are fitted; others are left alone.
        windows: token ids to fit on, (N, L).
        held_out: token ids to measure errors on, (M, L).
        seed_of: seed for a site's method.
        progress: called with the name of every site once it is done.
        store: loads layers and stores the finished ones; by default they are in memory.
    """
    was_training = model.training
    model.eval()
    try:
        fit = _LayerwiseFit(model, plan, store or LayerStore(), seed_of, progress)
        return fit.run(windows, held_out)
    finally:
        model.train(was_training)


class _LayerwiseFit:
    def __init__(
        self,
        model: Any,
        plan: Plan,
        store: LayerStore,
        seed_of: Callable[[str], int],
        progress: Callable[[str], None],
    ) -> None:
        self.model, self.plan, self.store = model, plan, store
        self.seed_of, self.progress = seed_of, progress
        self.layers = find_layers(model)
        self.stack: Any = model.get_submodule(self.layers.path)
        self.sites = {site.name: site for site in plan.sites}
        self.narrow = [mlp for mlp in plan.mlps if mlp.fitted]
        self.also = other_names(model, set(find_sites(model)))
        self.shared: dict[str, nn.Module] = {}
        """Dense maps that later layers share with finished ones, by the names they have there."""
        self.early = early_layers(len(self.stack))
        self.random = 0
        """Batches with random tokens, which come first; none after the early layers."""
        self.fitting = 0
        """Batches to fit on; those after them are held out."""
        self.unseen = 0
        """Batches at the end that the layers are not fitted to, for a training end to end."""
        self.extras: list[list[Extra]] = []
        """Arguments of each layer beside the hidden states, for each batch."""
        self.ids: list[Tensor] = []
        """Token ids of each batch."""
        self.autocast: torch.dtype | None = None

    def run(self, windows: Tensor, held_out: Tensor) -> Fitted:
        """Fit every layer that something is planned for."""
        streams = self._prepare(windows, held_out)
        first, streams = self.store.resume(streams)
        if first >= self.early:
            self._drop_random()
        spec = self.plan.recipe.refine
        context = FitContext(
            self.model,
            self.sites,
            find_mlps(self.model, self.layers),
            self.narrow,
            spec if spec is not None and spec.steps else None,
            self.seed_of,
            self.progress,
        )
        to_fit = [self._has_plans(index) for index in range(len(self.stack))]
        changed = [to_fit[index] or self._dropped(index) for index in range(len(self.stack))]
        last = max((index for index, planned in enumerate(to_fit) if planned), default=-1)
        if self._trains:
            last = len(to_fit) - 1  # all that the dense model makes of the text is needed
        whole = Fitted()
        for index in range(first, last + 1):
            with self.store.layer(index):
                if any(changed[: index + 1]):
                    result, after = self._fit_layer(context, index, streams)
                else:  # until something changes, both streams are one
                    both = self._pair(index, self.stack[index], streams).outputs(self.stack[index])
                    unseen = self._run_unseen(index, self.stack[index], streams)
                    result, after = Fitted(), Streams([*both, *unseen], both)
                if index + 1 == self.early:
                    after = Streams(*(stream[self.random :] for stream in after))
                    self._drop_random()
                streams = self.store.finished(index, result, after)
            whole.add(result)
        if last == len(to_fit) - 1:
            whole.states = self._dense_states(streams)
        return whole

    def _prepare(self, windows: Tensor, held_out: Tensor) -> Streams:
        """Record what the layers are called with; return the streams before the first one."""
        # What the layers were fitted to is nearly right already: text that they have not seen is
        # what a training of the whole model gains from.
        kept = len(windows) // 2 if self._trains else 0
        windows, unseen = windows.split((len(windows) - kept, kept))
        copies = windows[:0]
        if any(self._has_plans(index) for index in range(self.early)):
            # The name keeps what is drawn as it was when the method was measured.
            copies = with_random_tokens(windows, self.model.config, self.seed_of("scrambled"))
        with self.store.beginning():
            parts = [part for part in (copies, windows, held_out, unseen) if len(part)]
            size = windows_per_batch(parts, self.model.device)
            ids = torch.cat(parts).to(self.model.device)
            self.ids = list(ids.split(size))
            self.random, self.unseen = len(copies) // size, kept // size
            self.fitting = self.random + len(windows) // size
            layers = list(self.stack)
            calls = record_calls(self.model, layers, self.ids)
            fast = fast_type(self.model.device, self.model.dtype)
            self.autocast = type_taken(layers[0], calls, fast)
        self.extras = calls.extras
        return Streams(calls.hidden, calls.hidden[: len(calls.hidden) - self.unseen])

    @property
    def _trains(self) -> bool:
        """Whether a training end to end follows."""
        spec = self.plan.recipe.refine
        return spec is not None and spec.end_to_end is not None

    def _dense_states(self, streams: Streams) -> DenseStates:
        """Return what a training starts from: the text of the fits and the rest, then held-out."""
        end = len(self.ids) - self.unseen
        order = [*range(self.fitting), *range(end, len(self.ids)), *range(self.fitting, end)]
        ids, hidden = ([each[n] for n in order] for each in (self.ids, streams.dense))
        return DenseStates(ids, hidden, self.fitting + self.unseen, self.autocast)

    def _run_unseen(self, index: int, dense: nn.Module, streams: Streams) -> list[Tensor]:
        """Return the dense stream after a layer for what is not fitted to."""
        found = []
        for n in range(len(streams.slim), len(streams.dense)):
            extra = self.extras[index][n]
            output, _ = run_layer(dense, streams.dense[n], extra, autocast=self.autocast)
            assert output is not None
            found.append(output)
        return found

    def _prefix(self, index: int) -> str:
        return f"{self.layers.path}.{index}."

    def _dropped(self, index: int) -> bool:
        """Return whether a layer is left out of the slim model."""
        keep = self.plan.keep_layers
        return keep is not None and index not in keep

    def _has_plans(self, index: int) -> bool:
        """Return whether anything is to be fitted in a layer."""
        planned = [*self.sites, *(mlp.mlp.down for mlp in self.narrow)]
        return any(name.startswith(self._prefix(index)) for name in planned)

    def _drop_random(self) -> None:
        """Forget the windows with random tokens, which only the early layers are fitted to."""
        self.extras = [known[self.random :] for known in self.extras]
        self.ids = self.ids[self.random :]
        self.fitting -= self.random
        self.random = 0

    def _pair(self, index: int, dense: nn.Module, streams: Streams) -> LayerPair:
        return LayerPair(
            dense, self.stack[index], streams, self.extras[index], self.fitting, self.autocast
        )

    def _fit_layer(
        self, context: FitContext, index: int, streams: Streams
    ) -> tuple[Fitted, Streams]:
        """Fit what is planned in a layer; return its results and the streams after it."""
        layer, prefix = self.stack[index], self._prefix(index)
        if self._dropped(index):
            pair = self._pair(index, layer, streams)
            unseen = self._run_unseen(index, layer, streams)
            return Fitted(), Streams([*pair.outputs(layer), *unseen], streams.slim)
        dense = self._dense_copy(layer, prefix)
        unseen = self._run_unseen(index, dense, streams)
        fit = LayerFit(context, prefix, self._pair(index, dense, streams))
        after = fit.run()
        self._fill_unseen(prefix, fit.result)
        return fit.result, Streams([*after.dense, *unseen], after.slim)

    def _dense_copy(self, layer: nn.Module, prefix: str) -> nn.Module:
        """Return a copy of a layer that stays dense; maps that it shares may be slim by now.

        A map that layers share is fitted in the first of them, to the inputs it has there.
        """
        dense = copy.deepcopy(layer)
        for name in [name for name in self.shared if name.startswith(prefix)]:
            set_module(dense, name.removeprefix(prefix), self.shared.pop(name))
        for name, others in self.also.items():
            if name.startswith(prefix):
                own = dense.get_submodule(name.removeprefix(prefix))
                self.shared |= dict.fromkeys(others, own)
        return dense

    def _fill_unseen(self, prefix: str, result: Fitted) -> None:
        """Fill what the calibration text never reached from its weights alone."""
        for name, site in self.sites.items():
            if not name.startswith(prefix) or name in result.sites:
                continue
            if method_named(site.init).needs_gram:
                result.unseen.append(name)
                site = replace(site, init="project")
            result.errors[name] = fill_site(self.model, site, self.seed_of)
            result.sites.add(name)
            self.progress(name)
