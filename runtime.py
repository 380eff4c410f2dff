"""What surrounds an algorithm and changes nothing that is learned: processes and memory, the
rows of a step, and the run's folder with its log."""
import contextlib
import copy
import fcntl
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
import weakref
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from common import (check_room, combine_rewards, load_reward, load_tokenizer,
                    logprobs_of_whole, micro_batches, same_tokens, token_logprobs)
from flags import RunArgs, json_lines, writable, write_json
from modeling import (UserError, embedding_rows, first_line, freeze, has_plain_head,
                      load_causal_lm)


def save_last_step():
    """Saves what a failed run has trained, unless it failed in the middle of an update."""
    run = Run.newest and Run.newest()
    if run and run.unsaved and run.world_size == 1:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            run.save(run.step_done)
            print(f"saved step {run.step_done}" + run.to_continue())


# --- processes

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over all processes; x itself where there is one."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def global_mean(values, mask):
    """masked_mean over the values of all processes."""
    return all_sum((values * mask).sum()) / all_sum(mask.sum()).clamp(min=1)


def global_means(parts: list[dict]) -> dict:
    """Mean of each metric over the rows of all parts, in all processes."""
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: global_mean(values, torch.ones_like(values))
            for name, values in columns.items()}


def gather_objects(x: list) -> list:
    """The lists of all processes, one after the other. All wait for each other."""
    if not dist.is_initialized():
        return x
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return [row for part in parts for row in part]


def reference_mode(model):
    """A context in which a model with a LoRA adapter is used without it, as the reference."""
    adapter = getattr(model, "adapter", None)  # set by Run.trainable
    return adapter[0].disable_adapter() if adapter else contextlib.nullcontext()


class Bar(list):
    """Parts of a step's work, with a progress bar while they take seconds."""
    def __iter__(self):
        return iter(tqdm(super().__iter__(), self.name, len(self), leave=False, delay=2,
                         disable=rank() > 0 or None))


HOPELESS = {  # a metric of every step -> what it means if it stays 1
    "zero_std_groups":
        "all completions of a prompt score alike, so there is nothing to learn from. Are the "
        "prompts too easy or too hard, or does --reward give one value to all? Try other "
        "prompts, a larger --group-size, or a higher --temperature",
    "truncated":
        "no completion ended before --max-new-tokens, and the reward sees what was cut. Raise "
        "it, or check that the model writes its end of sequence"}

LOCKS = weakref.WeakValueDictionary()  # path: open file


class Run:
    """One training run in this process: where it computes, and where it writes."""
    newest = None  # for save_last_step

    def __init__(self, args: RunArgs, script: str):
        Run.newest, self.unsaved = weakref.ref(self), False
        self.args, self.state, self.frozen, self.trained = args, {"step": 0, "rows": 0}, [], {}
        self.step, self.steps = 0, getattr(args, "steps", 0)
        self.bf16 = self.stopped = self._precision_chosen = False
        self.outdated = []  # files that flags of --resume make useless
        self.metrics = {}  # the last step's, and the last evaluation's
        self._rows, self._orders, self._phases, self._interrupts = [], {}, [], []
        self._hopeless = {}
        self._join()
        name = f"runs/{Path(script).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir = Path(gather_objects([args.resume or args.run_dir or name])[0])
        self._check_folder()
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise UserError("--tensorboard: pip install tensorboard")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(args.seed % 2**63)
        # or else several threads, or a GPU, add up gradients in another order in each run
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        warnings.filterwarnings("ignore", ".*(deterministic|gradient_checkpointing)")

    def _check_folder(self):
        begun = {"args.json", "args.json.part", "lock", "baseline.jsonl"}  # without a step
        if self.dir.exists() and not self.args.resume and (
                not self.dir.is_dir() or {path.name for path in self.dir.iterdir()} - begun):
            raise UserError(f"--run-dir: {self.dir} exists: name a new one, or move it away")

    def _join(self):
        """Joins the processes that torchrun started: each on its GPU, or all on the CPU."""
        name = self.args.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products
        try:
            self.device = torch.device(name)
            torch.zeros(1, device=self.device)
        except Exception as error:
            raise UserError(f"--device {name}: {first_line(error)}")
        if {"RANK", "WORLD_SIZE"} <= os.environ.keys() and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            if rank() > 0:  # only the first process prints
                sys.stdout = open(os.devnull, "w")
        self.rank = rank()
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        for name in ("prompts_per_step", "pairs_per_step"):
            if getattr(self.args, name, 0) % self.world_size:
                raise UserError(f"--{name.replace('_', '-')}: must be divisible by the "
                                f"{self.world_size} processes")

    # --- models and memory

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def trainable(self, model):
        """A model made ready for training by the flags: precision, LoRA, memory, processes."""
        args, large = self.args, model.num_parameters() > 50e6
        if not self._precision_chosen:  # by the first model, which --lr is for as well
            self.bf16, self._precision_chosen = args.dtype == "bfloat16", True
            if args.dtype == "auto" and self.device.type == "cuda":
                self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            elif args.dtype == "auto":  # on CPUs where bfloat16 was measured to be faster
                cpu = getattr(torch.cpu, "get_capabilities", dict)()
                self.bf16 = large and bool(cpu.get("amx_bf16"))
            if large and hasattr(args, "lr") and args.lr == type(args).lr:
                raise UserError(f"--lr: the default, {args.lr:g}, is for the tiny model: set "
                                f"one for {model.num_parameters() / 1e6:.0f} M parameters "
                                "(--help)")
        if args.lora_rank:
            try:
                from peft import LoraConfig, get_peft_model
            except ImportError:
                raise UserError("--lora-rank: pip install peft")
            if Path(model.name_or_path).is_dir():  # the adapter names its base model
                model.name_or_path = str(Path(model.name_or_path).resolve())
            heads = {name for name in ("score", "classifier") if hasattr(model, name)}
            heads |= set(getattr(model, "new_modules", ()))  # untrained, as BERT's pooler
            config = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank,  # 2106.09685
                                target_modules="all-linear",
                                modules_to_save=sorted(heads) or None)
            # peft changes the model in place; in a tuple, its wrapper is not a submodule
            model.adapter = (get_peft_model(freeze(model, self.bf16), config),)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return self.shard(model)

    def load_reference(self, policy):
        """The frozen model that the KL is measured against; None if no flag asks for one. With
        LoRA it is the policy: see reference_mode."""
        args, name = self.args, self.args.reference or self.args.model
        if not (args.reference or args.beta > 0 or getattr(args, "max_kl", 0) > 0):
            return None
        if args.lora_rank and not args.reference:
            return policy
        model = load_causal_lm(name, self.device)
        tokenizer = load_tokenizer(args.model)
        if not same_tokens(tokenizer, load_tokenizer(name)):
            raise UserError(f"--reference {name}: its tokenizer is not the policy's")
        if embedding_rows(model) < tokenizer.embedded:
            raise UserError(f"--reference {name}: embeds {embedding_rows(model)} tokens, and "
                            f"the policy {tokenizer.embedded}: resize_token_embeddings")
        renewed = getattr(args, "renew_reference_every", 0) > 0  # then it keeps all its bits
        self.reference = self.shard(freeze(model, self.bf16 and not renewed))
        self.frozen.append(("reference", model))
        shapes = [[p.shape for p in m.parameters()] for m in (model, policy)]
        if renewed and shapes[0] != shapes[1]:
            raise UserError(f"--renew-reference-every: {name} has other weights than --model")
        return model

    @torch.no_grad()
    def renew_reference(self, step: int, policy, reference):
        """Every --renew-reference-every steps, moves the reference to the policy
        (DeepSeekMath, algorithm 1), or by --reference-mix towards it (TR-DPO,
        arXiv:2404.09656)."""
        every = self.args.renew_reference_every
        if every and step % every == 0:
            self.reshard(policy, reference)
            for old, new in zip(reference.parameters(), policy.parameters()):
                old.lerp_(new, self.args.reference_mix)
        self.unsaved = True  # see log

    def load_reward(self, names, rows: list[dict] = ()):
        """common.load_reward with this run's device, precision and memory; several names are
        combined by the flags. Raises if a reward model cannot read a completion of one of the
        rows' prompts."""
        args, rewards = self.args, {}
        for name in names if isinstance(names, tuple) else (names,):
            reward = load_reward(name, self.device, self.bf16, args.micro_batch_tokens)
            short = writable(name).strip("<>/").rpartition(":")[2].rpartition("/")[2]
            while short in rewards:
                short += "_"
            rewards[short] = reward
            if hasattr(reward, "model"):
                self.frozen.append((short, reward.model))
                if rows:
                    check_room(reward.model, reward.tokenizer, rows, args.max_new_tokens)
        first = next(iter(rewards.values()))
        if len(rewards) == 1 and not (isinstance(names, tuple) and (
                args.reward_weights or args.normalize_rewards)):
            return first
        reward = combine_rewards(rewards, args.reward_weights, args.reward_combine,
                                 args.normalize_rewards)
        reward.model = getattr(first, "model", None)  # a critic may start from it
        return reward

    def shard(self, model):
        """Splits a model over the processes with FSDP2, layer by layer."""
        if self.args.compile:
            model.token_logprobs = torch.compile(token_logprobs, dynamic=True)
        if not dist.is_initialized():
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        if model.get_output_embeddings() is not None:
            has_plain_head(model)  # checked while it is whole
            model.logprobs = types.MethodType(logprobs_of_whole, model)
        for module in model.modules():
            if type(module).__name__ in (model._no_split_modules or ()):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if hasattr(model, "logprobs"):  # it calls the body and the head one by one
            register_fsdp_forward_method(model, "logprobs")
        for module in self._sharded(model):  # losses are divided by global counts already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        return model

    def _sharded(self, model) -> list:
        return [module for module in model.modules() if hasattr(module, "unshard")]

    def reshard(self, *models):
        """Gives up gathered weights: after a pass without gradients, the root's remain."""
        for model in models:
            for module in self._sharded(model):
                module.reshard()

    @contextlib.contextmanager
    def gathered(self, model):
        """All of a model's weights in every process, so that each samples at its own pace."""
        for module in self._sharded(model):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
        for module in self._sharded(model):
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()

    def micro_batches(self, lengths, rows=None) -> list:
        """common.micro_batches by --micro-batch-tokens, equally many in every process."""
        groups = micro_batches(lengths, self.args.micro_batch_tokens, rows)
        if dist.is_initialized():
            most = torch.tensor(len(groups), device=self.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            while 0 < len(groups) < most:  # split the one with the most rows
                i = max(range(len(groups)), key=lambda i: len(groups[i]))
                halves = groups[i].tensor_split(2)
                # a single row is repeated; only in evaluation, whose shares differ by one
                groups[i:i + 1] = halves if len(halves[1]) else halves[:1] * 2
        return self.progress(groups)

    def progress(self, parts) -> list:
        bar = Bar(parts)
        bar.name = self._phases[-1][0] if self._phases else "evaluate"
        return bar

    def clip_grad_norm(self, model) -> float:
        """Scales the gradients down to --max-grad-norm; returns their norm before."""
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(),
                                              self.args.max_grad_norm or math.inf)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if math.isfinite(norm):
            return norm
        bad = gather_objects([repr(str(row["prompt"]).strip()[:60]) for row in self._rows
                              if not self._outputs_are_finite(model, row)])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"step {self.step}: the gradient is not finite, and was not used. " + (
            f"Rows with such outputs: {', '.join(bad[:3])}{more}. Lower --lr, or use --dtype "
            "float32; --resume continues from the newest checkpoint" if bad else
            "All rows have finite outputs: the rewards or --beta may be too large, or --lr"))

    @torch.no_grad()
    def _outputs_are_finite(self, model, row: dict) -> bool:
        prompt, answers = row.get("prompt_ids", []), ("chosen_ids", "rejected_ids")
        texts = [prompt + row[side] for side in answers if side in row] or [prompt]
        with self.autocast():
            return all([model(input_ids=torch.tensor([ids], device=self.device)
                              ).logits.isfinite().all() for ids in texts])

    # --- steps

    def batch(self, rows: list, step: int, size: int, passes: float = math.inf, length=None):
        """This process's share of the rows of a step. Each pass over the data has a new order;
        with length (a function of a row), rows of similar length are batched together."""
        if not self._orders:
            self._compare_rows(rows)
        self.step, n = step, len(rows)
        end = min(step * size, passes * n)
        end += -end % self.world_size  # in the last step, too, each process has as many
        places = range((step - 1) * size, int(end))[self.rank::self.world_size]
        for epoch in {place // n for place in places} - set(self._orders):
            self._orders[epoch] = self._order(rows, size, epoch, length)
        # copies: a row that comes twice is two
        self._rows = [copy.copy(rows[self._orders[place // n][place % n]]) for place in places]
        return self._rows

    def draw_rows(self, rows: list, n, generator) -> list[dict]:
        """n random rows; one for a process that needs none, since all sample together."""
        places = torch.randint(len(rows), (max(1, int(n)),), generator=generator,
                               device=self.device)
        return [copy.copy(rows[i]) for i in places.tolist()]

    def _compare_rows(self, rows: list):
        """Says if a resumed run has other rows than before, or the same in other tokens."""
        names = "prompt_ids", "chosen_ids", "rejected_ids"
        tokens = [[row.get(name) for name in names] for row in rows if isinstance(row, dict)]
        digest = zlib.crc32(repr(tokens).encode())
        if self.state["rows"] not in (0, digest):
            print(f"warning: {self.args.data} gives other prompts than when this run began: "
                  "other rows, or a chat template that writes today's date")
        self.state["rows"] = digest

    def _order(self, rows: list, size: int, epoch: int, length) -> list[int]:
        generator = torch.Generator().manual_seed(
            (self.args.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(rows), generator=generator)
        if length is None:
            return order.tolist()
        order = torch.tensor([i for part in order.split(16 * size) for i in sorted(
            part.tolist(), key=lambda i: length(rows[i]))])
        batches, whole = order.split(size), len(rows) // size  # an incomplete one stays last
        shuffled = [batches[i] for i in torch.randperm(whole, generator=generator)]
        return torch.cat(shuffled + list(batches[whole:])).tolist()

    def share(self, rows: list) -> list:
        """This process's part of held-out rows: as many as the others', or one more."""
        n, size = len(rows), self.world_size
        if n < size:
            raise UserError(f"{n} held-out rows are too few for {size} processes")
        return rows[n * self.rank // size:n * (self.rank + 1) // size]

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of a step in this process: a resumed run draws the same ones."""
        seed = ((self.args.seed * 1_000_003 + step) * 1009 + self.rank) % 2**63
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def phase(self, name: str):
        """Starts the timer of a part of a step, for seconds_NAME."""
        self.unsaved = self.unsaved and name != "update"
        self._phases.append((name, time.time()))

    def due(self, every: int, step: int) -> bool:
        """Whether a step is one of every so many, or the run's last."""
        return every > 0 and step % every == 0 or step == self.steps or self.stopped

    # --- the log

    def write(self, name: str, rows: list[dict]):
        """Appends rows to a file of the run's folder."""
        if self.rank == 0:
            with open(self.dir / name, "a", encoding="utf-8") as file:
                file.write(json_lines(rows))

    def log(self, step: int, metrics: dict, prefix: str = ""):
        """Writes metrics, the same in all processes, to metrics.jsonl, and prints the first
        five. With a prefix they are an evaluation's; a step's get its seconds."""
        row = {prefix + name: float(f"{float(value):.5g}") for name, value in metrics.items()}
        if not prefix:
            every = getattr(self.args, "renew_reference_every", 0)  # renewed first, then saved
            self.unsaved, self.step_done = not every or step % every > 0, step
            ends = [start for _, start in self._phases[1:]] + [time.time()]
            seconds = {f"seconds_{name}": end - start
                       for (name, start), end in zip(self._phases, ends)}
            row |= {"seconds": round(sum(seconds.values()), 4)}
            row |= {name: round(value, 4) for name, value in seconds.items()}
            if self.device.type == "cuda":
                row["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            self._phases = []
            interrupts = torch.tensor(float(len(self._interrupts)), device=self.device)
            self.stopped = all_sum(interrupts).item() > 0  # by Ctrl-C in any process
            if 0 < getattr(self.args, "max_kl", 0) < row.get("kl", 0):
                self.stopped = True
                tqdm.write(f"stopped by --max-kl: the KL of step {step} is {row['kl']:g}")
            self._warn_once(row)
        row = {"step": step} | row
        self.metrics |= row
        self.write("metrics.jsonl", [row])
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        shown = [name for name in row if row[name] == row[name] and (
            name != "step" and not name.endswith(("_low", "_high")))][:5]
        if prefix or step % self.args.log_every == 0:
            intervals = {name: f" ({row[name + '_low']:.2f} to {row[name + '_high']:.2f})"
                         for name in shown if name + "_low" in row}
            tqdm.write(f"step {step:4}  " + "  ".join(
                f"{name} {row[name]:.3g}{intervals.get(name, '')}" for name in shown))
        if not prefix:
            self.bar.set_postfix({name: row[name] for name in shown}, refresh=False)
            self.bar.update()

    def _warn_once(self, row: dict):
        """Says what it means that a metric was 1 in five steps in a row."""
        if getattr(self.args, "group_size", 1) == 1:
            row = row | {"zero_std_groups": 0}
        for name, meaning in HOPELESS.items():
            count = self._hopeless.get(name, 0)
            self._hopeless[name] = count + 1 if row.get(name) == 1 or count >= 5 else 0
            if count == 4 and self._hopeless[name] == 5:
                tqdm.write(f"warning: {name} was 1 in five steps in a row: {meaning}")

    # --- checkpoints

    def resume(self, tokenizer, **trained) -> int:
        """Registers what is trained, name=(model, optimizer, scheduler), opens the run folder,
        and with --resume loads its last checkpoint. Returns the first step to train."""
        self.tokenizer, self.trained, self.tensorboard = tokenizer, trained, None
        self._print_memory()
        if self.rank == 0:
            self._open()
        gather_objects([])  # the others wait
        if self.args.resume:
            from checkpoints import load_checkpoint
            load_checkpoint(self)
        step = self.state["step"]
        if self.rank == 0:
            for path in self.outdated:
                path.unlink(missing_ok=True)
            flags = {k: writable(v) for k, v in vars(self.args).items()} | {"resume": ""}
            write_json(self.dir / "args.json", flags | {"ran_with": versions(self.device)})
            if self.args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(self.dir / "tensorboard",
                                                 purge_step=step + 1 if step else None)
        print(f"writing to {self.dir}")
        if step >= self.steps > 0:
            print(f"{self.dir} is finished: it has made all of its {self.steps} steps")
        self.bar = tqdm(total=self.steps, initial=step, disable=self.rank > 0 or None)
        if threading.current_thread() is threading.main_thread():
            finish_step_on_interrupt(self)
        return step + 1

    def _print_memory(self):
        """What the models take in memory, besides activations."""
        trained = [(name, model) for name, (model, _, _) in self.trained.items()]
        for name, model in trained + self.frozen:
            tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
            size = 12 * tuned + sum(p.numel() * p.element_size() for p in model.parameters())
            print(f"{name:12} {model.num_parameters() / 1e6:8.2f} M parameters "
                  f"{size / 2**20:8.1f} MiB of weights" + (
                      f", gradients and AdamW moments ({tuned / 1e6:.2f} M trained)"
                      if tuned else ""))

    def _open(self):
        """Makes the run's folder, locks it against other processes, and checks its disk."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            path = self.dir.resolve() / "lock"
            # held as long as a run of this process on this folder lives: closing any file of
            # the path would end it. flock would be inherited by a reward function's workers
            self.lock = LOCKS[path] = LOCKS.get(path) or open(path, "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            flag = "--resume" if self.args.resume else "--run-dir"
            raise UserError(f"{flag} {self.dir}: another process is writing to this run")
        except OSError as error:
            raise UserError(f"--run-dir: {self.dir} cannot be made: {error.strerror}")
        self._check_folder()  # once more: another process may have finished since
        trained = sum(p.numel() for model, _, _ in self.trained.values()
                      for p in model.parameters() if p.requires_grad)
        needed = trained * (16 if self.args.resumable else 4)
        free, written = shutil.disk_usage(self.dir).free, len(list(
            self.dir.glob("checkpoint-*[0-9]")))
        if self.steps and free < needed * max(1, self.args.keep_checkpoints + 1 - written):
            raise UserError(f"--run-dir: {self.dir} has {free / 2**30:.1f} GiB free, and a "
                            f"checkpoint takes {needed / 2**30:.1f}: make room, or lower "
                            "--keep-checkpoints")

    def save(self, step: int):
        """Writes RUN/checkpoint-STEP."""
        from checkpoints import save_checkpoint
        save_checkpoint(self, step)

    def to_continue(self) -> str:
        return f"; to continue: --resume {self.dir}" if self.args.resumable else ""


def finish_step_on_interrupt(run: Run):
    """Notes Ctrl-C, for Run.log to stop after the step; a second one stops at once. The
    handler does not hold the run, or its lock would outlive it, and is taken back with it."""
    interrupts, before = run._interrupts, signal.getsignal(signal.SIGINT)

    def interrupt(*_):
        interrupts.append(time.time())
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def give_back():
        if signal.getsignal(signal.SIGINT) is interrupt:  # not another run's
            signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGINT, interrupt)
    weakref.finalize(run, give_back)


def versions(device) -> dict:
    """What a run ran with; the commit where the scripts are in a git checkout."""
    commit = shutil.which("git") and subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
        capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU"
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__, "device": f"{device} ({gpu})",
            "processes": dist.get_world_size() if dist.is_initialized() else 1,
            "commit": commit or None}


