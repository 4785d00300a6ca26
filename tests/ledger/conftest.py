"""Tokenizers trained here, and chat templates in the style of several model families, written for these tests."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kv_retract.ledger.render import Renderer

SPECIALS = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
]
CORPUS = [
    "The tool returned the price of the flight to Oslo: 380 euros, and the train leaves at 09:40 from platform seven.",
    "You are a helpful assistant. Use the search tool where you need it, and say so when you do not know the answer.",
    '{"name": "search", "arguments": {"query": "weather in Bergen", "limit": 3, "exact": true, "tags": ["a", "b"]}}',
    "user assistant system tool <tool_call> </tool_call> <tool_response> <think> \n\n  \t \n  error: not found",
    "naïve café Zürich, мир, 日本語のテキスト, עברית, emoji 😀 👩‍👩‍👧, e\u0301, ok.",
] * 4

CHATML = """
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Answer with <tool_call> objects.<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments if call.function.arguments is string
    else call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """<|begin_of_text|>
{%- for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>

{% if m.tool_calls %}{% for call in m.tool_calls -%}
{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}
{%- endfor %}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

# The system prompt goes into the newest user turn; turns must alternate.
MISTRAL = """<s>
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- set turn = namespace(user=true) %}
{%- for m in rest if m.role in ('user', 'assistant') and not m.tool_calls %}
    {%- if (m.role == 'user') != turn.user %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- set turn.user = not turn.user %}
{%- endfor %}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if system and loop.last else '') + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + '}' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
            {{- ', ' if not loop.last }}
        {%- endfor %}
        {{- ']</s>' }}
    {%- else %}
        {{- ' ' + m.content + '</s>' }}
    {%- endif %}
{%- endfor %}"""

PHI3 = """
{%- for m in messages %}<|{{ m.role if m.role != 'tool' else 'user' }}|>
{{ m.content }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""

# Reasoning only behind the newest user message, whether it came apart or inside of the content.
QWEN3 = """
{%- set at = namespace(user=0) %}
{%- for m in messages if m.role == 'user' %}{% set at.user = loop.index0 %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set at.seen = (at.seen or 0) + 1 %}{% endif %}
    {%- set content = m.content %}
    {%- set reasoning = m.reasoning_content or '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and reasoning and at.seen == at.user + 1 %}
        {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}
        {{- content }}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Tool results as JSON strings, calls as one element for each argument.
JSON_XML = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'tool' %}{{ '{"result": ' + m.content | tojson + '}' }}{% else %}{{ m.content }}{% endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '<function=' + call.function.name + '>\\n' }}
        {%- for key, value in call.function.arguments.items() %}
            {{- '<parameter=' + key + '>' }}{{ value }}{{ '</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Looks at the first characters of what users say, repeats names, indents arguments, drops system messages.
PICKY = """
{%- set last = namespace(name='') %}
{%- for m in messages if m.role != 'system' %}
    {{- '<|im_start|>' + (('functions.' + last.name) if m.role == 'tool' else m.role) + '\\n' }}
    {%- if m.role == 'user' and m.content.startswith('/') %}{{ '(command) ' }}{% endif %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}
        {%- set last.name = call.function.name %}
        {{- ' to=' + call.function.name + ' json ' + call.function.arguments | tojson(indent=2) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "qwen3": QWEN3,
    "json_xml": JSON_XML,
    "picky": PICKY,
}
EOS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|end|>"}


def byte_level(trim_offsets):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe


def sentencepiece_like():
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", *SPECIALS, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe


def fast(bpe, template, eos="</s>"):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=SPECIALS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def renderers():
    """Renderers by the name of their template; one of a sentencepiece-like tokenizer."""
    plain, trimmed = byte_level(False), byte_level(True)
    made = {}
    for number, (name, template) in enumerate(TEMPLATES.items()):
        made[name] = Renderer(fast(trimmed if number % 2 else plain, template, EOS.get(name, "</s>")))
    made["sentencepiece"] = Renderer(fast(sentencepiece_like(), PHI3, "<|end|>"))
    return made
