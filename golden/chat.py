"""Records what transformers renders of chat templates.

python chat.py

Reads chat/conversations.json, chat/templates/*.jinja and the templates in chat/snippets.json; writes the renderings to
chat/renderings.json and into chat/snippets.json. Special tokens of small tokenizers go into chat/special_tokens.json. The time is 2024-02-09 15:04:05.123456 in a zone one hour east.
A case that fails in Python has its exception's type instead of a text.
"""

import datetime
import json
import pathlib
import tempfile

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent / "chat"


class Fixed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        zone = datetime.timezone(datetime.timedelta(hours=1))
        return datetime.datetime(2024, 2, 9, 15, 4, 5, 123456) if tz is None else cls(2024, 2, 9, 15, 4, 5, 123456, zone)


chat_template_utils._cached_compile_jinja_template.__globals__["datetime"] = Fixed


def read(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def write(name, value):
    (HERE / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


def rendered(render):
    try:
        return {"text": render()}
    except Exception as error:
        return {"error": type(error).__name__}


def tokenizer(tokens):
    plain = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=plain, **tokens)


def record_templates():
    conversations = read("conversations.json")
    found = {}
    for path in sorted((HERE / "templates").glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        tok = tokenizer(conversations["tokens"])
        found[path.stem] = {}
        for name, conversation in conversations["conversations"].items():
            arguments = dict(conversation)
            messages = arguments.pop("messages")
            arguments.setdefault("add_generation_prompt", True)
            case = rendered(
                lambda: tok.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
            )
            found[path.stem][name] = case.get("text", case)
    write("renderings.json", found)


def record_snippets():
    snippets = read("snippets.json")
    for case in snippets["cases"]:
        case.pop("text", None), case.pop("error", None)
        compiled = chat_template_utils._cached_compile_jinja_template
        case.update(rendered(lambda: compiled(case["template"]).render(**snippets["variables"])))
        if "refused" in case:  # what Python prints is another text each time
            case.pop("text", None)
    write("snippets.json", snippets)


def record_special_tokens():
    special = read("special_tokens.json")
    for case in special["cases"]:
        files = {"tokenizer.json": special["tokenizers"][case["tokenizer"]], **case["files"]}
        with tempfile.TemporaryDirectory() as folder:
            for name, value in files.items():
                (pathlib.Path(folder) / name).write_text(json.dumps(value), encoding="utf-8")
            tok = AutoTokenizer.from_pretrained(folder)
        case.update(named=dict(tok.special_tokens_map), eos=tok.eos_token_id)
    write("special_tokens.json", special)


record_templates()
record_snippets()
record_special_tokens()
