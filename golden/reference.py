"""Run a decoder in transformers, and take down everything that a golden file holds."""
import copy
import inspect
import math
import re

import torch
import transformers

B, T, NEW = 3, 24, 16          # batch rows, prompt length, greedy continuation
PADS = (0, 5, 11)              # padding of each row, on the left
SPLIT = 10                     # prompt prefix used by the two cache checks
TOL = 1e-4                     # cached and uncached logits should agree to this
ROUTER = re.compile(r"(^|\.)(gate|router|wg|router\.layer|gate\.wg|router\.classifier)\.weight$")
HALVES = (torch.float16, torch.bfloat16)

torch.set_num_threads(1)       # sums in one order: the same bits on every run
torch.set_grad_enabled(False)
transformers.logging.disable_progress_bar()


def load(folder, trust=False, dtype=torch.float32):
    """(model, what the loader complained about), with eager attention and eager experts where they are native.

    What a model keeps in float32 in its half precision stays so, as do the buffers that rotations are computed from."""
    options = {} if trust else {"experts_implementation": "eager"}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, trust_remote_code=trust, **options)
    model = model if dtype in HALVES else model.to(dtype)
    return model.eval(), {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}


def vocab_of(config):
    return int(config.get_text_config().vocab_size)


def positions(mask):
    """generate()'s position ids."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def random_batch(vocab, seed, pad):
    """Random ids (never one of the first four, which are special) with the three paddings."""
    gen = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(4, vocab, (B, T), generator=gen), torch.ones(B, T, dtype=torch.int64)
    for row, n in enumerate(PADS):
        ids[row, :n], mask[row, :n] = pad, 0
    return ids, mask, positions(mask)


def prompt_batch(prompts, pad):
    """Token lists, the longest first, padded on the left."""
    width = len(prompts[0])
    if any(len(p) > width for p in prompts):
        raise SystemExit("the first prompt has to be the longest: it is the row that is checked step by step")
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask, positions(mask)


def private(model):
    """A copy that shares the parameters: dynamic RoPE and some hybrids keep state in their modules."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Session:
    """One decoding run."""

    def __init__(self, model):
        self.model, self.cache = private(model), None
        self.args = set(inspect.signature(self.model.forward).parameters)
        self.slot = next((a for a in ("past_key_values", "cache_params", "state") if a in self.args), "past_key_values")

    def __call__(self, ids, mask, pos, use_cache=True, **kw):
        if "position_ids" in self.args:
            kw["position_ids"] = pos
        if "attention_mask" in self.args:      # the pure state-space models want the mask of the new tokens only
            kw["attention_mask"] = mask[:, -ids.shape[1]:] if self.slot == "cache_params" else mask
        if self.cache is not None:
            kw[self.slot] = self.cache
        out = self.model(input_ids=ids, use_cache=use_cache, return_dict=True, **kw)
        self.cache = next((getattr(out, a) for a in ("past_key_values", "cache_params", "state")
                           if getattr(out, a, None) is not None), None)
        return out


def full_pass(model, ids, mask, pos, **kw):
    return Session(model)(ids, mask, pos, use_cache=False, **kw)


def in_pieces(model, ids, mask, pos, sizes):
    """Logits of a prompt fed in pieces through the cache."""
    run, parts, at = Session(model), [], 0
    for n in sizes:
        here = slice(at, at + n)
        parts.append(run(ids[:, here], mask[:, :at + n], pos[:, here]).logits.float())
        if run.cache is None:
            raise RuntimeError("the model returned no cache")
        at += n
    return torch.cat(parts, 1)


def greedy(model, ids, mask):
    """(prompt with its continuation, logits of each step); no token ends it."""
    model = private(model)
    gc = model.generation_config
    gc.eos_token_id, gc.forced_eos_token_id, gc.suppress_tokens, gc.begin_suppress_tokens = None, None, None, None
    gc.pad_token_id = 0 if gc.pad_token_id is None else gc.pad_token_id
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, max_length=None,
                         output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, 1).float()


def maxdiff(a, b):
    return float((a - b).abs().max()) if torch.isfinite(a).all() and torch.isfinite(b).all() else math.inf


def decoder(model, ids, mask, pos):
    """(tensors of the golden, metadata): the full pass, the cache, padding and batching as transformers sees them."""
    row, width, pads = slice(0, 1), ids.shape[1], [int(n) for n in (mask == 0).sum(-1)]
    full = full_pass(model, ids, mask, pos).logits.float()
    first = full_pass(model, ids[row], mask[row], pos[row], output_hidden_states=True)
    seqs, steps = greedy(model, ids[row], mask[row])
    tensors = dict(input_ids=ids, attention_mask=mask, position_ids=pos, logits=full * mask[..., None],
                   greedy_ids=seqs, greedy_logits=steps)
    for i, h in enumerate(getattr(first, "hidden_states", None) or ()):
        tensors[f"hidden_states_{i}"] = h.float()
    checks = {}
    for label in ("steps", "chunks"):
        # in a batch the first piece reaches a real token of every row, as it does in generate()
        for scope, rows, n in (("row0", row, min(SPLIT, width - 1)), ("batch", slice(None), min(max(pads) + 1, width))):
            sizes = [n] + ([1] * (width - n) if label == "steps" else [width - n] * (width > n))
            try:
                got, live = in_pieces(model, ids[rows], mask[rows], pos[rows], sizes), mask[rows][..., None].bool()
                diff = maxdiff(torch.where(live, got, 0.0), torch.where(live, full[rows], 0.0))
                checks[f"{label}_{scope}"] = diff
                if scope == "row0" and TOL < diff < math.inf:
                    tensors[f"logits_{label}"] = got
            except Exception as error:   # a finding about transformers, not a failure of the recording
                checks[f"{label}_{scope}"] = f"{type(error).__name__}: {error}"[:160]
    for at, p in list(enumerate(pads))[1:]:
        alone = full_pass(model, ids[at:at + 1, p:], mask[at:at + 1, p:], pos[at:at + 1, p:]).logits
        checks[f"pad_row{at}"] = maxdiff(alone, full[at:at + 1, p:])
    again = full_pass(model, seqs, torch.ones_like(seqs), torch.arange(seqs.shape[1])[None]).logits[:, width - 1:-1]
    checks["generate_vs_full"] = maxdiff(again.float(), steps)
    checks["batch_vs_row0"] = maxdiff(first.logits, full[row])
    wrong = [k for k, v in checks.items() if isinstance(v, str) or v > TOL]
    return tensors, {"checks": checks, "transformers_disagrees": wrong}


def nll(model, tokens, window):
    """(mean negative log-likelihood, tokens scored): each window scores `window` tokens and starts with the last token
    of the one before, so the very first token is the only one that is not scored."""
    total = 0.0
    for at in range(0, len(tokens) - 1, window):
        ids = torch.tensor([tokens[at:at + window + 1]])
        given, wanted = ids[:, :-1], ids[0, 1:, None]
        logits = full_pass(model, given, torch.ones_like(given), torch.arange(given.shape[1])[None]).logits
        total -= float(logits[0].float().log_softmax(-1).gather(-1, wanted).double().sum())
    return total / (len(tokens) - 1), len(tokens) - 1
