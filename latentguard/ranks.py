"""Processes of torchrun that hold one model between them: rank 0 leads, the others follow. Knows no model, no prompt and no file.

Only rank 0 runs a study, asks the store and writes. What it asks of the model goes to the others, which do the same passes beside it
and keep nothing. Before each pass, and wherever something is chosen, all ranks meet and bring a word; the greatest is what all do, so
that none waits in a pass for a rank that has gone elsewhere.
"""

import atexit
import gc
import logging
import os
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import cloudpickle
import torch
import torch.distributed as dist

from latentguard.errors import InputError

T = TypeVar("T")
_GO, _SHORT, _END, _CALL, _FAIL = range(5)
_AGES, _LOADING = timedelta(days=30), timedelta(hours=2)  # a study may think for long between two passes


class ElsewhereError(torch.OutOfMemoryError):
    """Memory ran out on another rank."""


class _Failed:
    depth = 0  # how many questions were open when another rank could not go on with the last


class _FailedError(_Failed, InputError):
    """In that rank's words."""


class _CrashedError(_Failed, Exception):
    """With that rank's traceback."""


class _OverError(Exception):
    """Rank 0 wants no more of what it asked."""


class Alone:
    """One process: every question is answered here."""

    size, rank, follows = 1, 0, False

    def turn(self) -> None:
        """Before a pass."""

    def same(self, make: Callable[[], T]) -> T:
        """What rank 0 makes."""
        return make()

    def ran_short(self, error: BaseException) -> None:
        """Memory ran out here."""

    def guard(self, *_: object) -> None:
        """A hook before a model's forward, to refuse one that rank 0 would run by itself."""

    @contextmanager
    def asking(self, number: int, what: str, *args: Any) -> Iterator[object]:
        """While open, all ranks work on a question to a model; gives the question."""
        yield None

    def resume(self, question: object) -> None:
        """Go on with a question after its caller had an answer in hand."""


ALONE = Alone()


class Team(Alone):
    """All processes of this torchrun; made by `join`."""

    patience = timedelta(seconds=60)  # that a rank in trouble waits for the others to come out of a pass; those it left alone never do

    def __init__(self) -> None:
        self.size, self.rank, self.follows = dist.get_world_size(), dist.get_rank(), dist.get_rank() > 0
        self._words: Any = dist.new_group(backend="gloo", timeout=_AGES)
        self._last: Any = None  # exchange of words: a thread of gloo that lets go of its tensors while Python ends would abort the process
        self._open: list[object] = []  # on rank 0: a question may be asked while the answers to another are read
        self._lost = False  # the others may stand anywhere
        self._code: object = 1
        self._count = 0
        self._gone: list[int] = []
        self._models: dict[int, Any] = {}
        self._load: Callable[..., Any] | None = None
        self._why = ""
        self._done = False

    def turn(self) -> None:
        """Meet before a pass.

        Raises:
            ElsewhereError: memory ran out on another rank.
            InputError: on rank 0, where another rank cannot go on.
        """
        if (self.follows or self._open) and self._meet(_GO):
            raise self._out_of_step()

    def same(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks; the others do not make it."""
        if self.follows:
            return self._received(self._meet(_GO))
        made = make()
        if self._open:
            self._send(_GO, made)
        return made

    def ran_short(self, error: BaseException) -> None:
        """Memory ran out here, or (`ElsewhereError`) where this rank knows of it: all ranks give up the pass.

        Raises:
            InputError: the others do not come out of it.
        """
        if isinstance(error, ElsewhereError):
            return
        try:
            self._meet(_SHORT, limit=self.patience)
        except ElsewhereError:
            return
        except RuntimeError as waited:
            if "imed out" not in str(waited):
                raise
            self._lost = True
            raise InputError(
                f"out of memory on rank {self.rank} alone, in a pass that the other ranks wait in: set backend.batch_size to fewer rows and run again"
            ) from waited

    def _meet(self, word: int, size: int = 0, limit: timedelta | None = None) -> int:
        """Bring a word and do what the greatest says; returns how many bytes rank 0 sends next."""
        while True:
            told = torch.tensor([word, size])
            self._last = dist.all_reduce(told, dist.ReduceOp.MAX, group=self._words, async_op=True)
            self._last.wait(limit or _AGES)
            said, coming = told.tolist()
            if said == _FAIL:
                self._over()
            if said == _END and self.follows:
                raise _OverError
            if said == _SHORT:
                raise ElsewhereError("out of memory on another rank")
            if said != _CALL or not self.follows:
                return coming
            self._answer(*self._received(coming))

    def _over(self) -> NoReturn:
        """A rank cannot go on with a question, so it is over for all."""
        reasons: list[Any] = [None] * self.size
        dist.all_gather_object(reasons, self._why, group=self._words)
        self._why = ""
        if self.follows:
            raise _OverError
        rank, why = next((rank, why) for rank, why in enumerate(reasons) if why)
        error = _CrashedError(f"rank {rank} failed\n{why}") if "\n" in why else _FailedError(why)
        error.depth = len(self._open)
        raise error

    def _send(self, word: int, value: object) -> None:
        data = torch.frombuffer(bytearray(cloudpickle.dumps(value)), dtype=torch.uint8)
        self._meet(word, len(data))
        self._share(data)

    def _received(self, size: int) -> Any:
        if not size:
            raise self._out_of_step()
        data = torch.empty(size, dtype=torch.uint8)
        self._share(data)
        return cloudpickle.loads(data.numpy().tobytes())

    def _share(self, data: torch.Tensor) -> None:
        self._last = dist.broadcast(data, 0, group=self._words, async_op=True)
        self._last.wait()

    def _out_of_step(self) -> Exception:
        return AssertionError(f"rank {self.rank} is out of step with rank 0")

    # What rank 0 does.

    def number(self) -> int:
        """Of a model to come."""
        self._count += 1
        return self._count

    def bind(self, model: object, number: int) -> None:
        """Where this model goes, the other ranks let theirs of the same number go before they do anything else."""
        weakref.finalize(model, self._gone.append, number)

    @contextmanager
    def asking(self, number: int, what: str, *args: Any) -> Iterator[object]:
        """While open, all ranks work on a question to a model: the others on `model.follow(what, *args)`; `load` makes it there."""
        if self.follows:
            yield None
            return
        gone, self._gone[:] = list(self._gone), []
        self._send(_CALL, (gone, number, what, args))
        self._open.append(question := object())
        try:
            yield question
        except Exception as error:
            if isinstance(error, _Failed) and error.depth == len(self._open):
                self._open.pop()
            else:
                with suppress(_FailedError, _CrashedError):  # it failed there as it did here
                    self._close(self.patience)
            raise
        except GeneratorExit:  # whoever asked wants no more
            self._close()
            raise
        except BaseException:  # interrupted, maybe in the middle of a pass
            self._lost, self._code = True, 130
            raise
        self._close()

    def resume(self, question: object) -> None:
        """Go on with a question after its caller had an answer in hand.

        Raises:
            InputError: another one was asked meanwhile and is open still: the other ranks are at that one.
        """
        if not self.follows and self._open[-1] is not question:
            raise InputError("two streams of a model that lies on several ranks were read in turns: read one to its end, or close it, before the other goes on")

    def _close(self, patience: timedelta | None = None) -> None:
        try:
            if not self._lost:
                self._meet(_END, limit=patience)
        except RuntimeError:
            if patience is None:
                raise
            self._lost = True  # they hang in a pass, and this process has an error to tell
        finally:
            self._open.pop()

    def guard(self, *_: object) -> None:
        """A hook before a model's forward, to refuse one that rank 0 would run by itself.

        Raises:
            InputError: nothing is being asked.
        """
        if not self.follows and not self._open:
            raise InputError(f"this model lies on {self.size} ranks, which only read, moments, logits and generate reach: load it without tensor_parallel")

    def dismiss(self, code: object = 0) -> None:
        """Let the others end, with this exit code."""
        if self._lost:
            self._code = code or self._code
        if self._lost or self._done:
            return
        self._done = True
        with suppress(RuntimeError):  # a rank that is gone: torchrun says so
            self._send(_CALL, ([], 0, "leave", (code,)))
        if code in (0, None):
            dist.destroy_process_group()

    def leave(self) -> None:
        """At the end of this process."""
        self.dismiss()
        if self._lost:
            self._die(self._code)

    def _die(self, code: object) -> NoReturn:
        """End at once: the threads of a meeting that never took place would keep the process."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)

    # What the others do.

    def follow(self, load: Callable[..., Any]) -> NoReturn:
        """Do what rank 0 asks, in silence, and end when it does.

        Args:
            load: makes a model of what rank 0 says, and this team.
        """
        self._load = load
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            self._meet(_GO)
        except RuntimeError as error:
            if "onnection" in str(error):  # rank 0 is gone, and has said why
                raise SystemExit(1) from None
            if not self._why:
                raise
            self._give_up()
        raise self._out_of_step()

    def _give_up(self) -> NoReturn:
        """Say why here: rank 0 cannot be told."""
        print(self._why if "\n" in self._why else f"latentguard: {self._why}", file=sys.stderr)
        self._die(1 if "\n" in self._why else 2)

    def _answer(self, gone: list[int], number: int, what: str, args: tuple) -> None:
        for other in gone:
            self._models.pop(other, None)
        if gone:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if what == "leave":
            if args[0] in (0, None):
                dist.destroy_process_group()
            else:
                with suppress(RuntimeError):  # until rank 0 is gone: torchrun ends all that are left as soon as one ends with an error
                    self._meet(_GO)
            raise SystemExit(*args)
        assert self._load is not None
        try:
            if what == "load":
                self._models[number] = self._load(*args, self)
            else:
                self._models[number].follow(what, *args)
        except _OverError:
            return
        except Exception as error:  # rank 0 has the same one, or is told
            self._why = str(error) if isinstance(error, InputError) else traceback.format_exc()
            if self._lost:
                self._give_up()
        with suppress(_OverError):
            self._meet(_FAIL if self._why else _GO, limit=self.patience if self._why else None)
            raise self._out_of_step()


def count() -> int:
    """Processes of this torchrun; 1 where this process was started by itself."""
    return int(os.environ.get("WORLD_SIZE", "1")) if {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() else 1


_teams: list[Team] = []


def joined() -> bool:
    """Whether this process has met the others."""
    return bool(_teams)


def join() -> Team:
    """The processes of this torchrun.

    Raises:
        InputError: there are more of them than GPUs.
    """
    if not _teams:
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        backend = "gloo"
        if kind is not None and kind.type != "mps":
            here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", count())), torch.accelerator.device_count()
            if here > cards:
                raise InputError(
                    f"torchrun started {here} processes on a machine with {cards} {kind.type} devices: one process a device, --nproc-per-node {cards}"
                )
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
            backend = f"cpu:gloo,{kind.type}:{dist.get_default_backend_for_device(kind.type)}"
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=_LOADING)
        _teams.append(Team())
        if not _teams[0].follows:
            atexit.register(_teams[0].leave)
    return _teams[0]


def led(command: Callable[[], None], load: Callable[..., Any]) -> None:
    """Run a command on rank 0; the others follow it and end with the same exit code."""
    try:
        team = join()
    except InputError as error:
        if os.environ["RANK"] == "0":
            print(f"latentguard: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if team.follows:
        team.follow(load)
    code: object = 1
    try:
        command()
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    finally:
        team.dismiss(code)
