"""Checkpoints of a run: written whole or not at all, read again, and checked. Apart from
runtime.py since --help and the first step need none of it."""
import json
import pickle
import re
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from flags import read_json, write_json, write_whole
from modeling import UserError, first_line
from runtime import Run, gather_objects

def save_checkpoint(run: Run, step: int):
    """RUN/checkpoint-STEP: what from_pretrained loads, and in resume/ what --resume needs.
    It has its name only when it is complete, so a kill leaves no half of one."""
    folder, part = run.dir / f"checkpoint-{step}", run.dir / f"checkpoint-{step}.part"
    run.state["step"] = step
    finite = [weight.isfinite().all() for model, _, _ in run.trained.values()
              for weight in map(local, model.parameters())]
    if any(gather_objects([not torch.stack(finite).all().item()])):
        raise UserError(f"{folder}: not written: the weights are not finite: lower --lr "
                        "(earlier checkpoints are untouched)")
    updates = {name: trained[2].last_epoch for name, trained in run.trained.items()}
    try:
        if run.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
        gather_objects([])
        if run.args.resumable:
            with warnings.catch_warnings(action="ignore"):
                dcp.save(tensors(run), checkpoint_id=part / "resume",
                         no_dist=not dist.is_initialized())
        model, _, _ = next(iter(run.trained.values()))
        to_save, = getattr(model, "adapter", [model])
        weights = get_model_state_dict(to_save, options=StateDictOptions(
            full_state_dict=True, cpu_offload=True)) if dist.is_initialized() else None
        if run.rank == 0:
            to_save.save_pretrained(part, state_dict=weights)
            model.config.architectures = [type(model).__name__]
            # beside an adapter, transformers would take its config for a whole model's
            model.config.save_pretrained(part if to_save is model else part / "model")
            run.tokenizer.save_pretrained(part)
            if run.args.resumable:
                write_json(part / "resume/state.json", run.state | {
                    "updates": updates, "checksums": checksums(part / "resume")})
            part.rename(folder)
            run.unsaved = False
            others = [path for _, path in complete(run.dir) if path != folder]
            for old in others[:max(0, len(others) + 1 - run.args.keep_checkpoints)]:
                shutil.rmtree(old)
    except (Exception, dcp.api.CheckpointException) as error:  # each library has its own
        reason = last_line(error)
        if "unexpected pos" in reason:  # torch's words for a write that fell short
            reason = "the disk is full"
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{folder}: not written: {reason} (earlier checkpoints are untouched)")
    if run.stopped:
        print(f"stopped after step {step}" + run.to_continue())
    if step == run.steps:
        print(f"the trained model is in {folder}")


def load_checkpoint(run: Run):
    """Loads the last checkpoint, and takes the run's folder back to it."""
    where = f"--resume {run.dir}"
    if not complete(run.dir):
        raise UserError(f"{where}: it has no checkpoint yet: start a new run")
    step, folder = complete(run.dir)[-1]
    if not (folder / "resume").is_dir():
        raise UserError(f"{where}: {folder} was saved with --no-resumable")
    before = read_json(run.dir / "args.json", where)
    every = getattr(run.args, "renew_reference_every", 0)
    if bool(every) != bool(before.get("renew_reference_every")) or every and (
            run.args.reference != before["reference"]):
        raise UserError(f"{where}: --renew-reference-every cannot be switched on or off, "
                        "nor the --reference changed that it renews")
    # a step's place in the data and in the learning rate's schedule is counted in these
    for name in ("seed", "prompts_per_step", "pairs_per_step", "minibatches") + (
            ("epochs",) if hasattr(run.args, "minibatches") else ()):
        if name in before and getattr(run.args, name) != before[name]:
            raise UserError(f"{where}: --{name.replace('_', '-')} stays {before[name]}: for "
                            f"another one, start a new run with --model {folder}")
    if step > run.steps:
        raise UserError(f"{where}: it has made {step} steps, more than the {run.steps} of now")
    saved = read_json(folder / "resume/state.json", where)
    try:
        check_state(run, folder, saved)
        if saved["step"] != step:
            raise UserError(f"its folder is named {step}, and it is of step {saved['step']}")
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors(run), checkpoint_id=folder / "resume",
                     no_dist=not dist.is_initialized())
            for name, (_, _, scheduler) in run.trained.items():
                for _ in range(saved["updates"][name]):
                    scheduler.step()
    except (Exception, dcp.api.CheckpointException) as error:
        raise UserError(f"{where}: {folder} is damaged, or does not fit these flags: "
                        f"{last_line(error)}")
    gather_objects([])  # all have read it
    if run.rank == 0:
        for part in run.dir.glob("*.part"):  # what a kill left half written
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        for path in [run.dir / name for name in ("metrics.jsonl", "samples.jsonl")]:
            try:
                text = path.read_text(encoding="utf-8") if path.exists() else ""
                write_whole(path, "".join(
                    line for line in text.splitlines(keepends=True)
                    if line.endswith("\n") and json.loads(line)["step"] <= step))
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{where}: {path} has a line that no run has written")
    gather_objects([])


def check_state(run: Run, folder: Path, saved: dict):
    """Takes over a checkpoint's state. Raises if a file has changed since it was written, or
    if dcp.load would run code from it."""
    run.state = {name: saved[name] for name in run.state}
    for count in (saved["step"], saved["rows"], *saved["updates"].values()):
        if type(count) is not int or not 0 <= count < 2**32:
            raise UserError(f"{count!r} is no number of steps")
    if run.rank == 0 and saved["checksums"] != checksums(folder / "resume"):
        raise UserError("a file has changed since it was written")
    MetadataOnly(open(folder / "resume/.metadata", "rb")).load()


def complete(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints, the newest last."""
    return sorted((int(path.name.rpartition("-")[2]), path)
                  for path in folder.glob("checkpoint-*")
                  if re.fullmatch(r"checkpoint-\d+", path.name))


def tensors(run: Run) -> dict:
    """Weights and AdamW moments by name; the moments are zero before the first update."""
    found = {}
    run.reshard(*(model for model, _, _ in run.trained.values()),
                *(model for _, model in run.frozen))
    for name, (model, optimizer, _) in run.trained.items():
        for key, weight in model.named_parameters():
            if weight.requires_grad:
                moments = optimizer.state[weight]
                if not moments:
                    moments |= {"step": torch.zeros((), device=weight.device),
                                "exp_avg": torch.zeros_like(weight),
                                "exp_avg_sq": torch.zeros_like(weight)}
                found[f"{name}.{key}"] = weight.detach()
                found |= {f"{name}.{key}.{k}": v.detach() for k, v in moments.items()}
    if getattr(run.args, "renew_reference_every", 0):
        found |= {f"reference.{key}": weight.detach() for key, weight in
                    run.reference.named_parameters()}
    return found


class MetadataOnly(pickle.Unpickler):
    """Reads the index of a checkpoint, which is a pickle, and runs nothing but its classes."""
    CLASSES = {  # not BytesStorageMetadata: what it names would be unpickled by dcp.load
        "torch": ["Size"], "torch.serialization": ["_get_layout"], "pathlib": ["PosixPath"],
        "torch.distributed.checkpoint.metadata": [
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
            "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"],
        "torch.distributed.checkpoint.filesystem": ["_StorageInfo"]}

    def find_class(self, module, name):
        if name in self.CLASSES.get(module, ()) or (
                module == "torch" and isinstance(getattr(torch, name), torch.dtype)):
            return super().find_class(module, name)
        raise UserError(f"its .metadata would run {module}.{name}")


def checksums(folder: Path) -> dict:
    """The CRC-32 of each file in a folder but state.json, which holds them."""
    sums = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**24), b""):
                sums[path.name] = zlib.crc32(block, sums.get(path.name, 0))
    return {name: value for name, value in sums.items() if name != "state.json"}


def local(weight):
    """This process's part of a weight."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def last_line(error: BaseException) -> str:
    """torch.distributed ends its messages with the reason."""
    return first_line(Exception(*str(error).strip().splitlines()[-1:]))
