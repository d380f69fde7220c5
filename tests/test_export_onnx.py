"""ONNX folders in onnxruntime, against transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import make_slim, tiny_tokenizer
from helpers_cli import ok
from helpers_streaming import mixtral
from tiny import tiny_model, tokens
from transformers import AutoConfig, AutoTokenizer

import llmslim
from llmslim.errors import CheckpointError
from llmslim.export import onnx as exporting
from llmslim.export import write_onnx
from llmslim.modeling.low_rank import LowRank
from llmslim.modeling.structured import StructuredLinear
from llmslim.storage import write_checkpoint

# Reason to skip: the default run does without these extras; scripts/test --all installs them.
needs_onnx = pytest.mark.skipif(
    not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra `onnx`, or onnxruntime, is not installed",
)


def blocks(**changes: Any) -> Any:
    """Return a Llama with each kind of block, and an MLP of another width in one layer."""
    model = tiny_model("llama", num_hidden_layers=2, **changes)
    width = {"match": "*.layers.1.mlp.*", "structure": "width", "keep_ratio": 0.5}
    rules = [
        width,
        {"match": "*.layers.0.mlp.up_proj", "structure": "grouped_pointwise", "groups": 4},
        {"match": "*.k_proj", "structure": "low_rank", "rank": 5},
        {"match": "*.o_proj", "structure": "pivoted_low_rank", "rank": 12},
    ]
    llmslim.slim(model, {"name": "all", "init": "project", "replace": rules})
    return model


def phi3() -> Any:
    """Return a Phi-3 with grouped MLPs, whose attention sees four tokens."""
    model = tiny_model("phi3", num_hidden_layers=2, sliding_window=4)
    grouped = {"structure": "grouped_pointwise", "groups": 4}
    return make_slim(model, {"mlp.gate_up_proj": grouped, "mlp.down_proj": grouped})


def gpt2() -> Any:
    model = tiny_model("gpt2", num_hidden_layers=2)
    return make_slim(model, {"mlp.c_fc": {"structure": "low_rank", "rank": 6}})


def experts() -> Any:
    """Return a Mixtral of one layer with experts of two kinds."""
    rules = [
        {"match": "*.gate_up_proj", "structure": "low_rank", "rank": 5},
        {
            "match": "*experts.down_proj",
            "structure": "grouped_pointwise",
            "groups": 4,
            "channel_order": "learned",
        },
    ]
    model = mixtral(num_hidden_layers=1)
    llmslim.slim(model, {"name": "experts", "init": "project", "replace": rules})
    return model


def padded(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and mask, the first row padded on the left where there are several."""
    ids = tokens(rows, length, seed=length)
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[0, :2] = mask[0, :2] = 0
    return ids, mask


@torch.no_grad()
def alone(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Return each row's logits, computed without its padding, with no other row beside it."""
    rows = zip(ids, mask.bool(), strict=True)
    return [model(row[real][None], use_cache=False).logits[0] for row, real in rows]


def in_onnxruntime(folder: Path, ids: torch.Tensor, mask: torch.Tensor, *cuts: int) -> torch.Tensor:
    """Return logits, the tokens given in one piece or cut, with the cache handed on."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    names = [one.name for one in session.get_inputs()]
    assert names[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    heads, size = session.get_inputs()[2].shape[1::2]
    past = [torch.zeros(len(ids), heads, 0, size).numpy() for _ in names[2:]]
    pieces, start = [], 0
    for end in (*cuts, ids.shape[1]):
        new = (ids[:, start:end].numpy(), mask[:, :end].numpy())
        logits, *past = session.run(None, dict(zip(names, (*new, *past), strict=True)))
        pieces.append(torch.from_numpy(logits))
        start = end
    return torch.cat(pieces, dim=1)


@needs_onnx
@pytest.mark.parametrize("make", [blocks, phi3, gpt2, experts])
def test_onnxruntime_gives_the_logits_of_transformers(make: Any, tmp_path: Path) -> None:
    model = make()
    out = write_onnx(model, tmp_path / "out")
    for rows, length, cuts in ((2, 7, ()), (1, 4, ()), (3, 9, (5, 6)), (1, 2, (1,))):
        ids, mask = padded(rows, length)
        found = in_onnxruntime(out, ids, mask, *cuts)
        wanted = alone(model, ids, mask)
        for row, real, expected in zip(found, mask.bool(), wanted, strict=True):
            torch.testing.assert_close(row[real], expected, rtol=0, atol=1e-4)


@needs_onnx
def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One export, from bfloat16, with weights beside the graph: what it holds and refuses."""
    model = blocks(tie_word_embeddings=True).to(torch.bfloat16)
    slim = write_checkpoint(model, tmp_path / "slim", tokenizer=tiny_tokenizer())
    monkeypatch.setattr(exporting, "_ONE_FILE_BYTES", 0)
    out = tmp_path / "new" / "out"
    assert ok("export", slim, "--onnx", out) == f"wrote {out}\n"
    import onnx
    import onnxruntime

    stored = onnx.load(out / "model.onnx", load_external_data=False)
    beside = [one.data_location == onnx.TensorProto.EXTERNAL for one in stored.graph.initializer]
    assert sum(beside) > 10
    assert str(Path(llmslim.__file__).parent).encode() not in stored.SerializeToString()
    config = AutoConfig.from_pretrained(out)
    assert (config.model_type, config.num_hidden_layers) == ("llama", 2)
    assert config.architectures == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer().chat_template
    assert llmslim.verify(out).ok

    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert [one.shape for one in session.get_inputs()[:3]] == [
        ["batch_size", "sequence_length"],
        ["batch_size", "total_sequence_length"],
        ["batch_size", 2, "past_sequence_length", 12],
    ]
    names = [f"present.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [one.name for one in session.get_outputs()] == ["logits", *names]

    ids, mask = padded(2, 6)
    model = llmslim.load(slim).float()  # unlike `to`, loading keeps the rotary table in float32
    wanted = alone(model, ids, mask)[1]
    torch.testing.assert_close(in_onnxruntime(out, ids, mask)[1], wanted, rtol=0, atol=1e-4)
    model.model.norm.weight.data[0] += 1
    with pytest.raises(CheckpointError, match=r"model\.onnx: .*differ"):
        exporting.check_same_in_onnxruntime(model, out / "model.onnx")
    (out / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.onnx: onnxruntime .* does not run it"):
        exporting.check_same_in_onnxruntime(model, out / "model.onnx")


def test_experts_that_need_a_loop_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = experts()
    exporting.check_model(model)
    monkeypatch.setattr(LowRank, "product_by", StructuredLinear.product_by)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: .*--dense"):
        exporting.check_model(model)


def test_what_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        llmslim.export_onnx(tmp_path / "missing", tmp_path / "there")
    monkeypatch.setattr(
        "transformers.exporters.exporter_onnx.OnnxExporter.required_packages", ["x1"]
    )
    with pytest.raises(CheckpointError, match=r"x1.*llmslim-toolkit\[onnx\]"):
        llmslim.export_onnx(tmp_path / "missing", tmp_path / "out")
