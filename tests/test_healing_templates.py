"""Text for healing as the model sees it: templates, and on which tokens the loss falls."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from helpers_checkpoint import tiny_tokenizer
from helpers_data import alone as alone
from helpers_data import jsonl, with_start
from helpers_healing_data import (
    CHATML,
    EOS,
    heal,
    problem,
    tagged_tokenizer,
    texts_in,
)

from llmslim.data.prompts import Encoder


def test_the_reports_template(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"instruction": "Q", "response": "A"}])
    rows = jsonl(tmp_path / "b.jsonl", [{"instruction": "Q", "response": "A"}] * 2)
    tokenizer = tagged_tokenizer()
    text = heal(rows, tokenizer=tokenizer, template="report", length=16, held_out=0)
    (row,) = text.train
    written = "<|user|>Q<|end|><|assistant|>A<|end|><|endoftext|>"
    ids = [0, *tokenizer(written, add_special_tokens=False)["input_ids"]]
    assert len(ids) == 8  # a token each: the start, Q, A and five tags
    assert row["input_ids"].tolist() == ids * 2
    assert row["labels"].tolist() == [-100, *ids[1:]] * 2
    answers = heal(rows, tokenizer=tokenizer, template="report", length=16, loss_on="answers")
    assert answers.train[0]["labels"][:8].tolist() == [-100] * 5 + ids[5:]
    assert text.notes == ()
    note = heal([name, rows], template="report").notes[-1]
    assert "no token for <|user|>, <|assistant|>, <|end|>, <|endoftext|>" in note


TALK = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]


def masked(template: str | None, document: Any, **options: Any) -> tuple[str, str, Counter[str]]:
    """Return what a document becomes, and the part of it that is learned."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, loss_on="answers", **options)
    (ids,) = encoder([document])
    whole = tokenizer.decode([i if i >= 0 else ~i for i in ids.tolist()])
    return whole, tokenizer.decode([i for i in ids.tolist() if i >= 0]), encoder.counts


@pytest.mark.parametrize(
    ("template", "document", "whole", "learned", "happened"),
    [
        (CHATML, TALK[:2], "[user]Q1~[assistant]A1~", "A1~", {}),
        (
            CHATML,
            TALK,
            "[user]Q1~[assistant]A1~[user]Q2~[assistant]A2~",
            "A1~A2~",
            {},
        ),
        # Earlier answers are rewritten: the text of the first turns is no beginning of the whole.
        (
            "{% for m in messages %}[{{ m['role'] }}]"
            "{{ m['content'] if loop.last else m['content'][:1] }}~{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            TALK,
            "[user]Q~[assistant]A~[user]Q~[assistant]A2~",
            "A~A2~",
            {},
        ),
        # Nothing says that the answer comes: its tag is learned with it.
        (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}~{% endfor %}",
            TALK[:2],
            "[user]Q1~[assistant]A1~",
            "[assistant]A1~",
            {},
        ),
        (CHATML, [*TALK[:1], {**TALK[1], "unfinished": True}], "[user]Q1~[assistant]A1", "A1", {}),
        (None, TALK[:2], "Q1A1</s>", "A1</s>", {}),
        (None, [*TALK[:1], {**TALK[1], "unfinished": True}], "Q1A1", "A1", {}),
        (CHATML, TALK[:1], "", "", {"silent": 1}),
        (CHATML, "text", "text</s>", "text</s>", {"whole": 1}),
        ("{{ raise_exception('no') }}", TALK[:2], "Q1A1</s>", "A1</s>", {"refused": 1}),
        (CHATML, None, "", "", {}),
        (CHATML, "", "", "", {}),
    ],
)
def test_answers_are_found_in_any_template(template, document, whole, learned, happened):
    assert masked(template, document) == (whole, learned, Counter(happened))


def test_a_token_across_the_border_is_learned():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(["q", ":", "a", ":a", "</s>"])},
            merges=[(":", "a")],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if loop.first %} :{% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (ids,) = Encoder(tokenizer, loss_on="answers")([turns])
    assert ids.tolist() == [~0, 3]


def test_masks_reach_the_labels(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    rows = [{"messages": TALK}, {"text": "plain"}, {"messages": TALK[:1]}]
    names = [jsonl(tmp_path / f"{i}.jsonl", [row] * 2) for i, row in enumerate(rows)]
    text = heal(names[:2], tokenizer=tokenizer, loss_on="answers", held_out=0)
    assert sorted(texts_in(text.train, learned=True)) == ["A1~A2~"] * 2 + ["lain"] * 2
    assert text.notes == (
        "1.jsonl: 2 documents are plain text without turns; the loss falls on all of each.",
    )
    said = problem(names[2], tokenizer=tokenizer, loss_on="answers")
    assert "2.jsonl: no text is left" in said
    assert "2 documents hold nothing to learn from" in said


def test_plain_texts_begin_and_end_as_the_tokenizer_has_it(tmp_path):
    tokenizer = with_start(tiny_tokenizer())
    text = heal(jsonl(tmp_path / "a.jsonl", [{"text": "ab"}] * 2), tokenizer=tokenizer, length=4)
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert text.train[0]["input_ids"].tolist() == [0, a, b, EOS]
    # A chat template brings its own.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{"prompt": "a", "completion": "b"}] * 2
    text = heal(jsonl(tmp_path / "b.jsonl", rows), tokenizer=tokenizer, length=2)
    assert text.train[0]["input_ids"].tolist() == [a, b]


def test_long_documents_are_cut_with_a_note(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"text": "x" * 30}, {"text": "y"}, {"text": "z"}])
    text = heal(name, length=8, held_out=0)
    assert "".join(texts_in(text.train)).count("x") == 30
    assert text.notes == (
        "a.jsonl: 1 documents are longer than the context of 8 tokens and were cut into pieces.",
    )


def test_answers_that_a_template_leaves_out_are_counted():
    without_the_first = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
        "[{{ m['content'] }}]{% endif %}{% endfor %}"
    )
    whole, learned, happened = masked(without_the_first, TALK)
    assert (whole, learned) == ("[Q1][Q2][A2]", "[A2]")
    assert happened["lost"] == 1
