"""Load a model piece by piece, so that a machine need not hold it.

A piece is one decoder layer, or one module outside of them: the embedding, the final norm, the
head. The model stands on the meta device; `load` gives one piece its weights, memory-mapped from
the files, and `release` takes them away again.

transformers renames and merges tensors on loading (Mixtral's experts are w1, w2 and w3 each in
the files, and one three-dimensional parameter in memory). Its own machinery does so here, too: it
is given the tensors of one piece at a time, and tried once on tensors without memory, so that
whatever a piece lacks is known before any work is done.

Left out, for loading as a whole: Python code that comes with a model, quantised weights, weights
that transformers makes up when they are missing, and tied weights that are stored twice.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from llmslim.anatomy.sites import outer_modules
from llmslim.compat import (
    generation_settings,
    load_tensors,
    loading_config,
    mark_initialized,
    may_be_missing,
    on_meta,
)
from llmslim.errors import CheckpointError, SlimError
from llmslim.modeling.depth import plain_class
from llmslim.modeling.structured import StructuredLinear

from .load import (
    check_size,
    dtype_of_weights,
    loses_values,
    names_in_model,
    refuse_absent,
    refuse_other_kinds,
)
from .safetensors_io import TORCH_TYPES, Entry, read_weights
from .source import Source, empty_model, first_line, quiet


class NotInPiecesError(Exception):
    """This model can only be loaded as a whole; the message is the reason."""


class Piece(NamedTuple):
    """Modules that are loaded together."""

    modules: tuple[str, ...]
    """Names of the modules; more than one where they share a parameter."""
    stored: tuple[str, ...]
    """Names of their tensors in the files."""

    @property
    def name(self) -> str:
        """Its name in messages and records."""
        return self.modules[0]


class Pieces:
    """A model on the meta device, and the pieces that it can be loaded in.

    Args:
        source: a folder with safetensors.
        dtype: as for `load_model`.
        trust_remote_code: as for `open_source`.
        device: where a piece's weights are.
        tried: whether every piece is tried first, without memory. Without, what a piece lacks is
            known once it is loaded.

    Raises:
        NotInPiecesError: if it can only be loaded as a whole.
        CheckpointError: if the files do not hold every weight of the model.
    """

    def __init__(
        self,
        source: Source,
        *,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        device: torch.device | str = "cpu",
        tried: bool = True,
    ) -> None:
        if source.path is None or source.gguf_file is not None or source.is_kphi3:
            raise NotInPiecesError("its files are GGUF or of a published kphi-3 model")
        self.source, self.device = source, torch.device(device)
        self._tables: dict[str, Tensor] = {}
        self._entries = entries = read_weights(source.path)
        check_size(source, entries, trust_remote_code)
        self.model = self._empty(entries, dtype, trust_remote_code)
        self._shapes = self.model.state_dict()
        try:
            self._config = loading_config(self.model, self.device)
            self._names = names_in_model(self.model, entries, self._config.weight_mapping)
            refuse_other_kinds(source.given, self.model, entries, self._names)
            self.unused = sorted(entries.keys() - self._names.keys())
            """Tensors in the files that the model has no use for."""
            self.all = tuple(self._grouped())
            self._pieces = {holder: piece for piece in self.all for holder in piece.modules}
            if tried:
                self._try(entries)
        except (NotInPiecesError, SlimError):
            raise
        except Exception as error:  # each architecture has its own way of loading
            raise NotInPiecesError(first_line(error)) from error

    @property
    def used_conversions(self) -> list[Any]:
        """What transformers renames and merges in these files."""
        return [given for given in self._config.weight_mapping or () if given.was_used()]

    def files(self, piece: Piece) -> list[Path]:
        """Return the files that hold a piece."""
        return list(dict.fromkeys(self._entries[key].path for key in piece.stored))

    def load(self, piece: Piece) -> None:
        """Give a piece its weights."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in self.files(piece)
            }
            tensors = {key: opened[self._entries[key].path].get_tensor(key) for key in piece.stored}
            self._put(tensors, self._config)
        self._put_tables()

    def load_zeros(self, piece: Piece, *, in_memory: bool) -> None:
        """Give a piece weights that are all zero.

        Args:
            piece: the piece.
            in_memory: whether each has a place in memory, as fused kernels for experts need it.
        """
        for holder in piece.modules:
            for inside, module in self.model.get_submodule(holder).named_modules(prefix=holder):
                if self.piece_of(inside) is not piece:
                    continue  # a module with a parameter of its own may hold all others
                own = (*module.named_parameters(recurse=False), *module.named_buffers("", False))
                for name, tensor in own:
                    if tensor.is_meta:
                        zero = torch.zeros((), dtype=tensor.dtype, device=self.device)
                        zeros: Tensor = zero.expand(tensor.shape)
                        if in_memory:
                            zeros = zeros.contiguous()
                        if isinstance(tensor, nn.Parameter):
                            zeros = nn.Parameter(zeros, requires_grad=False)
                        setattr(module, name, zeros)
        self._put_tables()

    def release(self, piece: Piece) -> None:
        """Take a piece's weights away again, those of blocks that it got in between as well."""
        for holder in piece.modules:
            self.model.get_submodule(holder).to("meta")
        _free_memory()

    def make_tables(self) -> None:
        """Work out what no file holds (rotary frequencies, masks), so that loaded pieces can run.

        Raises:
            NotInPiecesError: if that takes the model's weights.
        """
        if self._tables:
            return  # transformers works out each module once: a second time would leave them empty
        unstored = dict(self.model.named_non_persistent_buffers())
        self._tables = {k: torch.empty_like(b, device=self.device) for k, b in unstored.items()}
        self._put_tables()
        for tensor in self.model.state_dict(keep_vars=True).values():
            mark_initialized(tensor)
        try:
            self.model.initialize_weights()
        except Exception as error:  # each architecture has its own way
            self._tables = unstored
            self._put_tables()
            self._tables = {}
            raise NotInPiecesError(first_line(error)) from error

    def _put_tables(self) -> None:
        for name, table in self._tables.items():
            module, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(module), leaf, table)

    def tensors(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors of a piece, as the model has them now."""
        for holder in piece.modules:
            module = self.model.get_submodule(holder)
            for inner, tensor in module.state_dict().items():
                name = f"{holder}.{inner}" if holder else inner
                if self.piece_of(name) is piece:
                    yield name, tensor

    def piece_of(self, name: str) -> Piece:
        """Return the piece that a module or tensor is loaded with."""
        # A module with parameters may hold other such modules: the innermost counts.
        while name not in self._pieces and name:
            name = name.rpartition(".")[0]
        return self._pieces[name]

    def _empty(
        self, entries: Mapping[str, Entry], dtype: str | None, trust_remote_code: bool
    ) -> PreTrainedModel:
        """Return the model as `from_pretrained` would make it, on the meta device.

        Raises:
            NotInPiecesError: if that is not known, or code comes with it.
        """
        given, config = self.source.given, self.source.config
        if getattr(config, "quantization_config", None):
            raise NotInPiecesError("its weights are quantised")
        stored = dtype_of_weights(given, entries)
        wanted = dtype or stored or getattr(config, "dtype", None)
        if wanted is None:
            raise NotInPiecesError("its weights are of several types and its config names none")
        model = model_without_weights(config, wanted, given, trust_remote_code)
        if dtype is None and stored is None and (exact := loses_values(model, entries)):
            model = model_without_weights(config, exact, given, trust_remote_code)
        if model.is_remote_code():
            raise NotInPiecesError("its code comes with it")
        assert self.source.path is not None
        model.config.name_or_path = str(self.source.path)
        if model.can_generate():
            with quiet():
                model.generation_config = generation_config(self.source.path)
        model.eval()
        return model

    def _grouped(self) -> Iterator[Piece]:
        """Yield the pieces, in the model's order."""
        names = list(self.model.state_dict(keep_vars=True).items())
        modules = outer_modules(self.model)
        blocks = {name for name, module in modules if isinstance(module, StructuredLinear)}
        module_of: dict[str, str] = {}
        owner: dict[int, str] = {}
        joined: dict[str, str] = {}
        for name, tensor in names:
            holder = module_of[name] = _module_of(name, blocks)
            joined.setdefault(holder, holder)
            # Modules that share a parameter come and go together.
            first = _root(joined, owner.setdefault(id(tensor), holder))
            joined[_root(joined, holder)] = first
        for target, owned_by in self.model.all_tied_weights_keys.items():
            one, other = (_root(joined, module_of[name]) for name in (target, owned_by))
            joined[one] = other
        groups: dict[str, list[str]] = defaultdict(list)
        for holder in joined:
            groups[_root(joined, holder)].append(holder)
        stored: dict[str, list[str]] = defaultdict(list)
        for key, name in self._names.items():
            stored[_root(joined, module_of[name])].append(key)
        for root, members in groups.items():
            yield Piece(tuple(members), tuple(stored[root]))

    def _try(self, entries: Mapping[str, Entry]) -> None:
        """Load every piece with tensors that have no memory.

        Raises:
            NotInPiecesError: if a piece lacks something that only the whole model has.
            CheckpointError: if the files lack a weight, or have it in another shape.
        """
        unknown = {entries[key].dtype for key in self._names} - TORCH_TYPES.keys()
        if unknown:
            raise NotInPiecesError(f"it has tensors of type {', '.join(sorted(unknown))}")
        tied = self.model.all_tied_weights_keys
        twice = [n for n in tied if {n, tied[n]} <= set(self._names.values())]
        if twice:
            raise NotInPiecesError(f"{twice[0]} is tied and stored all the same")
        dry = on_meta(self._config)
        missing, wrong = set(self.model.state_dict()), set[str]()
        for piece in self.all:
            with torch.device("meta"):
                tensors = {
                    key: torch.empty(entries[key].shape, dtype=TORCH_TYPES[entries[key].dtype])
                    for key in piece.stored
                }
            info = self._put(tensors, dry)
            if info.conversion_errors or info.error_msgs:
                raise NotInPiecesError(f"{piece.name} cannot be loaded by itself")
            missing &= info.missing_keys
            wrong |= {str(name) for name in info.mismatched_keys}
        for name, owned_by in tied.items():
            if {name, owned_by} - missing:
                missing -= {name, owned_by}
        if missing and not wrong and may_be_missing(self.model):
            raise NotInPiecesError(f"its files lack {sorted(missing)[0]}")
        refuse_absent(self.source.given, {*missing, *wrong})

    def _put(self, tensors: dict[str, Tensor], config: Any) -> Any:
        # transformers asks for the names of the whole model each time: they stay the same.
        model: Any = self.model
        model.state_dict, model.named_buffers = (lambda: self._shapes), (lambda: iter(()))
        with quiet():
            try:
                info = load_tensors(self.model, tensors, config)
            finally:
                del model.state_dict, model.named_buffers
            if self.model.all_tied_weights_keys:
                self.model.tie_weights(set(info.missing_keys), recompute_mapping=False)
        return info


def model_without_weights(
    config: PreTrainedConfig, dtype: str | torch.dtype, where: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model that a config describes in a type, as `empty_model` does.

    Args:
        config: of a causal language model; not changed.
        dtype: of its weights.
        where: whose config it is, for messages.
        trust_remote_code: as for `open_source`.
    """
    return empty_model(config_in(config, dtype), where, trust_remote_code=trust_remote_code)


def config_in(config: PreTrainedConfig, dtype: str | torch.dtype) -> PreTrainedConfig:
    """Return a copy of a config, of the class that Auto classes know, for weights of a type.

    Args:
        config: of a causal language model; not changed.
        dtype: of its weights.
    """
    config = copy.deepcopy(config)
    config.__class__ = plain_class(config)  # the one that Auto classes know
    chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for part in (config, *parts):
        if part is not None:
            part.dtype = chosen
    return config


def generation_config(folder: Path) -> GenerationConfig:
    """Read what `from_pretrained` reads.

    Args:
        folder: of a model.

    Raises:
        CheckpointError: if it has values that no generation config can have.
    """
    try:
        try:
            config: GenerationConfig = GenerationConfig.from_pretrained(folder)
        except OSError:
            config = generation_settings(folder)
    except Exception as error:  # it takes every key and value as it comes
        raise CheckpointError(
            f"{folder / 'generation_config.json'}: cannot be used ({first_line(error)}). Correct "
            "it, or remove it: the defaults then hold."
        ) from error
    return config


def _module_of(name: str, blocks: Collection[str]) -> str:
    """Return the module that a tensor is loaded with: the member of a list or block it is in."""
    parts = name.split(".")[:-1]
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    whole = (each for n, each in enumerate(around) if parts[n].isdigit() or each in blocks)
    return next(whole, ".".join(parts))


def _root(joined: dict[str, str], holder: str) -> str:
    while joined[holder] != holder:
        holder = joined[holder]
    return holder


def _free_memory() -> None:
    """Return unused pages to the system.

    glibc keeps what is freed in pieces of less than 32 MB, and lays the next ones beside it: over
    a large model it comes to hold a third more than is in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)
