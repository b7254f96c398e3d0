"""Checkpoints of a run: all a trainer needs to go on exactly where it was, on any number of processes.

RUN/checkpoints/step-00000250/ holds the state as torch.distributed.checkpoint writes it, a file a process
(__0_0.distcp ...) and .metadata, and manifest.json (step, tokens, data order, checksums of those files). Each process
writes the rows of the latents that it owns; whatever mesh reads them, one process or many, each takes its own rows
from the files that have them. All processes see one file system.

A checkpoint is written under another name, flushed, and renamed by rank 0 when all have written: it is there whole or
not at all. One that is found damaged is set aside, and the one before it is used; both are said. .metadata is a pickle,
which can run code: it is read only if its checksum is the one of the manifest, so damage does no harm, but whoever may
write to a checkpoint folder is trusted, as with any folder of programs.

`Saver` does so for a training loop, which may go on while a thread writes a copy of the state. All processes write
together then too, with process groups of their own.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from topkapi.console import say
from topkapi.errors import TopkapiError
from topkapi.files import read_json, require_shape, sha256, whole_folder, write_json
from topkapi.parallel import ALONE, Mesh

METADATA, MANIFEST = ".metadata", "manifest.json"
OLD_STATE = "state.safetensors"  # of versions that knew one process only
COPY_AHEAD = 10_000_000  # bytes brought from a GPU while those before them are written; PyTorch's own number


@dataclass(frozen=True)
class Rows:
    """Rows of a latent-indexed tensor: those that this process owns, of `n_latents` in all."""

    local: Tensor
    n_latents: int
    of_shard: bool = False
    """Whether they are instead all rows of the shard, the same on its replicas."""


State = Mapping[str, Tensor | Rows]
"""Tensors by name; those that are no `Rows` are the same on every process."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint of a run is to hold."""

    run: Path
    step: int
    state: State
    meta: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of a run, found to be sound."""

    step: int
    meta: dict[str, Any]
    folder: Path

    def read_into(self, state: State, mesh: Mesh = ALONE) -> None:
        """Overwrite tensors with what was saved under their names; every process of the mesh calls it."""
        whole = {name: _as_whole(value, mesh) for name, value in state.items()}
        reader = dcp.FileSystemReader(self.folder)
        _unwrapped(lambda: dcp.load(whole, storage_reader=reader, process_group=mesh.world, no_dist=mesh.n_ranks == 1))

    def read(self) -> dict[str, Tensor]:
        """All tensors, whole, on the CPU of this process."""
        known = dcp.FileSystemReader(self.folder).read_metadata().state_dict_metadata
        tensors = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in known.items()}
        self.read_into(tensors)
        return tensors


class Saver:
    """Writes the checkpoints of runs side by side, at once or in the background, and removes old ones.

    In the background: whoever saves waits while the state is copied to CPU memory, which is held from then on (pinned,
    where it comes from a GPU), and while the checkpoint before this one is still being written; a thread writes the
    copy. Every process of the mesh makes one, and calls its methods in the same order.
    """

    def __init__(self, keep: int, in_background: bool = False, mesh: Mesh = ALONE) -> None:
        self.keep, self.mesh = keep, mesh
        self._thread: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None
        self._writing: Sequence[Snapshot] = ()
        self._copies: dict[tuple[Path, str], Tensor] = {}
        if in_background:
            _ignore_one_process()  # here, as the thread's own call can fall into another one's `catch_warnings`
            self.mesh = _of_cpus(mesh.apart())
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="topkapi-checkpoints")

    def save(self, snapshots: Sequence[Snapshot]) -> None:
        """Write a checkpoint of each run; in the background, raises what `wait` raises of those before.

        Raises OSError, on all processes, with older checkpoints untouched.
        """
        self.wait()
        if self._thread is None:
            self._write(snapshots)
            return
        copies = [self._copied(snapshot) for snapshot in snapshots]
        if any(_is_on_gpu(snapshot.state) for snapshot in snapshots):
            torch.cuda.current_stream().synchronize()
        self._writing, self._written = copies, self._thread.submit(self._write, copies)

    def wait(self) -> None:
        """Return when what was saved is on the disk; what could not be written is tried once more, from the copy.

        Raises OSError if it could not be written then either, as `save` does without a background, and any other error.
        """
        written, self._written = self._written, None
        if written is None:
            return
        try:
            written.result()
        except OSError as error:
            say(f"warning: a checkpoint could not be written ({error}); trying once more.")
            self._write(self._writing)

    def close(self) -> None:
        """Let what was saved be written, and end the thread. An error of it that `wait` has not raised is forgotten."""
        if self._thread is not None:
            self._thread.shutdown()

    def abandon(self) -> None:
        """`close` where a process has failed: the thread may wait for it for ever, and is left behind."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def _write(self, snapshots: Sequence[Snapshot]) -> None:
        """Older checkpoints go when all runs have the new one, so that there is always one they share."""
        for it in snapshots:
            save(it.run, it.step, it.state, it.meta, self.mesh)
        for it in snapshots:
            self.mesh.on_first(lambda run=it.run: keep_newest(run, self.keep))

    def _copied(self, snapshot: Snapshot) -> Snapshot:
        """The same on the CPU, once the current stream is synchronised."""
        state = {}
        for name, value in snapshot.state.items():
            tensor = _local(value)
            copy = self._copies.get((snapshot.run, name))
            if copy is None:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[snapshot.run, name] = copy
            copy.copy_(tensor, non_blocking=True)
            state[name] = replace(value, local=copy) if isinstance(value, Rows) else copy
        return replace(snapshot, state=state)


def save(run: Path, step: int, state: State, meta: dict[str, Any], mesh: Mesh = ALONE) -> None:
    """Write the checkpoint of `step`; every process of the mesh calls it.

    Raises OSError, on all of them, with older ones untouched.
    """
    target = folder_of(run, step)
    if mesh.on_first(target.exists):  # saved before, and whole: damaged ones are set aside when read
        return
    with ExitStack() as stack:
        temporary = mesh.on_first(lambda: stack.enter_context(whole_folder(target)))
        whole = {name: _as_whole(value, mesh) for name, value in state.items()}
        # What is on the CPU is written without looking at a stream, which would wait for the work of training.
        writer = _Writer(temporary, per_thread_copy_ahead=COPY_AHEAD if _is_on_gpu(state) else 0)
        _unwrapped(lambda: dcp.save(whole, storage_writer=writer, process_group=mesh.world, no_dist=mesh.n_ranks == 1))
        checksums = mesh.gather_objects({path.name: sha256(path) for path in temporary.glob(f"__{mesh.rank}_*")})

        def finish() -> None:
            files = {METADATA: sha256(temporary / METADATA)}
            for some in checksums:
                files |= some
            write_json(temporary / MANIFEST, {"step": step, "meta": meta, "files": files})
            stack.close()  # flushes and renames

        mesh.on_first(finish)


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / "checkpoints" / f"step-{step:08d}"


def keep_newest(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints.

    With several runs side by side, call it when all of them have saved: they resume from a step they share.
    """
    for old in steps(run)[:-keep]:
        shutil.rmtree(folder_of(run, old))


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints that a run has, ascending."""
    names = (path.name for path in (run / "checkpoints").glob("step-????????"))
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def load(run: Path, step: int, mesh: Mesh = ALONE) -> Checkpoint:
    """One checkpoint; every process of the mesh checks a part of its files.

    Raises:
        TopkapiError: a file is missing or damaged; on every process.
    """
    folder = folder_of(run, step)
    manifest = mesh.on_first(lambda: _manifest(folder))
    mine = sorted(manifest["files"].items())[mesh.rank :: mesh.n_ranks]
    damages = [_damage(folder / name, checksum) for name, checksum in mine]
    found = [damage for some in mesh.gather_objects(damages) for damage in some if damage]
    if found:
        raise TopkapiError(found[0])
    return Checkpoint(manifest["step"], manifest["meta"], folder)


def _manifest(folder: Path) -> dict[str, Any]:
    found = read_json(folder / MANIFEST, "checkpoint")
    shape = {"step": int, "meta": dict, "files": {METADATA: str, "*": str}}
    require_shape(found, shape, folder / MANIFEST, "checkpoint", "")
    return found


def load_newest(runs: list[Path], mesh: Mesh = ALONE) -> list[Checkpoint] | None:
    """The newest step of which every run has a sound checkpoint, one a run; None if there never was one.

    Raises:
        TopkapiError: there are checkpoints, but no step at which all runs have a sound one.
    """
    common, damaged = mesh.on_first(lambda: _candidates(runs))
    for step in common:
        found = []
        for run in runs:
            try:
                found.append(load(run, step, mesh))
            except TopkapiError as error:
                say(f"warning: {error} Falling back to the checkpoint before it.")
                mesh.on_first(lambda run=run, step=step: _set_aside(run, step))
                damaged = True
        if len(found) == len(runs):
            mesh.on_first(lambda step=step: _forget_after(runs, step))
            return found
    if damaged:
        raise TopkapiError(
            f"every checkpoint of {', '.join(map(str, runs))} is damaged; nothing to resume from. "
            "Start again with another --run."
        )
    return None


def _candidates(runs: list[Path]) -> tuple[list[int], bool]:
    """Steps of which all runs have a checkpoint, newest first, and whether a damaged one was set aside before."""
    found_steps = [set(steps(run)) for run in runs]
    common = sorted(set.intersection(*found_steps), reverse=True)
    if not common and any(found_steps):
        raise TopkapiError(
            f"{', '.join(map(str, runs))} have no checkpoint of the same step, so they cannot go on side by side. "
            "Resume each by itself: topkapi train RUN --resume."
        )
    for old in (folder_of(run, step) / OLD_STATE for run in runs for step in common):
        if old.exists():
            raise TopkapiError(
                f"{old} was written by an earlier version of Topkapi, which this one does not read: finish the run "
                "with that version, or train again with another --run."
            )
    return common, any(list((run / "checkpoints").glob("*.damaged")) for run in runs)


class _Writer(dcp.FileSystemWriter):
    """One that tells of a full disk as such: torch.save buries it under an error of its own."""

    def write_data(self, *arguments: Any) -> Any:
        try:
            return super().write_data(*arguments)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _local(value: Tensor | Rows) -> Tensor:
    return value.local if isinstance(value, Rows) else value


def _is_on_gpu(state: State) -> bool:
    return any(_local(value).is_cuda for value in state.values())


def _as_whole(value: Tensor | Rows, mesh: Mesh) -> Tensor:
    """A tensor as torch.distributed.checkpoint takes it: with several processes, rows know their place in the whole."""
    if not isinstance(value, Rows):
        return value
    if mesh.n_ranks == 1:
        return value.local
    local = value.local.contiguous()
    shape = torch.Size((value.n_latents, *local.shape[1:]))
    return DTensor.from_local(
        local,
        mesh.device_mesh,
        (Shard(0), Replicate() if value.of_shard else Shard(0)),
        run_check=False,
        shape=shape,
        stride=local.stride(),
    )


def _unwrapped(call: Callable[[], object]) -> None:
    """Do what torch.distributed.checkpoint is asked for; of its collection of exceptions the first is raised."""
    _ignore_one_process()
    try:
        call()
    except CheckpointException as error:
        inner, _ = next(iter(error.failures.values()))
        inner.is_common = True
        raise inner from None


def _ignore_one_process() -> None:
    """Silence the warning that one process is one process; for good, as `catch_warnings` is not for threads."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def _of_cpus(mesh: Mesh) -> Mesh:
    """The same mesh for tensors on CPUs: a DTensor moves its tensor to the kind of device that its mesh has."""
    same = mesh.device_mesh
    if same is None:
        return mesh
    return replace(mesh, device_mesh=DeviceMesh("cpu", same.mesh, mesh_dim_names=same.mesh_dim_names))


def _damage(path: Path, checksum: str) -> str | None:
    """What is wrong with a file, if anything."""
    if not path.is_file():
        return f"checkpoint: no file {path}."
    if sha256(path) != checksum:
        return f"checkpoint: {path} is damaged or another file: its SHA-256 is not the one recorded."
    return None


def _forget_after(runs: list[Path], step: int) -> None:
    """Remove checkpoints beyond the step that runs go back to: they belong to another course of them."""
    for run in runs:
        for later in [found for found in steps(run) if found > step]:
            shutil.rmtree(folder_of(run, later))


def _set_aside(run: Path, step: int) -> None:
    source = folder_of(run, step)
    target = source.with_name(f"{source.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
