"""On which tokens the loss falls with `loss_on: answers`: truths written by hand, all templates."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from helpers_data import alone as alone
from helpers_templates import ENDS, LAST_ENDS, TEMPLATES, tokenizer_of
from transformers import ByT5Tokenizer

from llmslim.data import Conversation
from llmslim.data.prompts import Encoder


def turn(role: str, content: str, **more: Any) -> Any:
    return {"role": role, "content": content, **more}


ASK, ANSWER = turn("user", "Q1 x"), turn("assistant", "A1 y")
TALK = [ASK, ANSWER, turn("user", "Q2"), turn("assistant", "A2")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city"}}


def masked(tokenizer: Any, document: Any, **options: Any) -> tuple[str, list[str], Counter[str]]:
    """Return what a document becomes, the stretches of it that are learned, and what is counted."""
    encoder = Encoder(tokenizer, loss_on="answers", **options)
    (ids,) = encoder([document])
    whole = tokenizer.decode([i if i >= 0 else ~i for i in ids.tolist()])
    stretches: list[list[int]] = [[]]
    for i in ids.tolist():
        if i >= 0:
            stretches[-1].append(i)
        elif stretches[-1]:
            stretches.append([])
    return whole, [tokenizer.decode(one) for one in stretches if one], +encoder.counts


def without_frame(name: str, learned: list[str]) -> list[str]:
    """Return what is learned without what a template puts around an answer without a thought."""
    frames = {"glm4": "\n", "glm4.5": "\n<think></think>\n", "qwen3": "<think>\n\n</think>\n\n"}
    bare = [one.removeprefix(frames.get(name, "")) for one in learned]
    return [one.removeprefix(" ") for one in bare] if name in {"mistral", "vicuna"} else bare


@pytest.mark.parametrize("tags", [True, False], ids=["tags", "spelt"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_of_a_long_conversation_is_learned_and_nothing_else(name, tags):
    tokenizer = tokenizer_of(TEMPLATES[name], tags=tags)
    for document in (TALK[:2], TALK, [turn("system", "S"), *TALK], TALK[:3]):
        whole, learned, counts = masked(tokenizer, document)
        if name != "gemma":
            assert whole == tokenizer.apply_chat_template(document, tokenize=False)
        answers = [one["content"] for one in document if one["role"] == "assistant"]
        truth = [answer + ENDS[name] for answer in answers]
        if document[-1]["role"] == "assistant":
            truth[-1] = answers[-1] + LAST_ENDS[name]
        assert without_frame(name, learned) == truth
        assert not counts


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "gemma"])
def test_where_the_assistant_begins_no_system_prompt_is_learned(name):
    document = [turn("assistant", "A0"), *TALK[:2]]
    _, learned, counts = masked(tokenizer_of(TEMPLATES[name]), document)
    assert without_frame(name, learned) == ["A0" + ENDS[name], "A1 y" + LAST_ENDS[name]]
    assert not counts


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        # The tag in front of an answer swallows the space that begins it.
        ("phi3", ["A1<|end|>", "A2<|end|></s>"]),
        ("phi4-mini", ["A1<|end|>", "A2<|end|></s>"]),
        ("glm4", ["A1", "A2"]),
        # Here a word stands between them.
        ("chatml", ["\n  A1<|im_end|>", "\tA2<|im_end|>"]),
        ("olmo3", ["\n  A1<|im_end|>", "\tA2</s>"]),
        ("llama3", ["A1<|eot_id|>", "A2<|eot_id|>"]),
    ],
)
def test_tags_that_take_in_space_after_them_are_not_learned(name, truth):
    document = [ASK, turn("assistant", "\n  A1"), turn("user", " Q2"), turn("assistant", "\tA2")]
    tokenizer = tokenizer_of(TEMPLATES[name], strip="rstrip")
    assert masked(tokenizer, document)[1] == truth


def test_tags_that_take_in_space_before_them_are_not_learned():
    document = [ASK, turn("assistant", " A1 "), turn("user", " Q2"), turn("assistant", "A2\n")]
    tokenizer = tokenizer_of(TEMPLATES["phi3"], strip="lstrip")
    assert masked(tokenizer, document)[1] == [" A1<|end|>", "A2<|end|>\n</s>"]


def test_a_template_s_own_marks_give_the_tokenizer_s_own_mask():
    tokenizer = tokenizer_of(TEMPLATES["smollm3"])
    truth = tokenizer.apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (ids,) = Encoder(tokenizer, loss_on="answers")([TALK])
    assert [int(i >= 0) for i in ids.tolist()] == truth["assistant_masks"]
    assert [i if i >= 0 else ~i for i in ids.tolist()] == truth["input_ids"]


def test_thoughts_are_learned_where_they_are_written():
    thoughtful = [
        ASK, turn("assistant", "A1", reasoning_content="T1"),
        turn("user", "Q2"), turn("assistant", "A2", reasoning_content="T2"),
    ]  # fmt: skip
    inside = [
        ASK, turn("assistant", "<think>\nT1\n</think>\n\nA1"),
        turn("user", "Q2"), turn("assistant", "<think>\nT2\n</think>\n\nA2"),
    ]  # fmt: skip
    for document in (thoughtful, inside):
        tokenizer = tokenizer_of(TEMPLATES["qwen3"])
        encoder = Encoder(tokenizer, loss_on="answers")
        _, learned, _ = masked(tokenizer, document)
        assert learned == ["A1<|im_end|>\n", "<think>\nT2\n</think>\n\nA2<|im_end|>\n"]
        encoder([document])
        assert encoder.notes("a") == ["a: the chat template does not write reasoning (1)."]
    _, learned, _ = masked(tokenizer_of(TEMPLATES["deepseek-r1"]), inside)
    assert [one.strip() for one in learned] == [
        f"{a}<\uff5cend▁of▁sentence\uff5c>" for a in ("A1", "A2")
    ]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_calls_of_tools_are_learned_and_replies_of_tools_are_not(name):
    document = Conversation(
        [ASK, turn("assistant", "", tool_calls=[CALL]), turn("tool", "20 C"), ANSWER], [TOOL]
    )
    whole, learned, counts = masked(tokenizer_of(TEMPLATES[name]), document)
    call = '<tool_call>weather {"city": "Rome"}</tool_call><|im_end|>\n'
    assert without_frame(name, learned) == [call, "A1 y<|im_end|>\n"]
    assert "of a city" in whole
    assert "20 C" in whole
    assert not counts


def test_a_call_that_the_template_does_not_write_is_not_learned_as_silence():
    document = Conversation(
        [ASK, turn("assistant", "", tool_calls=[CALL]), turn("tool", "20 C"), ANSWER], [TOOL]
    )
    tokenizer = tokenizer_of(TEMPLATES["phi3"])
    encoder = Encoder(tokenizer, loss_on="answers")
    (ids,) = encoder([document])
    assert tokenizer.decode([i for i in ids.tolist() if i >= 0]) == "A1 y<|end|>\n</s>"
    unwritten, lost = encoder.notes("a")[::-1]
    assert "calls of tools (1)" in unwritten
    assert "turns of tool (1)" in unwritten
    assert "tools (1)" in unwritten
    assert lost.startswith("a: 1 answers cannot be found")


@pytest.mark.parametrize(
    ("template", "written"),
    [
        # No content where a tool is called; arguments as text.
        (
            "{% for m in messages %}{% if m.content is defined %}{{ m.role + ':' + m.content }}"
            "{% else %}{{ m.tool_calls[0].function.arguments }}{% endif %}~{% endfor %}",
            '{"city": "Rome"}~',
        ),
        # Text added to text: an object is refused.
        (
            "{% for m in messages %}{{ m.role + ':' + m.content }}{% for t in m.tool_calls or [] %}"
            "{{ t.function.name + t.function.arguments }}{% endfor %}~{% endfor %}",
            'weather{"city": "Rome"}~',
        ),
        # Parts.
        (
            "{% for m in messages %}{{ m.role + ':' }}{% for p in m.content or [] %}"
            "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
            "{% for t in m.tool_calls or [] %}{{ t | tojson }}{% endfor %}~{% endfor %}",
            '"weather", "arguments": {"city": "Rome"}}}~',
        ),
    ],
)
def test_a_conversation_is_given_as_the_template_wants_it(template, written):
    document = [ASK, turn("assistant", "", tool_calls=[CALL]), turn("tool", "20 C"), ANSWER]
    encoder = Encoder(tokenizer_of(template, tags=False))
    text = encoder.text(document)
    assert written in text
    assert all(one["content"] in text for one in document)
    assert encoder.notes("a") in ([], ["a: the chat template does not write calls of tools (1)."])


def test_a_system_prompt_goes_to_the_user_where_there_is_no_turn_for_it():
    encoder = Encoder(tokenizer_of(TEMPLATES["gemma"]))
    text = encoder.text([turn("system", "S"), *TALK])
    assert text.startswith("<s><start_of_turn>user\nS\n\nQ1 x<end_of_turn>\n<start_of_turn>model\n")
    (note,) = encoder.notes("a")
    assert "no system turn; in 1 conversations" in note


def test_equal_text_elsewhere_is_not_taken_for_the_answer():
    template = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}~{% endif %}{% endfor %}"
    )
    encoder = Encoder(tokenizer_of(template))
    encoder.text([ASK, turn("tool", "20 C"), turn("assistant", "It is 20 C.")])
    assert encoder.notes("a") == ["a: the chat template does not write turns of tool (1)."]


def test_a_template_without_an_end_of_turn_ends_where_the_model_stops():
    tokenizer = tokenizer_of(TEMPLATES["glm4"])
    stops = frozenset(tokenizer.convert_tokens_to_ids(["<|user|>", "</s>"]))
    _, learned, _ = masked(tokenizer, TALK, stops=stops)
    assert learned == ["\nA1 y<|user|>", "\nA2"]
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    stops = frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]))
    assert masked(tokenizer, TALK, stops=stops)[1] == ["A1 y<|im_end|>\n", "A2<|im_end|>\n"]


def test_a_tokenizer_without_offsets():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = TEMPLATES["phi3"]
    _, learned, counts = masked(tokenizer, TALK)
    assert learned == ["A1 y<|end|>\n", "A2<|end|></s>"]  # </s> swallows the line end
    assert not counts


ASKING = [
    ASK, turn("assistant", "I look.", tool_calls=[CALL]), turn("tool", "20 C"), ANSWER, *TALK[2:],
]  # fmt: skip
NAMED = "{% set ns = namespace(name='') %}{% for m in messages %}{% set c = m.tool_calls or [] %}"


@pytest.mark.parametrize(
    ("template", "truth"),
    [
        # What a tool says stands behind the name of the function, before what the assistant says.
        (
            NAMED + "{% if m.role != 'tool' %}{{ '<turn>' + m.role + '\\n' }}{% endif %}"
            "{% if m.role == 'tool' %}{% elif c %}{{ '<call>' + c[0].function.name + '</call>' }}"
            "{% set next = messages[loop.index] if not loop.last %}{% if next.role == 'tool' %}"
            "{{ '<reply>' + c[0].function.name + ':' + next.content + '</reply>' }}{% endif %}"
            "{{ m.content }}{% else %}{{ m.content }}{% endif %}"
            "{% if m.role != 'tool' %}{{ '</turn>\\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<turn>assistant\\n' }}{% endif %}",
            ["<call>weather</call>", "I look.</turn>\n", "A1 y</turn>\n", "A2</turn>\n"],
        ),
        # A tool's turn has the name of the function; calls end otherwise than answers.
        (
            NAMED + "{% if c %}{% set ns.name = c[0].function.name %}"
            "{{ '<start>assistant to=' + ns.name + '<message>' + m.content }}"
            "{{ '<call>' if loop.index0 < messages | length - 1 else '<end>' }}"
            "{% elif m.role == 'tool' %}"
            "{{ '<start>' + ns.name + '<message>' + m.content + '<end>' }}"
            "{% else %}{{ '<start>' + m.role + '<message>' + m.content + '<end>' }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant' }}{% endif %}",
            [" to=weather<message>I look.<call>"] + [f"<message>{a}<end>" for a in ("A1 y", "A2")],
        ),
    ],
)
def test_replies_of_tools_within_a_turn_are_not_learned(template, truth):
    whole, learned, _ = masked(tokenizer_of(template), Conversation(ASKING, [TOOL]))
    assert "20 C" in whole
    assert learned == truth


def test_a_prompt_may_end_in_more_line_ends_than_the_answer_begins_with():
    template = (
        "{% for m in messages %}\n  {{ '<' + m.role + '>\\n' + m.content + '</s>\\n' }}\n"
        "{% endfor %}\n{% if add_generation_prompt %}\n  {{ '<assistant>\\n' }}\n{% endif %}"
    )
    tokenizer = tokenizer_of(template)
    assert tokenizer.apply_chat_template(
        TALK[:1], tokenize=False, add_generation_prompt=True
    ).endswith("<assistant>\n\n")
    assert [one.rstrip() for one in masked(tokenizer, TALK)[1]] == ["A1 y</s>", "A2</s>"]


def test_a_header_that_is_always_written_at_the_end_is_no_part_of_an_answer():
    template = (
        "{% for m in messages %}{{ '<start><' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
        "{{ '<start><assistant>' }}"
    )
    _, learned, counts = masked(tokenizer_of(template), TALK)
    assert learned == ["A1 y</s>", "A2</s>"]
    assert not counts
