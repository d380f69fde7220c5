"""Find the role of each projection in its decoder layer, from the structure of the model.

No model family is listed. A projection inside a module that mixes tokens belongs to attention or a
recurrence; the others of a layer belong to an MLP where their sizes fit (`sites.find_groups`), or
to experts. Names decide only what sizes leave open: q or k, gate or up, shared or routed experts.

Only the decoder's layers have roles; encoders of images or sound, and what connects them to the
decoder, have none. Neither has a projection that fits nothing, such as a router's or an adapter's.

Shapes: D = hidden size.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

from torch import nn

from llmslim.anatomy.module_kinds import is_recurrent, serves_router_or_norm, token_mixer
from llmslim.anatomy.sites import (
    Group,
    Site,
    as_site,
    find_experts,
    find_groups,
    find_layers,
    find_sites,
    find_towers,
    outer_modules,
    widest,
)
from llmslim.errors import TargetError
from llmslim.modeling.experts import Experts
from llmslim.modeling.structured import StructuredLinear

_LETTERS = {"query": "q", "key": "k", "value": "v", "out": "o", "output": "o"}
_ANONYMOUS = r"\d+|weight|linear|dense|proj|layer"
"""Names without meaning; the name of the module around them decides."""


def find_roles(model: Any) -> dict[str, str]:
    """Return the role of every dense map by name, in the model's order; empty where it has none.

    Args:
        model: a causal language model, on any device, slim or not.
    """
    sites = find_sites(model) | find_experts(model)
    maps = dict.fromkeys(sites, "")
    modules = dict(model.named_modules())
    for top, inside in _by_layer(model, modules).items():
        found = _Layer(model, modules, top, inside).roles()
        maps |= {name: role for name, role in found.items() if name in maps}
    return maps


def _by_layer(model: Any, modules: dict[str, nn.Module]) -> dict[str, list[Site]]:
    """Return the maps of every decoder layer, with blocks and maps that cannot be replaced."""
    stacks = _stacks(model, modules)
    by_layer: dict[str, list[Site]] = defaultdict(list)
    for site in _every_map(model):
        stack = next((stack for stack in stacks if site.name.startswith(f"{stack}.")), None)
        if stack is not None:
            index, _, inner = site.name[len(stack) + 1 :].partition(".")
            if inner:
                by_layer[f"{stack}.{index}"].append(site)
    return by_layer


def _stacks(model: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the module lists that hold a model's decoder layers.

    XLM has a list of its attentions and one of its MLPs. Where no list is as long as the config
    says, a model has several stacks, and every list that reads tokens is one.
    """
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    try:
        layers = find_layers(model)
    except TargetError:
        towers = find_towers(model)
        return [name for name in lists if not f"{name}.".startswith(towers)]
    parent = layers.path.rpartition(".")[0]
    return [
        name
        for name in lists
        if name.rpartition(".")[0] == parent and len(modules[name]) == layers.count  # type: ignore[arg-type]
    ]


def _every_map(model: Any) -> list[Site]:
    found = dict(find_experts(model))
    for name, module in outer_modules(model):
        if isinstance(module, StructuredLinear):
            spec = module.spec()
            found[name] = Site(name, spec["in_features"], spec["out_features"], spec["bias"])
        elif isinstance(module, Experts):
            sizes = module.block_spec
            found[name] = Site(
                name, sizes["in_features"], sizes["out_features"], False, module.experts
            )
        elif site := as_site(name, module):
            found[name] = site
    return list(found.values())


class _Layer:
    """The maps of one decoder layer."""

    def __init__(
        self, model: Any, modules: dict[str, nn.Module], top: str, sites: list[Site]
    ) -> None:
        self.modules, self.top, self.sites = modules, top, sites
        config, text = model.config, model.config.get_text_config()
        self.families = [str(each.model_type) for each in (text, config)]
        # Of stacks with configs of their own, a layer's most frequent size.
        often = Counter(site.in_features for site in sites).most_common(1)[0][0]
        self.hidden: int = getattr(text, "hidden_size", None) or often

    def roles(self) -> dict[str, str]:
        mixers: dict[str, list[Site]] = defaultdict(list)
        rest: list[Site] = []
        for site in self.sites:
            if serves_router_or_norm(self.modules, site.name, self.top):
                continue
            mixer = token_mixer(self.modules, site.name, self.top)
            (rest if mixer is None else mixers[mixer]).append(site)
        found: dict[str, str] = {}
        for mixer, sites in mixers.items():
            if is_recurrent(self.modules[mixer], self.families):
                found |= self._recurrence(mixer, sites)
            else:
                found |= self._attention(mixer, sites)
        return found | self._mlps(rest)

    def _attention(self, mixer: str, sites: list[Site]) -> dict[str, str]:
        parts = {site.name: self._letters(mixer, site.name) for site in sites}
        silent = [site for site in sites if parts[site.name] == ""]
        if "o" not in parts.values():
            writers = [site for site in silent if site.out_features == self.hidden]
            parts |= {site.name: "o" for site in writers[-1:]}
        # The one reader of the hidden states that is left makes what the others do not.
        readers = [
            site for site in silent if site.in_features == self.hidden and not parts[site.name]
        ]
        named = set("".join(part for part in parts.values() if part != "o"))
        missing = "".join(letter for letter in "qkv" if letter not in named)
        if len(readers) == 1 and missing in ("q", "qkv", "kv"):
            parts[readers[0].name] = missing
        allowed = ("q", "k", "v", "qkv", "kv", "o")
        return {
            name: f"attention.{part}" if part in allowed else "attention"
            for name, part in parts.items()
        }

    def _letters(self, mixer: str, name: str) -> str:
        """Return which of q, k, v and o a name means; '-' for something else, '' for none."""
        inner = name[len(mixer) + 1 :].split(".")
        while len(inner) > 1 and re.fullmatch(_ANONYMOUS, inner[-1]):
            inner.pop()
        around = [".".join((mixer, *inner[:n])) for n in range(1, len(inner))]
        if any("indexer" in type(self.modules[outer]).__name__.lower() for outer in around):
            return "-"
        words = re.findall(r"[a-z]+", inner[-1].lower())
        found = ""
        for word in words:
            letters = _LETTERS.get(word, word.removeprefix("w"))
            found += letters if re.fullmatch("[qkvo]+", letters) else ""
        gates = any(re.search(r"gate|preact", word) for word in words)
        return "-" if gates or (not found and {"a", "b", "f", "g", "r"} & set(words)) else found

    def _recurrence(self, mixer: str, sites: list[Site]) -> dict[str, str]:
        writers = [site for site in sites if site.out_features == self.hidden]
        named = [site for site in writers if self._letters(mixer, site.name) == "o"]
        out = {site.name for site in (named or writers)[-1:]}
        return {
            site.name: "ssm.out"
            if site.name in out
            else "ssm.in"
            if site.in_features == self.hidden
            else "ssm"
            for site in sites
        }

    def _mlps(self, sites: list[Site]) -> dict[str, str]:
        stacked = find_groups(self.top, [site for site in sites if site.experts], None)
        experts = [group for group in stacked if not self._is_shared(group)]
        dense = find_groups(self.top, [site for site in sites if not site.experts], self.hidden)
        # Experts that are one module each.
        single = [
            group
            for group in dense
            if "expert" in group.holder[len(self.top) :] and not self._is_shared(group)
        ]
        blocks = [self._around_experts(group) for group in (*experts, *single)]
        # Projections that only lead the hidden states to the experts and back.
        inner = {group.down.out_features for group in experts} - {self.hidden}
        others = [g for g in dense if g not in single and g.down.in_features not in inner]
        # A stack is of experts even where its sizes do not fit.
        found = {
            site.name: "shared_experts" if "shared" in site.name[len(self.top) :] else "experts"
            for site in sites
            if site.experts
        }
        for group in (*experts, *single):
            found |= _parts("experts", group)
        for group in (*widest(others), *(g for g in stacked if g not in experts)):
            shared = blocks and (
                self._is_shared(group) or any(group.holder.startswith(f"{b}.") for b in blocks)
            )
            found |= _parts("shared_experts" if shared else "mlp", group)
            if group.holder != self.top:
                # Other projections of the same module, such as RWKV's gate.
                beside = {s.name for s in sites if s.name.rpartition(".")[0] == group.holder}
                found = {name: "mlp" for name in beside if not blocks} | found
        return found

    def _is_shared(self, group: Group) -> bool:
        return "shared" in group.holder[len(self.top) :]

    def _around_experts(self, group: Group) -> str:
        """Return the name of the module that holds a group of experts and their router."""
        holder = group.holder
        return holder.rpartition(".")[0] if "expert" in holder.rpartition(".")[2] else holder


def _parts(whole: str, group: Group) -> dict[str, str]:
    """Return the role of each site of a group."""
    width = group.down.in_features
    found = {group.down.name: f"{whole}.down"}
    single = [site.name for site in group.up if site.out_features == width]
    fused = {site.name for site in group.up} - set(single)
    found |= dict.fromkeys(fused, f"{whole}.gate_up")
    # Nearly all declare the gate first; so it is where no name decides.
    gates = [name for name in single if "gate" in name.rpartition(".")[2]] or single[:1]
    for name in single:
        gate = len(single) > 1 and name in gates
        found[name] = f"{whole}.{'gate' if gate else 'up'}"
    return found
