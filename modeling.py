"""Models: how they are loaded, and how they run on rows of tokens. A causal LM of transformers
gives in a batch what it gives on each row alone, or it is refused.

Shapes: B completions, P prompt tokens (left-padded), T completion tokens (right-padded).
"""
import inspect
import json
import math
import re
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers  # its names are looked up where they are used: some take seconds to load


class UserError(Exception):
    """A mistake in a flag, a file, a model or a reward function; one line says what to do."""


def first_line(error: BaseException) -> str:
    try:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    except Exception:  # it cannot be shown
        return type(error).__name__


# --- loading

def config_folder(name: str) -> str:
    """Where a model's config is: a LoRA checkpoint of these scripts has it in `model`, since
    transformers takes a folder with a config.json for a whole model."""
    inner, adapter = Path(name) / "model", Path(name) / "adapter_config.json"
    if (inner / "config.json").is_file():
        return str(inner)
    if adapter.is_file() and not (Path(name) / "config.json").is_file():  # of another library
        try:
            return json.loads(adapter.read_text())["base_model_name_or_path"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{adapter}: names no base model: {first_line(error)}")
    return name


def check_model(name: str):
    if not Path(name).is_dir() and (
            not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).exists()
            or Path(name).parts[0] in ("tiny", "runs")):
        hint = " (set --model, --data and --reward)" if name.startswith("tiny/") else ""
        raise UserError(f"{name}: no such model folder{hint}")
    if Path(name).is_dir() and not (Path(name) / "adapter_config.json").is_file() and not (
            Path(name) / "config.json").is_file():
        raise UserError(f"{name}: not a model: the folder has no config.json")


def load_config(name: str, **changes):
    """A model's config, with every kind of dropout set to 0."""
    check_model(name)
    try:
        config = transformers.AutoConfig.from_pretrained(
            config_folder(name), trust_remote_code=False, **changes)
    except Exception as error:
        raise UserError(f"{name}: its config does not load: {first_line(error)}")
    bias = getattr(config, "reward_bias", 0.0)
    if not isinstance(bias, (int, float)) or not math.isfinite(bias):
        raise UserError(f"{name}: config.json: reward_bias must be a number, not {bias!r}")
    config.return_dict, config.output_router_logits = True, False  # outputs as we read them
    text_config = config.get_text_config()  # of a multimodal model; or the config itself
    for part in (config, text_config):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)  # eval() is not enough: checkpointing needs train()
    if (getattr(text_config, "pad_token_id", 0) or 0) not in range(text_config.vocab_size):
        text_config.pad_token_id = None  # outside the vocabulary
    return config


def context_length(model) -> float:
    """How many tokens a model (itself, or by its name) reads at most."""
    loaded = not isinstance(model, str)
    for name, module in model.named_modules() if loaded else ():
        first = getattr(module, "padding_idx", None)  # RoBERTa counts from here: 514 hold 512
        if name.endswith("position_embeddings") and first is not None:
            return module.num_embeddings - first - 1
    config = (model.config if loaded else load_config(model)).get_text_config()
    limit = "max_seq_len" if hasattr(config, "max_seq_len") else "max_position_embeddings"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):  # beyond, rows change each other
        return min(rope.get("original_" + limit) or math.inf, getattr(config, limit))
    return getattr(config, limit, None) or math.inf


def load_model(auto_class, name: str, device, **config_changes):
    """(model, names of the weights it came without), in float32, from safetensors, without
    dropout. A LoRA adapter is loaded with its base model and merged into it."""
    config, kind = load_config(name, **config_changes), auto_class.__name__.removeprefix(
        "AutoModelFor")
    base, adapters = name, []
    try:
        while (adapter := Path(base) / "adapter_config.json").is_file():
            adapters.insert(0, base)  # one may have been trained on top of another
            base = json.loads(adapter.read_text())["base_model_name_or_path"]
        if adapters:
            text_config = config.get_text_config()
            vocab_size = text_config.vocab_size  # the base may have had fewer tokens
            text_config.vocab_size = load_config(base).get_text_config().vocab_size
        model, loading = auto_class.from_pretrained(
            base, config=config, dtype=torch.float32, use_safetensors=True,
            output_loading_info=True, trust_remote_code=False)
        missing, unexpected = loading["missing_keys"], loading["unexpected_keys"]
        for folder in adapters:
            from peft import PeftModel
            model.resize_token_embeddings(vocab_size)
            with warnings.catch_warnings():  # after these, the merged model is another one
                for words in ("Found missing adapter keys", ".*tie_word_embeddings"):
                    warnings.filterwarnings("error", words)
                model = PeftModel.from_pretrained(model, folder)
            saved = model.peft_config["default"].modules_to_save or []
            model = model.merge_and_unload().requires_grad_(True)
            missing = [key for key in missing if key.rpartition(".")[0] not in saved]
            names = dict(model.named_modules())
            unexpected = [f"{name}.weight" for name in saved if name not in names]
            model.name_or_path = folder  # what a next adapter names as its base
    except Exception as error:
        if adapters and isinstance(error, ImportError):
            raise UserError(f"{name}: is a LoRA adapter: pip install peft")
        raise UserError(f"{name}: does not load as a {kind} model: {first_line(error)}")
    if unexpected and (kind == "CausalLM"  # other models may get a new head
                       or "SequenceClassification" in str(config.architectures)):
        what = "causal LM" if kind == "CausalLM" else "reward model"
        raise UserError(f"{name}: not a {what}: it has weights that {type(model).__name__} "
                        f"lacks, {min(unexpected)}")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # some heads have one that no config names
            module.p = 0.0
    model.new_modules = sorted({key.rpartition(".")[0] for key in missing})
    model.to(device)
    if hasattr(model, "score"):
        model.score.__class__ = Float32Linear  # the same weights
        cache_works(body_of(model))  # found out while all weights are float32
    return model, missing


def load_causal_lm(name: str, device):
    """A causal LM, whose forward pass was tried on a few tokens (check_forward)."""
    model, missing = load_model(transformers.AutoModelForCausalLM, name, device)
    if missing:
        raise UserError(f"{name}: not a causal LM: it has no weights for "
                        f"{', '.join(sorted(missing)[:3])}")
    check_forward(model.train())
    if not has_plain_head(model.eval()):  # found out in float32
        print(f"{name}: its logits are more than its head's outputs, so those of whole rows "
              "are computed at once, which takes more memory")
    return model


def load_body(name: str, device):
    """(body, head): what makes a model's last hidden states, and a linear head on them with
    one output: a reward model's, or zeros."""
    if "SequenceClassification" in str(load_config(name).architectures):
        model, missing = load_model(transformers.AutoModelForSequenceClassification, name,
                                    device, num_labels=1)
        if not hasattr(model, "score"):
            raise UserError(f"{name}: no critic: an encoder attends to later tokens")
        weight = model.score.weight.detach() * (not missing)  # (1, D)
        bias = getattr(model.config, "reward_bias", 0.0)
    else:
        model = load_causal_lm(name, device)
        weight, bias = torch.zeros_like(model.get_output_embeddings().weight[:1]), 0.0
    head = Float32Linear(weight.shape[1], 1, device=device, dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": torch.tensor([bias])})
    body = body_of(model)
    cache_works(body)  # found out while all weights are float32
    return body, head


class Float32Linear(torch.nn.Linear):
    """A head that computes in float32 under autocast, too: in bfloat16, scores from 8 to 16
    would be rounded to multiples of 1/16, and groups would have ties."""
    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def body_of(model):
    """A model without its head: what makes the last hidden states."""
    parts = (part for part in model.children()
             if isinstance(part, transformers.PreTrainedModel))
    return model.base_model if model.base_model is not model else next(parts, model)


def embedding_rows(model) -> int:
    return model.config.get_text_config().vocab_size


def freeze(model, bf16: bool):
    """The model without gradients. With bf16 its matrices are kept as autocast would cast them
    at each use: half their memory, and the same numbers."""
    model.eval().requires_grad_(False)
    for name, module in model.named_modules() if bf16 else ():
        if isinstance(module, torch.nn.Linear) and name not in ("score", "classifier"):
            # parameters of its own: a head's may be the embeddings', which stay float32
            module.load_state_dict({k: v.to(torch.bfloat16) for k, v in
                                    module.state_dict().items()}, assign=True)
    return model


# --- running

def completion_outputs(network, prompt_ids, prompt_mask, completion_ids, mask, share: bool):
    """What a network (a model or its body) puts out before each completion token: (B, T, ·).

    prompt_ids, prompt_mask: (B, P); completion_ids, mask: (B, T). Positions are counted from a
    row's first token, so that padding changes nothing. With share (see cache_works), rows with
    the same prompt share its forward pass; their gradients add up through the cache.
    """
    P, T = prompt_ids.shape[1], completion_ids.shape[1]
    ids = torch.cat([prompt_ids, completion_ids], 1)[:, :-1]  # (B, P + T - 1)
    attention_mask = torch.cat([prompt_mask, mask], 1)[:, :-1]  # (B, P + T - 1)
    prompts, prompt_of = torch.cat([prompt_mask, prompt_ids], 1).unique(
        dim=0, return_inverse=True)
    checkpointing = network.training and any(  # it forbids a cache
        getattr(m, "gradient_checkpointing", False) for m in network.modules())
    # several processes must pass through their layers equally often, so they share nothing
    longest = int(attention_mask.sum(1).max())
    if (not share or P == 1 or checkpointing or dist.is_initialized() or not sharing_pays(
            len(prompts), P - 1, len(ids), T, longest, ids.is_cuda)):
        # move each row to the left: padding then comes last, where no token attends to it
        first = P - prompt_mask.sum(1, keepdim=True)  # (B, 1)
        place = torch.arange(longest, device=ids.device)[None]
        output = network(input_ids=ids.gather(1, (place + first).clamp(max=P + T - 2)),
                         use_cache=False)[0]  # (B, longest row, ·)
        before = torch.arange(P - 1, P + T - 1, device=ids.device) - first  # (B, T)
        return output[torch.arange(len(ids), device=ids.device)[:, None],
                      before.clamp(max=output.shape[1] - 1)]
    prompt_mask, prompt_ids = prompts[:, :P - 1], prompts[:, P:-1]  # (prompts, P - 1)
    cache = transformers.DynamicCache(config=network.config)
    network(input_ids=prompt_ids, attention_mask=prompt_mask, use_cache=True,
            position_ids=positions(prompt_mask), **cache_argument(network, cache))
    cache.batch_select_indices(prompt_of)  # (B, ...)
    return network(input_ids=ids[:, P - 1:], attention_mask=attention_mask, use_cache=True,
                   position_ids=positions(attention_mask)[:, P - 1:],
                   **cache_argument(network, cache))[0]


def sharing_pays(prompts: int, P: int, rows: int, T: int, longest: int, cuda: bool) -> bool:
    """Whether passing the prompts once, and then the rows' other tokens, takes so much fewer
    tokens, padding included, than whole rows that it is faster: it is two passes, with masks
    (benchmarks/parts.py)."""
    return prompts * P + rows * T < (0.5 if cuda else 0.8) * rows * longest


def positions(mask):
    """The place of each token in its row, (B, P), padding not counted."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class SamplingCache(transformers.DynamicCache):
    """A cache of keys and values in autocast's precision, to which attention would cast them:
    in bfloat16 half the memory and the same numbers. (Not for training: gradients of a shared
    prompt would add up in bfloat16.)"""
    def update(self, key_states, value_states, *args, **kwargs):
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        return super().update(key_states, value_states, *args, **kwargs)


def sampling_cache(model) -> tuple:
    """An empty SamplingCache, and the keyword argument that passes it to the model."""
    cache = SamplingCache(config=model.config)
    return cache, cache_argument(model, cache)


def cache_argument(model, cache) -> dict:
    """The keyword that passes a cache; transformers 5.24 renamed it from past_key_values."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


@torch.no_grad()
def has_plain_head(model) -> bool:
    """Whether the logits are the head of the last hidden states and nothing more: Gemma 2,
    Cohere and Granite cap or scale them. Checked once per model, on four tokens."""
    if not hasattr(model, "plain_head"):
        ids = torch.arange(4, device=model.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = body_of(model)(input_ids=ids, use_cache=False)[0]
        head = model.get_output_embeddings()
        model.plain_head = hidden.shape[-1] == head.weight.shape[1] and torch.allclose(
            head(hidden), logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    return model.plain_head


@torch.no_grad()
def cache_works(model) -> bool:
    """Whether a prompt's cache can be repeated for its completions and cut to some of them, as
    attention's can, and the states of Mamba and other recurrent layers cannot. Found out once
    per model, by check_forward."""
    if not hasattr(model, "cache_is_exact"):
        with torch.autocast(model.device.type, enabled=False):
            check_forward(model)
    return model.cache_is_exact


@torch.no_grad()
def check_forward(model):
    """Tries a model on two short rows. The truth is each alone, with nothing but its ids. Rows
    in a batch must agree, in the mode that the model is in. Then sets cache_is_exact: whether
    tokens one by one agree, as in sampling. If not, transformers' generate must agree."""
    def same(outputs, tolerance=1e-4):
        return (outputs - truth).abs().max() <= tolerance * truth.abs().max()

    def next_outputs(ids):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)[
            :, -ids.shape[1]:], use_cache=True, **cache_argument(model, cache))[0][:, -1]

    kind, training = f"{model.name_or_path}: {type(model).__name__}", model.training
    ids = torch.arange(3, 12, device=model.device) % embedding_rows(model)
    prompt_ids, completions = ids[:6].view(2, 3), ids[6:].expand(2, 3)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=model.device)
    tokens = prompt_ids, mask, completions, torch.ones_like(completions)
    rows = [torch.cat([prompt, ids[6:]])[None] for prompt in (ids[:3], ids[4:6])]
    try:
        truth = torch.stack([model.eval()(input_ids=row, use_cache=False)[0][0, -4:-1]
                             for row in rows])  # (2, 3, ·)
        exact = same(completion_outputs(model.train(training), *tokens, share=False))
    except Exception as error:
        raise UserError(f"{kind} does not run on token ids alone: {first_line(error)}")
    if not truth.isfinite().all():
        raise UserError(f"{kind}: its outputs are not finite")
    if not exact:
        raise UserError(f"{kind} gives a row other outputs in a batch, or in train mode, than "
                        "alone: its log-probs would be wrong")
    model.eval()
    try:
        cache = transformers.DynamicCache(config=model.config)
        outputs = [next_outputs(prompt_ids)]
        cache.batch_repeat_interleave(2)
        mask = F.pad(mask, (0, 1), value=1).repeat_interleave(2, 0)
        outputs.append(next_outputs(completions[:, :1].repeat_interleave(2, 0))[::2])
        cache.batch_select_indices(torch.tensor([0, 3], device=model.device))
        mask = F.pad(mask[::2], (0, 1), value=1)
        outputs.append(next_outputs(completions[:, 1:2]))
        model.cache_is_exact = same(torch.stack(outputs, 1))
    except Exception:  # a cache of another kind
        model.cache_is_exact = False
    if not model.cache_is_exact and hasattr(model, "generate"):
        try:
            both = torch.cat([rows[1], rows[1].flip(1)])  # (2, 5)
            new = generate_by_library(model, both, torch.ones_like(both), max_new_tokens=3,
                                      return_dict_in_generate=True, output_logits=True)
            truth = model(input_ids=new.sequences[:, :-1], use_cache=False).logits[:, 4:]
            exact = same(torch.stack(new.logits, 1), 5e-3)  # Zamba 2's decoding is a bit off
        except Exception:
            exact = False
        if not exact:
            raise UserError(f"{kind} gives other outputs with a cache than without, also in "
                            "transformers' generate: it cannot be sampled from")
    model.train(training)


def generate_by_library(model, prompt_ids, prompt_mask, **settings):
    """What transformers' generate gives with these settings alone: the model's own
    generation_config changes nothing."""
    own, model.generation_config = model.generation_config, transformers.GenerationConfig(
        pad_token_id=0, **settings)
    try:
        return model.generate(input_ids=prompt_ids, attention_mask=prompt_mask)
    finally:
        model.generation_config = own
