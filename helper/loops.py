"""The training loop: an epoch of the runs that see the same batches, one step of theirs, and testing.

The teacher's outputs are computed once per batch, then every student makes its step.
"""

import functools
import inspect
import itertools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from dataset import VIEWS, Augmentation, Batch, ImageData, Images, Loader, StreamedImages, epoch_seed
from distiller_zoo import Distiller, Progress, Stage, explained
from distiller_zoo.base import ALPHA, GAMMA, NOTHING_TO_TRAIN
from errors import StoppedAtOnce, UserError, count_of
from helper.configuration import Configuration
from helper.distributed import Replica, count_processes, images_per_pass, list_of_all, rank, total_of
from helper.fast import Fast
from helper.log import format_title, of_stage, progress_bar
from helper.metrics import EpochMeter, measure_all
from helper.optim import SCHEDULES, Average, Guard, make_optimizer, parameters_of, step_learning_rate, warm_up
from helper.teacher import Teacher
from models.backbone import Backbone, Output

#: A loss that is scaled below this and whose gradient is still not finite in float16 has no finite gradient.
SMALLEST_SCALE = 2.0**-10
#: Number of epochs between two passes over the held-out images in one epoch, so that no two are alike.
PASSES_APART = 100_000


class Training:
    """One stage of one run: what it trains, its optimizer and its batches, and its parts of a step."""

    def __init__(
        self,
        stage: Stage,
        method: Distiller,
        data: ImageData,
        config: Configuration,
        device: torch.device,
        guard: Guard | None = None,
        average: Average | None = None,
    ):
        _check_stage(stage, config)
        if method.views not in VIEWS:
            raise UserError(
                f"--distill {method.name}: its views are '{method.views}'; they must be one of {', '.join(VIEWS)}"
            )
        self.guard, self.average, self.fast = guard or Guard(), average, Fast.of(config)
        stage = stage._replace(respond=self.fast.passing(method, stage.respond))
        self.stage, self.method, self.config, self.device = stage, method, config, device
        self._compiled = self._compile()
        set_modes(stage, method)
        self.optimizer = make_optimizer(method, config)
        self._is_scaled = config.precision == "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._is_scaled)  # pyright: ignore[reportPrivateImportUsage]
        self.replica = Replica(method, method.uses_everything and _uses_all_weights(method))
        kept, held_out = _split(len(data.train.targets), stage.holdout, config.data_seed)
        self.data, self.augmentation = data, augmentation_of(config, data)
        self.loader = self._loader(kept, config.data_seed, self.augmentation)
        unmixed = self.augmentation.unmixed
        self._held_out = self._loader(held_out, config.data_seed + 1, unmixed) if stage.holdout else None
        self._held_out_batches: Iterator[Batch] | None = None
        self.meter, self._number = EpochMeter(device), torch.zeros((), device=device)  # of the step, for the guard
        self._has_stepped = False  # whether the step before was made, and not skipped
        self._repeats = False  # whether this step changes only what a step before it has made
        #: Of the step's micro-batches: losses, logits, classes.
        self._outcomes: list[tuple[dict[str, Tensor], Tensor | None, Tensor]] = []
        has_tensors = all(isinstance(group["lr"], Tensor) for group in self.optimizer.param_groups)
        waits = not has_tensors or self.guard.most_skipped or self._is_scaled
        self._captured_update = Training._update if waits else self.fast.captured(Training._update)

    def _compile(self) -> Callable[..., tuple[Tensor | None, dict[str, Tensor]]]:
        """The method's call as this run computes it on whole batches: the student's pass and the losses."""
        if count_processes() == 1:
            return self.fast.compiled(self.method.forward)
        # Losses may gather the rows of all processes, which no graph can hold.
        method, stage = self.method, self.stage._replace(respond=self.fast.compiled(self.stage.respond))
        return lambda batch, output, progress, _: method(batch, output, progress, stage)  # not self: it holds the DDP

    def judging_loader(self, images: Images | StreamedImages, subset: Tensor) -> Loader:
        """The same batches of some images in every epoch, for `matching_loss`."""
        config, method = self.config, self.method
        augmentation = None if method.views == "plain" else self.augmentation.unmixed
        sizes = {"min_batch": method.min_batch, "subset": subset}
        loader = Loader(images, self.data, config.batch_size, self.device, augmentation, views=method.views, **sizes)
        if not len(loader):
            kept = count_of(len(subset), "image")
            raise UserError(f"--holdout: {kept} kept, too few for --distill {config.distill}; keep more")
        return loader

    def _loader(self, subset: Tensor, seed: int, augmentation: Augmentation) -> Loader:
        config, method = self.config, self.method
        loader = Loader(
            self.data.train,
            self.data,
            config.batch_size,
            self.device,
            augmentation=augmentation,
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

    def describe_left_out(self) -> str:
        """A line on the images of a last batch that is too short to be trained on; empty where there is none."""
        loader, images = self.loader, len(self.loader.subset)
        if loader.images_shown == images:
            return ""
        return (
            f"each {of_stage(self.stage.name)}epoch leaves out {images - loader.images_shown} of {images} training "
            f"images, others each time: a last batch needs at least {count_of(loader.min_batch, 'image')}"
        )

    @property
    def batch_key(self) -> tuple:
        """Equal for two runs of one process exactly if their batches and micro-batches of an epoch are."""
        config, method = self.config, self.method
        shown = (config.data_seed, method.views, self.stage.holdout, self.loader.min_batch, self.augmentation)
        return (*shown, method.min_batch, config.batch_size, config.accumulate)

    def learning_rate(self, epoch: int, step: int | None = None) -> float:
        """Of a step of an epoch of this stage, the step counted from 0 (None: the last), the epoch from 1."""
        config, steps = self.config, len(self.loader)
        step = steps - 1 if step is None else step
        warm = config.lr_warmup_epochs if self.stage.milestones is None else 0
        return warm_up(epoch, step, steps, warm) * self._scheduled(epoch, step)

    def _scheduled(self, epoch: int, step: int) -> float:
        """The rate without warm-up."""
        config, stage = self.config, self.stage
        base = stage.learning_rate or config.learning_rate
        if stage.milestones is not None:
            return step_learning_rate(base, epoch, stage.milestones, stage.decay_rate)
        return SCHEDULES[config.lr_decay](base, epoch, config, stage.epochs, len(self.loader), step)

    def begin_epoch(self, progress: Progress, epochs_over: int, state: dict | None) -> None:
        """Prepare an epoch of this stage; `state` is where an interrupted one stopped. What is random depends on the
        seed and on the number of finished epochs of the whole run."""
        self.progress, epoch = progress, epochs_over + 1
        if self.fast.compile != "off":
            factor = torch.as_tensor(self.method.schedule(progress), dtype=torch.float32, device=self.device)
            self.progress = progress._replace(factor=factor)
        torch.manual_seed(epoch_seed(self.config.seed, epoch, stream="training"))
        first = state["steps"] if state else 0
        self.go_to(first)
        if self.config.drop_momentum and not first and self._follows_milestone(progress.epoch):
            self.optimizer.state.clear()
        set_modes(self.stage, self.method)
        self.title = format_title(self.stage.name, progress)
        self.guard.begin_epoch(self.title, self.stage.learning_rate is not None)
        self._held_out_batches = None if self._held_out is None else _endless(self._held_out, epoch, first)
        self.meter.begin()
        self._has_stepped = False
        if state:
            self.meter.load_state(state["meter"])
            set_random_state(state["random"])

    def _follows_milestone(self, epochs_over: int) -> bool:
        """Whether the rate falls after this number of epochs of the stage by one of its milestones."""
        has_milestones = self.stage.milestones is not None or self.config.lr_decay == "step"
        return has_milestones and self._scheduled(epochs_over + 1, 0) != self._scheduled(max(epochs_over, 1), 0)

    def parts(self, batch: Batch) -> list[Batch]:
        """The micro-batches of this process's batch; a short batch may have fewer."""
        smallest = _global_size(batch) // count_processes()
        parts = batch.parts(max(min(self.config.accumulate, smallest // self.method.min_batch), 1))
        return [self._laid_out(part) for part in parts]

    def _laid_out(self, batch: Batch) -> Batch:
        original = None if batch.original is None else self.fast.lay_out(batch.original)
        return batch._replace(images=self.fast.lay_out(batch.images), original=original)

    def is_whole(self, part: Batch) -> bool:
        """Whether this is a micro-batch of a batch as all but the last are."""
        return len(part.targets) == images_per_pass(self.config.batch_size, self.config.accumulate)

    def go_to(self, step: int) -> None:
        """Give the guard the number of a step of this epoch, counted from 0, and the optimizer its rate."""
        self._number.fill_(step + 1)
        rate = self.learning_rate(self.progress.epoch + 1, step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)
        self._outcomes = []

    def add_gradients(self, batch: Batch, part: Batch, teacher_output: Output | None, is_last: bool) -> None:
        """Forward and backward of one micro-batch of a batch."""
        if self.stage.before_step is not None:
            held_out = None if self._held_out_batches is None else next(self._held_out_batches)
            held_out = held_out and self._laid_out(held_out)
            self.stage.before_step(self.optimizer, part, teacher_output, held_out, self.progress)
        if not self._outcomes:
            self.guard.begin_step(self.method)
        # Gradients are added over the micro-batches and averaged over the processes; this makes them the batch's mean.
        share = len(part.targets) * count_processes() / _global_size(batch)
        compute = self._compiled if self.is_whole(part) else self.method
        size = part.images.shape[-1]
        with (
            explained(type(self.method), f"its losses in {self.title}", self.method.student, size, teacher_output),
            self.replica.only_adding(not is_last),
            self.fast.naming_compiler(),
        ):
            losses, logits = forward_backward(
                functools.partial(self.replica, compute),
                self.stage,
                part,
                teacher_output,
                self.progress,
                self.fast.autocast(self.device),
                share,
                self.scaler.scale,
            )
        losses = {name: value.detach() for name, value in losses.items()}
        logits = logits.detach() if logits is not None and self.data.labelled else None
        self._outcomes.append((losses, logits, part.classes))
        self._repeats = self.is_whole(part) and self._has_stepped

    def finish_step(self) -> bool:
        """What follows the gradients; returns False where the step was skipped.

        The first step of an epoch makes what the others change: sums of the losses, the optimizer's state, an average.
        """
        update = self._captured_update if self._repeats else Training._update
        with self.fast.naming_compiler():
            self._has_stepped = update(self, self._outcomes)
        if not self._repeats:
            self.fast.hold([*self.guard.kept, *self.meter.kept])
        return self._has_stepped

    @torch.no_grad()
    def _update(self, outcomes: list[tuple[dict[str, Tensor], Tensor | None, Tensor]]) -> bool:
        """Judge, clip, the optimizer's step, its average and the sums of the epoch, a function of tensors but for
        `_may_step`; returns False where the step was skipped."""
        sums: dict[str, Tensor] = {}
        for losses, _, _ in outcomes:
            for name, value in losses.items():
                sums[name] = sums[name] + value if name in sums else value
        trained = parameters_of(self.optimizer)
        if not self._may_step(sums, trained):
            return False
        if self.config.clip_grad:
            nn.utils.clip_grad_norm_(trained, self.config.clip_grad)
        if self._is_scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:  # without torch's hooks around a step, where a graph breaks
            inspect.unwrap(type(self.optimizer).step)(self.optimizer)
        for losses, logits, classes in outcomes:
            self.meter.update(losses, logits, classes)
        if self.average is not None:
            self.average.update(self.method)
        return True

    def _may_step(self, losses: dict[str, Tensor], trained: list[Tensor]) -> bool:
        """Judge the gradients, which are as large as without float16 afterwards; a step that float16 overflowed in
        lowers the scale (Micikevicius et al., ICLR 2018)."""
        if not self._is_scaled:
            return self.guard.judge(losses, trained, self._number)
        self.scaler.unscale_(self.optimizer)
        overflowed = self.scaler.get_scale() >= SMALLEST_SCALE and self.guard.overflowed(losses, trained)
        good = not overflowed and self.guard.judge(losses, trained, self._number)
        if not good:
            self.scaler.update()
        return good

    def state(self, number: int) -> dict:
        """Where the epoch is after its step of this number, to resume from."""
        self.guard.look()
        return {"steps": number, "meter": self.meter.state(), "random": random_state()}

    def end_epoch(self) -> dict[str, float]:
        """The means of the epoch."""
        self.guard.look()
        means = self.meter.summary()
        if not means:
            flag = "--precision float16" if self.guard.overflows else "--max_bad_steps"
            raise UserError(f"{flag}: every step of {self.title} was skipped; the training diverged")
        return means


def _global_size(batch: Batch) -> int:
    """The number of images of a batch in all processes."""
    return batch.global_size or len(batch.targets) * count_processes()


def _check_stage(stage: Stage, config: Configuration) -> None:
    """Raise `UserError` where a stage cannot be trained with these settings."""
    if config.compile == "reduce-overhead" and config.accumulate > 1:
        # The gradients of one micro-batch would be where the next one's graph writes.
        raise UserError("--accumulate: --compile reduce-overhead needs whole batches; take --compile default")
    if stage.before_step is None:
        return
    which = f"stage {stage.name} of --distill {config.distill}"
    if config.precision == "float16":
        raise UserError(f"--precision float16: {which} takes gradients of its own, which are not scaled; take bfloat16")
    if config.optimizer != "sgd" or config.clip_grad:
        flag = "--clip_grad" if config.optimizer == "sgd" else f"--optimizer {config.optimizer}"
        raise UserError(
            f"{flag}: {which} looks ahead of sgd's next step, without clipping; give --optimizer sgd --clip_grad 0, or "
            "choose another method"
        )
    if config.accumulate > 1:
        raise UserError(f"--accumulate: {which} needs whole batches")


def augmentation_of(config: Configuration, data: ImageData) -> Augmentation:
    """The data set's augmentation of the training images, with what a run asks for."""
    off = {"pad": 0, "flip": False, "scale": None} if config.augment == "none" else {}
    return data.augmentation._replace(
        **off,
        policy=config.augment,
        colour_jitter=config.colour_jitter,
        random_erasing=config.random_erasing,
        mixup=config.mixup,
        cutmix=config.cutmix,
        balanced=config.balanced_sampling,
    )


def train_epoch(
    runs: Sequence,
    teacher: Teacher | None,
    finishing: Callable[[], AbstractContextManager],
    after_step: Callable[[int], None],
) -> None:
    """An epoch of runs whose batches are the same; `after_step(number)` is called after every step but the last.

    A run is what helper/run.py calls so. One that fails ends alone, the others continue. Within `finishing()` a step is
    not interrupted by a request to stop; waiting for a batch may be.
    """
    lead = runs[0]
    for run in runs:
        with run.own_turn():
            run.begin_epoch()
    if all(run.error is not None for run in runs):
        return
    first, last = lead.first_step, lead.last_step
    batches = itertools.islice(lead.training.loader.batches(lead.epochs_over + 1, first), last - first)
    bar = progress_bar(batches, lead.training.title, last, first)
    waited_from = time.perf_counter()
    for number, batch in enumerate(bar, first + 1):
        waiting = [run for run in runs if run.error is None]
        for run in waiting:
            run.training.meter.waited(time.perf_counter() - waited_from)
        with finishing():
            step(waiting, batch, teacher, number)
            bar.set_postfix_str(lead.latest, refresh=False)
            if number < last and any(run.error is None for run in runs):
                after_step(number)
        if all(run.error is not None for run in runs):
            return
        waited_from = time.perf_counter()
    _end_epoch(runs, finishing)


def _end_epoch(runs: Sequence, finishing: Callable[[], AbstractContextManager]) -> None:
    """Test and save every run; where a request to stop interrupts a test, the steps of the epoch are saved."""
    try:
        with finishing():
            for run in runs:  # before anybody is tested: their clocks run
                with run.own_turn():
                    run.end_steps()
        for run in runs:
            with run.own_turn():
                run.end_epoch()
    except StoppedAtOnce:
        for run in runs:
            with run.own_turn():
                run.save_untested()
        raise


def step(runs: Sequence, batch: Batch, teacher: Teacher | None, number: int) -> None:
    """One step of every run on one batch, counted from 1."""
    for run in runs:
        run.training.go_to(number - 1)
    compute_step(runs, batch, teacher, number)


def compute_step(runs: Sequence, batch: Batch, teacher: Teacher | None, number: int) -> None:
    """What a device does in a step: the teacher once for each micro-batch, then the students with their losses, their
    optimizers and meters. Rates, schedules and all numbers that it computes are there before it, or stay there."""
    for run in runs:
        run.training.begin_step()
    parts = runs[0].training.parts(batch)
    for part_number, part in enumerate(parts, 1):
        outputs: dict[bool, Output] = {}  # with maps before their last ReLU, or behind it
        for run in [run for run in runs if run.error is None]:
            with run.own_turn():
                training = run.training
                output, preact = None, training.method.teacher_preact
                if teacher is not None and training.stage.reads_teacher:
                    if preact not in outputs:
                        outputs[preact] = teacher.teach(part, training, run.epochs_over + 1, preact)
                    output = outputs[preact]
                training.add_gradients(batch, part, output, part_number == len(parts))
                if part_number == len(parts):
                    run.finish_step(number)


@torch.no_grad()
def evaluate(predict: Callable[[Tensor], Tensor], loader: Loader, title: str = "testing") -> dict[str, float]:
    """What `METRICS` say of `predict(images) -> logits` over a whole split, as test_<name>; the number of unreadable
    images, which are left out, as test_unreadable where there are any.

    Of several processes each goes through its own part of the split, in `loader`. Raises `UserError` where no image of
    the split can be read.
    """
    bar = progress_bar(loader.batches(), title, len(loader))
    here = [(predict(batch.images).float(), batch.targets) for batch in bar]
    found = list_of_all([(logits.cpu(), targets.cpu()) for logits, targets in here])
    if not any(len(targets) for _, targets in found):
        raise UserError(f"--data: {title}: no readable image; repair or remove the files")
    logits, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    values = measure_all(logits, targets)
    measured = {f"test_{name}": value for name, value in values.items() if value is not None}
    (images,) = total_of([len(loader.subset)])
    unreadable = int(images) - len(targets)
    return measured | ({"test_unreadable": unreadable} if unreadable else {})


@torch.no_grad()
def matching_loss(training: Training, teacher: Teacher | None, loader: Loader) -> float:
    """The mean of a stage's losses over the images of a loader, of the method in eval mode.

    Their weights are those of the middle of the run: a method may weigh them differently in every epoch, and epochs are
    compared by it.
    """
    method, stage, total, images = training.method, training.stage, 0.0, 0
    middle = Progress(stage.epochs // 2, stage.epochs)
    for batch in progress_bar(loader.batches(1), "matching loss", len(loader)):
        output = None if teacher is None else teacher(teacher.shown(batch), method.teacher_preact, False)
        with training.fast.autocast(training.device):
            _, losses = method(batch, output, middle, stage)
        total += len(batch.targets) * float(sum(losses.values()))
        images += len(batch.targets)
    return total / images


@torch.no_grad()
def pooled_features(network: Backbone, loader: Loader) -> tuple[Tensor, Tensor]:
    """The pooled vectors (n, D) float32 of a network for the images of a loader, and their classes (n,), on the CPU."""
    features, classes = [], []
    for batch in progress_bar(loader.batches(), "pooled features", len(loader)):
        features.append(network.outputs(batch.images).pooled.float().cpu())
        classes.append(batch.targets.cpu())
    return torch.cat(features), torch.cat(classes)


def random_state() -> dict[str, Tensor]:
    """The state of torch's global generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restore a `random_state`, as far as this machine has the generators."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def set_modes(stage: Stage, method: Distiller) -> None:
    """Put what the stage trains into train mode, with gradients, and everything else of the method into neither.

    The method's own flag is that of a step, in every stage, so that its losses can tell one from a judgement.
    """
    method.requires_grad_(False).eval()
    method.training = True
    for module in stage.trained:
        module.requires_grad_(True).train()


def without_trunk(stage: Stage, method: Distiller) -> Stage:
    """A stage that trains of the student only its classifier; the rest is frozen, its BatchNorms in eval mode.

    Raises `UserError` for a stage that trains a part of the rest by itself.
    """
    networks = [part for part in method.student.modules() if isinstance(part, Backbone)]
    trained = [
        part.get_classifier() if isinstance(part, Backbone) and part in networks else part for part in stage.trained
    ]
    plain = networks[-1]  # within all wrappers
    trunk = {*plain.parameters()} - {*plain.get_classifier().parameters()}
    if trunk & {*nn.ModuleList(trained).parameters()}:
        raise UserError(
            f"--freeze trunk: stage {stage.name} of --distill {method.name} trains the student's feature maps; choose "
            "another method"
        )
    return stage._replace(trained=trained)


def forward_backward(
    compute: Callable[..., tuple[Tensor | None, dict[str, Tensor]]],
    stage: Stage,
    batch: Batch,
    teacher_output: Output | None,
    progress: Progress,
    autocast: AbstractContextManager,
    share: float = 1.0,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Forward of a method, which `compute` calls in the context `autocast`, and backward of its losses times `share`,
    `scale`d.

    Returns (named weighted losses, student's logits); gradients are added to those that there are.
    """
    with autocast:
        logits, losses = compute(batch, teacher_output, progress, stage)
    if not losses:
        raise UserError(NOTHING_TO_TRAIN)
    total = functools.reduce(operator.add, losses.values())
    total = total if share == 1 else share * total
    (scale(total) if scale else total).backward()
    return losses, logits


def _uses_all_weights(method: Distiller) -> bool:
    """Whether some term reads the logits, and no other term is switched off."""
    weights = {flag.argument: getattr(method, flag.argument) for flag in method.flags if flag.is_weight}
    of_logits = [weights.pop(flag.argument) for flag in (GAMMA, ALPHA) if flag.argument in weights]
    return any(of_logits or [True]) and all(weights.values())


def _split(n: int, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sample indices that are trained on, and a random share of them that is held out."""
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
