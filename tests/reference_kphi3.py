"""The published kphi-3 network once more, in plain torch, group by group and head by head.

Slow and independent on purpose: the truth that `llmslim.storage.kphi3` is held against. It
knows the published names of tensors and config fields and nothing of llmslim or transformers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FIELDS = {
    "architectures": ["KPhi3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "someone/some-model--configuration_kphi3.KPhi3Config",
        "AutoModelForCausalLM": "someone/some-model--modeling_kphi3.KPhi3ForCausalLM",
    },
    "bos_token_id": 1,
    "do_layer_norm_before": True,
    "embed_size": 48,
    "eos_token_id": 2,
    "ffn_dim": 48,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "min_channels_per_group": 8,
    "model_type": "kphi3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 64,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.3",
    "vocab_size": 64,
}


def group_count(channels_in: int, channels_out: int, min_channels: int) -> int:
    """The published rule, by search from above."""
    divisor = max(1, min(channels_in, channels_out, channels_in // min_channels))
    while channels_in % divisor or channels_out % divisor:
        divisor -= 1
    return divisor


class Reference:
    """A random kphi-3 model: `tensors` under their published names, and the forward pass.

    Args:
        kind: `io` or `residual`, the block of the projections in the layers.
        embed_kind: the block beside the embeddings; `kind` if not given.
        dtype: of tensors and arithmetic.
        fields: what differs from FIELDS.
    """

    def __init__(
        self, kind="io", embed_kind=None, *, dtype=torch.float32, seed=0, **fields
    ) -> None:
        self.fields = {**FIELDS, **fields}
        self.kind, self.embed_kind = kind, embed_kind or kind
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self._make()

    def __getattr__(self, key: str):
        return self.fields[key]

    # The weights.

    def _random(self, name: str, *shape: int, fan_in: int) -> None:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        self.tensors[name] = (values / math.sqrt(fan_in)).to(self.dtype)

    def _make_block(self, name: str, I: int, O: int, kind: str) -> None:  # noqa: E741
        groups = group_count(I, O, self.min_channels_per_group)
        if groups == 1:
            self._random(f"{name}.first_pointwise_conv.group_layers.0.weight", O, I, fan_in=I)
            return
        i, o = I // groups, O // groups
        self._random(f"{name}.first_pointwise_conv.weight", groups, i, o, fan_in=2 * i)
        second = f"{name}.second_pointwise_conv.weight"
        if kind == "io":
            self._random(second, groups, i, o, fan_in=2 * i)
        elif I >= O:
            self._random(second, groups, o, o, fan_in=o)

    def _make(self) -> None:
        H, E, F = self.hidden_size, self.embed_size, self.intermediate_size
        qkv = H + 2 * self.num_key_value_heads * (H // self.num_attention_heads)
        self._random("model.embed_tokens.weight", self.vocab_size, E, fan_in=1)
        for n in range(self.num_hidden_layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self._random(f"model.layers.{n}.{norm}.weight", H, fan_in=1)
            for leaf, sizes in {
                "self_attn.qkv_proj": (H, qkv),
                "self_attn.o_proj": (H, H),
                "mlp.gate_up_proj": (H, 2 * F),
                "mlp.down_proj": (F, H),
            }.items():
                name = f"model.layers.{n}.{leaf}"
                if self.min_channels_per_group < 0:
                    self._random(f"{name}.weight", sizes[1], sizes[0], fan_in=sizes[0])
                else:
                    self._make_block(name, *sizes, self.kind)
        self._random("model.norm.weight", H, fan_in=1)
        if E != H:
            self._make_block("model.embed_to_hidden", E, H, self.embed_kind)
            self._make_block("hidden_to_embed", H, E, self.embed_kind)
        if not self.tie_word_embeddings:
            self._random("lm_head.weight", self.vocab_size, E, fan_in=E)

    # The forward pass.

    def _block(self, name: str, x: Tensor, kind: str) -> Tensor:
        plain = self.tensors.get(f"{name}.weight")
        if plain is None:
            plain = self.tensors.get(f"{name}.first_pointwise_conv.group_layers.0.weight")
        if plain is not None:
            return x @ plain.T
        first = self.tensors[f"{name}.first_pointwise_conv.weight"]
        second = self.tensors.get(f"{name}.second_pointwise_conv.weight")
        G, i, _ = first.shape
        blocks = [x[..., g * i : (g + 1) * i] @ first[g] for g in range(G)]
        if kind == "io":
            return torch.cat([blocks[g] + x[..., g::G] @ second[g] for g in range(G)], dim=-1)
        h = torch.cat(blocks, dim=-1)
        residues = [h[..., g::G] for g in range(G)]
        if second is None:  # what goes on is interleaved even where no second convolution reads it
            return torch.cat(residues, dim=-1)
        return torch.cat([residues[g] @ second[g] for g in range(G)], dim=-1) + h

    def _norm(self, name: str, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + self.rms_norm_eps)
        return self.tensors[f"{name}.weight"] * wide.to(x.dtype)

    def _rotate(self, head: Tensor) -> Tensor:
        """Turn channel j with channel j + d/2 by position times frequency j; head is (T, d)."""
        length, d = head.shape
        scale, divide = 1.0, torch.ones(d // 2)
        if self.rope_scaling is not None:
            trained = self.original_max_position_embeddings
            which = "long_factor" if length > trained else "short_factor"
            divide = torch.tensor(self.rope_scaling[which])
            stretch = self.max_position_embeddings / trained
            scale = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
        frequency = 1 / (divide * self.rope_theta ** (torch.arange(0, d, 2).float() / d))
        angle = torch.arange(length).float()[:, None] * frequency
        cos, sin = (angle.cos() * scale).to(head.dtype), (angle.sin() * scale).to(head.dtype)
        left, right = head[:, : d // 2], head[:, d // 2 :]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    def _attention(self, n: int, x: Tensor) -> Tensor:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        d = self.hidden_size // heads
        qkv = self._block(f"model.layers.{n}.self_attn.qkv_proj", x, self.kind)
        q, k, v = qkv.split([heads * d, kv_heads * d, kv_heads * d], dim=-1)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        outputs = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            query = self._rotate(q[:, head * d : (head + 1) * d])
            key = self._rotate(k[:, shared * d : (shared + 1) * d])
            scores = (query @ key.T / math.sqrt(d)).masked_fill(future, -math.inf)
            weights = scores.float().softmax(-1).to(x.dtype)
            outputs.append(weights @ v[:, shared * d : (shared + 1) * d])
        return self._block(f"model.layers.{n}.self_attn.o_proj", torch.cat(outputs, -1), self.kind)

    def _mlp(self, n: int, x: Tensor) -> Tensor:
        both = self._block(f"model.layers.{n}.mlp.gate_up_proj", x, self.kind)
        gate, up = both.split(self.intermediate_size, dim=-1)
        return self._block(f"model.layers.{n}.mlp.down_proj", up * gate * gate.sigmoid(), self.kind)

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) for token ids (B, T), one sequence at a time."""
        return torch.stack([self._sequence(row) for row in ids])

    def _sequence(self, ids: Tensor) -> Tensor:
        table = self.tensors["model.embed_tokens.weight"]
        x = table[ids]
        if self.embed_size != self.hidden_size:
            x = self._block("model.embed_to_hidden", x, self.embed_kind)
        for n in range(self.num_hidden_layers):
            x = x + self._attention(n, self._norm(f"model.layers.{n}.input_layernorm", x))
            x = x + self._mlp(n, self._norm(f"model.layers.{n}.post_attention_layernorm", x))
        x = self._norm("model.norm", x)
        if self.embed_size != self.hidden_size:
            x = self._block("hidden_to_embed", x, self.embed_kind)
        return x @ self.tensors.get("lm_head.weight", table).T

    # The files.

    def save(self, folder: Path, *, shards: int = 1) -> Path:
        """Write config.json and the tensors, in one file or in shards with an index."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.fields))
        names = sorted(self.tensors)
        if shards == 1:
            save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        places = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {name: self.tensors[name] for name in names[number::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder
