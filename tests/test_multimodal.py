"""Models that read images or sound besides text: slimmed, written, loaded as their source is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from every_architecture import fit_to_text, walk
from every_multimodal import (
    LISTED,
    answer,
    convert_trip,
    of_images_or_sound,
    round_trip,
    tiny_multimodal,
)
from helpers_checkpoint import tiny_tokenizer

import llmslim
from llmslim.modeling.base_class import auto_class_of
from llmslim.storage import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's models warn of

USUAL = {"llava", "gemma3", "qwen2_vl"}
NOT_BUILT = {
    "diffusion_gemma", "evolla", "fast_vlm", "gemma3n", "granite4_vision",
    "kyutai_speech_to_text", "nemo_speechlm", "perception_lm", "qwen3_omni_moe",
}  # fmt: skip
"""What no tiny model is built of: sizes that fit each other are not found generically."""
NO_TRIP = {
    "qwen2_5_omni",  # to load it takes a file of speakers that is neither config nor weights
    "shieldgemma2",  # transformers does not load back what it saves of it
    "udop",  # its modules have none of the names that the sweep's recipe looks for
}
RULE = {"match": "*language_model*.mlp.*", "structure": "low_rank", "rank": 8}
RECIPE = {"name": "r", "replace": [RULE]}


def every(usual: set[str]) -> list[Any]:
    names = sorted(set(LISTED) - NOT_BUILT - NO_TRIP)
    return [pytest.param(n, marks=[] if n in usual else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", every(USUAL))
def test_slim_save_and_load_with_the_auto_classes_of_the_source(name: str) -> None:
    round_trip(tiny_multimodal(name))


@pytest.mark.parametrize("name", every(USUAL))
def test_what_is_converted_in_pieces_is_what_slim_makes(name: str, tmp_path: Path) -> None:
    convert_trip(name, tmp_path)


@pytest.mark.parametrize("name", sorted(USUAL))
def test_the_text_decoder_is_fitted_to_text(name: str) -> None:
    walk(tiny_multimodal(name))
    fit_to_text(tiny_multimodal(name))


@pytest.mark.slow
def test_what_has_no_tiny_model_is_known() -> None:
    failed = set()
    for name in sorted(NOT_BUILT):
        try:
            tiny_multimodal(name)
        except Exception:
            failed.add(name)
    assert failed == NOT_BUILT


def llava() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text = {**sizes, "model_type": "llama", "num_attention_heads": 2, "vocab_size": 100}
    seen = {**sizes, "model_type": "clip_vision_model", "num_attention_heads": 2}
    seen |= {"image_size": 28, "patch_size": 14, "projection_dim": 32}
    torch.manual_seed(0)
    config = tf.LlavaConfig(text_config=text, vision_config=seen, image_token_index=99)
    return tf.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def of_an_image(model: Any) -> torch.Tensor:
    """Logits of two tokens, an image of four patches, and two tokens."""
    ids = torch.tensor([[5, 6, *[99] * 4, 7, 8]])
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids, pixel_values=pixels).logits


def test_an_image_is_read_as_by_the_model_in_memory(tmp_path: Path) -> None:
    model = llava()
    dense = of_an_image(model)
    rules = [RULE, {"match": "*vision*.mlp.*", "structure": "low_rank", "rank": 8}]
    llmslim.slim(model, {"name": "r", "replace": rules})
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(of_an_image(loaded), of_an_image(model))
    assert not torch.allclose(of_an_image(model), dense)
    with pytest.raises(ValueError, match=r"SlimLlavaConfig.*AutoModelForCausalLM"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)  # as it is for the source


def test_its_auto_classes_are_named_in_its_config(tmp_path: Path) -> None:
    model = llava()
    llmslim.slim(model, RECIPE)
    model.save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    writes = {"AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert set(named) == {"AutoConfig", "AutoModel", *writes}
    assert {named[auto] for auto in writes} == {"llmslim_entry.SlimLlavaForConditionalGeneration"}
    assert named["AutoModel"] == "llmslim_entry.SlimLlavaModel"


@pytest.mark.slow
def test_where_llmslim_is_not_installed(tmp_path: Path) -> None:
    model = llava()
    llmslim.slim(model, RECIPE)
    model.save_pretrained(tmp_path / "slim")
    torch.save(of_an_image(model), tmp_path / "logits.pt")
    program = """if True:
        import sys
        sys.modules["llmslim"] = None
        import torch, transformers
        for auto in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
            model = getattr(transformers, auto).from_pretrained("slim", trust_remote_code=True)
            pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
            ids = torch.tensor([[5, 6, *[99] * 4, 7, 8]])
            with torch.no_grad():
                logits = model.eval()(input_ids=ids, pixel_values=pixels).logits
            torch.testing.assert_close(logits, torch.load("logits.pt"))
    """
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_the_class_that_architectures_names_is_kept(tmp_path: Path) -> None:
    model = tiny_multimodal("llama4")
    model.save_pretrained(tmp_path)
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "llama4_text"
    assert type(llmslim.load(tmp_path)) is tf.Llama4ForConditionalGeneration


def source(folder: Path) -> Path:
    """Write a Llava with a tokenizer and the files of a processor."""
    llava().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    files = {
        "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"},
        "processor_config.json": {"processor_class": "LlavaProcessor", "patch_size": 14},
        "video_preprocessor_config.json": {"size": 28},
        "chat_template.json": {"chat_template": "{{ 'image' }}"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tf.GenerationConfig(max_new_tokens=7, eos_token_id=2).save_pretrained(folder)
    return folder


KEPT = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",
)


@pytest.mark.parametrize("fitted", [False, True])
def test_processors_and_templates_travel(fitted: bool, tmp_path: Path) -> None:
    dense = source(tmp_path / "dense")
    extra = {}
    if fitted:
        (tmp_path / "t.txt").write_text("a b c d e f g h " * 400)
        extra = {"calibration": str(tmp_path / "t.txt"), "calibration_tokens": 512}
    result = llmslim.convert(dense, RECIPE, tmp_path / "slim", **extra)
    exported = llmslim.export_dense(tmp_path / "slim", tmp_path / "exported")
    for folder in (result.path, exported):
        for name in KEPT:
            assert (folder / name).read_bytes() == (dense / name).read_bytes()
        # The tokenizer's own template is not the processor's.
        assert not (folder / "chat_template.jinja").exists()
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
        assert tf.GenerationConfig.from_pretrained(folder).max_new_tokens == 7
        assert llmslim.verify(folder).ok
    assert result.auto_class == "AutoModelForImageTextToText"
    card = (result.path / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "AutoProcessor" in card
    assert "AutoModelForCausalLM" not in card
    reported = json.loads((result.path / "llmslim_manifest.json").read_text())["source"]["files"]
    assert set(KEPT) < set(reported)
    plain = tf.AutoModelForImageTextToText.from_pretrained(exported)
    slim = tf.AutoModelForImageTextToText.from_pretrained(result.path)
    assert type(plain) is tf.LlavaForConditionalGeneration
    torch.testing.assert_close(of_an_image(plain), of_an_image(slim), rtol=1e-4, atol=1e-4)


def test_a_healed_one_still_reads_images_and_keeps_its_processor(tmp_path: Path) -> None:
    dense = source(tmp_path / "dense")
    slim = llmslim.convert(dense, RECIPE, tmp_path / "slim").path
    (tmp_path / "t.txt").write_text("the cat sat on the mat " * 200)
    llmslim.heal(
        slim,
        data=str(tmp_path / "t.txt"),
        teacher=dense,
        tokens=512,
        out=tmp_path / "healed",
        settings={"batch_size": 2, "context_length": 32, "learning_rate": 1e-2},
    )
    exported = llmslim.export_dense(tmp_path / "healed", tmp_path / "exported")
    for folder in (tmp_path / "healed", exported):
        assert all((folder / n).read_bytes() == (dense / n).read_bytes() for n in KEPT)
        assert llmslim.verify(folder).ok
    before, healed, plain = (
        tf.AutoModelForImageTextToText.from_pretrained(folder)
        for folder in (slim, tmp_path / "healed", exported)
    )
    assert not torch.allclose(of_an_image(healed), of_an_image(before), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(of_an_image(plain), of_an_image(healed), rtol=1e-4, atol=1e-4)
    tower = {k: v for k, v in before.state_dict().items() if "vision" in k}
    assert tower  # text says nothing of images
    assert all(torch.equal(healed.state_dict()[key], value) for key, value in tower.items())


def test_templates_of_several_names_travel(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    llava().save_pretrained(dense)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(dense)
    llmslim.convert(dense, RECIPE, tmp_path / "slim")
    again = tf.AutoTokenizer.from_pretrained(tmp_path / "slim")
    assert again.chat_template == tokenizer.chat_template


def test_a_model_without_a_tokenizer_keeps_its_templates(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "chat_template.jinja").write_text("{{ 1 }}")
    (tmp_path / "dense" / "additional_chat_templates").mkdir()
    (tmp_path / "dense" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 2 }}")
    llmslim.convert(tmp_path / "dense", RECIPE, tmp_path / "slim")
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "slim" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def test_models_of_text_keep_their_auto_class() -> None:
    config = tf.LlamaConfig(architectures=["LlamaForCausalLM"])
    assert auto_class_of(config) is tf.AutoModelForCausalLM
    assert auto_class_of(tf.BartConfig()) is tf.AutoModelForCausalLM
    assert "llava" in of_images_or_sound()
    assert "gemma3" not in of_images_or_sound()


def test_an_encoder_of_images_alone_does_not_answer(tmp_path: Path) -> None:
    assert answer(tiny_multimodal("pix2struct")) is None
    with pytest.raises(llmslim.SlimError):
        walk(tiny_multimodal("pix2struct"))


def test_writing_a_model_that_was_made_in_memory(tmp_path: Path) -> None:
    model = llava()
    write_checkpoint(model, tmp_path / "dense")
    llmslim.slim(model, RECIPE)
    llmslim.save(model, tmp_path / "slim")
    assert torch.equal(of_an_image(llmslim.load(tmp_path / "slim")), of_an_image(model))


def test_the_document_is_up_to_date() -> None:
    text = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    part = text.partition("\n## Models that read images or sound")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| `")]
    shown = {row[0].strip("| `"): row for row in rows}
    assert set(shown) == set(of_images_or_sound())
    assert all(row[1] == LISTED[name] for name, row in shown.items())
    not_tried = {name for name, row in shown.items() if row[5].startswith("not tried")}
    assert not_tried == NOT_BUILT & set(shown)
    assert {name for name, row in shown.items() if row[5].startswith("no:")} == NO_TRIP
