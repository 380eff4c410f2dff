"""Other ways to decode and to update than the scripts', timed in turn on one model: is a change worth its lines?

    python benchmarks/gpu_lab.py --model MODEL --out lab.json --device cuda --seconds 200

Decoding (64 prompts x 16 completions of 128 tokens, weights in float32 under bfloat16 autocast):
  as it is            generate of grpo.py; in two calls; without torch's deterministic algorithms, which the scripts use
  graph               one decoded token captured as a CUDA graph and replayed; rows that have ended are dropped only
                      every 64 tokens. Not captured, on a bfloat16 copy of the model, and with its step compiled
  model.generate      of transformers, and model.generate_batch (continuous batching)
Updating (forward and backward of 32 rows with 256 tokens of completion each): completion_logprobs as it is; without
deterministic algorithms; with prompts that are not shared; with more logits at once; with token_logprobs compiled.
Profiles of both list the kernels that take the time.

The output is written after each way. A way that fails or takes too long is noted, and the next one begins. MODEL needs
the tokenizer of tiny/policy; gpu_check.py makes one with random weights.
"""
import copy
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in the scripts
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import (ContinuousBatchingConfig, DynamicCache, GenerationConfig,  # noqa: E402
                          logging)
from transformers.cache_utils import DynamicLayer  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import grpo  # noqa: E402
from modeling import cache_argument, load_causal_lm  # noqa: E402


@dataclass
class Args:
    model: str
    out: str = "gpu_lab.json"
    device: str = "cuda"
    seconds: float = 200


# --- a decoder that replays a CUDA graph

class Room(DynamicLayer):
    """Keys and values with room for tokens to come: a token is written in its column, in place."""
    column = None  # (1,), the same tensor in all layers

    def update(self, keys, values, *_, **__):
        self.keys.index_copy_(2, self.column, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, values.to(self.values.dtype))
        return self.keys, self.values


@torch.no_grad()
def graph_generate(model, prompt_ids, prompt_mask, group_size: int, max_new_tokens: int, temperature: float, eos_ids,
                   generator=None, stride: int = 64, capture: bool = True, step=None):
    """grpo.generate, with one token's work captured as a CUDA graph and replayed.

    Every `stride` tokens, and only then, ended rows are dropped, the cache gets room for as many tokens more, and the
    work is captured again. In between nothing is allocated, copied or asked of the GPU. step: reads a token (default:
    the model).
    """
    cache, device = DynamicCache(config=model.config), prompt_ids.device
    position = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    past = cache_argument(model, cache)
    logits = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=position, use_cache=True,
                   logits_to_keep=1, **past).logits[:, -1]
    cache.batch_repeat_interleave(group_size)
    P = prompt_ids.shape[1]
    column = torch.tensor([P], device=device)  # where the next token goes
    autocast = torch.is_autocast_enabled(device.type)
    for layer in cache.layers:
        layer.__class__, layer.column = Room, column
        dtype = torch.get_autocast_dtype(device.type) if autocast else layer.keys.dtype  # cast once, not at each use
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
    logits = logits.repeat_interleave(group_size, 0).float()  # (rows, V)
    seen = prompt_mask.bool().repeat_interleave(group_size, 0)[:, None, None]  # (rows, 1, 1, columns)
    position = position[:, -1:].repeat_interleave(group_size, 0)
    rows = torch.arange(len(logits), device=device)  # completions not finished yet
    alive = torch.ones_like(rows, dtype=torch.bool)
    ids = prompt_ids.new_zeros(len(rows), max_new_tokens)

    def one_token():
        probs = (logits / temperature).softmax(-1)
        token = (probs.argmax(-1, keepdim=True) if generator is None else
                 torch.multinomial(probs, 1, generator=generator))
        written.index_copy_(1, column - P - t, token)
        alive.logical_and_(~torch.isin(token[:, 0], eos_ids))
        position.add_(1)
        seen.index_fill_(3, column, True)
        logits.copy_((step or model)(input_ids=token, attention_mask=seen, position_ids=position, use_cache=True,
                                     **past).logits[:, -1])
        column.add_(1)

    graph = None
    for t in range(0, max_new_tokens, stride):
        n = min(stride, max_new_tokens - t)
        written = ids.new_zeros(len(rows), n)
        for layer in cache.layers:
            layer.keys, layer.values = F.pad(layer.keys, (0, 0, 0, n)), F.pad(layer.values, (0, 0, 0, n))
        seen = F.pad(seen, (0, n))
        one_token()
        if capture and n > 1:
            graph = torch.cuda.CUDAGraph()
            if generator is not None:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                one_token()
        for _ in range(n - 1):
            graph.replay() if capture else one_token()
        ids[rows, t:t + n] = written
        keep = alive.nonzero()[:, 0]
        if len(keep) == 0:
            break
        rows, logits, seen, position, alive = (x[keep] for x in (rows, logits, seen, position, alive))
        cache.batch_select_indices(keep)
    ended = torch.isin(ids, eos_ids).long()
    mask = (ended.cumsum(1) - ended == 0).long()
    return ids * mask, mask


# --- the ways

class Late(BaseException):
    pass


class Lab:
    def __init__(self, args: Args):
        logging.set_verbosity_error()
        self.began, self.args, self.cuda = time.time(), args, args.device == "cuda"
        self.found = {"decode": {}, "update": {}, "profile": {}}
        self.prompts, self.group, self.tokens = (64, 16, 128) if self.cuda else (4, 4, 16)
        tokenizer = common.load_tokenizer("tiny/policy")
        rows = common.encode_prompts(tokenizer, common.read_prompts("tiny/prompts.jsonl"), "prompts", 1000)
        self.rows = [row["prompt_ids"] for row in rows[:self.prompts]]
        self.ids, self.mask = common.pad(self.rows, "left", args.device)
        self.model = load_causal_lm(args.model, args.device)
        self.eos_ids = common.eos_token_ids(self.model, tokenizer, args.device)

    def way(self, kind: str, name: str, function, most: float = 30, deterministic: bool = False):
        """Notes what function returns, a dict, or what came of it. It has `most` seconds."""
        def late(*_):
            raise Late
        left, begun = self.args.seconds - (time.time() - self.began), time.time()
        if left < 6:
            result = f"not begun: {left:.0f} s were left"
        else:
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
            signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, min(most, left))
            try:
                if self.cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                result = function()
                if self.cuda:
                    result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            except Late:
                result = f"cut off after {min(most, left):.0f} s"
            except Exception as error:
                result = f"{type(error).__name__}: {str(error)[:300]}"
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.found[kind][name] = result
        print(f"{kind}, {name} ({time.time() - begun:.1f} s): {result}", flush=True)
        Path(self.args.out).write_text(json.dumps(self.found, indent=1))

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.time()

    def autocast(self, enabled: bool = True):
        return torch.autocast(self.args.device, torch.bfloat16, enabled=enabled)

    def decode(self, generate, model=None, autocast: bool = True, calls: int = 1, tokens: int = 0) -> dict:
        """Seconds to sample all completions in some calls; the first time is warm-up."""
        model, tokens, times = (model or self.model).eval(), tokens or self.tokens, []
        for i in range(2):
            generator, begun, written = torch.Generator(self.args.device).manual_seed(i), self.now(), 0
            for ids, mask in zip(self.ids.tensor_split(calls), self.mask.tensor_split(calls)):
                with torch.no_grad(), self.autocast(autocast):
                    out = generate(model, ids, mask, self.group, tokens, 1.0, self.eos_ids, generator)[1]  # its mask
                written += out.sum().item()
            times.append(self.now() - begun)
        return {"seconds": [round(x, 3) for x in times], "ms_a_token": round(1000 * times[-1] / tokens, 2),
                "tokens_a_second": round(written / times[-1])}

    def same(self) -> dict:
        """Greedy, the graph's completions beside grpo.py's. In bfloat16 a tie can go either way."""
        with torch.no_grad(), self.autocast():
            a, b = (generate(self.model.eval(), self.ids[:8], self.mask[:8], 2, min(self.tokens, 80), 1.0,
                             self.eos_ids)[0] for generate in (grpo.generate, self.graph))
        return {"equal": (a == b).float().mean().item(), "equal_of_first_8": (a == b)[:, :8].float().mean().item()}

    def graph(self, *arguments, **more):
        """graph_generate; without a GPU nothing is captured."""
        return graph_generate(*arguments, **{"capture": self.cuda, **more})

    def library(self, model, ids, mask, group_size, max_new_tokens, *_):
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, pad_token_id=0,
                             max_new_tokens=max_new_tokens, num_return_sequences=group_size)[:, ids.shape[1]:]
        return out, torch.ones_like(out)

    def continuous(self) -> dict:
        """model.generate_batch, which needs weights that are bfloat16 themselves."""
        model = copy.deepcopy(self.model).to(torch.bfloat16).eval()
        settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=self.tokens, pad_token_id=0,
                                    num_return_sequences=self.group, eos_token_id=self.eos_ids.tolist())
        small = {"max_memory_percent": 0.5} if self.cuda else {"num_blocks": 64, "max_batch_tokens": 64}
        begun = self.now()
        out = model.generate_batch(self.rows, generation_config=settings,
                                   continuous_batching_config=ContinuousBatchingConfig(seed=0, **small)).values()
        seconds, tokens = self.now() - begun, sum(len(x.generated_tokens) for x in out)
        return {"seconds": round(seconds, 3), "tokens_a_second": round(tokens / seconds),
                "error": next((x.error for x in out if x.error), None)}

    def update(self, share: bool = True, repeats: int = 3) -> dict:
        """Seconds of the forward and of the backward pass of one micro-batch."""
        rows = 32 if self.cuda else 8
        ids, mask = (x[:rows // self.group].repeat_interleave(self.group, 0).clone() for x in (self.ids, self.mask))
        if not share:
            ids[:, -1] = torch.arange(rows, device=ids.device) + 5
        completions = torch.randint(5, 500, (rows, 2 * self.tokens), device=ids.device)
        self.model.train()
        for _ in range(repeats):
            begun = self.now()
            with self.autocast():
                logprobs, _ = common.completion_logprobs(self.model, ids, mask, completions,
                                                         torch.ones_like(completions))
            middle = self.now()
            logprobs.sum().backward()
            end = self.now()
            self.model.zero_grad()
        work = 6 * self.model.num_parameters() * completions.numel()
        return {"forward_s": round(middle - begun, 4), "backward_s": round(end - middle, 4),
                "tflops": round(work / (end - begun) / 1e12, 1)}

    def changed(self, function, **names) -> dict:
        """What function returns with other values of some names in common.py."""
        before = {name: getattr(common, name) for name in names}
        vars(common).update(names)
        try:
            return function()
        finally:
            vars(common).update(before)

    def profile(self, function, tokens: int = 1) -> dict:
        """The kernels that take most of the time, with their number and milliseconds."""
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        with profiler(activities=kinds) as record:
            function()
        events = record.key_averages()
        key = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        kernels = [e for e in events if not self.cuda or str(e.device_type).endswith("CUDA")]
        kernels.sort(key=lambda e: getattr(e, key), reverse=True)
        return {"busy_s": round(sum(getattr(e, key) for e in kernels) / 1e6, 3),
                "launches_a_token": sum(e.count for e in events if "LaunchKernel" in e.key) / tokens,
                "top": [(e.key[:70], e.count, round(getattr(e, key) / 1e3, 2)) for e in kernels[:18]]}


def main(args: Args):
    lab = Lab(args)
    decode, update, loop = lab.decode, lab.update, grpo.generate
    lab.way("decode", "as it is", lambda: decode(loop), 40, deterministic=True)
    lab.way("decode", "as it is, in two calls", lambda: decode(loop, calls=2), 40, deterministic=True)
    lab.way("decode", "not deterministic", lambda: decode(loop), 40)
    lab.way("decode", "graph: the same greedy tokens?", lab.same)
    lab.way("decode", "graph", lambda: decode(lab.graph))
    lab.way("decode", "graph, not captured", lambda: decode(lambda *x: lab.graph(*x, capture=False)))
    lab.way("decode", "graph, a bfloat16 copy of the model",
            lambda: decode(lab.graph, copy.deepcopy(lab.model).to(torch.bfloat16), autocast=False))
    lab.way("decode", "model.generate", lambda: decode(lab.library))

    lab.way("update", "as it is", update, deterministic=True)
    lab.way("update", "not deterministic", update)
    lab.way("update", "prompts not shared", lambda: update(share=False))
    for power in (26, 28, 30):
        lab.way("update", f"logits at once: 2**{power}", lambda: lab.changed(update, LOGITS_AT_ONCE=2**power))
    compiled = torch.compile(common.token_logprobs, dynamic=True)
    lab.way("update", "token_logprobs compiled", lambda: lab.changed(update, token_logprobs=compiled), 60)
    lab.way("update", "token_logprobs compiled, logits at once: 2**28", lambda: lab.changed(
        update, token_logprobs=compiled, LOGITS_AT_ONCE=2**28), 40)

    few = min(8, lab.tokens)
    lab.way("profile", "decode", lambda: lab.profile(lambda: decode(loop, tokens=few), 2 * few), deterministic=True)
    lab.way("profile", "update", lambda: lab.profile(lambda: update(repeats=1)), deterministic=True)
    lab.way("decode", "model.generate_batch", lab.continuous, 40)
    if lab.cuda:  # takes long to compile
        step = torch.compile(lab.model.forward, dynamic=True)
        lab.way("decode", "graph of a compiled step", lambda: decode(lambda *x: lab.graph(*x, step=step)), 150)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
