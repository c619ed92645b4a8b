"""Write and read checkpoints that are complete or absent: written to a temporary folder, renamed into place, verified
when loaded, and never unpickled.

A run folder holds `step_00000100/` folders, each with model.safetensors (weights), optimizer.safetensors (moments,
masters, step counters, random states) and state.json (settings, progress, position in the data, and size and sha256 of
the other files). In a sharded checkpoint (fastgpt.training.sharded), each process has a file in place of each of the
two.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.errors import UserError, cause_of
from fastgpt.core.tensorfile import Deferred, save_file
from fastgpt.core.tensorpieces import Pieces, open_pieces
from fastgpt.distributed.mesh import ALONE, Mesh

FORMAT = 2  # format 1 names the optimizer's state by the numbers of the parameters, not by their names
READS = (1, FORMAT)
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that the rename below cannot become visible before its content."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


Named = Iterable[tuple[str, Tensor]]  # as model.named_parameters() returns


def flatten_optimizer(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Tensor]:
    """Return the optimizer's state as named tensors: '<name of the parameter>.<name in its state>'."""
    names = {p: name for name, p in named}
    return {f"{names[p]}.{name}": torch.as_tensor(t) for p, s in optimizer.state.items() for name, t in s.items()}


def unflatten_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], named: Named) -> None:
    """Load what `flatten_optimizer` returned, however the parameters are grouped now. The numbers in format 1 are the
    positions of the parameters in the groups.

    Raises:
        UserError: a parameter has no state in the checkpoint, a state has no parameter here, or a state does not fit.
    """
    names = {p: name for name, p in named}
    order = [names[p] for g in optimizer.param_groups for p in g["params"]]
    state: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        owner, _, name = key.rpartition(".")
        owner = order[int(owner)] if owner.isdigit() and int(owner) < len(order) else owner
        state.setdefault(owner, {})[name] = t
    if state and (other := sorted(set(order) ^ set(state))):
        where = (
            "no state in the checkpoint" if other[0] in order else "state in the checkpoint, but is not trained here"
        )
        raise UserError(f"optimizer: {other[0]} has {where}")
    numbered = {i: state[name] for i, name in enumerate(order) if name in state}
    try:
        optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})
    except ValueError as e:
        raise UserError(f"optimizer: the checkpoint's state does not fit ({e})") from e


def random_states(device: torch.device, mesh: Mesh = ALONE) -> dict[str, Tensor]:
    """Return the states of the generators that the processes of training draw from; those of process 2 end in ".2"."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    each = mesh.gather(states)
    return {f"{name}.{i}" if i else name: t for i, found in enumerate(each) for name, t in found.items()}


def restore_random_states(states: dict[str, Tensor], device: torch.device, mesh: Mesh = ALONE) -> None:
    """Restore what `random_states` returned; a generator that the checkpoint does not contain is left unchanged."""
    end = f".{mesh.rank}" if mesh.rank else ""
    if f"rng.cpu{end}" in states:
        torch.set_rng_state(states[f"rng.cpu{end}"])
    if device.type == "cuda" and f"rng.cuda{end}" in states:
        torch.cuda.set_rng_state(states[f"rng.cuda{end}"], device)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in host memory that share no memory with these tensors or one another."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


class Writer:
    """Writer of checkpoints on a thread, one at a time, from copies on the host; training continues meanwhile."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._done: list[Path] = []
        self._error: BaseException | None = None

    def save(
        self,
        run: Path,
        step: int,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        keep: int,
        stays: Container[int] = (),
    ) -> None:
        """Call the function `save` in the background, after waiting for the previous checkpoint.

        Raises:
            UserError: the previous checkpoint could not be written.
        """
        self._join()
        arguments = (run, step, self.copied(weights), self.copied(optimizer), state, keep, stays)
        self._thread = threading.Thread(target=self._write, args=arguments, name="fastgpt-checkpoint")
        self._thread.start()

    def copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies in host memory, which the thread writes."""
        return _on_cpu(tensors)

    def write(self, *arguments: Any) -> Path:
        """Write a checkpoint; arguments and result are those of the function `save`."""
        return save(*arguments)

    def _write(self, *arguments: Any) -> None:
        try:
            self._done.append(self.write(*arguments))
        except BaseException as e:  # raised where the run next asks
            self._error = e

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finished(self, wait: bool = False) -> list[Path]:
        """Return the checkpoints completed since the last call.

        Raises:
            UserError: one could not be written.
        """
        if wait or (self._thread is not None and not self._thread.is_alive()):
            self._join()
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Wait for the checkpoint in progress. Its failure does not replace the error that ends the run."""
        if self._thread is not None:
            self._thread.join()


class Draft:
    """A checkpoint that is being written, in a folder aside that is renamed when it is complete."""

    def __init__(self, run: Path, step: int) -> None:
        self.run, self.step = run, step
        self.final, self.aside, self._replaced = (
            run / f"{name}_{step:08d}" for name in ("step", ".writing", ".replaced")
        )

    def begin(self) -> None:
        """Make the folder, empty."""
        shutil.rmtree(self.aside, ignore_errors=True)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self.aside.mkdir(parents=True)

    def write(
        self, name: str, tensors: Mapping[str, Tensor | Deferred], metadata: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Write a tensor file, and return its size and hash as state.json holds them."""
        path = self.aside / name
        save_file(tensors, path, metadata)
        _sync(path)
        return {"bytes": path.stat().st_size, "sha256": _sha256(path)}

    def complete(self, files: dict[str, Any], state: dict[str, Any], keep: int, stays: Container[int] = ()) -> None:
        """Write state.json and rename the folder, then delete all but the last `keep` and the steps in `stays`.

        Args:
            files: what `write` returned, by the names of the files.
        """
        text = json.dumps({"format": FORMAT, "step": self.step, "files": files, **state}, indent=1)
        (self.aside / STATE).write_text(text, encoding="utf-8")
        _sync(self.aside / STATE)
        _sync(self.aside)
        if self.final.exists():  # the same step again, after a resume from an earlier one
            os.replace(self.final, self._replaced)
        os.replace(self.aside, self.final)
        _sync(self.run)
        shutil.rmtree(self._replaced, ignore_errors=True)
        for old in checkpoints(self.run)[:-keep] if keep > 0 else []:
            if int(old.name.removeprefix("step_")) not in stays:
                shutil.rmtree(old, ignore_errors=True)

    def failed(self, cause: str) -> UserError:
        """Remove what was written, and return the error that says why."""
        shutil.rmtree(self.aside, ignore_errors=True)
        return UserError(f"checkpoint {self.final} could not be written ({cause}); earlier checkpoints are untouched")


def save(
    run: Path,
    step: int,
    weights: Mapping[str, Tensor | Deferred],
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    keep: int,
    stays: Container[int] = (),
) -> Path:
    """Write checkpoint `run/step_<step>`, then delete all but the last `keep` and the steps in `stays`.

    Raises:
        UserError: the folder cannot be written (full disk, no permission); earlier checkpoints are not changed.
    """
    draft = Draft(run, step)
    try:
        draft.begin()
        files = {name: draft.write(name, tensors) for name, tensors in ((MODEL, weights), (OPTIMIZER, optimizer))}
        draft.complete(files, state, keep, stays)
    except OSError as e:
        raise draft.failed(cause_of(e)) from e
    return draft.final


def checkpoints(run: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    return sorted(p for p in run.glob("step_*") if p.is_dir())


def find(path: str | Path) -> Path:
    """Return `path` if it is a checkpoint folder, or the newest checkpoint of the run folder `path`.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / STATE).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(f"checkpoint: {path} is neither a checkpoint nor a run folder with step_* in it")
    return found[-1]


def read_state(path: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint.

    Raises:
        UserError: the file is missing, not JSON, or of another format version.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"checkpoint {path} is damaged: {STATE} cannot be read ({cause_of(e)}){_before(path)}") from e
    if not isinstance(state, dict) or state.get("format") not in READS:
        raise UserError(
            f"checkpoint {path}: {STATE} is not of format {' or '.join(map(str, READS))}, which this version reads"
        )
    return state


def require_model(path: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint of `fastgpt finetune` that does not hold a whole language model.

    Raises:
        UserError: it holds adapters alone, or a model with a task head.
    """
    if state.get("adapters"):
        merged = path.parent / "merged"
        raise UserError(f"checkpoint {path} holds adapters of {state['base']} alone, expected a model, as in {merged}")
    if state.get("head"):
        raise UserError(f"checkpoint {path} has a head for {state['head']['kind']}, expected a language model")


def merged(path: Path, state: dict[str, Any], of_run: bool) -> Path:
    """Return the checkpoint with the adapters of checkpoint `path` merged into the weights, which the end of a run of
    `fastgpt finetune` writes.

    Args:
        of_run: whether the run is wanted, whose best checkpoint it is, and not this checkpoint.

    Raises:
        UserError: there is none, or it is of another step.
    """
    found = checkpoints(path.parent / "merged")
    if not found or not (of_run or found[-1].name == path.name):
        require_model(path, state)
    return found[-1]


def shard_name(name: str, mesh: Mesh) -> str:
    """Return the name of this process's file in place of MODEL or OPTIMIZER in a sharded checkpoint."""
    stem, ending = name.split(".")
    return f"{stem}.{mesh.rank}-of-{mesh.world}.{ending}"


def is_part(file: str, name: str) -> bool:
    """Return whether a file of a checkpoint is `name`, which is MODEL or OPTIMIZER, or a shard of it."""
    return file.split(".")[0] == name.split(".")[0] and file.endswith(".safetensors")


def verified(path: Path, name: str, state: dict[str, Any], mesh: Mesh = ALONE) -> list[Path]:
    """Return the files of a checkpoint with the weights (MODEL) or the optimizer's state (OPTIMIZER), one or a shard of
    each process that wrote it, after comparing them with state.json. The processes of `mesh` share the work.

    Raises:
        UserError: a file is missing, truncated or altered.
    """
    files = sorted(file for file in state["files"] if is_part(file, name))
    damage = [_damage(path / file, state["files"][file]) for file in files[mesh.rank :: mesh.world]]
    found = [text for each in mesh.gather(damage) for text in each if text]
    if found or not files:
        text = found[0] if found else f"{name} is missing"
        raise UserError(f"checkpoint {path} is damaged: {text}{_before(path)}")
    return [path / file for file in files]


def _damage(file: Path, expected: dict[str, Any]) -> str:
    """Return in which way a file differs from its size and hash in state.json."""
    if not file.is_file():
        return f"{file.name} is missing"
    if (size := file.stat().st_size) != expected["bytes"]:
        return f"{file.name} has {size} bytes, expected {expected['bytes']}"
    return "" if _sha256(file) == expected["sha256"] else f"the content of {file.name} has changed"


def open_tensors(path: Path, name: str, state: dict[str, Any], mesh: Mesh = ALONE) -> dict[str, Pieces]:
    """Return where the tensors of a checkpoint lie, in files that `verified` finds; `read` returns one.

    Raises:
        UserError: a file is missing, truncated or altered.
    """
    return open_pieces(verified(path, name, state, mesh))


def read_tensors(path: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, in files that `verified` finds.

    Raises:
        UserError: a file is missing, truncated or altered.
    """
    return {key: tensor.read() for key, tensor in open_tensors(path, name, state).items()}


def _before(path: Path) -> str:
    """Name the checkpoint to fall back to, for an error message."""
    older = [p for p in checkpoints(path.parent) if p.name < path.name]
    return f"; the previous checkpoint is {older[-1]} (--resume {older[-1]})" if older else ""
