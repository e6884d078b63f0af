#!/usr/bin/env python3
"""Record what transformers' `generate` makes of a generation_config.json.

    record.py            writes the files beside it; install ../requirements.txt first

    processors.json   fixed scores behind fixed tokens, and what the chain of logits processors makes of them, for each of
                      many settings; -inf is null
    texts.json        what ../kjv-llama continues a prompt by, for each of many settings
    errors.json       settings that transformers refuses, when it loads the model or when it generates, and the key at fault
    strings.json      tokens of three kinds of tokenizers, and whether a stop string ends with the last of them
"""
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from transformers.generation.stopping_criteria import StopStringCriteria  # noqa: E402

HERE = Path(__file__).parent
KJV = HERE.parent / "kjv-llama"
INF = float("inf")


def write(name, cases):
    text = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    head = json.dumps({"transformers": transformers.__version__, "torch": torch.__version__})
    (HERE / name).write_text(f'{{"versions": {head}, "cases": [\n{text}\n]}}\n', encoding="utf-8")


# Each with eos_token_id 2 unless it says another.
PROCESSORS = [
    {}, {"renormalize_logits": True}, {"remove_invalid_values": True},
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.5}, {"encoder_repetition_penalty": 1.7}, {"encoder_repetition_penalty": 0.4},
    {"repetition_penalty": 2.0, "encoder_repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 40}, {"no_repeat_ngram_size": -1},
    {"encoder_no_repeat_ngram_size": 1}, {"encoder_no_repeat_ngram_size": 2}, {"encoder_no_repeat_ngram_size": 3},
    {"bad_words_ids": [[4], [7, 5], [3, 7], [9, 7, 5, 3, 7, 8], [2], [5, 7, 7]]}, {"bad_words_ids": [[2]]}, {"bad_words_ids": [[]]},
    {"bad_words_ids": [[2], [6]], "eos_token_id": [2, 6]}, {"bad_words_ids": [[2], [6]], "eos_token_id": None},
    {"sequence_bias": [[[4], 2.5], [[7, 5], -3.0], [[3, 7, 9], 4.0], [[7, 9], 0.25], [[9], -1.0]]},
    {"sequence_bias": [[[4], 2.5], [[4], -1.5]]}, {"sequence_bias": [[[4], -INF], [[5], 1e30]]},
    {"min_length": 8}, {"min_length": 30, "eos_token_id": [2, 6, 9]}, {"min_length": -3}, {"min_new_tokens": 3}, {"min_new_tokens": 9},
    {"min_new_tokens": 0, "min_length": 30}, {"min_length": 30, "eos_token_id": None},
    {"forced_bos_token_id": 11}, {"forced_eos_token_id": 12, "max_new_tokens": 6}, {"forced_eos_token_id": [12, 13], "max_length": 10},
    {"forced_eos_token_id": 12, "max_new_tokens": 1}, {"forced_eos_token_id": 5, "max_length": 10, "max_new_tokens": 6},
    {"suppress_tokens": [1, 2, 3, 99, -4]}, {"suppress_tokens": []}, {"begin_suppress_tokens": [5, 6]}, {"begin_suppress_tokens": [5, 6], "forced_bos_token_id": 11},
    {"exponential_decay_length_penalty": [2, 1.5]}, {"exponential_decay_length_penalty": [-2, 1.2], "eos_token_id": [2, 6, 2]},
    {"exponential_decay_length_penalty": [0, 0.5]}, {"remove_invalid_values": True, "suppress_tokens": [4], "exponential_decay_length_penalty": [1, 2.0]},
    # Without do_sample these change nothing.
    {"temperature": 0.5, "top_k": 3, "top_p": 0.2, "min_p": 0.5, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "top_h": 0.1},
    *({"do_sample": True, **keys} for keys in [
        {}, {"top_k": 0}, {"top_k": 1}, {"top_k": 5}, {"top_k": 1000}, {"top_k": 0, "temperature": 0.3}, {"top_k": 0, "temperature": 4.0},
        {"top_k": 0, "top_p": 0.0}, {"top_k": 0, "top_p": 0.3}, {"top_k": 0, "top_p": 0.6}, {"top_k": 0, "top_p": 0.95}, {"top_k": 0, "top_p": 1.0}, {"top_k": 0, "top_p": 1.5},
        {"top_k": 0, "min_p": 0.0}, {"top_k": 0, "min_p": 0.1}, {"top_k": 0, "min_p": 0.6}, {"top_k": 0, "min_p": 1.0},
        {"top_k": 0, "typical_p": 0.1}, {"top_k": 0, "typical_p": 0.5}, {"top_k": 0, "typical_p": 0.95}, {"top_k": 0, "typical_p": 1.0}, {"top_k": 0, "typical_p": 1e-6},
        {"top_k": 0, "epsilon_cutoff": 0.02}, {"top_k": 0, "epsilon_cutoff": 0.2}, {"top_k": 0, "epsilon_cutoff": 0.99}, {"top_k": 0, "epsilon_cutoff": 0.0}, {"top_k": 0, "epsilon_cutoff": 1.0}, {"top_k": 0, "epsilon_cutoff": -1.0},
        {"top_k": 0, "eta_cutoff": 0.02}, {"top_k": 0, "eta_cutoff": 0.3}, {"top_k": 0, "eta_cutoff": 0.99}, {"top_k": 0, "eta_cutoff": 1.5},
        {"top_k": 0, "top_h": 0.1}, {"top_k": 0, "top_h": 0.4}, {"top_k": 0, "top_h": 0.8}, {"top_k": 0, "top_h": 1.0}, {"top_k": 0, "top_h": 1e-9},
        {"top_k": 6, "top_p": 0.7, "temperature": 1.7}, {"top_k": 12, "min_p": 0.2, "typical_p": 0.7, "renormalize_logits": True},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}, {"top_h": 0.6, "top_k": 4, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
        {"suppress_tokens": [4, 8, 15], "top_k": 3, "no_repeat_ngram_size": 2, "temperature": 0.9}, {"top_p": 0.5, "suppress_tokens": list(range(20))},
        {"typical_p": 0.4, "suppress_tokens": list(range(9))}, {"top_h": 0.5, "suppress_tokens": list(range(9))}, {"eta_cutoff": 0.2, "suppress_tokens": list(range(9))},
    ]),
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[4], [7, 9]], "sequence_bias": [[[7, 9], 50.0], [[8], 3.0]], "min_new_tokens": 7, "suppress_tokens": [20], "renormalize_logits": True},
]
CONTEXTS = [([3, 7, 7, 5], []), ([3, 7, 7, 5], [9, 7, 5, 3, 7]), ([1], []), ([1], [3, 7, 3, 7])]


def processors():
    torch.manual_seed(0)
    vocabulary = 24
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    rows = (torch.randn(len(CONTEXTS), vocabulary) * 2.0).tolist()
    for settings in PROCESSORS:
        settings = {"eos_token_id": 2, **settings}
        for (prompt, new), scores in zip(CONTEXTS, rows):
            odd = settings.get("remove_invalid_values")
            row = [INF, -INF, float("nan"), *scores[3:]] if odd else scores
            model.generation_config = GenerationConfig(**settings)
            config, _ = model._prepare_generation_config(None)
            model._prepare_special_tokens(config, True, device="cpu", batch_size=1)
            ids = torch.tensor([prompt])
            model._prepare_generated_length(config, settings.get("max_length") is None, settings.get("min_length") is None, "input_ids", len(prompt), ids)
            chain = model._get_logits_processor(config, input_ids_seq_length=len(prompt), encoder_input_ids=ids, device="cpu", model_kwargs={})
            made = chain(torch.tensor([prompt + new]), torch.tensor([row]))[0].tolist()
            assert not any(value != value for value in made), settings
            number = lambda value: None if value == -INF else "nan" if value != value else "inf" if value == INF else float(f"{value:.8g}")
            spelled = {k: [[s, {"__float__": "-Infinity"} if b == -INF else b] for s, b in v] if k == "sequence_bias" else v for k, v in settings.items()}
            yield {"settings": spelled, "prompt": prompt, "new": new, "scores": [number(v) for v in row], "expected": [number(v) for v in made]}


PROMPTS = ["In the beginning God created the heaven", "And the LORD spake unto Moses, saying,", "Blessed are they that"]
TEXTS = [
    {}, {"do_sample": False, "temperature": 0.5, "top_k": 3},
    {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}, {"encoder_no_repeat_ngram_size": 1}, {"encoder_no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.1}, {"repetition_penalty": 1.8}, {"encoder_repetition_penalty": 0.2},
    {"suppress_tokens": list(range(256, 700))}, {"suppress_tokens": list(range(3, 300))}, {"begin_suppress_tokens": list(range(256, 1200))},
    {"bad_words_ids": [[i] for i in range(260, 500)]}, {"bad_words_ids": [[261, i] for i in range(300, 2048)]}, {"bad_words_ids": [[1], [265], [270]]},
    {"sequence_bias": [[[300], 6.5]]}, {"sequence_bias": [[[i], -4.0] for i in range(257, 420)]}, {"sequence_bias": [[[50], 1000.0]]},
    {"min_new_tokens": 12, "eos_token_id": list(range(1, 600))}, {"min_new_tokens": 3, "eos_token_id": list(range(1, 600))}, {"min_length": 16, "eos_token_id": list(range(1, 900))},
    {"eos_token_id": list(range(1, 400))}, {"eos_token_id": [265, 260, 1]}, {"eos_token_id": None},
    {"max_length": 14, "max_new_tokens": None}, {"max_length": 20, "max_new_tokens": None}, {"max_length": 25, "max_new_tokens": 5},
    {"forced_eos_token_id": 1}, {"forced_eos_token_id": [77, 78]}, {"forced_eos_token_id": 400, "max_length": 15, "max_new_tokens": None},
    {"exponential_decay_length_penalty": [4, 1.6]}, {"exponential_decay_length_penalty": [0, 3.0], "eos_token_id": [1, 261]}, {"max_time": 0.0},
    {"stop_strings": ["the"]}, {"stop_strings": " the "}, {"stop_strings": [",", "zzz"]}, {"stop_strings": ["e L"]}, {"stop_strings": ["LORD", "land", "all"]}, {"stop_strings": ["nd th"]},
    {"remove_invalid_values": True, "renormalize_logits": True},
    *({"do_sample": True, **keys} for keys in [
        {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"epsilon_cutoff": 0.9}, {"top_h": 1e-9}, {"typical_p": 1e-7}, {"temperature": 1e-5},
        {"min_p": 1.0, "top_k": 0, "no_repeat_ngram_size": 2}, {"top_k": 1, "repetition_penalty": 1.4}, {"top_p": 0.0, "suppress_tokens": list(range(256, 600))},
        {"typical_p": 1e-7, "top_k": 4}, {"epsilon_cutoff": 0.99, "temperature": 0.5, "max_new_tokens": 9}, {"eta_cutoff": 0.9999, "top_k": 1},
    ]),
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "suppress_tokens": [265], "min_new_tokens": 10, "eos_token_id": list(range(1, 300)), "stop_strings": ["unto"]},
]
BASE = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_new_tokens": 18}


def repository(folder, generation):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            shutil.copy(KJV / name, folder / name)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def texts():
    with tempfile.TemporaryDirectory() as folder:
        for settings in TEXTS:
            generation = {**BASE, **settings}
            model, tokenizer = repository(Path(folder), generation)
            for prompt in PROMPTS:
                inputs = tokenizer(prompt, return_tensors="pt")
                length = inputs.input_ids.shape[1]
                runs = []
                for seed in range(3 if settings.get("do_sample") else 1):
                    torch.manual_seed(seed)
                    runs.append(model.generate(**inputs, tokenizer=tokenizer)[0].tolist())
                assert all(run == runs[0] for run in runs), (settings, prompt)
                before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (runs[0][:length], runs[0]))
                assert whole.startswith(before)
                yield {"settings": generation, "prompt": prompt, "ids": runs[0][length:], "text": whole[len(before):]}


ERRORS = [
    *((key, {key: value}) for key, value in [
        ("max_new_tokens", 0), ("max_new_tokens", -5), ("max_new_tokens", "5"), ("repetition_penalty", 0.0), ("repetition_penalty", -1.5), ("repetition_penalty", "1.1"),
        ("no_repeat_ngram_size", 1.5), ("no_repeat_ngram_size", "2"), ("min_new_tokens", "3"), ("min_length", 12.5), ("encoder_repetition_penalty", -0.5),
        ("bad_words_ids", []), ("bad_words_ids", [3]), ("bad_words_ids", [[-3]]), ("bad_words_ids", [[5000]]), ("bad_words_ids", "words"),
        ("sequence_bias", {}), ("sequence_bias", {"(50,)": 1.0}), ("sequence_bias", [[50, 1.0]]), ("sequence_bias", [[[5000], 1.0]]), ("sequence_bias", []),
        ("suppress_tokens", 5), ("suppress_tokens", ["5"]), ("begin_suppress_tokens", 7), ("forced_eos_token_id", -1), ("forced_eos_token_id", 5000), ("forced_eos_token_id", "1"),
        ("eos_token_id", "1"), ("eos_token_id", [1, "2"]), ("eos_token_id", {"a": 1}), ("exponential_decay_length_penalty", [3]), ("exponential_decay_length_penalty", 3),
        ("stop_strings", []), ("stop_strings", [5]), ("max_time", "1"),
    ]),
    ("max_length", {"max_length": 3, "max_new_tokens": None}), ("max_length", {"max_length": 10, "max_new_tokens": None}),
    ("forced_eos_token_id", {"forced_eos_token_id": [5, 6], "suppress_tokens": [4, 5, 6]}),
    *((key, {"do_sample": True, key: value}) for key, value in [
        ("top_k", -1), ("top_k", 1.5), ("top_k", "50"), ("top_p", -0.1), ("temperature", 0.0), ("temperature", -1.0), ("temperature", "0.7"),
        ("min_p", -0.1), ("min_p", 1.1), ("typical_p", 0.0), ("typical_p", -1.0), ("top_h", 0.0), ("top_h", 1.1), ("epsilon_cutoff", "x"), ("eta_cutoff", [1]),
    ]),
]


def errors():
    with tempfile.TemporaryDirectory() as folder:
        for key, settings in ERRORS:
            generation = {**BASE, **settings}
            try:
                model, tokenizer = repository(Path(folder), generation)
                inputs = tokenizer(PROMPTS[0], return_tensors="pt")
                model.generate(**inputs, tokenizer=tokenizer)
            except Exception as error:  # whatever it refuses with
                yield {"key": key, "settings": generation, "transformers": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
            else:
                raise AssertionError(f"transformers generates with {settings}")


def tokenizers():
    crab = "🦀".encode()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = transformers.convert_slow_tokenizer.bytes_to_unicode()
    spell = lambda raw: "".join(byte_of[b] for b in raw)
    longer = [spell(w.encode()) for w in ["st", "op", "stop", " stop", "opera", "las", "topper", "to", "pped", " é"]] + [spell(crab[:2]), spell(crab[2:]), spell(crab[1:])]
    level = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(letters + longer)}, merges=[]))
    level.pre_tokenizer, level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    words = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], *"▁ ▁▁ ▁st op ▁stop opera las topper to pped s t é a b c d e f".split()]
    fallback = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True))
    fallback.pre_tokenizer = None
    fallback.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = "<unk> ▁ ▁st op ▁stop opera las topper to pped s t é a b c d e f ▁▁".split()
    unigram = Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=0, byte_fallback=False))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="always")
    for made in (level, fallback, unigram):
        made.add_special_tokens(["<end>"])
    return {"byte-level": level, "byte-fallback": fallback, "unigram": unigram}


STOPS = [["stop"], [" stop"], ["s"], ["é", "zzs"], ["🦀"], ["op", "pp"], ["<end>"], ["ast op"], ["  "], ["\n"], ["stopped st"]]


def strings():
    draw = random.Random(5)
    for kind, made in tokenizers().items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
        size = made.get_vocab_size()
        likely = [i for i in range(size) if len(made.id_to_token(i)) > 1 and not made.id_to_token(i).startswith("<0x")]
        likely += [i for i in (made.token_to_id(w) for w in ["s", "t", "a", "é", "▁", "<0x0A>", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0xA6>", "<0x80>", "Ã", "©", "Ċ"]) if i is not None]
        cases, matched = [], 0
        for stop in STOPS:
            try:
                criteria = StopStringCriteria(tokenizer, stop)
            except ValueError:  # no token of this tokenizer fits
                continue
            for _ in range(400):
                ids = [draw.choice(likely) for _ in range(draw.randint(1, 7))]
                ends = bool(criteria(torch.tensor([ids]), None)[0])
                # As many that end as that do not.
                if ends and 2 * matched <= len(cases) or not ends and draw.random() < 0.02:
                    matched += ends
                    cases.append({"stop": stop, "ids": ids, "ends": ends})
        yield {"kind": kind, "tokenizer": json.loads(made.to_str()), "cases": cases}


if __name__ == "__main__":
    write("processors.json", processors())
    write("strings.json", strings())
    write("errors.json", errors())
    write("texts.json", texts())
