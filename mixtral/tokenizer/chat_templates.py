"""Chat templates (Jinja): those of a folder or a GGUF file, by name, and ours by tokenizer version.

Ours say what mistral-common does for plain conversations, for the programs that read templates from model files, as
llama.cpp does. They put a space before the text after each control token, as sentencepiece does, so that the templates
have none. Tools are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from mixtral.config.table import warn_once
from mixtral.errors import MixtralError, shown
from mixtral.tokenizer.side_files import TEMPLATES as FOLDER
from mixtral.tokenizer.side_files import Beside, is_side_file

_GGUF = "tokenizer.chat_template"  # the default one; the others are _GGUF.NAME, and _GGUFs lists their names

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


def folder_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """The chat templates of a folder's small files (tokenizer/side_files.py), by name; "default" is the usual one.

    As in transformers, templates in files of their own make those in tokenizer_config.json void. Raises MixtralError,
    one line with the file, for what is no template.
    """
    found = {
        PurePosixPath(name).stem if "/" in name else "default": file_text(name, content)
        for name, content in files.items() if name.endswith(".jinja")
    }  # fmt: skip
    return found or _configured(Beside(files).config.get("chat_template"))


def file_text(name: str, content: bytes) -> str:
    """The text of a small file. Raises MixtralError when it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise MixtralError(f"{name}: not UTF-8 text at byte {error.start}") from None


def _configured(value: object) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json: one, or several with their names."""
    key = "tokenizer_config.json: chat_template"
    if value is None or isinstance(value, str):
        return {} if value is None else {"default": value}
    entries = [{"name": n, "template": t} for n, t in value.items()] if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise MixtralError(f"{key} must be a text or a list of templates, not {shown(value)}")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("name", "template")):
            raise MixtralError(f"{key}[{i}] must have a name and a template, not be {shown(entry)}")
    return {entry["name"]: entry["template"] for entry in entries}


def template_files(templates: Mapping[str, str]) -> dict[str, bytes]:
    """Templates by name -> the files that hold them; one whose name no file can have is left out with a warning."""
    files = {}
    for name, text in templates.items():
        file = "chat_template.jinja" if name == "default" else f"{FOLDER}/{name}.jinja"
        if name and is_side_file(file):
            files[file] = text.encode()
        else:
            warn_once(f"{_GGUF}: the template named {shown(name)} is left out: that is no name for a file")
    return files


def gguf_templates(templates: Mapping[str, str]) -> dict[str, Any]:
    """Templates by name -> metadata of a GGUF file."""
    named = {name: text for name, text in templates.items() if name != "default"}
    metadata: dict[str, Any] = {_GGUF: templates["default"]} if "default" in templates else {}
    if named:
        metadata[f"{_GGUF}s"] = list(named)
    return metadata | {f"{_GGUF}.{name}": text for name, text in named.items()}


def metadata_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a GGUF file's metadata, by name. Raises MixtralError, one line with the key, for others."""
    found = {}
    for key, text in metadata.items():
        if key == _GGUF or key.startswith(f"{_GGUF}."):
            if not isinstance(text, str):
                raise MixtralError(f"{key} must be a text, not {shown(text)}")
            found["default" if key == _GGUF else key.removeprefix(f"{_GGUF}.")] = text
    return found
