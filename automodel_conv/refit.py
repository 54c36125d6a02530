"""The public class that moves weights from the ranks of a trainer straight into the parameters of an engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from automodel_conv.destinations.model import refuse_shared_memory
from automodel_conv.distributed.collectives import all_or_raise, failures_on
from automodel_conv.doors import door
from automodel_conv.errors import RefitError, UnsupportedError, kind_of, listing, message, rate_text, size_text
from automodel_conv.execution.buffers import checked_buffer
from automodel_conv.refitting.agreement import Own, agree, publish
from automodel_conv.refitting.costs import RefitForecast, RefitReport
from automodel_conv.refitting.engine import engine_of
from automodel_conv.refitting.held import own_experts, trained
from automodel_conv.refitting.planned import bucket_for, incoming, planned
from automodel_conv.refitting.running import Prepared, Progress
from automodel_conv.refitting.sides import Sides, refuse_changes
from automodel_conv.types import LayoutName
from automodel_conv.upstream.given_rules import given_rules
from automodel_conv.upstream.wrappers import plain_model

_LOG = logging.getLogger(__name__)

DEFAULT_BUCKET_BYTES = 256 << 20


class Refit:
    """Moves the weights of a trainer into the parameters of an engine, as often as it is called.

    Ranks with ``sends=True`` hold a module of the trainer, the others one of the engine. All ranks of ``group``
    construct the object and call it. The construction plans: each element of each parameter of the engine is written
    exactly once, and is sent once, from a rank that has it, straight to the rank that needs it. Ranks of the trainer
    that hold the same elements share the sending. Calls plan nothing.

    The names of the two sides meet in the names of the checkpoint that ``save_checkpoint`` would write for the trainer.
    A refit therefore gives the engine the bytes that a load of that checkpoint would give it. Parameters and persistent
    buffers move. What the engine computes from its parameters after a load must be computed again after a refit.

    Bytes go through ``torch.distributed``, whose backend must support the device of the tensors: gloo for the CPU, NCCL
    for GPUs. They are packed into buckets on the sender, cast to the dtypes of the engine there, and unpacked on the
    receiver straight into place, while the next bucket is under way.

    Args:
        module: on a rank that sends, the trainer's module: its tensors are plain, or DTensors with any placements, and
            it may have only some layers of the model. Otherwise the module of the engine, whose tensors are filled in
            place.
        sends: whether ``module`` is the trainer's.
        group: process group of all ranks of the refit. None: the default group.
        rules: rule objects of transformers between the names of ``module`` and those of the checkpoint. None: the
            module's own rules. ``[]``: the names are equal.
        layout: layout of the routed experts in ``module``, such as "transformers", "nemo", "gpt_oss", "vllm", or one
            that an engine makes for a kernel. None: the layout of the module itself.
        loader: on a rank of the engine, the code that loads a checkpoint into ``module``, such as its
            ``load_weights``. It is traced once, with the names of the checkpoint; see ``trace_loader``. It replaces
            ``rules`` and ``layout``.
        experts: numbers of the experts that plain tensors of grouped experts hold on this rank, in their order, such as
            ``range(8, 16)``. None: all experts; ranks whose values then differ are refused, so construct the object
            after the trainer has its first weights.
        engine: on a rank that sends, a module of the engine that the same process fills; ``loader`` or ``layout`` then
            belong to it, and the trainer's module has the layout of its own. What stays in the process is copied
            without a message.
        bucket_bytes: most bytes of a bucket, the same on all ranks. Each rank has up to two buckets.

    Raises:
        NameProblems: a parameter is on one side only, or its shapes differ; lists all of them.
        CoverageError: the trainer's ranks do not hold all of a tensor, or hold it in different divisions.
        UnsupportedError: no rank sends or none receives, something other than copies fills a parameter, a tensor has no
            data, or an argument does not fit.
        ConversionError: two tensors of the engine share memory.
        RankError: another rank failed, or no longer responds. All ranks raise an error.

    Example:
        One process that holds both sides:

        >>> import torch
        >>> import torch.distributed as dist
        >>> from automodel_conv import Refit
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> trainer, engine = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).bfloat16()
        >>> refit = Refit(trainer, sends=True, engine=engine)
        >>> report = refit()
        >>> dist.destroy_process_group()
        >>> torch.equal(engine.weight, trainer.weight.bfloat16()), report.bytes_sent
        (True, 0)
    """

    @door("planning a refit")
    def __init__(
        self,
        module: nn.Module,
        *,
        sends: bool,
        group: Any = None,
        rules: Iterable[Any] | None = None,
        layout: LayoutName | None = None,
        loader: Callable[[Any], Any] | None = None,
        experts: Sequence[int] | None = None,
        engine: nn.Module | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ):
        self._group = _checked_group(group)
        self._groups = [self._group]
        what, rank = "planning a refit", dist.get_rank(self._group)
        with all_or_raise(self._groups, what):
            rules = given_rules(rules)
            _check_modules(module, engine, bucket_bytes)
            _check_arguments(sends, engine, loader, rules, layout)
            module = module if loader is not None and not sends else plain_model(module)
            engine = engine if loader is not None or engine is None else plain_model(engine)
            self._engine = engine if sends else module
            runs = own_experts(experts)
            self._device = _device_of(module)
            _check_backend(self._group, self._device)
            num_experts = max((first + count for first, count in runs or ()), default=0)
            own = Own(rank, bool(sends), self._engine is not None, bucket_bytes, self._device.type, num_experts)
        roles, num_experts = agree(self._groups, own)
        with all_or_raise(self._groups, what):
            bucket = bucket_for(bucket_bytes, roles)
            own_layout = layout if engine is None else None
            mine = trained(module, rules, own_layout, experts, num_experts) if sends else None
        published = publish(self._groups, rank, mine, bucket.least_bytes)
        with all_or_raise(self._groups, what):
            taken = filled = None
            if self._engine is not None:
                own_numbers = None if sends else experts
                filled = engine_of(published, self._engine, rules, layout, loader, own_numbers, num_experts)
                taken = incoming(published, filled, rank, bucket.unit_bytes)
                buffers = {target.name: filled.held.local(target.name) for target in taken.plan.targets}
                for target in taken.plan.targets:
                    checked_buffer(target, buffers)
                refuse_shared_memory(buffers)
            self._sides = Sides(
                module if sends else None,
                self._engine,
                loader,
                () if mine is None else tuple(mine.held.tensors),
                () if filled is None else tuple(filled.held.tensors),
                () if taken is None else tuple(target.name for target in taken.plan.targets),
            )
            self._specs = self._sides.tensors().specs
        self._broken: frozenset[str] = frozenset()
        self._work, self._forecast = planned(self._group, rank, roles, bucket, taken, self._device)
        self._unchanged = () if filled is None else filled.unchanged
        self._prepared: Prepared | None = None
        self._places: list[Any] = []
        _LOG.info("planned a refit: %r", self)

    def __repr__(self) -> str:
        sent, received = size_text(self._work.bytes_sent), size_text(self._work.bytes_received)
        rank = dist.get_rank(self._group) if dist.is_initialized() else "?"
        return f"<Refit on rank {rank}: sends {sent} and receives {received}; forecast() shows all ranks>"

    def forecast(self) -> RefitForecast:
        """Return what each call costs: bytes by link, messages, rounds and memory.

        Returns:
            A ``RefitForecast``, the same on all ranks.

        Example:
            >>> import torch
            >>> import torch.distributed as dist
            >>> from automodel_conv import Refit
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> forecast = Refit(torch.nn.Linear(3, 2), sends=True, engine=torch.nn.Linear(3, 2)).forecast()
            >>> dist.destroy_process_group()
            >>> forecast.links, forecast.rounds
            ({}, 0)
        """
        return self._forecast

    def __call__(self) -> RefitReport:
        """Move the weights that the trainer has now; all ranks of the group must call this.

        Returns:
            A ``RefitReport`` of this rank: bytes, messages, seconds and memory.

        Raises:
            RefitError: a rank failed or no longer responds. All ranks raise it. On a rank of the engine it states which
                parameters are new, which are old and which are broken.
        """
        began = time.perf_counter()
        progress = Progress()
        for step in (self._prepare, self._move):
            error = _error_of(step, progress)
            failures, lost = failures_on(self._groups, error)
            if failures or lost:
                got_wrong = not lost and any(failures_on(self._groups, error if progress.sent_wrong else None))
                raise self._failed([*failures, *lost], progress, got_wrong) from error
        self._broken = frozenset()
        report = RefitReport(
            self._work.bytes_sent,
            self._work.bytes_received,
            self._work.message_count,
            time.perf_counter() - began,
            self._work.buffer_bytes,
            self._forecast.left_out,
            self._unchanged,
        )
        _LOG.debug("refit in %.3f s, %s", report.seconds, rate_text(report.gb_per_s))
        return report

    def release(self) -> None:
        """Free the buckets of this rank, and forget the tensors of its modules.

        The next call allocates the buckets again. Until then nothing of this object keeps the memory of a module alive,
        so that a trainer can be moved to the host between two refits. Ranks need not call this together.

        Example:
            >>> import torch
            >>> import torch.distributed as dist
            >>> from automodel_conv import Refit
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> refit = Refit(torch.nn.Linear(3, 2), sends=True, engine=torch.nn.Linear(3, 2))
            >>> report = refit()
            >>> refit.release()
            >>> dist.destroy_process_group()
        """
        self._prepared = None

    def _prepare(self, progress: Progress) -> None:
        """Prepare the copies, unless all tensors are where they were."""
        tensors = self._sides.tensors()
        refuse_changes(self._specs, tensors)
        if self._prepared is None or self._places != tensors.places:
            self._prepared = None  # frees the buckets
            self._prepared, self._places = Prepared(self._work, *tensors, self._device), tensors.places

    def _move(self, progress: Progress) -> None:
        """Run what is prepared."""
        if self._prepared is not None:
            self._prepared.run(self._group, progress)

    def _failed(self, failures: Sequence[str], progress: Progress, got_wrong: bool) -> RefitError:
        new, old, broken = self._work.states(self._sides.filled, progress, got_wrong, self._broken)
        self._broken = frozenset((*new, *broken))
        lines = [] if self._engine is None else [f"{len(new)} parameters are new, {len(old)} old, {len(broken)} broken"]
        return RefitError(
            message(
                "the refit was not finished",
                found="\n" + listing([*failures, *lines]),
                do="if a rank has ended, build new groups and a new Refit; a finished refit makes all parameters new",
            ),
            new=new,
            old=old,
            broken=broken,
        )


def _checked_group(group: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise UnsupportedError(
            message("there is no process group", do="call torch.distributed.init_process_group on all ranks first")
        )
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise UnsupportedError(message("this rank is not in group=", do="construct it on the ranks of the group"))
    return group


def _check_modules(module: object, engine: object, bucket_bytes: object) -> None:
    for name, given in (("the first argument", module), ("engine=", engine)):
        if not isinstance(given, nn.Module) and not (given is None and name == "engine="):
            raise UnsupportedError(
                message(f"{name} is not a module", expected="a torch.nn.Module", found=kind_of(given))
            )
    if not isinstance(bucket_bytes, int):
        raise UnsupportedError(
            message("bucket_bytes= is not a size", expected="a number of bytes, as int", found=repr(bucket_bytes))
        )


def _check_arguments(sends: bool, engine: nn.Module | None, loader: object, rules: object, layout: str | None) -> None:
    if engine is not None and not sends:
        raise UnsupportedError(
            message("engine= is for ranks that send", do="pass the engine's module as the first argument")
        )
    if loader is not None and sends and engine is None:
        raise UnsupportedError(message("loader= is for ranks of the engine", do="leave {loader} out where sends=True"))
    if loader is not None and (layout is not None or (rules is not None and not sends)):
        raise UnsupportedError(
            message(
                "loader= takes the names of the checkpoint itself", do="leave {layout} and {rules} out with {loader}"
            )
        )


def _device_of(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _check_backend(group: Any, device: torch.device) -> None:
    """Raise UnsupportedError if the backend of a group cannot send tensors of a device from rank to rank."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    backend = backends.get(device.type)
    if device.type != "meta" and (backend is None or (backend == "gloo" and device.type != "cpu")):
        raise UnsupportedError(
            message(
                "the process group cannot send from the device of the tensors",
                expected="gloo for cpu, nccl for cuda",
                found=f"{backend} for {device.type}",
                do='pass a group= that can, such as torch.distributed.new_group(backend="nccl")',
            )
        )


def _error_of(step: Callable[[Progress], None], progress: Progress) -> Exception | None:
    """Run a step, and return the error that all ranks have to learn of."""
    try:
        step(progress)
    except Exception as error:
        return error
    return None
