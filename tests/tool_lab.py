"""What tests of calls share: a tokenizer of single characters, and templates in four styles.

The templates are written for these tests, as short as each family's manner allows.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from adapters.text_bundle import TextBundle

END = "<|end|>"
# Special, as Mistral's and Llama's are, so that decoding leaves them out.
SPECIAL = (END, "[TOOL_CALLS]", "<|python_tag|>")
CHARACTERS = [chr(code) for code in range(32, 256)] + ["\n", "\t"]

HERMES = """
{%- if tools %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}
{%- for m in messages %}
{%- if m.role == "tool" %}[tool]<tool_response>{{ m.content }}</tool_response>
{%- else %}[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}
{% endfor %}[assistant]"""

LLAMA = """
{%- if tools is not none %}Environment: ipython
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}Answer with {"name": function, "parameters": {"name": value}}
{% endif %}
{%- for m in messages %}
{%- if m.role == "tool" %}[ipython]{{ m.content | tojson }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{%- set call = m.tool_calls[0].function %}[assistant]
{{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}
{%- else %}[{{ m.role }}]{{ m.content | trim }}{% endif %}
{% endfor %}[assistant]"""

MISTRAL = """
{%- if tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.tool_calls is defined %}[TOOL_CALLS] [
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif %}
{{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson }}
{%- endfor %}]
{%- elif m.role == "tool" %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif -%}
[TOOL_RESULTS]{{ m.tool_call_id }}: {{ m.content }}[/TOOL_RESULTS]
{%- else %}[INST]{{ m.content }}[/INST]{% endif %}
{%- endfor %}"""

# Knows no functions, no system, and wants roles to alternate.
ALTERNATING = """
{%- for m in messages %}
{%- if (m.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("alternate") }}{% endif %}
[{{ m.role }}]{{ m.content }}
{%- endfor %}[assistant]"""


def echo(marks: str) -> str:
    """A template whose echo is the last message, and ends there; `marks` tell its family."""
    reads = "{% if tools %}{% endif %}"
    return f"{reads}{{# {marks} #}}{{{{ messages[-1].content }}}}{END}"


def bundle(chat_template: str) -> TextBundle:
    vocabulary = {character: place for place, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return TextBundle(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=chat_template,
        special_tokens={},
        eos_token_ids=(tokenizer.token_to_id(END),),
        generation_defaults={},
        context_length=1000,
        vocab_size=tokenizer.get_vocab_size(),
    )
