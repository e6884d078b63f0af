"""What torch and transformers make of the same shapes: a static cache, the step compiled or not (see run.py)."""
import gc
import inspect
import time


def device():
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait():
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine():
    """Versions, and the memory's bandwidth: a gigabyte that is copied is read and written."""
    import torch
    found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    if torch.cuda.is_available():
        one = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        two = torch.empty_like(one)
        best = min(timed(lambda: two.copy_(one)) for _ in range(20))
        found |= {"bandwidth_gb_s": round(2 * one.numel() / best / 1e9), "gpu_torch": torch.cuda.get_device_name()}
    return found


def timed(work):
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def model_of(config):
    """A model with random weights in float16, made where it runs."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    kept = {key: value for key, value in config.items() if key not in ("torch_dtype", "transformers_version")}
    config = AutoConfig.for_model(**kept)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device()):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


class Stepper:
    """A model with one static cache. What a release calls the tokens' places is asked of it."""

    def __init__(self, model, rows, length, compiled):
        import torch
        from transformers import StaticCache
        self.model, self.rows = model, rows
        names = inspect.signature(StaticCache.__init__).parameters
        sizes = {"max_batch_size": rows, "device": device(), "dtype": torch.float16}
        self.cache = StaticCache(config=model.config, max_cache_len=length, **{k: v for k, v in sizes.items() if k in names})
        self.takes = inspect.signature(model.forward).parameters
        # Captured as a CUDA graph: a step is a few hundred kernels.
        self.step = torch.compile(model, mode="reduce-overhead", fullgraph=False) if compiled else model

    def run(self, forward, ids, past):
        import torch
        places = torch.arange(past, past + ids.shape[1], device=ids.device)
        more = {"cache_position": places} if "cache_position" in self.takes else {}
        more |= {"position_ids": places.expand(self.rows, -1)}
        if "logits_to_keep" in self.takes:
            more["logits_to_keep"] = 1
        return forward(input_ids=ids, past_key_values=self.cache, use_cache=True, **more).logits[:, -1].argmax(-1)


def measure(config, rows, prompt, pasts, steps, compiled):
    """Tokens per second of prefill and of decoding behind each past; memory, and seconds of the first compiled step."""
    import torch
    model = model_of(config)
    draw = lambda count: torch.randint(0, config["vocab_size"], (rows, count), device=device())
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        # A cache that counts by itself goes on from one repetition to the next.
        longest = max(max(pasts), prompt) + 3 * steps + 16
        stepper = Stepper(model, rows, longest, compiled)
        run = lambda: stepper.run(model, draw(prompt), 0)
        run()
        times = []
        for _ in range(5):
            stepper.cache.reset()
            times.append(timed(run))
        found = {"prefill_tokens_per_second": round(rows * prompt / sorted(times)[2], 1), "decode_tokens_per_second": {}}
        for past in pasts:
            stepper.cache.reset()
            stepper.run(model, draw(past), 0)
            token = draw(1)

            def decode(count, begin=past):
                ids = token
                for k in range(count):
                    if compiled and cuda:
                        torch.compiler.cudagraph_mark_step_begin()
                    ids = stepper.run(stepper.step, ids, begin + k).clone()[:, None]

            # Compiled and captured by the first few.
            found.setdefault("warm_up_seconds", round(timed(lambda: decode(4)), 2))
            decode(4)
            best = min(timed(lambda: decode(steps)) for _ in range(3))
            found["decode_tokens_per_second"][str(past)] = round(rows * steps / best, 1)
    if cuda:
        found["peak_device_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    del model, stepper
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found
