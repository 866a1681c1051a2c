"""One stage of a run: what it trains, its optimizer, its batches, one epoch after the other."""

import functools
import itertools
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dataset import Batch, ImageData, Loader, epoch_seed
from distiller_zoo import Distiller, Progress, Stage
from errors import UserError
from helper.distributed import Replica, count_processes, images_per_pass, rank
from helper.fast import Fast
from helper.guard import Guard
from helper.metrics import EpochMeter
from helper.reporting import format_losses, progress_bar
from helper.schedule import cosine_learning_rate, step_learning_rate
from models.backbone import Output

#: Number of epochs between two passes over the held-out images in one epoch, so that no two are alike.
PASSES_APART = 100_000
#: What a part of a batch has given: losses by name, the student's logits if there are any, classes.
Outcome = tuple[dict[str, Tensor], Tensor | None, Tensor]


class TeacherRequest(NamedTuple):
    """What a step waits for: the teacher's outputs for a batch."""

    position: tuple[int, int, int]  # epochs of the whole run, steps of this one and parts of the step that are over
    batch_key: tuple  # equal for two runs of one data set exactly if their batches are
    images: Tensor  # (B, 3, H, W)
    preact: bool
    is_whole: bool  # not a short last batch: what is compiled is compiled for this size


class StageTraining:
    """Trains `stage` of a method on the training images; the rest of the method is frozen meanwhile."""

    def __init__(
        self,
        stage: Stage,
        distiller: Distiller,
        data: ImageData,
        config: Namespace,
        device: torch.device,
        guard: Guard | None = None,
    ):
        self.stage, self.distiller, self.config, self.device = stage, distiller, config, device
        self.guard = guard or Guard()
        self.fast = Fast.of(config)
        self.compiled_stage = stage._replace(respond=self.fast.compiled(stage.respond))
        begin(stage, distiller)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in distiller.parameters() if parameter.requires_grad],
            lr=stage.learning_rate or config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=self.fast.fused_optimizer or None,
        )
        self.replica = Replica(distiller)
        if stage.before_step is not None and config.accumulate > 1:
            raise UserError(f"--accumulate: stage {stage.name} of --distill {config.distill} needs whole batches")
        if self.fast.compile == "reduce-overhead" and config.accumulate > 1:
            # The gradients of one part would lie where the next part's graph writes.
            raise UserError("--accumulate: --compile reduce-overhead needs whole batches; take --compile default")
        kept, held_out = _split(len(data.train.targets), stage.holdout, config.data_seed)
        self.loader = self._loader(data, kept, config.data_seed)
        self.held_out = self._loader(data, held_out, config.data_seed + 1) if stage.holdout else None

    def _loader(self, data: ImageData, subset: torch.Tensor, seed: int) -> Loader:
        config, method = self.config, self.distiller
        loader = Loader(
            data.train,
            data,
            config.batch_size,
            self.device,
            augmentation=data.augmentation,
            seed=seed,
            views=method.views,
            min_batch=method.min_batch,
            subset=subset,
            rank=rank(),
            world_size=count_processes(),
        )
        if not len(loader):
            raise UserError(f"--data: {len(subset)} training images are too few for --distill {config.distill}")
        return loader

    def learning_rate(self, epoch: int) -> float:
        """Of an epoch of this stage, counted from 1."""
        config, stage = self.config, self.stage
        base = stage.learning_rate or config.learning_rate
        if stage.milestones is not None:
            return step_learning_rate(base, epoch, stage.milestones, config.lr_decay_rate)
        if config.lr_decay == "cos":
            return cosine_learning_rate(base, epoch - 1, stage.epochs, len(self.loader))
        return step_learning_rate(base, epoch, config.lr_decay_epochs, config.lr_decay_rate)

    def train_epoch(
        self,
        progress: Progress,
        epochs_over: int,
        most_steps: int | None,
        log: Callable[[str], None],
        after_step: Callable[[Callable[[], dict], int], None] = lambda state, number: None,
        state: dict | None = None,
    ) -> Generator[TeacherRequest, Output, tuple[dict[str, float], int]]:
        """One pass over the training images, of at most so many steps -> (means of the epoch, steps).

        Before each step that reads the teacher it yields a request, and is sent the teacher's outputs.
        `epochs_over` counts the epochs of the whole run; what is random depends on it and the seed alone. After every
        step but the last `after_step` is called with a function that returns the epoch's state, and the number of
        steps; `state` is such a state, to go on from.
        """
        epoch, over = epochs_over + 1, state["steps"] if state else 0
        torch.manual_seed(epoch_seed(self.config.seed, epoch))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(progress.epoch + 1)
        begin(self.stage, self.distiller)
        title = format_title(self.stage.name, progress)
        self.guard.begin_epoch(title, self.stage.learning_rate is not None)
        steps = max(over, len(self.loader) if most_steps is None else min(len(self.loader), most_steps))
        batches = itertools.islice(self.loader.batches(epoch, over), steps - over)
        held_out = None if self.held_out is None else _endless(self.held_out, epoch, over)
        meter = EpochMeter(self.device)
        if state:
            meter.load_state(state["meter"])
            set_random_state(state["random"])
        bar = progress_bar(meter.timed(batches), title, steps, over)
        for number, batch in enumerate(bar, over + 1):
            given = yield from self._step(batch, held_out, (epochs_over, number - 1), progress)
            if given is None:
                log(f"{title} step {number}/{steps} skipped: a number in it was not finite")
            for losses, logits, targets in given or ():
                meter.update(losses, logits, targets)
            if number % self.config.print_freq == 0 and meter.has_images:
                self.guard.look()
                means = meter.summary()
                bar.set_postfix_str(format_losses(means))
                log(f"{title} step {number}/{steps}: {format_losses(means)}")
            if number < steps:
                after_step(functools.partial(self._state, number, meter), number)
        if self.stage.after_epoch is not None:
            self.stage.after_epoch(progress)
        self.guard.look()
        if not meter.has_images:
            raise UserError(f"--max_bad_steps: every step of {title} was skipped; the training diverged")
        return meter.summary(), steps

    def _state(self, number: int, meter: EpochMeter) -> dict:
        """Where the epoch stands after its step of this number."""
        self.guard.look()
        return {"steps": number, "meter": meter.state(), "random": random_state()}

    def _request(self, position: tuple[int, int, int], epoch: int, part: Batch) -> TeacherRequest:
        config, method = self.config, self.distiller
        drawn_by = (config.data_seed, epoch, method.views, self.stage.holdout)
        batch_key = (*drawn_by, config.batch_size, config.accumulate, *position[1:])
        return TeacherRequest(position, batch_key, part.images, method.teacher_preact, self._is_whole(part))

    def _step(
        self, batch: Batch, held_out: Iterator[Batch] | None, position: tuple[int, int], progress: Progress
    ) -> Generator[TeacherRequest, Output, list[Outcome] | None]:
        """One step -> what each part of the batch has given; None where the step was skipped."""
        self.optimizer.zero_grad(set_to_none=True)
        parts, outcomes = self._parts(batch), []
        for number, part in enumerate(map(self._lay_out, parts)):
            teacher_output = None
            if self.stage.needs_teacher:
                teacher_output = yield self._request((*position, number), position[0] + 1, part)
            if self.stage.before_step is not None:
                held_out_batch = None if held_out is None else self._lay_out(next(held_out))
                self.stage.before_step(self.optimizer, part, teacher_output, held_out_batch, progress)
            if number == 0:
                self.guard.begin_step(self.distiller)
            # Gradients are added over the parts and averaged over the processes; this makes them the batch's mean.
            share = len(part.targets) * count_processes() / (batch.whole or len(batch.targets) * count_processes())
            autocast = self.fast.autocast(self.device)
            stage = self.compiled_stage if self._is_whole(part) else self.stage
            with self.replica.only_adding(number + 1 < len(parts)), self.fast.naming_compiler():
                losses, logits = add_gradients(self.replica, stage, part, teacher_output, progress, autocast, share)
            outcomes.append((losses, logits, part.targets))
        self.replica.finish_gradients()
        if not self.guard.judge(_sums(outcomes), self.optimizer.param_groups[0]["params"], position[1] + 1):
            return None
        self.optimizer.step()
        return outcomes

    def _parts(self, batch: Batch) -> list[Batch]:
        """The parts of this process's batch that are computed one after the other; a short batch may have fewer."""
        smallest = (batch.whole or len(batch.targets) * count_processes()) // count_processes()
        return batch.parts(max(min(self.config.accumulate, smallest // self.distiller.min_batch), 1))

    def _is_whole(self, part: Batch) -> bool:
        """Whether this is a part of a batch as all but the last are."""
        return len(part.targets) == images_per_pass(self.config)

    def _lay_out(self, batch: Batch) -> Batch:
        return batch._replace(images=self.fast.lay_out(batch.images))


def random_state() -> dict[str, Tensor]:
    """The state of torch's global generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Take up a `random_state`, as far as this machine has the generators."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def begin(stage: Stage, distiller: Distiller) -> None:
    """Put what the stage trains into train mode, with gradients, and everything else of the method into neither."""
    distiller.requires_grad_(False).eval()
    for module in stage.trained:
        module.requires_grad_(True).train()


def train_step(
    distiller: Distiller,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    teacher_output: Output | None,
    progress: Progress,
    autocast: AbstractContextManager | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Forward (in the context `autocast`, if any), backward, step -> (named weighted losses, student's logits)."""
    optimizer.zero_grad(set_to_none=True)
    losses, logits = add_gradients(distiller, stage, batch, teacher_output, progress, autocast)
    optimizer.step()
    return losses, logits


def add_gradients(
    distiller: Callable[..., tuple[Tensor | None, dict[str, Tensor]]],
    stage: Stage,
    batch: Batch,
    teacher_output: Output | None,
    progress: Progress,
    autocast: AbstractContextManager | None = None,
    share: float = 1.0,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Forward and backward of the losses times `share` -> (named weighted losses, student's logits)."""
    with autocast or nullcontext():
        logits, losses = distiller(batch, teacher_output, progress, stage)
    if not losses:
        raise UserError("every loss weight is 0: there is nothing to train; set -r, -a or -b")
    total = sum(losses.values())
    (total if share == 1 else share * total).backward()
    return losses, logits


def _sums(outcomes: list[Outcome]) -> dict[str, Tensor]:
    """The losses of all parts of a batch by name, added up: one that is not finite shows."""
    sums: dict[str, Tensor] = {}
    for losses, _, _ in outcomes:
        sums |= {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
    return sums


def format_title(stage: str, progress: Progress) -> str:
    """The name of an epoch on a progress bar and in the log."""
    prefix = "" if stage == "main" else f"{stage} "
    return f"{prefix}epoch {progress.epoch + 1}/{progress.epochs}"


def _split(n: int, holdout: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample indices that are trained on, and a random share of them that is kept apart."""
    if not holdout:
        return torch.arange(n), torch.arange(0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[round(n * holdout) :], order[: round(n * holdout)]


def _endless(loader: Loader, epoch: int, first: int) -> Iterator[Batch]:
    """Batches of an epoch from the one with number `first` on, in passes that are shuffled and cropped anew."""
    passes_over, first = divmod(first, len(loader))
    for number in itertools.count(passes_over):
        yield from loader.batches(epoch + number * PASSES_APART, first)
        first = 0
