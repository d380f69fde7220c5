"""Chat templates built like those of well-known models, and tokenizers that have their tags.

Each is written for these tests and has what matters of the model's: its tags, what it adds at the
end only, what it strips, trims, moves or inserts.
"""

from __future__ import annotations

import re
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LOOP = "{% for m in messages %}"
_THOUGHT = (
    "{% set c = m.content or '' %}{% set r = m.reasoning_content or '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
_CHATML_TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_CALLS = (
    "{% for t in m.tool_calls or [] %}{{ '<tool_call>' + t.function.name + ' ' }}"
    "{{ t.function.arguments | tojson }}{{ '</tool_call>' }}{% endfor %}"
)
_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{{ tools | tojson }}{{ '<|im_end|>\\n' }}"
    "{% endif %}"
)

TEMPLATES = {
    "chatml": _LOOP + _CHATML_TURN + "{% endfor %}" + _CHATML_PROMPT,
    # A system prompt of its own; calls of tools.
    "qwen2.5": _TOOLS
    + "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}"
    "{% endif %}"
    + _LOOP
    + "{{ '<|im_start|>' + m.role + '\\n' }}{{ m.content or '' }}"
    + _CALLS
    + "{{ '<|im_end|>\\n' }}{% endfor %}"
    + _CHATML_PROMPT,
    # Thoughts only behind the last question of the user.
    "qwen3": _TOOLS
    + "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    + _LOOP
    + "{% if m.role == 'assistant' %}"
    + _THOUGHT
    + "{{ '<|im_start|>assistant\\n' }}{% if loop.index0 > ns.asked and (loop.last or r) %}"
    "{{ '<think>\\n' + r + '\\n</think>\\n\\n' }}{% endif %}{{ c }}"
    + _CALLS
    + "{{ '<|im_end|>\\n' }}{% else %}"
    + _CHATML_TURN
    + "{% endif %}{% endfor %}"
    + _CHATML_PROMPT,
    # An end of text at the very end only, and only where nothing is to follow.
    "phi3": _LOOP + "{% if m.role in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    "phi4-mini": _LOOP + "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    # The last answer ends otherwise than those before it; a thought begins in the prompt.
    "olmo3": "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{% endif %}"
    + _LOOP
    + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + m.content }}"
    "{% if loop.last %}{{ eos_token }}{% else %}{{ '<|im_end|>\\n' }}{% endif %}{% else %}"
    + _CHATML_TURN
    + "{% endif %}{% if loop.last and add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n<think>' }}{% endif %}{% endfor %}",
    # No end of a turn at all.
    "glm4": "[gMASK]<sop>" + _LOOP + "{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "glm4.5": "[gMASK]<sop>"
    + _LOOP
    + "{% if m.role == 'assistant' %}"
    + _THOUGHT
    + "{{ '<|assistant|>\\n<think>' + (r if loop.last else '') + '</think>\\n' + c.strip() }}"
    "{% else %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    # Thoughts are never written, but the prompt begins one.
    "deepseek-r1": "{{ bos_token }}"
    + _LOOP
    + "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<\uff5cUser\uff5c>' + m.content }}{% else %}"
    "{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] }}"
    "{{ '<\uff5cend▁of▁sentence\uff5c>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}",
    "llama3": "{{ bos_token }}"
    "{% if messages[0].role != 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday is a day.<|eot_id|>' }}{% endif %}"
    + _LOOP
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    # No system turn, other names of roles, and turns that alternate.
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}"
    + _LOOP
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    # The system prompt stands in the last question.
    "mistral": "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' %}"
    "{% set talk = messages[1:] if s else messages %}"
    "{% set ns = namespace(asked=0) %}{% for m in talk %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}{% for m in talk %}"
    "{% if m.role == 'user' %}{{ '[INST] ' }}{% if s and loop.index0 == ns.asked %}"
    "{{ s + '\\n\\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}"
    "{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
    "vicuna": "{{ 'A chat. ' if messages[0].role != 'system' }}"
    + _LOOP
    + "{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% elif "
    "m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ m.content + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    # Marks of its own.
    "smollm3": "{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}"
    + _LOOP
    + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _CHATML_PROMPT,
}

ENDS = {
    "chatml": "<|im_end|>\n",
    "qwen2.5": "<|im_end|>\n",
    "qwen3": "<|im_end|>\n",
    "phi3": "<|end|>\n",
    "phi4-mini": "<|end|>",
    "olmo3": "<|im_end|>\n",
    "glm4": "",
    "glm4.5": "",
    "deepseek-r1": "<\uff5cend▁of▁sentence\uff5c>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>\n",
    "mistral": "</s>",
    "vicuna": "</s>",
    "smollm3": "<|im_end|>\n",
}
"""What ends an answer that another turn follows."""
LAST_ENDS = {**ENDS, "phi3": "<|end|>\n</s>", "phi4-mini": "<|end|></s>", "olmo3": "</s>"}

_TAGS = re.compile(r"<[^<>\s']+>|\[[^\[\]\s'.0-9:]+\]")


def tokenizer_of(
    template: str | None, *, tags: bool = True, strip: str = "", **more: Any
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that has a template.

    Args:
        template: the chat template.
        tags: whether its tags are tokens of their own.
        strip: `rstrip` if these swallow the space behind them, as Phi-3's do; `lstrip` for that
            in front of them.
        more: further arguments.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<pad>", **more
    )
    tokenizer.chat_template = template
    if tags:
        found = dict.fromkeys(_TAGS.findall(template or ""))
        roles = ["<|system|>", "<|user|>", "<|assistant|>"]
        tokenizer.add_tokens(
            [
                AddedToken(tag, special=True, **({strip: True} if strip else {}))
                for tag in (*found, *roles)
            ]
        )
    return tokenizer
