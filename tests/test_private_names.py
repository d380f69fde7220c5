"""Private names of other libraries are used in the compat files only."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from llmslim import compat

PACKAGE = Path(compat.__file__).parent
COMPAT = (PACKAGE / "compat.py", PACKAGE / "modeling/compat.py")
FOREIGN = {"accelerate", "datasets", "gguf", "huggingface_hub", "numpy", "peft", "pyarrow"}
FOREIGN |= {"safetensors", "tokenizers", "torch", "transformers"}
INHERITED = (
    *(nn.Module, torch.Tensor, PreTrainedModel, LlamaForCausalLM, LlamaConfig, GenerationConfig),
    *(Trainer, TrainingArguments, AutoModelForCausalLM, AutoConfig),
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_").isidentifier()


def names_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Attributes, keywords, whole strings and members of classes that a source names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield member.lineno, member.name
                targets = getattr(member, "targets", [getattr(member, "target", None)])
                yield from ((member.lineno, t.id) for t in targets if isinstance(t, ast.Name))


def defined_in(tree: ast.AST) -> set[str]:
    found = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def inherits_nothing(tree: ast.AST) -> set[str]:
    """Members of classes without a base: they have no name from elsewhere."""
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and not n.bases]
    return set().union(*map(defined_in, classes))


def private_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *inner = name.split(".")
            # Of transformers, what its front page exports is documented; its files move.
            deep = root == "transformers" and len(inner) > 1
            if root in FOREIGN and (deep or any(map(is_private, inner))):
                yield node.lineno, name


def used_by_compat() -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in COMPAT]
    return {name for tree in trees for _, name in names_of(tree) if is_private(name)}


@functools.cache
def inherited_names() -> set[str]:
    """Private names that classes of ours may have from other libraries."""
    found = {name for cls in INHERITED for name in dir(cls)}
    for cls in INHERITED:
        found |= set(re.findall(r"self\.(_\w+)", Path(inspect.getfile(cls)).read_text()))
    return set(filter(is_private, found))


def private_uses(tree: ast.Module, compat_names: set[str]) -> list[tuple[int, str]]:
    foreign = compat_names | (inherited_names() - inherits_nothing(tree))
    own = defined_in(tree)
    found = [(line, name) for line, name in names_of(tree) if name in foreign]
    found += [
        (node.lineno, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own
    ]
    return sorted({*found, *private_imports(tree)})


def test_private_names_of_other_libraries_are_used_in_the_compat_files_only():
    names, found = used_by_compat(), []
    for path in sorted({*PACKAGE.rglob("*.py")} - {*COMPAT}):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in private_uses(tree, names):
            found.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {name}")
    assert not found, "\n".join(["move these to llmslim/compat.py:", *found])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("module._parameters", "_parameters"),
        ("getattr(module, '_buffers')", "_buffers"),
        ("class A(Trainer):\n    def _clip_grad_norm(self): ...", "_clip_grad_norm"),
        ("class A(Trainer):\n    def _load_best_model(self): ...", "_load_best_model"),
        ("class A(Module):\n    _is_hf_initialized = True", "_is_hf_initialized"),
        ("read(folder, _from_model_config=True)", "_from_model_config"),
        ("thing._unheard_of", "_unheard_of"),
        ("from torch._subclasses import fake_tensor", "torch._subclasses.fake_tensor"),
        ("from transformers.core_model_loading import x", "transformers.core_model_loading.x"),
        ("import torch.utils._python_dispatch", "torch.utils._python_dispatch"),
    ],
)
def test_a_private_use_is_found(source, name):
    assert [found for _, found in private_uses(ast.parse(source), used_by_compat())] == [name]


def test_names_of_our_own_are_none():
    source = "class A:\n    def _own(self):\n        return self._own, self.__dict__, other._own"
    assert not private_uses(ast.parse(source), used_by_compat())


def test_what_travels_imports_nothing_else():
    tree = ast.parse(COMPAT[1].read_text())
    roots = {n.module.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert roots <= {"torch", "transformers"} | set(sys.stdlib_module_names)
