"""Which class transformers gives a tokenizer, and the special tokens that a class has by itself.

python tokenizer_classes.py > ../src/chat/tokenizer_classes.json
"""

import inspect
import json

import transformers
from transformers.models.auto import tokenization_auto as auto

SPECIAL = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
# The plain ones: they take a tokenizer.json as it is.
PLAIN = {"TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", "MistralCommonBackend"}

models = {model: name for model, name in auto.TOKENIZER_MAPPING_NAMES.items() if name}
classes = {}
known = {name for name in dir(transformers) if name.endswith("Tokenizer")}
for name in sorted(set(models.values()) | known):
    try:
        found = auto.tokenizer_class_from_name(name)
    except (ImportError, AttributeError):  # a class that needs a library that is not there
        continue
    if found is None or found.__name__ in PLAIN:
        continue
    parameters = inspect.signature(found.__init__).parameters
    classes[name.removesuffix("Fast")] = {
        key: None if parameters[key].default is None else str(parameters[key].default)
        for key in SPECIAL
        if key in parameters and parameters[key].default is not inspect.Parameter.empty
    }
print(
    json.dumps(
        {
            "models": dict(sorted(models.items())),
            "distrusted": sorted(auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS),
            "classes": classes,
        },
        ensure_ascii=False,
        indent=1,
    )
)
