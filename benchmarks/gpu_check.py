"""One check of the project on a machine with a GPU, in eight minutes: do the scripts run, learn and resume there, and
how far from the card's limits are they?

    python benchmarks/gpu_check.py --out gpu_check
    python benchmarks/gpu_check.py --out gpu_check --only env,speed,trl,lab --seconds 240
    python benchmarks/gpu_check.py --out gpu_check --tiny          # on a CPU, reduced: does the check itself run?

Stages, the most important first; each has a time limit, and what does not fit into --seconds is said to be skipped:
  env         versions, the card, its measured limits (copy, bfloat16 product, launch), attention at decoding shapes
  scripts     the five scripts with their defaults, shortened, all at a time, each twice
  resume      each of them again from its middle checkpoint: as close to the whole run as the repeat is?
  torchrun    one process through FSDP2 and NCCL beside a plain run: the same first step? does it resume?
  speed       grpo.py, 0.5B random weights, 64 prompts x 16 x 256 tokens: seconds by phase, and shares of the limits
  memory      memory.py: a 0.6B shape, 4 x (2048 + 1024) tokens, measured beside the estimate
  trl         the work of speed by TRL, if it is installed
  lab         gpu_lab.py: other ways to decode and to update
  memory_run  the case of memory through grpo.py itself
  syncs       the synchronizations of CPU and GPU in two steps of grpo.py, by source line

OUT/gpu_check.json is written after each process, so a check that is cut off leaves what it found. OUT/gpu_check.log has
the end of each process's output. Processes run through this file (watched), which notes their peak memory.

A machine without internet, but with PyTorch and transformers, needs a few wheels. With the same version of Python:
    pip download --no-deps -d wheels tyro==1.0.17 docstring_parser==0.18.0 typeguard==4.6.1
    pip download --no-deps -d wheels trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19  # for the stage trl
    # take the checkout there, with the folder wheels, and in it:
    pip install --no-index --no-deps --target site/site-packages wheels/*.whl  # dill minds the folder's name
    PYTHONPATH=$PWD/site/site-packages python benchmarks/gpu_check.py --out gpu_check
"""
import collections
import importlib.metadata
import importlib.util
import json
import os
import resource
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "grpo", "ppo", "reinforce", "dpo", "reward_model"
STAGES = {  # name -> seconds that it may take at most, and that must be left for it to begin
    "env": (40, 10), "scripts": (150, 60), "resume": (70, 30), "torchrun": (60, 25), "speed": (120, 50),
    "memory": (45, 20), "trl": (110, 50), "lab": (200, 30), "memory_run": (90, 50), "syncs": (40, 20)}
TORCHRUN = "-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone"


@dataclass
class Args:
    out: str = "runs/gpu_check"
    """folder for gpu_check.json and gpu_check.log"""
    seconds: float = 450
    """for all stages together"""
    only: str = ""
    """stages, with commas between (default: all)"""
    skip: str = ""
    """likewise"""
    tiny: bool = False
    """on the CPU, reduced"""


class Check:
    def __init__(self, args: Args):
        self.tiny, self.device = args.tiny, "cpu" if args.tiny else "cuda"
        self.out, self.work = Path(args.out).resolve(), Path(tempfile.mkdtemp(prefix="gpu_check-"))
        self.out.mkdir(parents=True, exist_ok=True)
        self.began, self.until = time.time(), 0.0  # until: the end of this stage's time
        self.stages, self.running, self.models = {}, {}, {}
        (self.work / "reward.py").write_text(
            "def length(completions, **_):\n"
            "    return [len(c if isinstance(c, str) else c[0]['content']) / 100 for c in completions]\n")

    def save(self):
        results = {"command": " ".join(sys.argv), "seconds": round(time.time() - self.began, 1), "stages": self.stages}
        part = self.out / "gpu_check.json.part"
        part.write_text(json.dumps(results, indent=1))
        part.rename(self.out / "gpu_check.json")

    # --- processes

    def start(self, name: str, script: str, *flags, launcher=(), count_syncs: bool = False, **environment):
        """Starts a script, watched. Its output is in work/NAME.log."""
        command = [sys.executable, *launcher, __file__, "watched", self.work / name, str(count_syncs), script, *flags]
        with open(self.work / f"{name}.log", "w") as log:
            self.running[name] = time.time(), subprocess.Popen(
                list(map(str, command)), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
                     "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1" if self.tiny else "4",
                     "NCCL_SOCKET_IFNAME": "lo", **environment})  # the machine may have no network

    def wait(self, name: str, enough=lambda: False) -> dict:
        """What came of a process: it ended, or enough was seen, or the stage's time was up."""
        began, process = self.running[name]
        end = ""
        while process.poll() is None and not end:
            end = "stopped: enough was seen" if enough() else "cut off" if time.time() > self.until else ""
            time.sleep(0.1)
        self.kill(name)
        text = (self.work / f"{name}.log").read_text(errors="replace")
        with open(self.out / "gpu_check.log", "a") as log:
            log.write(f"\n##### {name}: rc {process.returncode}, {end or 'ended'}\n{text[-6000:]}\n")
        found = {"rc": process.returncode, "end": end or "ended", "seconds": round(time.time() - began, 1)}
        if process.returncode and not end:
            found["says"] = text[-1500:]
        peaks = [int(path.read_text() or 0) for path in self.work.glob(f"{name}.peak.*[0-9]")]
        found["peak_gib"] = round(max(peaks, default=0) / 2**30, 2)
        self.save()
        return found

    def kill(self, name: str):
        """Ends a process and all that it started."""
        _, process = self.running.pop(name)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run(self, name: str, script: str, *flags, **more) -> dict:
        self.start(name, script, *flags, **more)
        return self.wait(name)

    def child(self, name: str, *flags) -> dict:
        """A function of this file in a process of its own, which prints JSON; or what came of that."""
        found = self.run(f"child-{name}", __file__, name, *flags)
        printed = [line for line in (self.work / f"child-{name}.log").read_text().splitlines() if line[:2] == '{"']
        return json.loads(printed[-1]) if printed else found

    # --- what the scripts wrote

    def rows(self, run: str, key: str = "seconds") -> list[dict]:
        """The rows of a run's metrics that have a key: the steps'."""
        path = self.work / run / "metrics.jsonl"
        lines = path.read_text().splitlines(True) if path.exists() else []
        return [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if key in row]

    def checkpoints(self, run: str) -> list[Path]:
        return sorted((self.work / run).glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))

    def resume_copy(self, name: str, run: str, **more):
        """Starts a copy of a run again from its first checkpoint."""
        shutil.copytree(self.work / run, self.work / name, ignore=shutil.ignore_patterns(
            "lock", *(path.name for path in self.checkpoints(run)[1:])))
        self.start(name, f"{run.split('-')[0]}.py", "--resume", self.work / name, **more)

    def model(self, shape: str) -> tuple[Path, int]:
        """A folder with random weights of a shape, made once, and the number of its parameters."""
        folder = self.work / f"model-{shape}"
        if shape not in self.models:
            self.models[shape] = self.child("model", shape, folder, self.device)["parameters"]
        return folder, self.models[shape]

    # --- the stages: each fills `now`, its part of gpu_check.json

    def env(self, now: dict):
        now |= self.child("limits", self.device)
        if shutil.which("nvidia-smi"):
            now["nvidia_smi"] = subprocess.run(
                ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.sm,clocks.max.sm", "--format=csv"],
                capture_output=True, text=True).stdout

    def flags(self, name: str) -> list:
        """A script's defaults, shortened, with a checkpoint halfway."""
        shared = ["--keep-checkpoints", 5, "--device", self.device]
        if name in ("dpo", "reward_model"):
            pairs, held_out = (48, 16) if self.tiny else (1920, 300)
            lines = (ROOT / "tiny/preferences.jsonl").read_text().splitlines(True)
            path = self.work / f"{name}-pairs.jsonl"
            path.write_text("".join(lines[:pairs] + lines[-held_out:]))
            shared += ["--data", path, "--eval-pairs", held_out, "--save-every", 2 if self.tiny else 30]
            small = ["--pairs-per-step", 12, "--eval-prompts" if name == "dpo" else "--bias-prompts", 6]
        else:
            steps = 4 if self.tiny else 20
            shared += ["--steps", steps, "--save-every", steps // 2, "--eval-every", 0]
            small = ["--prompts-per-step", 4, "--group-size", 4, "--eval-prompts", 12, "--max-new-tokens", 16]
        return shared + small * self.tiny

    def scripts(self, now: dict):
        runs = [(name, copy) for name in SCRIPTS for copy in ("whole", "again")]
        for name, copy in runs:
            run = f"{name}-{copy}"
            self.start(run, f"{name}.py", *self.flags(name), "--run-dir", self.work / run)
        for name, copy in runs:
            run = f"{name}-{copy}"
            found, steps = self.wait(run), self.rows(run)
            found["steps"], late = len(steps), steps[len(steps) // 2:]
            found["median"] = {key: statistics.median(row[key] for row in late) for key in (late or [{}])[-1]
                               if key.startswith("seconds")}
            for key, least in (("eval_gold", 0.1), ("eval_accuracy", 0.05)):
                if len(values := [row[key] for row in self.rows(run, key)]) > 1:
                    found[key] = values[0], values[-1]
                    found["learns"] = values[-1] > values[0] + least  # of dpo.py: by its accuracy
            if copy == "whole" or found["rc"]:
                now[name if copy == "whole" else run] = found
        now["all_run"] = all(now[name]["rc"] == 0 for name in SCRIPTS)
        now["all_learn"] = all(now[name].get("learns", False) for name in SCRIPTS)

    def resume(self, now: dict):
        from safetensors.torch import load_file
        whole_runs = {name: self.checkpoints(f"{name}-whole") for name in SCRIPTS}
        begun = [name for name, checkpoints in whole_runs.items() if len(checkpoints) > 1]
        for name in begun:
            self.resume_copy(f"{name}-resumed", f"{name}-whole")
        for name in SCRIPTS:
            if name not in begun:
                now[name] = "no run of the stage scripts to resume"
                continue
            found, (middle, *_, last) = self.wait(f"{name}-resumed"), whole_runs[name]
            start, whole = (load_file(folder / "model.safetensors") for folder in (middle, last))
            way = distance(whole, start)
            for copy in ("again", "resumed"):
                folder = self.work / f"{name}-{copy}" / last.name
                if (folder / "model.safetensors").is_file():
                    other = load_file(folder / "model.safetensors")
                    found[f"{copy}_of_the_way"] = distance(whole, other) / way  # 0: the same weights
                    found[f"{copy}_same_config"] = (  # it has a reward model's bias
                        (folder / "config.json").read_text() == (last / "config.json").read_text())
            now[name] = found

    def torchrun(self, now: dict):
        flags = ["--eval-every", 0, "--eval-prompts", 0, "--keep-checkpoints", 5, "--device", self.device, "--steps", 3,
                 "--save-every", 2]
        flags += ["--prompts-per-step", 4, "--group-size", 4, "--max-new-tokens", 12] * self.tiny
        for name, launcher in (("grpo-torchrun", TORCHRUN), ("grpo-plain", ())):
            self.start(name, "grpo.py", *flags, "--run-dir", self.work / name, launcher=launcher)
        for name in ("grpo-torchrun", "grpo-plain"):
            now[name] = self.wait(name) | {"first_step": {
                key: row[key] for row in self.rows(name)[:1] for key in ("reward", "loss", "grad_norm", "length")}}
        if now["grpo-torchrun"]["rc"] == 0:
            self.resume_copy("grpo-torchrun-resumed", "grpo-torchrun", launcher=TORCHRUN)
            now["grpo-torchrun-resumed"] = self.wait("grpo-torchrun-resumed")

    def speed(self, now: dict):
        prompts, group, tokens = self.size()
        folder, n = self.model("tiny" if self.tiny else "0.5b")
        self.start(
            "speed", "grpo.py", "--model", folder, "--reward", f"{self.work}/reward.py:length", "--steps", 5,
            "--prompts-per-step", prompts, "--group-size", group, "--max-new-tokens", tokens, "--eval-prompts", 0,
            "--save-every", 0, "--lr", 1e-6, "--dtype", "bfloat16", "--micro-batch-tokens", 16384,
            "--generate-batch-size", prompts * group, "--device", self.device, "--run-dir", self.work / "speed")
        now["run"] = self.wait("speed", enough=lambda: len(self.rows("speed")) >= 3)
        _, *steps = self.rows("speed")  # the first is warm-up
        now |= {"parameters": n, "prompts": prompts, "group": group, "max_new_tokens": tokens, "steps": steps}
        phases = [key for key in steps[0] if key.startswith("seconds")]
        seconds = now["seconds"] = {key: statistics.median(row[key] for row in steps) for key in phases}
        length = statistics.median(row["length"] for row in steps)
        now["decode_ms_a_token"] = 1000 * seconds["seconds_generate"] / length
        if limits := self.stages.get("env", {}).get("matrix_flops") and self.stages["env"]:
            config = json.loads((folder / "config.json").read_text())
            width = config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
            row = config["num_hidden_layers"] * 2 * width * 2  # bytes of a token's keys and values, in bfloat16
            read = sum(2 * n + prompts * group * row * (20 + t) for t in range(int(length)))  # prompts: about 20 tokens
            products = 2 * n * prompts * group * length / limits["matrix_flops"]  # seconds of one forward pass
            floor = max(read / limits["copy_bytes"], products)
            now |= {"decode_floor_s": floor, "decode_over_floor": seconds["seconds_generate"] / floor,
                    "update_of_peak": 3 * products / seconds["seconds_update"],
                    "logprobs_of_peak": products / seconds["seconds_logprobs"]}

    def size(self) -> tuple[int, int, int]:
        """Prompts, completions of each, and their tokens, for speed and trl."""
        return (4, 4, 12) if self.tiny else (64, 16, 256)

    def memory(self, now: dict):
        flags = (["--shape", "tiny", "--rows", 2, "--prompt-tokens", 32, "--completion-tokens", 32] if self.tiny else
                 ["--shape", "0.6b", "--rows", 4, "--prompt-tokens", 2048, "--completion-tokens", 1024])
        for name, more in (("plain", ()), ("checkpointing", ("--gradient-checkpointing",))):
            found = self.run(f"memory-{name}", "benchmarks/memory.py", *flags, "--device", self.device, *more)
            now[name] = found | {"says": (self.work / f"memory-{name}.log").read_text()[-900:]}

    def trl(self, now: dict):
        if not importlib.util.find_spec("trl"):
            now["skipped"] = "TRL is not installed"
            return
        prompts, group, tokens = self.size()
        folder, _ = self.model("tiny" if self.tiny else "0.5b")
        now["run"] = self.run(
            "trl", "benchmarks/speed.py", "--child", "grpo", "--model", folder, "--random-weights", "0.5b",
            "--steps", 3, "--prompts", prompts, "--group-size", group, "--max-new-tokens", tokens,
            "--trl-micro-batch-size", 8 if self.tiny else 32, "--dtype", "bfloat16", "--device", self.device)
        if now["run"]["rc"] == 0:
            now["step_seconds"] = json.loads((self.work / "trl.log").read_text().splitlines()[-1])
            ours = [row["seconds"] for row in self.rows("speed")[1:]]
            if ours:
                now["trl_over_ours"] = statistics.median(now["step_seconds"]) / statistics.median(ours)

    def lab(self, now: dict):
        folder, _ = self.model("tiny" if self.tiny else "0.5b")
        file = self.out / "gpu_lab.json"
        file.unlink(missing_ok=True)
        now["run"] = self.run("lab", "benchmarks/gpu_lab.py", "--model", folder, "--out", file, "--device", self.device,
                              "--seconds", self.until - time.time() - 10)
        now["ways"] = json.loads(file.read_text())

    def memory_run(self, now: dict):
        """Two minibatches of four rows, so that the second has AdamW's moments."""
        folder, _ = self.model("tiny" if self.tiny else "0.6b")
        prompt, tokens = (64, 16) if self.tiny else (2048, 1024)
        words = ("what is a towel made of ? " * prompt).split()[:prompt - 8]  # a token each, and the template's
        data = self.work / "long.jsonl"
        data.write_text("".join(json.dumps({"prompt": " ".join(words[i:] + words[:i])}) + "\n" for i in range(4)))
        self.start(
            "memory_run", "grpo.py", "--model", folder, "--data", data, "--reward", f"{self.work}/reward.py:length",
            "--steps", 2, "--eval-prompts", 0, "--save-every", 0, "--prompts-per-step", 4, "--group-size", 2,
            "--minibatches", 2, "--micro-batch-tokens", 4 * (prompt + tokens), "--max-new-tokens", tokens, "--lr", 1e-6,
            "--dtype", "bfloat16", "--device", self.device, "--run-dir", self.work / "memory_run")
        now["run"] = self.wait("memory_run", enough=lambda: len(self.rows("memory_run")) >= 1)
        now["steps"] = self.rows("memory_run")

    def syncs(self, now: dict):
        small = ["--prompts-per-step", 2, "--group-size", 2, "--max-new-tokens", 8] * self.tiny
        now["run"] = self.run("syncs", "grpo.py", "--steps", 2, "--eval-prompts", 0, "--save-every", 0, *small,
                              "--device", self.device, "--run-dir", self.work / "run-syncs", count_syncs=not self.tiny)
        file = self.work / "syncs.syncs"
        now["lines"] = json.loads(file.read_text()) if file.is_file() else "only counted on a GPU"


def distance(a: dict, b: dict) -> float:
    """The norm of the difference of two models' weights."""
    return sum((a[key].double() - b[key].double()).square().sum().item() for key in a) ** 0.5


# --- processes of their own

def watched(path: str, count_syncs: str, script: str, *flags: str):
    """Runs a script in this process. PATH.peak.PID has its peak memory, the GPU's if it uses one; PATH.syncs has its
    synchronizations by source line."""
    import torch

    def watch():
        file, part = Path(f"{path}.peak.{os.getpid()}"), Path(f"{path}.peak.{os.getpid()}.part")
        while True:
            part.write_text(str(torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else
                                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
            part.rename(file)
            time.sleep(0.3)
    threading.Thread(target=watch, daemon=True).start()
    found = collections.Counter()

    def note(message, category, filename, line, *_):
        """Counts a warning of torch's by the project's own line and the library's."""
        frame = sys._getframe(1)
        while frame and Path(frame.f_code.co_filename).resolve().parent != ROOT:
            frame = frame.f_back
        if "synchroniz" in str(message):
            own = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"
            found[f"{own} in {'/'.join(Path(filename).parts[-3:])}:{line}"] += 1
    if count_syncs == "True":
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode(1)
    sys.path[0], sys.argv = str(Path(script).resolve().parent), [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if count_syncs == "True":
            Path(f"{path}.syncs").write_text(json.dumps(found.most_common(60)))


def limits(device: str):
    """The machine, and what it can do at most."""
    import torch
    cuda, found = device == "cuda", {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "tyro", "trl", "safetensors"):
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    if cuda:
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}

    def seconds(function) -> float:
        """The median of ten, after three that are warm-up."""
        times = []
        for _ in range(13):
            if cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                function()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) / 1000)
            else:
                begin = time.perf_counter()
                function()
                times.append(time.perf_counter() - begin)
        return statistics.median(times[3:])
    n, size = (8192, 2**30) if cuda else (512, 2**24)
    a, b = torch.randn(2, n, n, dtype=torch.bfloat16, device=device)
    source, small = torch.randn(size // 4, device=device), torch.zeros(8, device=device)
    target = torch.empty_like(source)
    found |= {"matrix_flops": 2 * n**3 / seconds(lambda: a @ b),
              "copy_bytes": 2 * size / seconds(lambda: target.copy_(source)),
              "launch_us": 1e6 * seconds(lambda: [small.add_(1) for _ in range(200)]) / 200}
    print(json.dumps(found), flush=True)  # what comes later may fail

    # attention of one new token of many rows, with the heads of Qwen2.5-0.5B
    B, H, K, L, D = (1024, 14, 2, 276, 64) if cuda else (4, 14, 2, 20, 64)
    q = torch.randn(B, H, 1, D, dtype=torch.bfloat16, device=device)
    k, v = torch.randn(2, B, K, L, D, dtype=torch.bfloat16, device=device)
    mask = torch.rand(B, 1, 1, L, device=device) > 0.1
    attention = torch.nn.functional.scaled_dot_product_attention
    ways = {"a key head's query heads as its tokens, mask": lambda: attention(q.view(B, K, H // K, D), k, v, mask),
            "enable_gqa, no mask": lambda: attention(q, k, v, enable_gqa=True),
            "enable_gqa, mask": lambda: attention(q, k, v, mask, enable_gqa=True),
            "repeated keys, mask": lambda: attention(
                q, k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1), mask)}
    found["decode_attention_us"] = {"floor": 2e6 * 2 * k.numel() / found["copy_bytes"]}
    for name, way in ways.items():
        found["decode_attention_us"][name] = round(1e6 * seconds(way), 1)
        print(json.dumps(found), flush=True)


def model(shape: str, folder: str, device: str):
    """Random weights with the tiny world's tokenizer, in bfloat16 on disk."""
    import torch
    from memory import config_of
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/policy")
    config = config_of(shape)
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    with torch.device(device):  # a GPU draws them at once
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(json.dumps({"parameters": made.num_parameters()}))


def main(args: Args):
    check = Check(args)
    deadline = check.began + args.seconds
    for name, (most, least) in STAGES.items():
        begun = time.time()
        if args.only and name not in args.only.split(",") or name in args.skip.split(","):
            continue
        check.until = min(deadline, begun + (400 if args.tiny else most))
        now = check.stages[name] = {}
        if not args.tiny and deadline - begun < least:
            now["skipped"] = f"{deadline - begun:.0f} s were left"
        else:
            try:
                getattr(check, name)(now)
            except Exception as error:  # the other stages go on
                now["error"] = f"{type(error).__name__}: {error}"
                with open(check.out / "gpu_check.log", "a") as log:
                    log.write(traceback.format_exc())
            finally:
                for running in list(check.running):
                    check.kill(running)
        now["stage_seconds"] = round(time.time() - begun, 1)
        check.save()
        print(f"--- {name}: {json.dumps(now)[:1100]}", flush=True)
    shutil.rmtree(check.work)
    print(f"{check.out}/gpu_check.json, {time.time() - check.began:.0f} s in all")


if __name__ == "__main__":
    children = {"watched": watched, "limits": limits, "model": model}
    if sys.argv[1:] and sys.argv[1] in children:
        children[sys.argv[1]](*sys.argv[2:])
    else:
        main(tyro.cli(Args, description=__doc__))
