"""Chat templates (Jinja) that say what mistral-common does for plain conversations, by tokenizer version.

For the programs that read templates from model files, as llama.cpp does. They put a space before the text after each
control token, as sentencepiece does, so that the templates have none. Tools are not among them.
"""

from __future__ import annotations

_LOOP = """{{- bos_token }}
{%- set said = namespace(system='', last=0) %}
{%- set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set said.system = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for turn in turns if turn['role'] == 'user' %}
    {%- set said.last = loop.length %}
{%- endfor %}
{%- set said.users = 0 %}
{%- for turn in turns %}
    {%- if turn['role'] == 'user' %}
        {%- set said.users = said.users + 1 %}
        {%- set system = said.system if <WHERE> else '' %}
        {{- '<OPEN>' + system + turn['content'] + '<CLOSE>' }}
    {%- elif turn['role'] == 'assistant' %}
        {{- '<GAP>' + turn['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('only system, user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}
"""


def _template(opening: str, closing: str, gap: str, where: str) -> str:
    values = {"<OPEN>": opening, "<CLOSE>": closing, "<GAP>": gap, "<WHERE>": where}
    text = _LOOP
    for name, value in values.items():
        text = text.replace(name, value)
    return text


TEMPLATES = {
    "v1": _template("[INST] ", " [/INST]", " ", "said.users == 1"),  # the brackets are plain text there
    "v2": _template("[INST]", "[/INST]", "", "said.users == said.last"),
    "v3": _template("[INST]", "[/INST]", "", "said.users == said.last"),
}
