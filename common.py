"""What the five scripts share: rows of data, tokenization, log-prob helpers, the reward model,
measures of evaluation, and a run's folder. Nothing else.

Shapes: B completions, P prompt tokens (padded on the left), T completion tokens (padded on the
right). A user's mistake ends in one line on stderr and exit code 2; see `fail`.
"""
import contextlib
import dataclasses
import fcntl
import gzip
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import types
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForSequenceClassification, AutoTokenizer,
                          DynamicCache)


def fail(message: str):
    """Ends the program with one line: what is wrong (file, row or flag) and what to do about
    it."""
    if rank() > 0:
        time.sleep(3)  # the first process says the same and ends all, unless this one's mistake is its own
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# --- rows of data

def read_rows(path: str) -> list[tuple[str, dict]]:
    """[(where, row)] of a JSON-lines file (`.gz` too), or of a hub data set
    `owner/name[:config][:split]`.

    `where` names the row for messages. Blank lines are not rows; anything else that is no JSON
    object fails.
    """
    if not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", path):
        if not Path(path).parent.exists() and importlib.util.find_spec("datasets"):
            from datasets import load_dataset
            name, *config, split = path.split(":") if ":" in path else (path, "train")
            try:
                return [(f"{path}[{i}]", row) for i, row in enumerate(load_dataset(name, *config, split=split))]
            except Exception as error:  # the hub's own words say best what is wrong
                fail(f"{path}: not read from the hub: {first_line(error)}")
        fail(f"{path}: no such file (for a data set of the hub: pip install 'plain-rlhf[hub]')")
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            lines = [(f"{path}:{i}", line) for i, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        fail(f"{path}: cannot be read as text: {error}")
    rows = []
    for where, line in lines:
        try:
            rows.append((where, json.loads(line)))
        except json.JSONDecodeError as error:
            fail(f"{where}: not JSON: {error} (one JSON object a line is expected)")
        if re.search(r"\\ud[89a-f]", line, re.I) and re.search("[\ud800-\udfff]", json.dumps(rows[-1][1], ensure_ascii=False)):
            fail(f"{where}: holds half a character (a lone surrogate), which is no text: take it out")
        if not isinstance(rows[-1][1], dict):
            fail(f"{where}: a JSON object is expected, not {line.strip()[:40]}")
    if not rows:
        fail(f"{path}: holds no rows")
    return rows


def is_conversation(value) -> bool:
    return (isinstance(value, list) and len(value) > 0 and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value))


def read_prompts(path: str, column: str = "prompt") -> list[dict]:
    """Rows with their `prompt`, a text or chat messages, and all their other columns.

    Rows of pairs that hold the prompt inside `chosen` and `rejected` give that prompt.
    """
    rows = []
    for where, row in read_rows(path):
        if column in row:
            prompt = row[column]
        elif "chosen" in row and "rejected" in row:
            prompt = split_pair(where, row["chosen"], row["rejected"])[0]
        else:
            fail(f"{where}: no column {column!r}, only {', '.join(row)}: name yours with --prompt-column")
        if not (isinstance(prompt, str) and prompt.strip() or is_conversation(prompt)):
            fail(f"{where}: {column!r} must be a text or a list of messages (role, content), and not empty")
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            fail(f"{where}: the prompt ends with the assistant's turn: there is nothing to answer")
        rows.append({**row, "prompt": prompt})
    return rows


def read_pairs(path: str, column: str = "prompt") -> list[dict]:
    """Rows with `prompt` (text or messages), `chosen` and `rejected` (texts), and all their
    other columns."""
    rows = []
    for where, row in read_rows(path):
        if "chosen" not in row or "rejected" not in row:
            fail(f"{where}: pairs need the columns 'chosen' and 'rejected', not only {', '.join(row)}")
        prompt, chosen, rejected = row.get(column), row["chosen"], row["rejected"]
        if prompt is None or is_conversation(chosen) and len(chosen) > 1:
            prompt, chosen, rejected = split_pair(where, chosen, rejected)
        chosen, rejected = (c[0]["content"] if is_conversation(c) and len(c) == 1 else c
                            for c in (chosen, rejected))
        if not (isinstance(prompt, str) and prompt.strip() or is_conversation(prompt)):
            fail(f"{where}: {column!r} must be a text or a list of messages (role, content), and not empty")
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            fail(f"{where}: 'chosen' and 'rejected' must be texts or lists of messages")
        rows.append({**row, "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def split_pair(where: str, chosen, rejected) -> tuple:
    """(prompt, chosen answer, rejected answer) of a pair that holds the prompt inside both, at
    the common prefix.

    Message lists and `\\n\\nHuman: … \\n\\nAssistant: …` transcripts are cut at the last turn
    that starts inside the common prefix, other texts at its last space.
    """
    if is_conversation(chosen) and is_conversation(rejected):
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        if same == 0 or len(chosen) != same + 1 or len(rejected) != same + 1:
            fail(f"{where}: chosen and rejected must be the same messages up to their last")
        return chosen[:same], chosen[same]["content"], rejected[same]["content"]
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        fail(f"{where}: 'chosen' and 'rejected' must be both texts, or both lists of messages")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    turn = chosen.rfind("\n\nAssistant:", 0, same)
    cut = turn + len("\n\nAssistant:") if turn >= 0 else chosen.rfind(" ", 0, same)
    if cut <= 0:
        fail(f"{where}: no 'prompt', and chosen and rejected have no beginning in common")
    return chosen[:cut], chosen[cut:], rejected[cut:]


# --- tokenization

def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_tokenizer(name: str):
    """The tokenizer of a model folder or hub id, with some pad token: batches are told by
    masks, never by it."""
    check_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        fail(f"{name}: no tokenizer loads from it: {first_line(error)}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def as_messages(prompt) -> list[dict]:
    """Chat messages of a prompt: itself, the turns of a `\\n\\nHuman: …` transcript, or a text
    as the user's turn."""
    if not isinstance(prompt, str):
        return prompt
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    turns = re.split(r"\n\n(Human|Assistant):", prompt)[1:]
    role = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": role[a], "content": b.strip()} for a, b in zip(turns[::2], turns[1::2])]
    return messages if messages[-1]["content"] else messages[:-1]


def render(tokenizer, prompt, completion: str | None = None) -> str:
    """The conversation as the model reads it, by the tokenizer's chat template; with no
    completion, up to the point where the assistant is to speak. Without a template, texts
    follow one another as they are."""
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            fail(f"{tokenizer.name_or_path}: has no chat template, so prompts must be texts, not messages")
        if completion is None:
            return prompt
        text, end = prompt + completion, tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end
    messages = as_messages(prompt)
    if completion is not None:
        messages = messages + [{"role": "assistant", "content": completion.strip()}]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=completion is None)
    except Exception as error:  # templates raise what they like, for instance on roles that do not alternate
        fail(f"{tokenizer.name_or_path}: its chat template refuses the prompt {str(prompt)[:60]!r}: "
             f"{first_line(error)}")


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered conversations; a chat template has written the special tokens
    already."""
    return tokenizer(texts, add_special_tokens=tokenizer.chat_template is None).input_ids


def encode_prompts(tokenizer, rows: list[dict], path: str, room: float, longest: int = 0):
    """(rows, their prompts' token ids), without the rows longer than `longest` tokens (0:
    without none), which are counted aloud. A prompt that leaves no `room` in the model's
    context for an answer fails."""
    prompts = encode(tokenizer, [render(tokenizer, row["prompt"]) for row in rows])
    kept = [i for i, ids in enumerate(prompts) if len(ids) <= (longest or math.inf)]
    if len(kept) < len(rows):
        print(f"{path}: left out {len(rows) - len(kept)} of {len(rows)} rows: longer than {longest} tokens")
    if not kept:
        fail(f"{path}: no row has a prompt of at most {longest} tokens: raise that limit")
    for i in kept:
        if not 0 < len(prompts[i]) <= room:
            fail(f"{path}: row {i + 1}: its prompt has {len(prompts[i])} tokens, and the model's context has room "
                 f"for {room} before an answer: lower --max-new-tokens, or leave such rows out")
    return [rows[i] for i in kept], [prompts[i] for i in kept]


def context_of(model) -> float:
    """The most tokens that the model reads at once."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def pad(rows: list[list[int]], pad_id: int, side: str, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, (B, longest) int64 each, padded on the `left` (prompts) or the
    `right`."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


# --- models

def check_model(name: str):
    """Fails with one line where `name` is no model folder and cannot be a hub id."""
    if not Path(name).is_dir() and (not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
                                    or Path(name).parts[0] in ("tiny", "runs") or Path(name).exists()):
        fail(f"{name}: no such model folder")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        fail(f"{name}: no model: the folder has no config.json")


def load_model(auto_class, name: str, device, **config_changes):
    """A model in float32 (safetensors only), with dropout off, and the names of the weights it
    came without. An adapter of --lora-rank is loaded with the model it adapts, and merged into it."""
    check_model(name)
    base, adapter = name, None
    if (Path(name) / "adapter_config.json").is_file():
        adapter = json.loads((Path(name) / "adapter_config.json").read_text())
        base = adapter["base_model_name_or_path"]
    try:
        config = AutoConfig.from_pretrained(name, **config_changes)
        for key, value in vars(config).items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)  # not by eval(): gradient checkpointing works in train mode alone
        if adapter:  # the base may have had fewer tokens
            vocabulary = config.get_text_config().vocab_size
            config.get_text_config().vocab_size = AutoConfig.from_pretrained(base).get_text_config().vocab_size
        model, loading = auto_class.from_pretrained(
            base, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        missing = loading["missing_keys"]
        if adapter:
            from peft import PeftModel
            model.resize_token_embeddings(vocabulary)
            model = PeftModel.from_pretrained(model, name).merge_and_unload()
            heads = adapter.get("modules_to_save") or []
            missing = [k for k in missing if k.partition(".")[0] not in heads]
            loading["unexpected_keys"] = [f"{head}.weight" for head in heads if not hasattr(model, head)]
    except ImportError:
        fail(f"{name}: an adapter, to load it takes the library peft: pip install 'plain-rlhf[lora]'")
    except Exception as error:
        fail(f"{name}: no {auto_class.__name__.removeprefix('AutoModelFor')} model loads from it: "
             f"{first_line(error)}")
    other = [k for k in loading["unexpected_keys"] if k.startswith(("score.", "classifier."))]
    if other and "CausalLM" in auto_class.__name__:  # its tied embeddings would pass for a head
        fail(f"{name}: no causal LM: it has the weights of another head, {other[0]}")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # some heads have one that the config does not name
    return model.to(device), missing


def wants_bf16(dtype: str, model) -> bool:
    """Whether matrix products are to be in bfloat16: as dtype says, or with `auto` where that is
    faster: on a GPU, and on a CPU with instructions for it if the model is large enough to gain."""
    if dtype != "auto" or model.device.type != "cpu":
        return dtype != "float32"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16")) and model.num_parameters() > 50e6


def freeze(model, bf16: bool):
    """For a model that is not trained: no gradients, and with bf16 the matrices are kept as autocast
    would cast them at each use, which saves half their memory and changes no number."""
    model.eval().requires_grad_(False)
    head = model.get_output_embeddings()  # often the embeddings as well
    for name, module in model.named_modules():
        if bf16 and isinstance(module, torch.nn.Linear) and module is not head and name not in HEADS:
            module.to(torch.bfloat16)


HEADS = "score", "classifier"  # of models that score


def add_lora(model, rank: int, bf16: bool):
    """Trains updates of `rank` to every linear layer in the place of its weights (Hu et al. 2021,
    arXiv:2106.09685; alpha is twice the rank), and a scoring head whole. Returns peft's model around
    this one, which saves the adapter alone, and can switch it off."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        fail("--lora-rank: takes the library peft: pip install 'plain-rlhf[lora]'")
    if Path(model.name_or_path).is_dir():
        model.name_or_path = str(Path(model.name_or_path).resolve())  # the adapter names it
    freeze(model, bf16)
    heads = [name for name in HEADS if hasattr(model, name)]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                                            modules_to_save=heads or None))


@contextlib.contextmanager
def as_reference(model, adapter, device):
    """Within it the reference is on the device, wherever it waits between uses, and without the adapter
    where it is the policy itself."""
    home = model.device
    with adapter.disable_adapter() if adapter else contextlib.nullcontext():
        yield model.to(device)
    model.to(home)


def checkpoint_gradients(model):
    """Activations are recomputed in the backward pass; transformers renamed the method."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


# --- many processes

def join_processes(device: str) -> torch.device:
    """The device of this process; where torchrun started several, it joins them: a GPU each, or all of
    them on the CPU. Only the first one prints."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
    except Exception as error:
        fail(f"--device {device}: {first_line(error)}")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def enough(rows: int, what: str):
    """Fails where some process would have none of the rows."""
    if rows < ranks():
        fail(f"{what}: {rows} are too few for {ranks()} processes")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows):
    """This process's part of rows, a list or a tensor: as many as the others', or one more."""
    return rows[len(rows) * rank() // ranks():len(rows) * (rank() + 1) // ranks()]


def total(value):
    """The sum of a tensor, or a number, over the processes."""
    if ranks() == 1:
        return value
    tensor = value.clone() if torch.is_tensor(value) else torch.tensor(
        value, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor)
    return tensor if torch.is_tensor(value) else tensor.item()


def gather(part):
    """The parts of all processes, one after the other: what share took apart. (b, ...) -> (B, ...)"""
    if ranks() == 1:
        return part
    sizes = [torch.zeros(1, dtype=torch.long, device=part.device) for _ in range(ranks())]
    dist.all_gather(sizes, torch.tensor([len(part)], device=part.device))
    padded = part.new_zeros(max(map(int, sizes)), *part.shape[1:])
    padded[:len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([rows[:n] for rows, n in zip(parts, sizes)])


def shard(model):
    """Splits a model's weights over the processes (FSDP2): a layer is gathered when it computes, and
    gradients are summed. Without torchrun, the model as it is."""
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        mesh = init_device_mesh(model.device.type, (ranks(),))
        if model.get_output_embeddings() is not None:
            mixed = any(p.dtype == torch.bfloat16 for p in model.parameters())
            with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
                has_plain_head(model)  # found while it is whole
            model.logprobs = types.MethodType(logprobs_of_whole, model)
        for module in model.modules():
            if type(module).__name__ in (model._no_split_modules or ()):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if hasattr(model, "logprobs"):  # it calls the body and the head one by one
            register_fsdp_forward_method(model, "logprobs")
        for module in sharded(model):
            module.set_gradient_divide_factor(1.0)  # losses are normalised over all processes already
            module.set_force_sum_reduction_for_comms(True)
    return model


def sharded(model) -> list:
    """The modules of a model that shard took apart; none without torchrun."""
    from torch.distributed.fsdp import FSDPModule
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def unsharded(model, gather: bool = True):
    """Within it, each process has all weights, and samples at its own pace. Without `gather` they go layer
    by layer, in step; see anywhere."""
    parts = sharded(model) if dist.is_initialized() and gather else []
    model.in_step = dist.is_initialized() and not gather
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in parts:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def anywhere(alive: torch.Tensor, model) -> bool:
    """Whether a row is still being written, here or in a process that this one must keep in step with."""
    alive = alive.any()
    return bool(total(alive.long()) if getattr(model, "in_step", False) else alive)


def clip_gradients(model, most: float) -> torch.Tensor:
    """The norm of all gradients, which are scaled down to `most` where it is larger."""
    return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), most))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, of which each process gets all."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# --- log-prob helpers

def completion_outputs(network, prompt_ids, prompt_mask, completion_ids, mask):
    """What a network, a whole model or its body, puts out before each completion token: (B, T, ·).

    prompt_ids, prompt_mask (B, P); completion_ids, mask (B, T). Positions are counted from each
    row's first token, so that padding changes nothing. Rows of one prompt, a group's or a pair's,
    share its forward pass; gradients add up through the cache.
    """
    P, T = prompt_ids.shape[1], completion_ids.shape[1]
    ids = torch.cat([prompt_ids, completion_ids], 1)[:, :-1]  # (B, P + T - 1)
    attention = torch.cat([prompt_mask, mask], 1)[:, :-1]  # (B, P + T - 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    prompts, prompt_of = torch.cat([prompt_mask, prompt_ids], 1).unique(dim=0, return_inverse=True)
    checkpointing = network.training and any(  # it forbids a cache
        getattr(m, "gradient_checkpointing", False) for m in network.modules())
    # (and processes must pass through their layers equally often)
    if P == 1 or len(prompts) == len(ids) or checkpointing or dist.is_initialized():
        # every row from its first token on: what is then padding comes last, where no token looks at it
        first = P - prompt_mask.sum(1, keepdim=True)  # (B, 1)
        every = torch.arange(int(attention.sum(1).max()), device=ids.device)[None]  # (1, longest row)
        output = network(input_ids=ids.gather(1, (every + first).clamp(max=P + T - 2)),
                         position_ids=every, use_cache=False)[0]  # (B, longest row, ·)
        before = torch.arange(P - 1, P + T - 1, device=ids.device) - first  # (B, T)
        return output[torch.arange(len(ids), device=ids.device)[:, None],
                      before.clamp(max=output.shape[1] - 1)]
    prompt_mask, prompt_ids = prompts[:, :P - 1], prompts[:, P:-1]  # (prompts, P - 1), each once
    cache = DynamicCache(config=network.config)
    network(input_ids=prompt_ids, attention_mask=prompt_mask, use_cache=True,
            position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0), **past(network, cache))
    cache.batch_select_indices(prompt_of)  # (B, ...)
    return network(input_ids=ids[:, P - 1:], attention_mask=attention, position_ids=positions[:, P - 1:],
                   use_cache=True, **past(network, cache))[0]


def completion_logprobs(model, prompt_ids, prompt_mask, completion_ids, mask, temperature: float = 1.0):
    """log pi(token | prompt, tokens before it) and the policy's entropy at each completion
    token, in nats.

    Arguments as completion_outputs. Returns two float32 (B, T), 0 where mask is 0; the entropy is
    detached. Padding that all rows share is trimmed. Logits exist for the tokens of the mask only,
    and where they are many for a chunk of them at a time: the backward pass makes them again.
    """
    rollout = prompt_ids, prompt_mask, completion_ids, mask
    if hasattr(model, "logprobs"):  # sharded: by way of its hooks
        return model.logprobs(*rollout, temperature)
    return logprobs_of_whole(model, *rollout, temperature)


def logprobs_of_whole(model, prompt_ids, prompt_mask, completion_ids, mask, temperature: float):
    """completion_logprobs of a model whose weights are all here."""
    rows = trim(prompt_ids, prompt_mask, completion_ids, mask)
    written = rows[3].bool()
    tokens = rows[2][written]  # (N,) of all rows, one after the other
    plain = has_plain_head(model)
    hidden = completion_outputs(model.base_model if plain else model, *rows)[written]  # (N, D)
    head = model.get_output_embeddings() if plain else torch.nn.Identity()
    chunk = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    parts = [checkpoint(token_logprobs, *part, head, temperature, use_reentrant=False)
             if len(tokens) > chunk else token_logprobs(*part, head, temperature)
             for part in zip(hidden.split(chunk), tokens.split(chunk))]
    empty = torch.zeros(mask.shape, device=mask.device)  # (B, T)
    return tuple(empty.masked_scatter(mask.bool(), torch.cat(part)) for part in zip(*parts))


LOGITS_AT_ONCE = 2**26  # numbers, 256 MiB in float32: a vocabulary of 151,936 by 441 tokens


def token_logprobs(hidden, tokens, head, temperature: float):
    """The log-prob of each token and the entropy there, two (N,) float32, of hidden (N, D),
    tokens (N,) and the head that makes logits (N, V)."""
    log_softmax = (head(hidden).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(-1, tokens[:, None])[:, 0], entropy


@torch.no_grad()
def has_plain_head(model) -> bool:
    """Whether logits are the head of the last hidden states and no more: some models cap or scale
    them (Gemma 2, Cohere, Granite). Tried on four tokens, once for a model."""
    if not hasattr(model, "plain_head"):
        ids = torch.arange(4, device=model.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits
        plain = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False)[0])
        model.plain_head = torch.allclose(plain, logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    return model.plain_head


def trim(prompt_ids, prompt_mask, completion_ids, mask):
    """The four without the padding that all rows share: on the left of prompts, on the right of
    completions."""
    P, T = int(prompt_mask.sum(1).max()), int(mask.sum(1).max())
    return prompt_ids[:, -P:], prompt_mask[:, -P:], completion_ids[:, :T], mask[:, :T]


def past(model, cache) -> dict:
    """The argument that hands a model its cache: transformers renamed past_key_values."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def micro_batches(lengths: torch.Tensor, size: int, tokens: float = math.inf,
                  rows: torch.Tensor | None = None, shared: bool = True) -> list[torch.Tensor]:
    """Row numbers in groups, the longest first, so that what does not fit in memory fails at once: of at
    most `size` rows, at most `tokens` with their padding (or a single row), and none shorter than 0.7
    of its group's longest, since padding costs what tokens cost. lengths (B,); rows: some of 0..B-1,
    or all. shared: among the processes, each of which gets its part of every group, one row at least."""
    rows = torch.arange(len(lengths), device=lengths.device) if rows is None else rows
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    left, sizes, n = lengths[rows].tolist(), [], ranks() if shared else 1
    while left:
        alike = sum(length >= 0.7 * left[0] for length in left)
        sizes.append(max(n, min(n * size, n * max(1, int(min(tokens, 2**62) // left[0])), alike)))
        if len(left) - sizes[-1] < n:
            sizes[-1] = len(left)
        left = left[sizes[-1]:]
    return [share(group) if shared else group for group in rows.split(sizes)]


def kl_estimate(logprobs, ref_logprobs, kind: str = "k1"):
    """Per-token estimates of KL(policy || reference) at tokens sampled from the policy, (B, T)
    nats.

    With d = log pi - log pi_ref (Schulman 2020, "Approximating KL divergence"), as a VALUE:
      k1 = d                  unbiased, high variance, may be negative
      k2 = d^2 / 2            biased (second order in the distance), never negative
      k3 = exp(-d) - 1 + d    unbiased, low variance near d = 0, never negative
    As a LOSS, where the gradient is of the estimate with the sampled tokens held fixed, its
    expectation is
      k1: zero (E[grad log pi] = 0): never put k1 in a loss
      k2: grad KL(policy || reference), the gradient that k1 in the reward has
      k3: grad KL(reference || policy), the reversed KL; times the ratio pi / pi_old: grad
      KL(policy || reference)
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    return d.square() / 2 if kind == "k2" else torch.expm1(-d) + d


def masked_mean(values, mask, dim=None):
    """Mean over the entries whose mask is 1, over all or along `dim`; 0 where there are
    none."""
    if dim is None:
        return (values * mask).sum() / mask.sum().clamp(min=1)
    return (values * mask).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_whiten(values, mask, shift_mean: bool = True):
    """Values scaled to variance 1 (and mean 0 with `shift_mean`) over the entries whose mask
    is 1, 0 elsewhere."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


# --- the reward model

def score_ids(model, rows: list[list[int]]) -> torch.Tensor:
    """(B,) float32 scores of conversations, as token ids, by a one-label
    sequence-classification model.

    The head is read at the last token that is not padding, as transformers does. These heads
    have no bias, so `reward_bias` in the model's config is added here.
    """
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    own, ends = config.pad_token_id, {row[-1] for row in rows}
    if own is None:  # for the time of the call, any token that ends no row
        config.pad_token_id = next(i for i in range(config.vocab_size) if i not in ends)
    ids, mask = pad(rows, config.pad_token_id, "right", device)
    cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}  # encoders have none
    scores = model(input_ids=ids, attention_mask=mask, **cache).logits[:, 0].float()
    config.pad_token_id = own
    return scores + getattr(model.config, "reward_bias", 0.0)


def score_texts(model, tokenizer, texts: list[str], size: int, tokens: float = math.inf) -> torch.Tensor:
    """(B,) float32 scores of rendered conversations, without gradient, in micro_batches of size and
    tokens."""
    rows = encode(tokenizer, texts)
    longest = max(map(len, rows))
    if longest > context_of(model):
        fail(f"{tokenizer.name_or_path}: a conversation of {longest} tokens is longer than the reward model's "
             f"context of {context_of(model)}: lower --max-new-tokens, or leave out long prompts")
    scores = torch.zeros(len(rows), device=next(model.parameters()).device)
    with torch.no_grad():
        for part in micro_batches(torch.tensor([len(row) for row in rows]), size, tokens, shared=False):
            scores[part.to(scores.device)] = score_ids(model, [rows[i] for i in part])
    return scores


def load_reward(name: str, device, size: int, tokens: float = math.inf, bf16: bool = False,
                timeout: float = 0.0):
    """reward(rows, completions) -> (B,) float32, nan where a row is left out: of a reward
    model, or a function.

    name: a folder or hub id of a one-label sequence-classification model, which is scored
    through text, with its own tokenizer and chat template; or `file.py:function`, called with
    `prompts`, `completions` and the other columns of the rows, as TRL calls it: for a prompt
    of messages the completion is a list of one message. size, tokens: as in micro_batches. bf16:
    matrix products in bfloat16. timeout: seconds that a call of the function may take (0: any).
    """
    if re.search(r"\.py:\w+$", name):
        function = load_function(name)

        def reward(rows: list[dict], completions: list[str]) -> torch.Tensor:
            columns = {k: [row.get(k) for row in rows] for k in dict.fromkeys(k for row in rows for k in row)}
            prompts = columns.pop("prompt")
            answers = [c if isinstance(p, str) else [{"role": "assistant", "content": c}]
                       for p, c in zip(prompts, completions)]
            try:
                with at_most(timeout):
                    values = function(prompts=prompts, completions=answers, **columns)
                    values = list(values) if hasattr(values, "__iter__") else values
            except TimeoutError:
                fail(f"{name}: took more than --reward-timeout {timeout:g} seconds for {len(rows)} completions")
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                fail(f"{name}: raised {type(error).__name__}: {first_line(error)} "
                     f"({last.filename}:{last.lineno})")
            try:
                values = [float("nan") if v is None else finite(v) for v in values]
            except (TypeError, ValueError):
                fail(f"{name}: must return a list of finite numbers (None leaves a row out), "
                     f"not {' '.join(str(values).split())[:60]}")
            if len(values) != len(rows):
                fail(f"{name}: returned {len(values)} rewards for {len(rows)} completions")
            return torch.tensor(values, dtype=torch.float32, device=device)
        return of_all(reward)

    if name.endswith(".py"):
        fail(f"{name}: name the function in it, too: {name}:FUNCTION")
    tokenizer = load_tokenizer(name)
    model, missing = load_model(AutoModelForSequenceClassification, name, device)
    if model.config.num_labels != 1 or missing:
        fail(f"{name}: not a reward model: it has {model.config.num_labels} labels"
             + (f" and no weights for {', '.join(sorted(missing))}" if missing else "") + ", one label is needed")

    def reward(rows: list[dict], completions: list[str]) -> torch.Tensor:
        texts = [render(tokenizer, row["prompt"], c) for row, c in zip(rows, completions)]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            scores = score_texts(model, tokenizer, texts, size, tokens)
        for text in (text for text, fine in zip(texts, scores.isfinite()) if not fine):
            fail(f"{name}: its score is not finite, for the conversation that ends {text[-60:]!r}: try --dtype float32")
        return scores
    freeze(model, bf16)
    reward = of_all(reward)
    reward.model = model
    return reward


def of_all(reward):
    """The reward function of which each process computes its share."""
    return lambda rows, completions: gather(reward(share(rows), share(completions)))


@contextlib.contextmanager
def at_most(seconds: float):
    """Raises TimeoutError in the main thread after so many seconds (0: never)."""
    if seconds == 0:
        yield
        return

    def stop(*_):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def finite(value) -> float:
    if not abs(value) <= torch.finfo(torch.float32).max:  # nan, too
        raise ValueError
    return float(value)


def load_function(name: str):
    """The function of `file.py:function`."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    try:
        spec = importlib.util.spec_from_file_location(f"reward_file_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
    except Exception as error:
        fail(f"{path}: cannot be imported: {type(error).__name__}: {first_line(error)}")
    if not callable(getattr(module, function, None)):
        fail(f"{path}: has no function {function!r}")
    return getattr(module, function)


# --- evaluation

def wilson_interval(mean: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a rate seen in n tries (Wilson 1927), of 95 % with z = 1.96; with ties that count
    half, it is a little wider than it need be."""
    center = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def length_controlled(wins, longer, z: float = 1.96) -> tuple[float, float, float]:
    """The win rate if both answers were equally long, and its interval (Dubois et al. 2024,
    arXiv:2404.04475, section 3).

    wins, longer (B,): 1, 0, or 0.5 for a tie, and by how many tokens the answer is the longer one.
    P(win) = sigmoid(a + b * tanh(longer / its standard deviation)) is fitted by Newton's method, with a
    normal prior of standard deviation 3 on both; sigmoid(a) is the rate. Their term for a prompt's
    difficulty takes many models to fit, and is left out.
    """
    wins, longer = wins.double(), longer.double()
    spread = longer.std(correction=0).clamp(min=1e-6)
    x = torch.stack([torch.ones_like(longer), (longer / spread).tanh()], 1)  # (B, 2)
    prior, weights = torch.eye(2, dtype=x.dtype, device=x.device) / 9, x.new_zeros(2)
    for _ in range(20):
        p = (x @ weights).sigmoid()  # (B,)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + prior  # (2, 2)
        weights = weights + torch.linalg.solve(curvature, x.T @ (wins - p) - prior @ weights)
    error = z * curvature.inverse()[0, 0].sqrt()
    return tuple((weights[0] + e).sigmoid().item() for e in (0.0, -error, error))


def win_rates(ahead, longer, samples: int = 1) -> dict[str, float]:
    """How often the policy's completion is better than the reference's, ties counting half, and the
    length-controlled rate, with their intervals of 95 %.

    ahead, longer (B,): how much better (nan: left out), and how many tokens longer. samples: of each
    prompt, one after the other; the interval is over prompts.
    """
    wins = torch.where(ahead == 0, 0.5, (ahead > 0).float())
    wins[ahead.isnan()] = math.nan
    by_prompt = wins.view(-1, samples).nanmean(1)  # (prompts,)
    kept, valid = by_prompt[~by_prompt.isnan()], ~wins.isnan()
    if len(kept) == 0:
        return {}
    rate = kept.mean().item()
    low, high = wilson_interval(rate, len(kept))
    # as wide as if a prompt's samples were one, for they are alike
    controlled, lc_low, lc_high = length_controlled(wins[valid], longer[valid], 1.96 * samples ** 0.5)
    return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high, "lc_win_rate": controlled,
            "lc_win_rate_low": lc_low, "lc_win_rate_high": lc_high}


def pass_at_k(right, k: int):
    """Unbiased estimate of P(one of k completions is right), (prompts,), from n >= k of each prompt
    (Chen et al. 2021, arXiv:2107.03374, eq. 1): 1 - C(n - right, k) / C(n, k). right (prompts, n), 0 or
    1."""
    n, wrong = right.shape[1], (1 - right).sum(1)
    none = torch.ones_like(wrong, dtype=torch.float64)
    for i in range(k):  # C(wrong, k) / C(n, k), factor by factor
        none = none * (wrong - i).clamp(min=0) / (n - i)
    return 1 - none


def pass_rates(scores, samples: int) -> dict[str, float]:
    """pass_at_k for k = 1, 2, 4 ... up to samples, of scores (B,) that are all 0 or 1; otherwise nothing."""
    if samples < 2 or not ((scores == 0) | (scores == 1)).all():
        return {}
    right, ks = scores.view(-1, samples), [2**i for i in range(samples.bit_length())]
    return {f"pass_at_{k}": pass_at_k(right, k).mean().item() for k in ks}


def length_correlation(scores, lengths, group_size: int) -> float:
    """Pearson's correlation of score and length (B,) each, within prompts: both less their group's mean. 0
    where one of them does not vary. Near 1 the reward pays for words."""
    valid = ~scores.isnan()
    lengths = torch.where(valid, lengths.to(scores.dtype), math.nan)
    scores, lengths = ((v - v.view(-1, group_size).nanmean(1).repeat_interleave(group_size))[valid].double()
                       for v in (scores, lengths))
    return ((scores * lengths).sum() / (scores.norm() * lengths.norm()).clamp(min=1e-9)).item()


def distinct_ngrams(completion_ids, mask, n: int = 3) -> float:
    """The share of a completion's n-grams of tokens that are not repeats of another in it, averaged over the
    completions that have one; 1: none is repeated (Li et al. 2016, arXiv:1510.03055)."""
    if mask.shape[1] < n:
        return 1.0
    inside = mask[:, n - 1:].bool()  # (B, T - n + 1), as masks are 1 up to an end
    grams = completion_ids.new_zeros(inside.shape)
    size = int(completion_ids.max()) + 1
    for i in range(n):  # one number for each n-gram
        grams = grams * size + completion_ids[:, i:i + grams.shape[1]]
    grams = grams.masked_fill(~inside, -1).sort(1).values
    first = (grams[:, 1:] != grams[:, :-1]) & (grams[:, 1:] >= 0)
    distinct = first.sum(1) + (grams[:, 0] >= 0)
    of = inside.sum(1)
    return (distinct[of > 0] / of[of > 0]).mean().item() if of.any() else 1.0


def eval_line(metrics: dict) -> str:
    """Of an evaluation's metrics, what one reads first, as a line; all of them are in the log."""
    found = {k.removeprefix("eval_"): v for k, v in metrics.items() if k not in ("eval_truncated", "eval_reference_reward")}
    ends = {k: f" ({found[k + '_low']:.2f} to {found[k + '_high']:.2f})" for k in found if k + "_low" in found}
    return "eval  " + "  ".join(f"{k} {v if isinstance(v, int) else f'{v:.4g}'}{ends.get(k, '')}"
                                for k, v in found.items() if not k.endswith(("_low", "_high")))


def credit_line(tokenizer, completion_ids, advantages) -> str:
    """A completion (T,) with each token's advantage (T,): in a terminal green where it is to become more
    likely, red where less, the stronger the more; elsewhere as numbers."""
    most = advantages.abs().max().clamp(min=1e-6)
    words, colours = [], sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before = ""
    for t, advantage in enumerate(advantages.tolist()):
        text = tokenizer.decode(completion_ids[:t + 1])  # a token alone may be no whole letter, or lose its space
        word, before = text[len(before):], text
        word = "".join(c if c.isprintable() else "\\n" if c == "\n" else "?" for c in word)
        dark = 255 - int(200 * abs(advantage) / most)
        red, green = (dark, 255) if advantage > 0 else (255, dark)
        words.append(f"\033[30;48;2;{red};{green};{dark}m{word}\033[0m" if colours else f"{word}[{advantage:+.2f}]")
    return "".join(words)


# --- a run's folder

def command_line(main, Args, description: str):
    """Runs main with the flags of the command line. With --resume RUN they are that run's own, but for those
    given now."""
    args = tyro.cli(Args, description=description)
    if args.resume:
        path = Path(args.resume) / "args.json"
        try:
            flags = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            fail(f"--resume {args.resume}: no run: {path} cannot be read")
        if unknown := set(flags) - {field.name for field in dataclasses.fields(Args)}:
            fail(f"--resume {args.resume}: a run of another script: it has --{min(unknown).replace('_', '-')}")
        args = tyro.cli(Args, description=description, default=Args(**flags | {"resume": args.resume}))
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        fail("--tensorboard: takes the library tensorboard: pip install 'plain-rlhf[tensorboard]'")
    try:
        main(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:  # before the first step, or the second one
        print("stopped by Ctrl-C at once", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if "probability tensor" in str(error):  # in sampling
            fail("the policy's probabilities are not finite after the last step in metrics.jsonl: try a lower --lr, "
                 "or --dtype float32; --resume goes on from the newest checkpoint")
        if not isinstance(error, MemoryError) and not re.search(
                "out of memory|allocate memory|not enough memory", str(error)):
            raise
        fail(f"out of memory ({first_line(error)[:100]}): lower --tokens-per-micro-batch or --micro-batch-size, "
             "--generate-batch-size if it was sampling, or use --gradient-checkpointing, --lora-rank, or "
             "--dtype bfloat16; --resume goes on from the newest checkpoint")


def open_run(run_dir: Path, args, trained: dict):
    """The folder of a new run, or with --resume of one that there is, made sure to be writable and large
    enough. Nobody else may write to it while what is returned is open."""
    if rank() > 0:
        return dist.barrier()
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        lock = open(run_dir / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--resume {run_dir}: another process is at work on this run")
    except OSError as error:
        fail(f"--run-dir: {run_dir} cannot be made: {error.strerror}")
    needed = 16 * sum(p.numel() for model, *_ in trained.values() for p in model.parameters() if p.requires_grad)
    free = shutil.disk_usage(run_dir).free
    if free < needed * (args.keep + 1):
        fail(f"--run-dir: {run_dir} has {free / 2**30:.1f} GiB free, and a checkpoint takes {needed / 2**30:.1f}: "
             "make room, or lower --keep")
    if not args.resume:
        write_args(run_dir, args)
    if dist.is_initialized():
        dist.barrier()
    return lock


def open_curves(run_dir: Path, args, step: int):
    """What writes RUN/tensorboard, without the steps after `step` that it may hold; None without
    --tensorboard."""
    if args.tensorboard and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(run_dir / "tensorboard", purge_step=step + 1 if step else None)


def draw(curves, row: dict):
    """A row of metrics as points of curves."""
    for name, value in row.items():
        curves.add_scalar(name, value, row["step"])
    curves.flush()


def write_args(run_dir: Path, args):
    part = run_dir / "args.json.part"
    part.write_text(json.dumps(dataclasses.asdict(args) | {"resume": ""}, indent=2) + "\n", encoding="utf-8")
    part.rename(run_dir / "args.json")


def cut_back(run_dir: Path):
    """A run's folder as it was at its newest checkpoint."""
    for part in run_dir.glob("*.part"):  # what a kill left half written
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    step, newest = checkpoints(run_dir)[-1]
    if newest.name == "checkpoint":  # the name of the run's end is to be free again
        newest.rename(run_dir / f"checkpoint-{step}")
    for path in (run_dir / "metrics.jsonl", run_dir / "samples.jsonl"):
        if path.is_file():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            part = path.with_name(path.name + ".part")
            part.write_text("".join(kept), encoding="utf-8")
            part.rename(path)


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's whole checkpoints, the newest last."""
    found = []
    for path in (p for p in run_dir.glob("checkpoint*/resume/state.json") if p.parents[1].suffix != ".part"):
        try:
            found.append((json.loads(path.read_text(encoding="utf-8"))["step"], path.parents[1]))
        except (OSError, ValueError, KeyError):
            fail(f"--resume {run_dir}: {path} is damaged: remove {path.parents[1]} to go on from the one before")
    found.sort(key=lambda pair: (pair[0], pair[1].name == "checkpoint"))
    return found or fail(f"--resume {run_dir}: it has no checkpoint yet: start it anew")


@contextlib.contextmanager
def whole_folder(folder: Path):
    """A folder that has its name only when all is written, so that a kill leaves no half of one."""
    part = folder.with_name(folder.name + ".part")
    try:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
        total(0)  # all processes wait for it
        yield part
        total(0)  # for all that they write
        if rank() == 0:
            part.rename(folder)
    except BaseException as error:  # each library has its own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        fail(f"{folder}: not written: {last_line(error)} (what was saved before is untouched)")


def not_finite(step: int, rows: list, of: int):
    """Ends the run before an update whose gradient is not finite; rows: those whose log-probs, or scores, are
    not finite either."""
    beginnings = ", ".join(repr(str(row).strip()[:60]) for row in rows[:3])
    fail(f"step {step}: the gradient is not finite, and the update was not made. Not finite are the outputs for "
         f"{len(rows)} of its {of} rows{': ' * bool(rows)}{beginnings}{', ...' * (len(rows) > 3)}. Try a lower --lr, "
         "or --dtype float32; --resume goes on from the newest checkpoint")


def last_line(error: BaseException) -> str:
    """Of a message that ends with the reason, as those of torch.distributed do."""
    return first_line(Exception(*str(error).strip().splitlines()[-1:]))


def remove_old(run_dir: Path, keep: int):
    """All checkpoints but the newest `keep`."""
    for _, folder in checkpoints(run_dir)[:-keep] if rank() == 0 else ():
        shutil.rmtree(folder)


def save_model(model, config, tokenizer, folder: Path):
    """A model as transformers has it, or an adapter as peft, with the config and tokenizer beside it."""
    weights = None
    if dist.is_initialized():
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        model.save_pretrained(folder, state_dict=weights)
        config.save_pretrained(folder)  # an adapter is saved without it
        tokenizer.save_pretrained(folder)


def tensors_of(trained: dict) -> dict:
    """By name, what an update changes: weights, and AdamW's moments, which are zero before the first one."""
    tensors = {}
    for name, (model, optimizer, _) in trained.items():
        for key, weight in model.named_parameters():
            if weight.requires_grad:
                moments = optimizer.state[weight]
                if not moments:
                    moments |= {"step": torch.zeros((), device=weight.device),
                                "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                tensors[f"{name}.{key}"] = weight.detach()
                tensors |= {f"{name}.{key}.{moment}": value.detach() for moment, value in moments.items()}
    return tensors


def save_state(folder: Path, trained: dict, state: dict, generator=None):
    """In folder/resume, all that it takes to go on as if nothing had been: weights and moments by
    torch.distributed.checkpoint; in state.json `state`, random states, and how far the schedules are.

    trained: name -> (model, optimizer, schedule). generator: that of the samples.
    """
    import torch.distributed.checkpoint as dcp
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.save(tensors_of(trained), checkpoint_id=folder / "resume", no_dist=not dist.is_initialized())
    samplers = [generator and generator.get_state().tolist()] * ranks()
    if dist.is_initialized():
        dist.all_gather_object(samplers, samplers[0])
    state = state | {"updates": {name: schedule.last_epoch for name, (_, _, schedule) in trained.items()},
                     "random": torch.get_rng_state().tolist(), "samplers": samplers}
    if rank() == 0:
        (folder / "resume/state.json").write_text(json.dumps(state), encoding="utf-8")


def load_state(run_dir: Path, args, trained: dict, state: dict, generator=None) -> dict:
    """`state` as it was saved last; weights, moments, schedules and random states are put back in place, and
    the run's folder as it then was, but for flags that are new."""
    import torch.distributed.checkpoint as dcp
    _, folder = checkpoints(run_dir)[-1]
    found = json.loads((folder / "resume/state.json").read_text(encoding="utf-8"))
    if lacks := set(state) - set(found):
        fail(f"--resume {run_dir}: {folder} was saved by another version of this script: it has no {min(lacks)!r}")
    if found["rows"] != state["rows"]:
        fail(f"--resume {run_dir}: --data now gives {state['rows']} rows, and {found['rows']} when the run began")
    if found.get("eval_rows") != state.get("eval_rows"):  # wins are counted against answers to them
        fail(f"--resume {run_dir}: other held-out prompts than when the run began: leave --eval-data, --eval-prompts "
             "and --eval-samples as they were")
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is one process; that no update came before
            dcp.load(tensors_of(trained), checkpoint_id=folder / "resume", no_dist=not dist.is_initialized())
            for name, (_, _, schedule) in trained.items():
                for _ in range(found["updates"][name]):
                    schedule.step()
        torch.set_rng_state(torch.tensor(found["random"], dtype=torch.uint8))
        if generator and len(found["samplers"]) == ranks():
            generator.set_state(torch.tensor(found["samplers"][rank()], dtype=torch.uint8))
        elif generator:  # other processes than before
            generator.manual_seed(generator.initial_seed() + found["step"])
    except (Exception, dcp.api.CheckpointException) as error:
        fail(f"--resume {run_dir}: {folder} is damaged, or does not fit these flags: {last_line(error)}")
    total(0)  # all processes have read it
    if rank() == 0:
        cut_back(run_dir)
        write_args(run_dir, args)
    total(0)  # before one of them writes to it
    return found
