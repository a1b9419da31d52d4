"""What is kept of a run so that it can go on: written beside the training, complete or not at all."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from openlance.errors import InputError
from openlance.train.parallel import Ranks

# DCP says so of every run on one process, in whichever thread writes.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

PREFIX, STATE, BEST = "step-", "state.json", "best.json"


class Checkpoints:
    """The saved states of a run, one folder `step-NNNNNNNN` each, in PyTorch's distributed format (DCP).

    A state is written under another name and renamed when all of it is there. It can be read by another
    number of processes than wrote it. The last `keep` are kept, and the one with the lowest score.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = folder, keep, ranks
        # Of its own: what the writing thread exchanges must not meet what training does.
        self._group = dist.new_group(backend="gloo") if ranks.size > 1 else None
        self._writing: tuple[Future, Path, float | None] | None = None

    def steps(self) -> list[int]:
        """Steps of the complete states, ascending."""
        found = [path for path in self.folder.glob(f"{PREFIX}*") if (path / STATE).is_file()]
        return sorted(int(path.name.removeprefix(PREFIX)) for path in found if path.suffix != ".draft")

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def save(
        self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Start writing; every process calls it. The tensors are copied first, so training can go on.

        state: what is not a tensor, plain enough for JSON. score: lower is better.
        """
        self.finish()
        draft = self.path(step).with_suffix(".draft")
        if self.ranks.main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            (draft / STATE).write_text(json.dumps(state))
        self.ranks.total([0.0])  # the folder is there before anyone writes to it
        future: Any = dcp.async_save(dict(tensors), checkpoint_id=draft, process_group=self._group)
        self._writing = (future, draft, score)

    def finish(self) -> None:
        """Wait for what is being written, and put it in its place. Raises InputError for a disk that is
        full."""
        if self._writing is None:
            return
        future, draft, score = self._writing
        self._writing = None
        try:
            future.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise InputError(
                f"{draft}: the state could not be written, is the disk full? ({_first_line(error)}). "
                "Earlier states are as they were"
            ) from error
        if self.ranks.main:
            final = draft.with_suffix("")
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
            self._note_best(final, score)
            self._prune()

    def done(self) -> bool:
        """Whether nothing is being written any more."""
        return self._writing is None or self._writing[0].done()

    def load(self, step: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Read a state into `tensors`, which have its names and shapes; gives what is not a tensor.

        Raises InputError for a state of another model.
        """
        path = self.path(step)
        try:
            state = json.loads((path / STATE).read_text())
            dcp.load(dict(tensors), checkpoint_id=path)
        except (CheckpointException, RuntimeError, ValueError, OSError, KeyError) as error:
            raise InputError(
                f"{path}: not a state of this run ({_first_line(error)}). Use another --run-dir, or remove it"
            ) from error
        return state

    def best(self) -> int | None:
        """The step of the state with the lowest score, None where none had one."""
        file = self.folder / BEST
        return json.loads(file.read_text())["step"] if file.is_file() else None

    def _note_best(self, path: Path, score: float | None) -> None:
        file = self.folder / BEST
        if score is None or (file.is_file() and json.loads(file.read_text())["score"] <= score):
            return
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps({"step": int(path.name.removeprefix(PREFIX)), "score": score}))
        draft.replace(file)

    def _prune(self) -> None:
        best = self.best()
        for step in self.steps()[: -self.keep]:
            if step != best:
                shutil.rmtree(self.path(step))
        for draft in self.folder.glob(f"{PREFIX}*.draft"):  # of processes that were killed
            shutil.rmtree(draft, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
