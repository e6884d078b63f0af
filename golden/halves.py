"""How far transformers in float16 or bfloat16 is from its own float32: what a build in that type may be off by.

`errors(load, ids, mask, pos, greedy, dtype)` gives, for each scenario of `hf2onnx verify`, three numbers for each of two models:

    computed   all of it in dtype, as from_pretrained(dtype=...) runs it: what a graph that computes in dtype is held to
    rounded    float32 with its matrices rounded to dtype: what a graph that only stores them in dtype is held to

    max        largest absolute difference of a logit, relative to the largest float32 logit
    error      norm of the difference by that of the float32 logits, both without the mean of each position
    typical    the median of that over the positions, each by itself

over the positions that hold a token. Both runs of a scenario are fed alike, so what is left is the rounding. A router that
chooses another expert for one token raises `max` and `error`, not `typical`. A scenario that transformers can not run, or
that overflows, has the reason in place of the numbers.
"""
import copy

import torch

from reference import ROUTER, SPLIT, full_pass, in_pieces

SCENARIOS = ("prefill", "batch-left", "batch-right", "decode", "chunks", "batch-decode", "greedy")


def behind(table, mask):
    """The rows of a table with their padding moved behind their tokens."""
    order = torch.argsort(mask, dim=-1, descending=True, stable=True)
    return torch.gather(table, 1, order)


def one_by_one(first, width):
    """A first piece, then single tokens."""
    return [first] + [1] * (width - first)


def cached(model, ids, mask, pos, sizes):
    """Logits through the cache; of the full pass where a model has none, which is what generate() runs then."""
    try:
        return in_pieces(model, ids, mask, pos, sizes)
    except RuntimeError as error:
        if "no cache" not in str(error):
            raise
        return full_pass(model, ids, mask, pos).logits.float()


def run(model, scenario, ids, mask, pos, greedy):
    """(logits, mask of the positions that count) of a scenario; the pieces are those of src/verify/scenario.rs."""
    width = ids.shape[1]
    split = min(SPLIT, width - 1)
    if scenario == "greedy":               # its tokens are given, so that every step is compared
        total = greedy.shape[1]
        ones, line = torch.ones_like(greedy), torch.arange(total)[None]
        logits = cached(model, greedy[:, :-1], ones[:, :-1], line[:, :-1], one_by_one(width, total - 1))
        return logits[:, width - 1:], torch.ones(1, total - width)
    if scenario == "batch-right":
        ids, pos, mask = behind(ids, mask), behind(pos, mask), behind(mask, mask)
    elif not scenario.startswith("batch"):
        ids, mask, pos = ids[:1], mask[:1], pos[:1]
    if scenario == "decode":
        return cached(model, ids, mask, pos, one_by_one(split, width)), mask
    if scenario == "chunks":
        return cached(model, ids, mask, pos, [split, width - split]), mask
    if scenario == "batch-decode":
        first = min(max(int((mask == 0).sum(-1).max()), 11) + 1, width - 1)
        return cached(model, ids, mask, pos, one_by_one(first, width)), mask
    return full_pass(model, ids, mask, pos).logits.float(), mask


def difference(got, want, mask):
    """The three numbers, as src/verify/metrics.rs has them; the upper median of an even count."""
    got, want = got[mask.bool()].double(), want[mask.bool()].double()
    if not torch.isfinite(got).all():
        return "logits that are not finite"
    centred = lambda x: (x - x.mean(-1, keepdim=True)).square().sum(-1)
    off, norm = centred(got - want), centred(want)
    each = (off / norm).sqrt().sort().values
    numbers = {"max": (got - want).abs().max() / want.abs().max(), "error": (off.sum() / norm.sum()).sqrt(),
               "typical": each[len(each) // 2]}
    return {name: float(f"{float(number):.4g}") for name, number in numbers.items()}


def rounded(model, dtype):
    """A float32 copy with its matrices rounded to dtype, but for those that a build keeps: vectors and routers."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.is_floating_point() and not ROUTER.search(name):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return model


def errors(load, ids, mask, pos, greedy, dtype):
    """{"computed": {scenario: numbers or a reason}, "rounded": ...}; `load(dtype)` gives the model in a type."""
    exact = load(torch.float32)
    found = {"computed": {}, "rounded": {}}
    models = {"computed": load(dtype), "rounded": rounded(exact, dtype)}
    for scenario in SCENARIOS if greedy is not None else SCENARIOS[:-1]:
        for kind, model in models.items():
            try:
                want, live = run(exact, scenario, ids, mask, pos, greedy)
                got, _ = run(model, scenario, ids, mask, pos, greedy)
                found[kind][scenario] = difference(got, want, live)
            except Exception as error:     # a finding about transformers, not a failure of the recording
                found[kind][scenario] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return found
