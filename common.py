"""What the algorithms compute with: rows of data and their tokens, log-prob helpers, and the
reward model.

Shapes: B completions, P prompt tokens (left-padded), T completion tokens (right-padded).
"""
import asyncio
import copy
import gzip
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import threading
import traceback
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint

from modeling import (UserError, body_of, cache_works, completion_outputs, context_length,
                      first_line, freeze, has_plain_head, load_config, load_model)

# --- rows of data

def read_rows(path: str) -> list[tuple[str, dict]]:
    """[(where, row)] of a .jsonl or .jsonl.gz file, or of a hub dataset
    owner/name[[:config]:split]. `where` names the row in error messages."""
    if not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", path):
        if not Path(path).parent.exists() and importlib.util.find_spec("datasets"):
            from datasets import load_dataset
            name, *config, split = path.split(":") if ":" in path else (path, "train")
            try:
                rows = load_dataset(name, *config, split=split)
            except Exception as error:
                raise UserError(f"{path}: not read from the hub: {first_line(error)}")
            return [(f"{path}[{i}]", row) for i, row in enumerate(rows)]
        raise UserError(f"{path}: no such file (hub datasets: pip install datasets)")
    if not Path(path).is_file():
        raise UserError(f"{path}: {'not a' if Path(path).exists() else 'no such'} file")
    try:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig") as file:  # some begin with a mark
            lines = [(f"{path}:{i}", line) for i, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as text: {error}")
    rows = []
    for where, line in lines:
        try:
            rows.append((where, json.loads(line)))
            if "\\ud" in line.lower():
                json.dumps(rows[-1][1], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: holds half a character (a lone surrogate): remove it")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error} (expected: one JSON object per line)")
        if not isinstance(rows[-1][1], dict):
            raise UserError(f"{where}: expected a JSON object, not {line.strip()[:40]}")
    if not rows:
        raise UserError(f"{path}: holds no rows")
    for column in ("system", "tools", "chat_template_kwargs"):  # which other libraries use
        others = [json.dumps([row[name] for name in row if name != column], default=str)
                  for _, row in rows if row.get(column)]
        values = [json.dumps(row[column], default=str) for _, row in rows if row.get(column)]
        if any(value not in other for value, other in zip(values, others)):
            print(f"{path}: the column {column!r} is not read: what the model shall see of it "
                  "must be in the prompt's messages")
    return rows


def read_text(where: str, row: dict, column: str):
    """A column's string, or its messages, with their parts of text joined."""
    value = row[column]
    if isinstance(value, str):
        return value
    messages = []
    for m in value if isinstance(value, list) and value else [None]:
        if not (isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m):
            raise UserError(f"{where}: {column!r} must be a string or a list of messages "
                            "(role, content), and not empty")
        if m.get("tool_calls"):
            raise UserError(f"{where}: {column!r}: tool calls are not supported")
        text = ""
        for part in m["content"] if isinstance(m["content"], list) else [m["content"]]:
            content = part.get("text") if isinstance(part, dict) else part
            if not isinstance(content, str):
                raise UserError(f"{where}: {column!r}: a message's content must be text, not "
                                f"{json.dumps(part, default=str)[:60]}")
            text += content
        messages.append({**m, "content": text})
    return messages


def check_prompt(where: str, prompt, column: str):
    messages = as_messages(prompt)
    if not messages or not str(prompt).strip():
        raise UserError(f"{where}: {column!r} is missing or empty")
    if messages[-1]["role"] == "assistant" and not str(prompt).endswith("\n\nAssistant:"):
        raise UserError(f"{where}: the prompt ends with the assistant's turn: remove it")


def read_prompts(path: str, column: str = "prompt", tokenizer=None) -> list[dict]:
    """Rows with `prompt` (a string or chat messages) and all their other columns. Preference
    pairs give the same prompt as in read_pairs."""
    rows = []
    for where, row in read_rows(path):
        if row.get("chosen") and row.get("rejected"):
            prompt, _, _ = read_pair(where, row, column)
        elif column in row:
            prompt = read_text(where, row, column)
        else:
            raise UserError(f"{where}: no column {column!r}, only {', '.join(row)}: "
                            "set --prompt-column")
        check_prompt(where, prompt, column)
        rows.append({**row, "prompt": prompt})
    warn_of_template(tokenizer, rows, path)
    return rows


def read_pairs(path: str, column: str = "prompt", tokenizer=None) -> list[dict]:
    """Rows with `prompt` (a string or chat messages), `chosen` and `rejected` (strings), and
    all their other columns."""
    rows, left_out = [], []
    for where, row in read_rows(path):
        if "chosen" not in row or "rejected" not in row:
            raise UserError(f"{where}: pairs need columns 'chosen' and 'rejected', not only "
                            f"{', '.join(row)}")
        prompt, chosen, rejected = read_pair(where, row, column)
        check_prompt(where, prompt, column)
        if isinstance(row["chosen"], str) and any(
                re.search(r"\n\n(Human|Assistant):", x) for x in (chosen, rejected)):
            left_out.append(where)  # HH has a few: no reason to refuse all its other rows
        else:
            rows.append({**row, "prompt": prompt, "chosen": chosen, "rejected": rejected})
    if all(str(row[side]).startswith(str(row["prompt"])) for row in rows
           for side in ("chosen", "rejected")) and len(rows) > 1:
        print(f"{path}: each answer begins with its prompt, which it will have twice: if that "
              "is not meant, set --prompt-column to a name that no row has")
    if left_out:
        print(f"{path}: left out {len(left_out)} pairs with a further turn inside an answer "
              f"(the first: {left_out[0]})")
    warn_of_template(tokenizer, rows, path)
    return rows


def read_pair(where: str, row: dict, column: str) -> tuple:
    """(prompt, chosen answer, rejected answer). The prompt is the column's, followed by what
    both conversations share and the column does not hold already."""
    chosen, rejected = (read_text(where, row, side) for side in ("chosen", "rejected"))
    prompt = [] if row.get(column) is None else read_text(where, row, column)
    both = (chosen, rejected)
    if prompt != [] and not all(str(x).startswith("\n\nHuman:") for x in both):
        chosen, rejected = (  # beside a prompt, a string is an answer, if no transcript
            [{"role": "assistant", "content": x}] if isinstance(x, str) else x for x in both)
    shared, chosen, rejected = split_pair(where, chosen, rejected)
    old, new = turns(prompt), turns(shared)
    if any(new[i:i + len(old)] == old for i in range(len(new))):
        return shared, chosen, rejected
    # the prompt's last n messages are the first n that the conversations share
    n = max(n for n in range(len(old) + 1) if old[len(old) - n:] == new[:n])
    rest = as_messages(shared)[n:]
    if rest and n == 0 and rest[0]["role"] in ("system", old[-1][0]):
        raise UserError(f"{where}: chosen and rejected do not continue {column!r} (to ignore "
                        "it, set --prompt-column to a name that no row has)")
    return as_messages(prompt) + rest if rest else prompt, chosen, rejected


def turns(prompt) -> list[tuple]:
    """What messages are compared by."""
    return [(m["role"], m["content"].strip()) for m in as_messages(prompt)]


def split_pair(where: str, chosen, rejected) -> tuple:
    """(prompt, chosen answer, rejected answer) of a pair that holds the prompt inside both.

    Message lists are split before their last message, "\\n\\nHuman: ... \\n\\nAssistant: ..."
    transcripts at the last turn that both share, other strings at the last space of their
    common beginning.
    """
    if isinstance(chosen, list) and isinstance(rejected, list):
        if turns(chosen[:-1]) != turns(rejected[:-1]):
            raise UserError(f"{where}: chosen and rejected differ before their last message")
        if not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
            raise UserError(f"{where}: chosen and rejected must end with the assistant's turn")
        return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise UserError(f"{where}: 'chosen' and 'rejected' must both be strings, or lists")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b),
                min(len(chosen), len(rejected)))
    turn = chosen.rfind("\n\nAssistant:", 0, same)
    cut = turn + len("\n\nAssistant:") if turn >= 0 else chosen.rfind(" ", 0, same)
    if cut <= 0:
        raise UserError(f"{where}: no 'prompt', and chosen and rejected share no beginning")
    return chosen[:cut], chosen[cut:], rejected[cut:]


# --- tokenization

def load_tokenizer(name: str):
    """The tokenizer of a model folder or hub id. It needs no pad token: masks tell what is
    padding."""
    vocab_size = load_config(name).get_text_config().vocab_size
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{name}: no tokenizer loads from it (has it a tokenizer.json?): "
                        f"{first_line(error)}")
    tokenizer.clean_up_tokenization_spaces = False  # decoded text is what was generated
    tokenizer.embedded = vocab_size  # how many tokens the model embeds; encode compares
    return tokenizer


def same_tokens(tokenizer, other) -> bool:
    """Whether another tokenizer has the same ids, but for padding and tokens of its own."""
    pad = {(tokenizer.pad_token, tokenizer.pad_token_id)}
    return tokenizer.get_vocab().items() - pad <= other.get_vocab().items()


def as_messages(prompt) -> list[dict]:
    """Chat messages of a prompt. A string is the user's turn, or a "\\n\\nHuman: ..."
    transcript."""
    if not isinstance(prompt, str):
        return prompt
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    turns = re.split(r"\n\n(Human|Assistant):", prompt)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": roles[speaker], "content": text.strip()}
                for speaker, text in zip(turns[::2], turns[1::2])]
    return messages if messages[-1]["content"] else messages[:-1]


def warn_of_template(tokenizer, rows: list[dict], path: str):
    """One line about the first prompt that begins with a mark of the chat template."""
    for i, row in enumerate(rows if tokenizer else [], 1):
        mark = re.match(r"<[^\s<>]+>|\[[A-Z_]+\]", turns(row["prompt"])[0][1])
        if mark and mark[0] in render(tokenizer, "x"):
            print(f"{path}: row {i}: the prompt begins with {mark[0]}, and the chat template "
                  "is put around it once more: take its marks out of the file")
            return


def holds(text: str, completion: str) -> bool:
    return "".join(completion.split()) in "".join(text.split())


def render(tokenizer, prompt, completion: str | None = None, whole: bool = True) -> str:
    """The conversation in the tokenizer's chat template; without a completion, up to where the
    assistant's turn begins. Without a template, the strings are concatenated. With whole, a
    template that drops a part of the completion is refused."""
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise UserError(f"{tokenizer.name_or_path}: has no chat template, so prompts must "
                            "be strings, not messages")
        if completion is None:
            return prompt
        eos = tokenizer.eos_token or ""
        return (prompt + completion).removesuffix(eos) + eos
    messages = as_messages(prompt)
    if completion is not None:
        messages = messages + [{"role": "assistant", "content": completion.strip()}]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=completion is None)
    except Exception as error:  # templates raise anything, as on roles that do not alternate
        raise UserError(f"{tokenizer.name_or_path}: its chat template refuses the prompt "
                        f"{str(prompt)[:60]!r}: {first_line(error)}")
    if whole and completion and not holds(text, completion):
        raise UserError(f"{tokenizer.name_or_path}: its chat template drops a part of the "
                        f"answer {completion[:60]!r} (its reasoning?): remove that part from "
                        "the data, or change chat_template.jinja to keep it")
    return text


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered conversations. A chat template has written the special tokens;
    render has written the end of sequence, so what a tokenizer itself appends is removed."""
    if tokenizer.chat_template is None:
        rows = tokenizer(texts).input_ids
        appended = tokenizer("").input_ids[-1:]
        if appended == [tokenizer.eos_token_id] != [tokenizer.bos_token_id]:
            rows = [ids[:-1] for ids in rows]
    else:
        rows = tokenizer(texts, add_special_tokens=False).input_ids
    largest = max((max(ids, default=0) for ids in rows), default=0)
    if largest >= getattr(tokenizer, "embedded", math.inf):
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(f"{tokenizer.name_or_path}: the model embeds {tokenizer.embedded} "
                        f"tokens, and its tokenizer has {token!r} (id {largest}): call "
                        "resize_token_embeddings, and train what that adds")
    return rows


def without_beginning(tokenizer, ids: list[int], n: int) -> list[int]:
    """Token ids without the first n, but with a leading <s> or [CLS], which models rely on."""
    kept = ids[:1] if n and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []
    return kept + ids[n + len(kept):]


def load_prompts(args, tokenizer) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows, each with its `prompt_ids`."""
    room = context_length(args.model) - args.max_new_tokens
    rows = read_prompts(args.data, args.prompt_column, tokenizer)
    rows = encode_prompts(tokenizer, rows, args.data, room, args.max_prompt_tokens)
    if not args.eval_data:
        return hold_out(rows, args.eval_prompts, args.data, "--eval-prompts")
    eval_rows = read_prompts(args.eval_data, args.prompt_column, tokenizer)[:args.eval_prompts]
    return rows, encode_prompts(tokenizer, eval_rows, args.eval_data, room,
                                args.max_prompt_tokens)


def load_pairs(args, tokenizer) -> tuple[list[dict], list[dict]]:
    """Training and held-out pairs."""
    rows = read_pairs(args.data, args.prompt_column, tokenizer)
    if args.eval_data:
        eval_rows = read_pairs(args.eval_data, args.prompt_column, tokenizer)
        return rows, eval_rows[:args.eval_pairs]
    return hold_out(rows, args.eval_pairs, args.data, "--eval-pairs")


def hold_out(rows: list, n: int, path: str, flag: str) -> tuple[list, list]:
    """All rows but the last n, and those n."""
    if len(rows) <= n:
        raise UserError(f"{path}: {len(rows)} rows, and {flag} {n} are held out: lower it, or "
                        "set --eval-data")
    return rows[:len(rows) - n], rows[len(rows) - n:]


def encode_prompts(tokenizer, rows: list[dict], path: str, room: float, longest: int = 0,
                   otherwise: str = ""):
    """Rows with their `prompt_ids`, without those longer than `longest` tokens (0: keep all).
    A prompt that does not leave `room` for a completion is an error. otherwise: what a user
    can do besides lowering --max-new-tokens, without a flag for `longest`."""
    if rows and room <= 0:
        raise UserError("--max-new-tokens: leaves no room for a prompt: lower it")
    prompts = encode(tokenizer, [render(tokenizer, row["prompt"]) for row in rows] or [""])
    kept = []
    for i, (row, ids) in enumerate(zip(rows, prompts), 1):
        if longest and len(ids) > longest:
            continue
        if not 0 < len(ids) <= room:
            raise UserError(
                f"{path}: prompt {i}, {str(row['prompt'])[:60]!r}, has {len(ids)} tokens, and "
                f"the model's context has room for {room}: lower --max-new-tokens, or "
                + (otherwise or "set --max-prompt-tokens"))
        kept.append({**row, "prompt_ids": ids})
    if len(kept) < len(rows):
        print(f"{path}: skipped {len(rows) - len(kept)} of {len(rows)} rows: longer than "
              f"{longest} tokens")
    if rows and not kept:
        raise UserError(f"{path}: no prompt has at most {longest} tokens: " + (
            f"lower --max-new-tokens, or {otherwise}" if otherwise else
            "raise --max-prompt-tokens"))
    return kept


def eos_token_ids(model, tokenizer, device="cpu") -> torch.Tensor:
    """All tokens that end a completion: chat models have more than one. The special token that
    a chat template writes after an answer is one of them."""
    ids = model.generation_config.eos_token_id or []
    ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None, -1}
    if tokenizer.chat_template is not None:
        after = encode(tokenizer, [render(tokenizer, "a", "zqx").rpartition("zqx")[2]])[0]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids |= set([i for i in after if i in special][:1])
    return torch.tensor(sorted(ids), dtype=torch.long, device=device)


def pad(rows: list[list[int]], side: str, device="cpu", pad_id: int = 0):
    """Token ids and their mask, two (B, longest), padded on the `left` or the `right`."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


@dataclass
class Rollout:
    """Prompts and their sampled completions, one row per completion."""
    prompt_ids: torch.Tensor  # (B, P), left-padded
    prompt_mask: torch.Tensor  # (B, P)
    completion_ids: torch.Tensor  # (B, T), right-padded
    mask: torch.Tensor  # (B, T), 1 for the completion's tokens, its end of sequence included
    tokenizer: object
    eos_ids: torch.Tensor
    sampler_logprobs: torch.Tensor = None  # (B, T), as the sampler had them; nan: not known

    def __post_init__(self):
        if self.sampler_logprobs is None:
            self.sampler_logprobs = torch.full_like(self.mask, math.nan, dtype=torch.float32)
        lengths = self.mask.sum(1)  # (B,)
        self.lengths = self.prompt_mask.sum(1) + lengths  # (B,), prompt and completion
        last = self.completion_ids.gather(1, lengths[:, None] - 1)[:, 0]
        self.truncated = ~torch.isin(last, self.eos_ids)  # (B,), hit the length limit
        ends = (lengths - (~self.truncated).long()).tolist()  # without the end of sequence
        completions = [ids[:end] for ids, end in zip(self.completion_ids.tolist(), ends)]
        self.texts = self.tokenizer.batch_decode(completions)
        if self.tokenizer.chat_template is None:  # some decoders drop a text's first space
            last = self.prompt_ids[:, -1:].tolist()
            both = self.tokenizer.batch_decode([a + b for a, b in zip(last, completions)])
            for i, (text, before) in enumerate(zip(both, self.tokenizer.batch_decode(last))):
                if text.startswith(before):
                    self.texts[i] = text[len(before):]

    def tokens(self, rows):
        """What completion_logprobs needs of some rows."""
        return (self.prompt_ids[rows], self.prompt_mask[rows], self.completion_ids[rows],
                self.mask[rows])

    def overlong(self, args) -> torch.Tensor:
        """Share of --truncation-penalty that each completion pays, (B,): 1 if it was cut. With
        --overlong-window it grows from 0 to 1 over the last tokens before the limit, also for
        completions that end there (DAPO, arXiv:2503.14476, eq. 13)."""
        if args.overlong_window == 0:
            return self.truncated.float()
        start = args.max_new_tokens - args.overlong_window
        return ((self.mask.sum(1) - start) / args.overlong_window).clamp(min=0)


def repeat(rows: list, n: int) -> list:
    """Each row n times, one after the other."""
    return [row for row in rows for _ in range(n)]


def replace_groups(flat, old: tuple, new: tuple) -> tuple:
    """Replaces the groups that are marked in flat (prompts,) by the first of the new ones.
    old, new: prompts, their Rollout, and its scores; those of old are changed and returned."""
    (prompts, rollout, scores), (others, new, new_scores) = old, new
    places, group_size = flat.nonzero()[:, 0], len(scores) // len(prompts)
    for place, row in zip(places.tolist(), others):
        prompts[place] = row
    rows = places[:, None] * group_size + torch.arange(group_size, device=flat.device)
    rows = rows.view(-1)  # of the rollout
    pairs = [(scores, new_scores)]
    if hasattr(scores, "parts"):  # see combine_rewards
        pairs += [(scores.raw, new_scores.raw)]
        pairs += [(scores.parts[name], new_scores.parts[name]) for name in scores.parts]
    for old, other in pairs:
        old[rows] = other[:len(rows)]
    fields = {}
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "mask", "sampler_logprobs"):
        old, other = getattr(rollout, name), getattr(new, name)
        width = max(old.shape[1], other.shape[1])
        left = name.startswith("prompt")  # where the padding is
        old, other = (F.pad(x, (width - x.shape[1], 0) if left else (0, width - x.shape[1]))
                      for x in (old, other))
        fields[name] = old.index_copy(0, rows, other[:len(rows)])
    merged = Rollout(**fields, tokenizer=rollout.tokenizer, eos_ids=rollout.eos_ids)
    return prompts, merged, scores


def draw(probs, generator=None):
    """Draws a token from each row of probs (N, V): (N, 1). Without a generator, takes the most
    likely. It uses one random number per row; torch.multinomial draws one per token of the
    vocabulary, which can take as long as a small model's forward pass."""
    if generator is None:
        return probs.argmax(-1, keepdim=True)
    random = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device,
                        generator=generator)
    cumulative = probs.cumsum(-1, dtype=torch.float64)  # (N, V)
    if not cumulative[:, -1].isfinite().all():
        raise UserError("the policy's probabilities are not finite: lower --lr, or use "
                        "--dtype float32; --resume continues from the newest checkpoint")
    return torch.searchsorted(cumulative, random * cumulative[:, -1:], right=True)


# --- log-prob helpers

def completion_logprobs(model, prompt_ids, prompt_mask, completion_ids, mask,
                        temperature: float = 1.0, entropy_grad: bool = False):
    """log pi(token | prompt, tokens before it) and the entropy of pi there, in nats.

    Arguments as for completion_outputs. Returns two float32 (B, T), 0 where the mask is 0. The
    entropy has a gradient only with entropy_grad, which costs memory. Logits are computed for
    the completions' tokens only, in chunks; with several chunks, the backward pass computes
    them again.
    """
    arguments = prompt_ids, prompt_mask, completion_ids, mask, temperature, entropy_grad
    if hasattr(model, "logprobs"):  # sharded over processes: set by Run.shard
        return model.logprobs(*arguments)
    return logprobs_of_whole(model, *arguments)


def logprobs_of_whole(model, prompt_ids, prompt_mask, completion_ids, mask,
                      temperature: float, entropy_grad: bool):
    """completion_logprobs of a model whose weights are all in this process."""
    rows = trim_padding(prompt_ids, prompt_mask, completion_ids, mask)
    in_completion = rows[-1].bool()
    tokens = rows[-2][in_completion]  # (N,), of all rows
    plain = has_plain_head(model)
    hidden = completion_outputs(body_of(model) if plain else model, *rows,
                                share=cache_works(model))  # (B, T, D)
    hidden = hidden[in_completion]  # (N, D)
    head = model.get_output_embeddings() if plain else torch.nn.Identity()
    at_once = LOGITS_AT_ONCE * (4 if hidden.is_cuda else 1)
    chunk = max(1, at_once // model.config.get_text_config().vocab_size)
    parts = [(*part, head, temperature, entropy_grad)
             for part in zip(hidden.split(chunk), tokens.split(chunk))]
    function = getattr(model, "token_logprobs", token_logprobs)  # compiled: set by Run.shard
    parts = [checkpoint(function, *part, use_reentrant=False) if len(parts) > 1 else
             function(*part) for part in parts]
    empty = torch.zeros(mask.shape, device=mask.device)  # (B, T)
    return tuple(empty.masked_scatter(mask.bool(), torch.cat(part)) for part in zip(*parts))


LOGITS_AT_ONCE = 2**26  # 256 MiB: 441 tokens of a vocabulary of 151,936; on a GPU 4 times that


def token_logprobs(hidden, tokens, head, temperature: float, entropy_grad: bool):
    """Log-prob of each token and the entropy there, two (N,) float32. hidden: (N, D); tokens:
    (N,); head: makes logits (N, V)."""
    logits = head(hidden).float()  # (N, V)
    if temperature != 1:
        logits = logits / temperature
    log_softmax = logits.log_softmax(-1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(-1, tokens[:, None])[:, 0], entropy


def trim_padding(prompt_ids, prompt_mask, completion_ids, mask):
    """The four without the columns that are padding in every row."""
    P, T = int(prompt_mask.sum(1).max()), int(mask.sum(1).max())
    return prompt_ids[:, -P:], prompt_mask[:, -P:], completion_ids[:, :T], mask[:, :T]


@torch.no_grad()
def rollout_logprobs(model, rollout: Rollout, micro_batches: list, temperature: float = 1.0):
    """Log-probs of a rollout's tokens under a model, and its entropy there: two (B, T)."""
    logprobs, entropy = torch.zeros(2, *rollout.mask.shape, device=rollout.mask.device)
    for rows in micro_batches:
        logprobs[rows], entropy[rows] = completion_logprobs(
            model, *rollout.tokens(rows), temperature)
    return logprobs, entropy


def micro_batches(lengths, tokens: int, rows=None) -> list[torch.Tensor]:
    """Row numbers in groups for one pass each, the longest rows first, so that what does not
    fit in memory fails at once. A group has at most `tokens`, padding included (or one row),
    and no row shorter than 0.7 of its longest, since padding costs what tokens cost.

    lengths: (B,). rows: some of 0 to B - 1 (default: all).
    """
    rows = torch.arange(len(lengths), device=lengths.device) if rows is None else rows
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    left, sizes = lengths[rows].tolist(), []
    while left:
        fit = max(1, tokens // max(1, left[0]))
        similar = sum(length >= 0.7 * left[0] for length in left)
        sizes.append(min(fit, similar))
        left = left[sizes[-1]:]
    return list(rows.split(sizes))


def kl_estimate(logprobs, ref_logprobs, estimator: str = "k1"):
    """Per-token estimates of KL(policy || reference) at tokens sampled from the policy.

    With d = log pi - log pi_ref, in nats (Schulman 2020, "Approximating KL divergence"), as a
    value:
      k1 = d                  unbiased, high variance, may be negative
      k2 = d^2 / 2            biased (third order in d), never negative
      k3 = exp(-d) - 1 + d    unbiased, low variance near d = 0, never negative
    As a loss, differentiated with the sampled tokens fixed, the expected gradient is that of
    the KL at each token, given the tokens before it:
      k1: zero (E[grad log pi] = 0), so never use k1 in a loss
      k2: KL(policy || reference)
      k3: KL(reference || policy); times the ratio pi / pi_old, KL(policy || reference)
    (docs/convergence.md; Liu et al. 2025, arXiv:2510.01555; Shah et al., arXiv:2512.21852.)
    k1 in the reward also charges a token for the KL of those after it.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else torch.expm1(-d) + d


def importance_weights(old_logprobs, sampler_logprobs, cap: float):
    """min(pi_old / pi_sampler, cap) of each token, (B, T): corrects the loss if sampling and
    training round differently, so that the same weights are two policies (truncated importance
    sampling: Ionides 2008; Yao et al. 2025). Without a cap it is unbiased, and noisy."""
    if sampler_logprobs.isnan().any():
        raise UserError("--importance-cap: this model's sampler does not give its log-probs")
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap)


def flat_groups(scores, group_size: int):
    """Whether a group is flat, (prompts,): all its scores are equal, so before penalties its
    advantages are 0. scores: (B,); nan: no score."""
    groups = scores.view(-1, group_size)
    highest, lowest = groups.nan_to_num(-math.inf).amax(1), groups.nan_to_num(math.inf).amin(1)
    return highest - lowest < 1e-4


def masked_mean(values, mask, dim=None):
    """Mean over the entries whose mask is 1, over all or along dim; 0 if there are none."""
    if dim is None:
        return (values * mask).sum() / mask.sum().clamp(min=1)
    return (values * mask).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_whiten(values, mask, mean=masked_mean):
    """Values with mean 0 and variance 1 over the entries whose mask is 1, and 0 elsewhere.
    mean: for several processes, runtime.global_mean."""
    centered = values - mean(values, mask)
    return centered * torch.rsqrt(mean(centered.square(), mask) + 1e-8) * mask


# --- the reward model

def load_reward(name: str, device, bf16: bool = False, tokens: int = 8192):
    """reward(rows, completions) -> (B,) float32, nan where a function returned None.

    name: folder or hub id of a sequence-classification model with one label, applied to text
    in its own chat template, with `tokens` per micro-batch; or file.py:function, called as TRL
    calls it: with `prompts`, `completions` and the rows' other columns.
    """
    if callable(name) or re.search(r"\.py:\w+$", name):
        function = name if callable(name) else load_function(name)
        return lambda rows, completions: call_reward(name, function, rows, completions, device)
    if re.search(r"\.py(:[^/]*)?$", name) and not Path(name).is_dir():
        raise UserError(f"{name}: name a function of that file, as in file.py:FUNCTION")
    if name.startswith("<"):  # by flags.writable
        raise UserError(f"{name}: the program that began this run had passed this function: "
                        "pass it again")
    tokenizer = load_tokenizer(name)
    if tokenizer.chat_template is None:
        print(f"{name}: has no chat template: it reads a prompt's text and right after it the "
              "completion's")
    model, missing = load_model(transformers.AutoModelForSequenceClassification, name, device)
    if model.config.num_labels != 1 or missing:
        raise UserError(f"{name}: not a reward model: it needs one label, and has "
                        + (f"no weights for {', '.join(sorted(missing))}" if missing else
                           f"{model.config.num_labels}"))
    for kind in model.config.architectures or ():  # code of its own, or a score per token
        if not hasattr(transformers, kind) or kind.endswith("TokenClassification"):
            raise UserError(f"{name}: not a reward model, but a {kind}")
    freeze(model, bf16)
    warned = []

    def reward(rows: list[dict], completions: list[str]) -> torch.Tensor:
        texts = [render(tokenizer, row["prompt"], c, whole=False)
                 for row, c in zip(rows, completions)]
        dropped = [c for c, text in zip(completions, texts) if not holds(text, c)]
        if dropped and not warned:
            warned.append(True)
            print(f"{name}: its chat template drops a part of such completions (reasoning?), "
                  f"and it scores the rest: {dropped[0][:60]!r}")
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            scores = score_texts(model, tokenizer, texts, tokens, [id(row) for row in rows])
        for text in (text for text, score in zip(texts, scores) if not score.isfinite()):
            raise UserError(f"{name}: its score is not finite for the conversation that ends "
                            f"{text[-60:]!r}: try --dtype float32")
        return scores
    reward.model, reward.tokenizer = model, tokenizer
    return reward


def combine_rewards(rewards: dict, weights=(), how: str = "sum", normalize: bool = False):
    """One reward of several, given by name: reward(rows, completions) -> (B,). Where one gave
    None, the others are combined; nan where all did.

    how: "sum" of weights (default: 1) times rewards; of an ensemble of reward models "min"
    (Coste et al. 2023, arXiv:2310.02743) or "mean_minus_std" (Eisenstein et al. 2023,
    arXiv:2312.09244). normalize: first each to mean 0 and standard deviation 1 over its group,
    rows that follow each other and are the same object (GDPO, arXiv:2601.05242).
    The result has `parts`, the scores by name, and `raw`, itself without normalize.
    """
    weights = torch.tensor(weights or [1.0] * len(rewards))

    def combine(parts):  # (B, rewards) -> (B,)
        parts = parts * weights.to(parts.device)
        values = parts.nansum(1)
        if how == "min":
            values = parts.nan_to_num(math.inf).amin(1)
        if how == "mean_minus_std":
            mean = parts.nanmean(1, keepdim=True)
            values = mean[:, 0] - (parts - mean).square().nanmean(1).sqrt()
        return values.masked_fill(parts.isnan().all(1), math.nan)

    def reward(rows: list[dict], completions: list[str]) -> torch.Tensor:
        parts = torch.stack([reward(rows, completions) for reward in rewards.values()], 1)
        raw = scores = combine(parts)
        if raw.isinf().any():
            raise UserError("--reward: the rewards are too large to be combined")
        if normalize:
            starts = [i for i in range(len(rows)) if i == 0 or rows[i] is not rows[i - 1]]
            sizes = [b - a for a, b in zip(starts, starts[1:] + [len(rows)])]
            scores = combine(torch.cat([normalized(group) for group in parts.split(sizes)]))
        scores.parts, scores.raw = dict(zip(rewards, parts.unbind(1))), raw.clone()
        return scores
    return reward


def normalized(values):
    """Columns (n, k) with mean 0 and standard deviation 1 (divisor n - 1), nan left out; 0
    where a column is constant."""
    centered = values.double() - values.double().nanmean(0)
    n = (~values.isnan()).sum(0) - 1
    std = (centered.square().nansum(0) / n.clamp(min=1)).sqrt()
    return (centered / (std + 1e-4)).to(values.dtype)


def check_room(model, tokenizer, rows: list[dict], max_new_tokens: int):
    """Raises unless a reward model reads each prompt with max_new_tokens of a completion."""
    longest = sorted(rows, key=lambda row: len(row["prompt_ids"]))[-100:]
    texts = [render(tokenizer, row["prompt"], "a") for row in longest]
    n = max(map(len, encode(tokenizer, texts))) + max_new_tokens
    if n > context_length(model):
        raise UserError(f"{tokenizer.name_or_path}: reads {context_length(model)} tokens, and "
                        f"the longest prompt with --max-new-tokens {max_new_tokens} has {n}: "
                        "lower it, or use shorter prompts (--max-prompt-tokens; dpo.py: "
                        "--sample-data; reward_model.py: --max-tokens or --bias-prompts 0)")


@torch.no_grad()
def score_texts(model, tokenizer, texts: list[str], tokens: int = 8192, prompts=()):
    """(B,) float32 scores of rendered conversations, `tokens` in a micro-batch. For prompts
    see score_ids."""
    rows = encode(tokenizer, texts)
    lengths = torch.tensor([len(row) for row in rows])
    limit = context_length(model)
    if lengths.max() > limit:
        raise UserError(f"{tokenizer.name_or_path}: a conversation of {lengths.max()} tokens "
                        f"does not fit the reward model's context of {limit}: lower "
                        "--max-new-tokens, or use shorter prompts (--max-prompt-tokens; "
                        "dpo.py: --sample-data; reward_model.py: --max-tokens)")
    scores = torch.zeros(len(rows), device=model.device)
    for part in micro_batches(lengths, tokens):
        scores[part.to(model.device)] = score_ids(
            model, [rows[i] for i in part], [prompts[i] for i in part] if prompts else ())
    return scores


def score_ids(model, rows: list[list[int]], prompts=()) -> torch.Tensor:
    """(B,) float32 scores of conversations (token ids) by a model with one label, read at the
    last token. These heads have no bias: `reward_bias` in the model's config is added.

    prompts: something that is equal for rows of the same prompt. The tokens that these have in
    common pass through the model once, where completion_outputs can share them.
    """
    config = model.config.get_text_config()
    body, pad_id = body_of(model), config.pad_token_id
    while any(len(row) > 1 and row[-1] == pad_id for row in rows):  # which nothing reads
        rows = [row[:-1] if len(row) > 1 and row[-1] == pad_id else row for row in rows]
    if hasattr(model, "score") and not dist.is_initialized() and cache_works(body):
        prompts = prompts or range(len(rows))
        shared = {}  # prompt: the tokens that its rows begin with
        for row, prompt in zip(rows, prompts):
            shared[prompt] = os.path.commonprefix([row, shared.get(prompt, row)])
        if not all(shared.values()):  # no token in common
            return score_ids(model, rows)
        prompt_ids, prompt_mask = pad([shared[prompt] for prompt in prompts], "left",
                                      model.device)
        # and a token that is not read: the outputs are those before each token
        completion_ids, mask = pad([row[len(shared[prompt]):] + [0] for row, prompt in
                                    zip(rows, prompts)], "right", model.device)
        hidden = completion_outputs(body, prompt_ids, prompt_mask, completion_ids, mask,
                                    share=True)  # (B, T, D)
        last = hidden[torch.arange(len(rows), device=model.device), mask.sum(1) - 1]  # (B, D)
        return model.score(last)[:, 0].float() + getattr(model.config, "reward_bias", 0.0)
    last = {row[-1] for row in rows}
    if pad_id is None:  # transformers reads before the first pad: take one that ends no row
        config.pad_token_id = next(i for i in range(config.vocab_size) if i not in last)
    ids, mask = pad(rows, "right", model.device, config.pad_token_id)
    no_cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    scores = model(input_ids=ids, attention_mask=mask, **no_cache).logits[:, 0].float()
    config.pad_token_id = pad_id
    return scores + getattr(model.config, "reward_bias", 0.0)


def call_reward(name: str, function, rows: list[dict], completions: list[str], device):
    """(B,) float32 scores by a user's function, checked; nan where it returned None."""
    names = dict.fromkeys(key for row in rows for key in row if key not in (
        "prompt_ids", "prompts", "completions"))
    columns = {key: [row.get(key) for row in rows] for key in names}
    prompts = columns.pop("prompt")
    answers = [c if isinstance(p, str) else [{"role": "assistant", "content": c}]
               for p, c in zip(prompts, completions)]
    folder, dtype, grad = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    default_device = torch.get_default_device()
    try:
        given = dict(prompts=prompts, completions=answers, **columns)
        values = function(**copy.deepcopy(given))
        if inspect.iscoroutine(values):
            values = run_coroutine(values)
        if hasattr(values, "__iter__") and not isinstance(values, (dict, set, str)):
            values = list(values)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, and those of asyncio
        last = traceback.extract_tb(error.__traceback__)[-1]
        hint = f"{last.filename}:{last.lineno}"
        if last.filename == __file__:  # it was not even entered
            hint = "expected: function(prompts, completions, **columns)"
        raise UserError(f"{name}: raised {type(error).__name__}: {first_line(error)} ({hint})")
    finally:  # what it changed for the whole process
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != default_device:  # setting one slows every operation
            torch.set_default_device(None if default_device.type == "cpu" else default_device)
        torch.set_grad_enabled(grad)
    try:
        scores = [math.nan if v is None else float(v) for v in values]
        valid = all(v is None or not isinstance(v, str) and abs(float(v)) <= torch.finfo().max
                    for v in values)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        scores, valid = [], False
    if not valid or not isinstance(values, list):
        raise UserError(f"{name}: must return a list of finite numbers (None leaves a "
                        f"completion out), not {' '.join(str(values).split())[:60]}")
    if len(scores) != len(rows):
        raise UserError(f"{name}: returned {len(scores)} rewards for {len(rows)} completions")
    return torch.tensor(scores, dtype=torch.float32, device=device)


def run_coroutine(coroutine):
    """Its result. It runs in a thread, as a notebook's own has a loop already, and in one that
    does not keep a stopped run alive."""
    future = Future()

    def work():
        try:
            future.set_result(asyncio.run(coroutine))
        except BaseException as error:
            future.set_exception(error)
    threading.Thread(target=work, daemon=True).start()
    return future.result()


def load_function(name: str):
    """The function of file.py:function."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        spec = importlib.util.spec_from_file_location(f"reward_file_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module there
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: cannot be imported: {type(error).__name__}: "
                        f"{first_line(error)}")
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path}: has no function {function!r}")
    return getattr(module, function)
