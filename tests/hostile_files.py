"""Hostile files by the thousand: what is valid, changed at random, and what must come of it.

Each kind of case makes one input from a `random.Random` and puts it through the function that
checks such input before anything is loaded. It must be refused by an error of our own, or be
accepted and mean the same to whoever reads it next. Sizes are bounded, so a case that takes long is
a fault of the code.

Used by test_fuzz.py, and with more cases by benchmarks/fuzz.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml
from safetensors import safe_open

from llmslim.errors import SlimError
from llmslim.plugins import STRUCTURES
from llmslim.recipe import Recipe, shipped_recipes
from llmslim.recipe.load import recipe_yaml
from llmslim.recipe.rule import rule_class
from llmslim.recipe.schema import Calibration, Depth, Heal, Refine, Width
from llmslim.storage import empty_model, open_source
from llmslim.storage.gguf_header import check_gguf
from llmslim.storage.safetensors_io import INDEX, read_header, read_weights

# fmt: off
NUMBERS = (
    0, 1, -1, 2, 7, 24, 255, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, 10**12, 10**40,
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "1/3", "1/0", "self",
    "é", "\x00", "\x1b[2J", "\ud800", "a\nb", "../x", "/etc/passwd", "x/y", "a" * 300, "*", "[!a",
    [], {}, [1], [[]], {"a": 1}, {"": None}, ["*.mlp.*"], "grouped_pointwise", "low_rank", "auto",
    *NUMBERS,
)
YAML_PARTS = (
    ": ", "- ", "? ", "[", "]", "{", "}", ",", "#", "&a ", "*a", "!!python/name:os.system ", "!a ",
    "!!binary ", "!!timestamp ", "!!set ", "!!int ", "!!float ", "!!bool ", "!!null ", "!!merge ",
    "|\n", ">\n", "'", '"', "%YAML 9\n", "---\n", "...\n", "\t", "\n", "  ", "<<: ", "~", "=", "\\",
    "1:2:3", "0x", "0b2", "2020-13-41", "1e999999999", ".inf", ".nan", "\u2028", "\ufeff", "\x07",
)
# fmt: on
RULES = tuple(map(rule_class, STRUCTURES.names()))
DTYPES = ("F32", "F16", "BF16", "U8", "I64", "BOOL", "F4", "F8_E4M3", "C64", "F99", "f32", "")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
KPHI3 = {
    "model_type": "kphi3",
    "hidden_size": 24,
    "embed_size": 12,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "min_channels_per_group": 6,
    "rope_scaling": None,
}
SLIM = {
    **LLAMA,
    "model_type": "llmslim",
    "base_model_type": "llama",
    "llmslim": {
        "format": 1,
        "sites": {
            "model.layers.0.mlp.up_proj": {
                "structure": "grouped_pointwise",
                "in_features": 24,
                "out_features": 48,
                "bias": False,
                "groups": 4,
                "variant": "io",
            }
        },
    },
}


def header_of(random: Random) -> tuple[dict[str, Any], int]:
    """Return a valid safetensors header and how many bytes of data it describes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if random.random() < 0.5 else {}
    end = 0
    for number in range(random.randint(0, 4)):
        shape = [random.randint(0, 3) for _ in range(random.randint(0, 3))]
        dtype, size = random.choice((("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8)))
        start, count = end, size
        for length in shape:
            count *= length
        end += count
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header, end


def file_of(text: bytes, data: int) -> bytes:
    """Return a safetensors file with a header of that text."""
    return struct.pack("<Q", len(text)) + text + bytes(data)


# ----------------------------------------------------------------------------- changes at random


def change_tree(random: Random, tree: Any) -> Any:
    """Return a JSON tree with one node replaced, removed, renamed, or put in twice."""
    if not isinstance(tree, dict | list) or not tree or random.random() < 0.2:
        return random.choice((*VALUES, *DTYPES))
    if isinstance(tree, list):
        at = random.randrange(len(tree))
        return random.choice(
            (
                [*tree[:at], change_tree(random, tree[at]), *tree[at + 1 :]],
                [*tree[:at], *tree[at + 1 :]],
                [*tree, random.choice(VALUES)],
                tree * 3,
            )
        )
    key = random.choice(list(tree))
    rest = {name: value for name, value in tree.items() if name != key}
    match random.randrange(6):
        case 0:
            return rest
        case 1:
            return {**rest, random.choice(("", "x", "__metadata__", "\x1b", key + "2")): tree[key]}
        case 2:
            return {**tree, random.choice(list(tree)): random.choice(list(tree.values()))}
        case _:
            return {**tree, key: change_tree(random, tree[key])}


def change_bytes(random: Random, text: bytes) -> bytes:
    """Return text with a few bytes flipped, cut out, put in or put in twice."""
    out = bytearray(text)
    for _ in range(random.randint(1, 3)):
        at = random.randint(0, len(out))
        end = min(len(out), at + random.choice((1, 1, 2, 5, 40)))
        match random.randrange(5):
            case 0:
                del out[at:end]
            case 1:
                out[at:at] = out[at:end]
            case 2:
                out[at:end] = random.randbytes(end - at)
            case 3:
                part = random.choice((*YAML_PARTS, str(random.choice(NUMBERS))))
                out[at:at] = part.encode() * random.choice((1, 1, 3, 200))
            case _ if out:
                out[at:] = b"" if random.random() < 0.2 else out[at:]
    return bytes(out[:20_000])


def write_json(random: Random, tree: Any) -> bytes:
    """Return a tree as JSON; at times with keys twice, in another encoding, or damaged."""
    text = json.dumps(tree, ensure_ascii=random.random() < 0.5 or "\ud800" in repr(tree))
    if random.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]  # every key twice
    raw = text.encode("utf-8", "surrogatepass")
    if random.random() < 0.1:
        raw = random.choice((b"\xef\xbb\xbf" + raw, text.encode("utf-16", "replace"), b" " + raw))
    return change_bytes(random, raw) if random.random() < 0.25 else raw


def recipe_text(random: Random) -> bytes:
    """Return a shipped recipe with changes, or a new one from the schema's keys and odd values."""
    match random.randrange(4):
        case 0:
            return change_bytes(random, random.choice(_shipped()))
        case 1:
            tree = yaml.safe_load(random.choice(_shipped()))
            for _ in range(random.randint(1, 3)):
                tree = change_tree(random, tree)
            return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
        case 2:
            sections = (Recipe, *RULES, Depth, Width, Calibration, Heal, Refine)
            keys = [key for section in sections for key in section.model_fields]
            tree = {random.choice(keys): random.choice(VALUES) for _ in range(3)}
            tree |= {random.choice(keys): random.choice((tree, [tree]))}
            return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
        case _:
            keys = [key for section in (Recipe, *RULES) for key in section.model_fields]
            parts = (*YAML_PARTS, *keys, *map(str, NUMBERS))
            return "".join(random.choices(parts, k=random.randint(1, 40))).encode()


_texts: list[bytes] = []


def _shipped() -> list[bytes]:
    if not _texts:
        _texts.extend(path.read_bytes() for path in shipped_recipes().values())
    return _texts


# ---------------------------------------------------------------------------- what must hold


def check_recipe(text: bytes, folder: Path) -> None:
    """Read a recipe; what is accepted must read back as itself, as a checkpoint's copy of it is."""
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    recipe = Recipe.load(path)
    path.write_text(recipe_yaml(recipe), encoding="utf-8")
    assert Recipe.load(path).model_dump() == recipe.model_dump(), "it does not read back as itself"


def check_header(content: bytes, folder: Path) -> None:
    """Read a header; the safetensors library must then find the same tensors."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    entries = read_header(path)
    with safe_open(path, framework="pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    # Types of less than a byte are packed there: their last size is not what the header says.
    packed = {
        name for name, entry in entries.items() if entry.dtype in ("F4", "F6_E2M3", "F6_E3M2")
    }
    assert theirs.keys() == entries.keys()
    assert all(theirs[name] == entries[name].shape for name in entries.keys() - packed)


def check_index(text: bytes, folder: Path) -> None:
    """Read a sharded folder; every tensor must then be in the file that the index names."""
    for name in ("one", "two"):
        header = {name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
        (folder / f"{name}.safetensors").write_bytes(file_of(json.dumps(header).encode(), 2))
    (folder / INDEX).write_bytes(text)
    entries = read_weights(folder)
    weight_map = json.loads(text)["weight_map"]
    assert weight_map.keys() <= entries.keys()
    assert all(f"{name}.safetensors" == file for name, file in weight_map.items())


def check_config(text: bytes, folder: Path) -> None:
    """Read a config and build its model on meta."""
    (folder / "config.json").write_bytes(text)
    empty_model(open_source(folder, weights=False).config, "config")


def _recipe(random: Random, folder: Path) -> None:
    check_recipe(recipe_text(random), folder)


def _header(random: Random, folder: Path) -> None:
    header, data = header_of(random)
    tree: Any = header
    for _ in range(random.randint(0, 2)):
        tree = change_tree(random, tree)
    content = file_of(write_json(random, tree), data)
    check_header(change_bytes(random, content) if random.random() < 0.2 else content, folder)


def _index(random: Random, folder: Path) -> None:
    files = {"one": "one.safetensors", "two": "two.safetensors"}
    tree: Any = {"metadata": {"total_size": 4}, "weight_map": files}
    for _ in range(random.randint(0, 2)):
        tree = change_tree(random, tree)
    check_index(write_json(random, tree), folder)


def _config(random: Random, folder: Path) -> None:
    tree: Any = random.choice((LLAMA, KPHI3, SLIM))
    for _ in range(random.randint(0, 2)):
        tree = change_tree(random, tree)
    check_config(write_json(random, tree), folder)


def gguf_header(random: Random) -> bytes:
    """Return the beginning of a GGUF file with lengths, types and numbers of any size."""

    def number(usual: int, bits: int) -> bytes:
        chosen = random.choice(NUMBERS) if random.random() < 0.06 else usual
        return (chosen % (1 << bits)).to_bytes(bits // 8, "little")

    def text(usual: str) -> bytes:
        raw = usual.encode("utf-8", "surrogatepass")
        return number(len(raw), 64) + raw

    def value(kind: int, depth: int = 0) -> bytes:
        if kind == 8:
            return text(random.choice(("llama", "é", "a" * 300, "")))
        if kind == 9:
            inner = random.choice((4, 5, 6, 8, 10, 9)) if depth < 7 else 4
            count = random.randint(0, 3)
            values = b"".join(value(inner, depth + 1) for _ in range(count))
            return number(inner, 32) + number(count, 64) + values
        width = {0: 8, 1: 8, 2: 16, 3: 16, 7: 8, 10: 64, 11: 64, 12: 64}.get(kind, 32)
        return number(random.choice((1, 2, 32, 4096)), width)

    names = ("general.architecture", "llama.block_count", "llama.attention.head_count_kv", "x",
             "llama.embedding_length", "tokenizer.ggml.tokens", "\x1b[2J")  # fmt: skip
    keys, tensors = random.randint(0, 5), random.randint(0, 2)
    parts = [b"GGUF", number(3, 32), number(tensors, 64), number(keys, 64)]
    for _ in range(keys):
        kind = random.choice((0, 1, 4, 5, 6, 7, 8, 9, 10, 12))
        parts += [text(random.choice(names[: 6 + (random.random() < 0.1)])), number(kind, 32)]
        parts.append(value(kind))
    for _ in range(tensors):
        sizes = [number(random.choice((1, 32, 4096)), 64) for _ in range(random.randint(0, 4))]
        parts += [text("token_embd.weight"), number(len(sizes), 32), *sizes]
        parts += [number(0, 32), number(0, 64)]
    return b"".join(parts)


def _gguf(random: Random, folder: Path) -> None:
    content = gguf_header(random)
    path = folder / "m.gguf"
    path.write_bytes(change_bytes(random, content) if random.random() < 0.3 else content)
    check_gguf(path)


KINDS: dict[str, Callable[[Random, Path], None]] = {
    "recipe": _recipe,
    "header": _header,
    "index": _index,
    "config": _config,
    "gguf": _gguf,
}


def outcome(kind: str, random: Random, folder: Path) -> str:
    """Try one case; return `accepted` or the class that refused it. All other errors escape."""
    try:
        KINDS[kind](random, folder)
    except SlimError as error:
        refusal = error
    else:
        return "accepted"
    assert refusal.problems
    assert all(isinstance(sentence, str) and sentence for sentence in refusal.problems)
    return type(refusal).__name__
