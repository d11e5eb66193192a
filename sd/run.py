"""A run: opened from its settings, in a folder, with what its parts share; and how it goes on.

`load` makes what can be checked before anything is written: the model, prompts and scorers.
`open_run` adds the folder, the labeller, the optimiser and the checkpoint.
"""

import itertools
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from sd import UserError, figures, files, label_files, metrics, options, report
from sd.annotate import AnnotationServer, listen, parse_public_url
from sd.evaluation import Evaluator, compare_with_initial, keep_images
from sd.labellers import PeopleLabeller, ScorerLabeller, open_page, result_paths
from sd.labels import label_row, pairs_from_labels, scores_from_labels
from sd.losses import step_losses
from sd.metrics import EvalResult
from sd.model import Batch, Model, RunningAverage, load_model, make_accelerator, sample
from sd.options import Settings
from sd.pipeline import ddim_options, loading_options
from sd.prompts import load_prompts
from sd.replay import (
    LabelledBatch,
    LatentGroup,
    ReplayBuffer,
    encode_groups,
    load_groups,
    parts_of_pass,
)
from sd.scorers import load_scorers
from sd.seeds import RandomPurpose, seeded_generator

ROUNDING_IMAGES = 4  # on which half precision is compared with float32
MAX_SKIPPED = 10  # updates in a row whose gradient overflowed
LIBRARIES = ("d3po", "torch", "diffusers", "transformers", "peft", "accelerate")
# What autograd holds in SD 1.5's UNet, in maps of its first block, by gradient checkpointing
ACTIVATION_MAPS = {False: 362, True: 90}


# What can be checked before anything is written


class Setup(NamedTuple):
    """What a run is made of."""

    args: Settings
    accelerator: Accelerator
    model: Model
    evaluator: Evaluator
    prompts: list[str]  # all that have a number
    label_groups: list[label_files.Group] | list[LatentGroup]  # of --labels
    bar: tqdm


def load(args: Settings) -> Setup:
    """Load the model and all else that settings name. Raises UserError where it cannot."""
    accelerator = make_accelerator(args.precision, args.device)
    check_batches(args, accelerator.num_processes)
    check_page(args, accelerator)
    bar = make_bar(disable=not is_shown(args, accelerator))
    groups = read_label_groups(args, accelerator)
    of_labels = list(dict.fromkeys(group.prompt for group in groups))
    prompts = read_prompts(args.prompts, "--prompts") or of_labels
    eval_prompts = read_prompts(args.eval_prompts, "--eval-prompts") or prompts
    models = {"clip": args.clip_model, "head": args.aesthetic_head, "device": accelerator.device}
    by_scorer = args.objective and not args.by_people
    scorers = load_scorers(args.objective, prompts, **models) if by_scorer else []
    watch = load_scorers(args.watch, prompts, **models) if args.watch else []
    if len(watch) > 1:
        raise UserError(f"--watch {args.watch}: give one scorer, not several")
    numbered = [*prompts, *sorted({*of_labels, *eval_prompts} - {*prompts})]
    model = load_model(
        args,
        prompts,
        accelerator,
        numbered=numbered,
        eval_prompts=eval_prompts,
        on_call=bar.update,
    )
    if args.beta is None:
        args = replace(args, beta=options.PAPER_BETA / math.prod(model.latent_shape))
    evaluator = Evaluator(model, args, scorers, watch=watch)
    return Setup(args, accelerator, model, evaluator, numbered, groups, bar)


def read_prompts(prompts: str | list | None, flag: str) -> list[str]:
    """Prompts that were handed in as a list, or those of a file or of App. C; none for None."""
    try:
        return load_prompts(prompts, flag) if isinstance(prompts, str) else prompts or []
    except ValueError as error:
        raise UserError(str(error)) from error


def make_bar(*, disable: bool) -> tqdm:
    """A bar of the network's passes, whose number is not known before."""
    layout = "{desc}, network passes: {n_fmt} [{elapsed}, {rate_noinv_fmt}]"
    return tqdm(
        desc="Evaluation",
        unit="",
        bar_format=layout,
        mininterval=0.5,
        delay=0.1,
        disable=disable,
    )


def is_shown(args: Settings, accelerator: Accelerator) -> bool:
    return accelerator.is_main_process and not args.dry_run


def read_label_groups(args: Settings, accelerator: Accelerator) -> list:
    """The groups of --labels; in an earlier run those that it has encoded."""
    if not args.labels:
        return []
    folder = args.resume or args.evaluate
    if folder and (groups := load_groups(folder / "latents", 0)):
        return groups
    label_file = read_labels(args)
    accelerator.print(label_file.describe())
    return label_file.groups


def read_labels(args: Settings, cache: Path | None = None) -> label_files.LabelFile:
    images = Path(args.images) if args.images else None
    return label_files.read_label_file(Path(args.labels), images, cache)


def check_batches(args: Settings, processes: int) -> None:
    """Raise UserError where the groups of an epoch do not fill whole batches on all processes."""
    across = args.batch_size * processes
    if args.objective and args.prompts_per_epoch % across:
        message = f"give a multiple of {across}, as many as are trained on together (--batch-size)"
        raise UserError(f"--prompts-per-epoch {args.prompts_per_epoch}: {message}")


def check_page(args: Settings, accelerator: Accelerator) -> None:
    """Raise UserError where no page can open, before anything is sampled."""
    if args.public_url:
        parse_public_url(args.public_url)
    new = not (args.resume or args.evaluate or args.labeller)
    if new and args.by_people and accelerator.is_main_process:
        listen(args.port).close()


def describe(setup: Setup) -> str:
    """The start-up lines of a run: model, prompts, labels, what beta means, and memory."""
    args, model = setup.args, setup.model
    row, device = args.row(), str(model.network.device)
    if not torch.cuda.is_available():
        device += ", as there is no CUDA GPU"
    D, weights = math.prod(model.latent_shape), sum(weight.numel() for weight in model.lora)
    first = " ".join(model.prompts[0].split())
    lines = [
        f"{row['model']} on {device}; {args.precision}; LoRA rank {args.lora_rank}: "
        f"{weights / 1e6:.2f} M weights.",
        f"Prompts of {row['prompts'] or row['labels']}: {len(model.prompts)}, first: {first:.80}",
    ]
    if setup.label_groups:
        lines.append(f"{len(setup.label_groups)} groups of --labels are trained on first.")
    if args.evaluate:
        lines.append(
            f"Initial and tuned model draw {args.eval_images} images from the same starting noise, "
            f"compared by {row['objective']}; then at the pipeline's own settings."
        )
    elif args.objective:
        images = args.prompts_per_epoch * args.images_per_prompt
        labels = f"{labels_of_epoch(args)} {'questions' if args.by_people else 'labels'}"
        again = f"; earlier batches trained on again: {args.replay}" if args.replay else ""
        groups = metrics.count(args.prompts_per_epoch, "group")
        epoch = "A round" if args.by_people else "An epoch"
        lines.append(
            f"Objective {row['objective']}. {epoch}: {images} images in {groups}, {labels}{again}."
        )
    if not args.evaluate:
        lines += [
            options.METHOD if args.loss == "chain" else f"Method: --loss {args.loss}.",
            f"Its beta: {args.beta:.3g} per nat of a log-ratio summed over {D:,} latent elements "
            f"({args.beta * D:.3g} for their mean, as in the released code).",
        ]
    return "\n".join([*lines, f"Memory: about {memory_gb(model, args):.1f} GB."])


def labels_of_epoch(args: Settings) -> int:
    """Questions about the groups of an epoch, or comparisons of their scores."""
    K = args.images_per_prompt
    of_group = {"tags": 1, "human": 1 if K == 2 else K}.get(args.row()["objective"])
    return args.prompts_per_epoch * (of_group or K * (K - 1) // 2)


def memory_gb(model: Model, args: Settings) -> float:
    """Weights, optimizer, and of Stable Diffusion what autograd holds, GB."""
    parts = (model.network, model.pipe.vae)
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    memory = weights + 12 * sum(weight.numel() for weight in model.lora)
    if type(model.pipe).__name__ == "StableDiffusionPipeline":
        first_map = math.prod(model.latent_shape[1:]) * model.network.config.block_out_channels[0]
        rows = args.batch_size * args.images_per_prompt * model.conditioning.halves
        maps = ACTIVATION_MAPS[args.gradient_checkpointing] * rows
        memory += maps * first_map * model.network.dtype.itemsize
    return memory / 1e9


# The run


class Epoch(NamedTuple):
    """What an epoch did, on all processes."""

    number: int
    rows: list[dict]  # labels, as labels.jsonl has them
    losses: list[float]
    log_ratios: list[metrics.LogRatios]  # of the policy before it trained on each batch
    sampled: bool  # the policy sampled its images; else they are of --labels
    skipped: int  # updates whose gradient overflowed
    seconds_sample: float
    seconds_train: float


@dataclass
class Run:
    """What the parts of a run share, and the epoch in hand."""

    args: Settings
    accelerator: Accelerator
    model: Model
    evaluator: Evaluator
    labeller: Any
    page: AnnotationServer | None
    optimizer: torch.optim.Optimizer
    average: RunningAverage
    replay: ReplayBuffer
    folder: Path
    bar: tqdm
    writer: Executor = field(default_factory=lambda: ThreadPoolExecutor(1))  # of images
    parts_of_pass: int = 1  # epochs of a pass over the images of --labels
    label_epochs: int = 0  # the first ones, which train on these
    epochs_done: int = 0
    initial: EvalResult | None = None  # of the model before training

    # The epoch in hand
    epoch: int = 0
    batches: int = 0  # trained on
    rows: list[dict] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    log_ratios: list[metrics.LogRatios] = field(default_factory=list)
    images_in_writing: list[Future] = field(default_factory=list)
    overflows: list[bool] = field(default_factory=list)
    last_overflows: list[bool] = field(default_factory=list)  # of earlier epochs too
    losses_left: int = 0  # of the batch in hand
    started: float = 0.0
    seconds_sample: float = 0.0

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def word(self) -> str:
        return metrics.epoch_word(self.args.objective).capitalize()

    @property
    def last_epoch(self) -> int:
        return self.label_epochs + (self.args.epochs if self.args.objective else 0)

    @property
    def counted_epochs(self) -> int:
        """Epochs that are done, as --epochs counts them: passes where there are labels alone."""
        if not self.args.objective:
            return self.epochs_done // self.parts_of_pass
        return max(self.epochs_done - self.label_epochs, 0)

    # The parts of an epoch, in their order

    def begin(self, epoch: int) -> None:
        self.epoch, self.batches = epoch, 0
        self.rows, self.losses, self.log_ratios, self.overflows = [], [], [], []
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.args, epoch, self.last_epoch)
        self.bar.reset()
        self.bar.set_description_str(f"{self.word} {epoch} of {self.last_epoch}", refresh=False)
        self.started = time.perf_counter()

    def sample(self, epoch: int) -> list[Batch]:
        """This process's batches of an epoch: groups of K images from one prompt and one x_T."""
        args, accelerator, model = self.args, self.accelerator, self.model
        size, K, N = args.batch_size, args.images_per_prompt, args.prompts_per_epoch
        random = seeded_generator(args.seed, RandomPurpose.PROMPTS, epoch)
        prompts = torch.randint(len(model.prompts), (N,), generator=random)
        firsts = range(accelerator.process_index * size, N, accelerator.num_processes * size)
        groups = [group for first in firsts for group in range(first, first + size)]
        training = RandomPurpose.TRAINING
        batch = sample(
            model,
            model.sampler,
            prompts[groups],
            images_per_prompt=K,
            generators=[
                seeded_generator(args.seed, training, epoch, group, k)
                for group in groups
                for k in range(K)
            ],
            trajectory=self.replay.kept_trajectory(epoch, firsts),
        )
        batches = batch._replace(files=image_files(epoch, groups, K)).split(size)
        for first, of_first in zip(firsts, batches, strict=True):
            self.replay.keep_batch(epoch, first, of_first.trajectory)
        self.seconds_sample = time.perf_counter() - self.started
        return batches

    def label(self, batches: list[Batch], epoch: int) -> list[LabelledBatch] | None:
        """Batches with their labels, which are in labels.jsonl when this returns.

        Images that no one looks at are saved beside the training, until `finish`.
        """
        labels = self.labeller.label(batches, epoch)
        if labels is None:
            return None
        pairs = list(zip(batches, labels, strict=True))
        rows = [
            label_row(label, epoch, prompts=batch.prompts, images=batch.files)
            for batch, of_batch in pairs
            for label in of_batch
        ]
        self.rows = gather_object(rows)
        if self.page is None:
            self.images_in_writing = [
                self.writer.submit(files.save_image, self.folder / file, image)
                for batch in batches
                for file, image in zip(batch.files, batch.images, strict=True)
            ]
            if self.is_main:
                files.append(self.folder / "labels.jsonl", self.rows)
        self.started = time.perf_counter()
        labelled = [
            LabelledBatch(
                batch.trajectory,
                batch.cond,
                pairs_from_labels(of_batch),
                scores=scores_from_labels(of_batch, batch.cond),
            )
            for batch, of_batch in pairs
        ]
        self.replay.add(epoch, labelled, self.args.images_per_prompt)
        return labelled

    def reference_log_prob(self, batch: LabelledBatch) -> Tensor:
        """Log-probs (T, B) of the reference: the initial model, or the one that sampled."""
        if self.args.reference == "previous":
            return batch.trajectory.log_prob
        return self.model.log_prob(self.model.reference, batch)

    def measure(self, batch: LabelledBatch, ref_log_prob: Tensor) -> None:
        """Note the log-ratios of the policy to the initial model, before it trains on a batch."""
        model, now, initial = self.model, batch.trajectory.log_prob, ref_log_prob
        if not batch.sampled:
            now = model.log_prob(model.sampler, batch)
        if self.args.reference == "previous":
            initial = model.log_prob(model.reference, batch)
        steps = self.args.trained_steps
        self.log_ratios.append(metrics.log_ratios(now - initial, batch.pairs, steps))

    def step_losses(self, batch: LabelledBatch, ref_log_prob: Tensor) -> Iterator[Tensor]:
        """The losses of Alg. 1 lines 24-33 on a batch, step by step in random order.

        Their gradients are those of the mean over the pairs of all processes, or over the chains
        where a method sees scores; a process without pairs takes part with weight 0.
        """
        args, pairs = self.args, batch.pairs
        random = seeded_generator(args.seed, RandomPurpose.STEPS, self.epoch, self.batches)
        self.batches += 1
        steps = torch.randperm(args.trained_steps, generator=random).tolist()
        own = len(batch.cond if args.loss in options.SCORED else pairs)
        count = torch.tensor(float(own), device=self.accelerator.device)
        total = self.accelerator.reduce(count).item()
        if total == 0:
            return
        weight = batch.weight * own * self.accelerator.num_processes / total
        batch = batch if len(pairs) else batch._replace(pairs=pairs.new_zeros(1, 2))
        self.losses_left = 1 if args.loss == "eq12" else len(steps)
        count = len(steps) if args.loss == "chain" else 1  # its loss comes in pieces
        for loss in step_losses(
            self.model, batch, args, ref_log_prob=ref_log_prob, steps=steps, generator=random
        ):
            self.losses_left -= 1
            yield weight * loss
            self.losses.append(count * weight * loss.item())

    def step_if_due(self) -> None:
        """Update the weights: after each loss, or after the last one of a batch."""
        if self.losses_left and not self.args.updates_each_step:
            return
        accelerator = self.accelerator
        norm = accelerator.clip_grad_norm_(self.model.lora, self.args.max_grad_norm)
        finite = accelerator.scaler is not None or norm.isfinite().item()
        if finite:  # a GradScaler looks at the gradient itself
            self.optimizer.step()
        self.overflows.append(not finite or self.optimizer.step_was_skipped)
        self.optimizer.zero_grad()

    def finish(self, *, sampled: bool) -> Epoch:
        """Raises UserError where weights, or the gradients of the last updates, overflowed.

        And where an image could not be written.
        """
        for image in self.images_in_writing:
            image.result()
        seconds_train = time.perf_counter() - self.started
        self.last_overflows = (self.last_overflows + self.overflows)[-MAX_SKIPPED:]
        finite = all(weight.isfinite().all() for weight in self.model.lora)
        if sum(self.last_overflows) == MAX_SKIPPED or not finite:
            remedy = f"give a new run a lower --lr (now {self.args.lr:g}) or --precision fp32"
            problem = "gradients or weights are not finite any more"
            raise UserError(f"{self.word} {self.epoch}: {problem}; {remedy}", new_run=True)
        self.average.update(self.epoch)
        return Epoch(
            self.epoch,
            self.rows,
            gather_object(self.losses),
            gather_object(self.log_ratios),
            sampled=sampled,
            skipped=self.overflows.count(True),
            seconds_sample=self.seconds_sample if sampled else 0.0,
            seconds_train=seconds_train,
        )

    # After an epoch

    def record(self, epoch: Epoch) -> bool:
        """Evaluate, log and save; whether the run ends here."""
        stop, problem = False, None
        if self.is_main:
            stop, problem = self.record_on_main(epoch)
        stop, problem = broadcast_object_list([stop, problem])
        if problem:
            self.close(problem)
            raise UserError(problem, new_run=True)
        return stop

    def record_on_main(self, epoch: Epoch) -> tuple[bool, str | None]:
        """Whether the run ends, and why it cannot go on."""
        args, initial = self.args, self.initial.as_row()
        row = self.metrics_row(epoch)
        row["warnings"] = metrics.warnings(row, initial, self.metrics())
        config = args.row()
        names = {"objective": config["objective"], "watch": config["watch"], "max_kl": args.max_kl}
        self.bar.write(metrics.format_metrics(row, self.last_epoch, initial, **names))
        if (row["eval_kl"] or 0) > (args.max_kl or math.inf):
            self.record_stop(epoch.number)
            return True, None
        files.append(self.folder / "metrics.jsonl", [row])
        self.save(epoch.number)
        self.replay.drop_batches(epoch.number)
        self.epochs_done = epoch.number
        self.draw()
        if self.page:
            self.page.status(f"Drawing the images of round {epoch.number + 1 - self.label_epochs}")
            if self.page.finished:
                return True, None
        return False, metrics.nothing_to_learn(self.folder, args.objective)

    def metrics_row(self, epoch: Epoch) -> dict:
        result = None
        if is_evaluated(self.args, epoch.number, self.last_epoch):
            with self.average.applied():
                result = self.evaluator.evaluate(self.model.sampler)
                self.check_rounding()
            keep_images(self.folder, epoch.number, result.images)
        log_ratios, losses = epoch.log_ratios, epoch.losses
        return {
            "epoch": epoch.number,
            "labels": self.replay.labels,
            **metrics.mean_score(epoch.rows),
            **metrics.label_counts(epoch.rows),
            **metrics.eval_row(result, self.initial),
            **metrics.preference_metrics(log_ratios if epoch.number > 1 else [], self.args.beta),
            **metrics.kl(log_ratios if epoch.sampled else []),
            "loss": sum(losses) / len(losses) if losses else None,
            "skipped": epoch.skipped,
            "seconds_sample": epoch.seconds_sample,
            "seconds_train": epoch.seconds_train,
            "peak_memory_mb": metrics.peak_memory_mb(self.accelerator.device),
        }

    def check_rounding(self) -> None:
        """Once in half precision: what rounding adds to the KL, and whether the limit sees more.

        config.json keeps it as rounding_kl. Raises UserError for a limit below it.
        """
        args, file = self.args, self.folder / "config.json"
        if args.precision == "fp32":
            return
        config = files.read_json(file)
        if (kl := config.get("rounding_kl")) is None:
            kl = self.measure_rounding()
            files.save_json(file, {**config, "rounding_kl": kl})
        message = f"In {args.precision} rounding alone adds {kl:.2g} nats to the KL"
        if kl > (args.max_kl or math.inf):
            raise UserError(
                f"{message}, more than --max-kl {args.max_kl:g}: give a larger one, or a new run "
                "with --precision fp32, or with fp16 in place of bf16"
            )

    def measure_rounding(self) -> float:
        """`Model.rounding_kl` on a few held-out images."""
        args, model = self.args, self.model
        numbers = model.eval_prompts[:ROUNDING_IMAGES]
        held_out = RandomPurpose.HELD_OUT
        noises = [seeded_generator(args.seed, held_out, n) for n in range(len(numbers))]
        batch = sample(model, model.sampler, numbers, images_per_prompt=1, generators=noises)
        kl = model.rounding_kl(batch, args.trained_steps)
        self.bar.write(
            f"In {args.precision} rounding alone adds {kl:.2g} nats to the KL: log-ratios are not "
            "exactly 0 before training either."
        )
        return kl

    def metrics(self) -> list[dict]:
        """Rows of metrics.jsonl."""
        return files.read_lines(self.folder / "metrics.jsonl")

    def evaluate_initial(self) -> None:
        """The held-out images before training; config.json keeps what they score."""
        self.initial = self.evaluator.evaluate(self.model.reference)
        keep_images(self.folder, 0, self.initial.images)
        config = files.read_json(self.folder / "config.json")
        config |= {"epochs": self.args.epochs, "max_kl": self.args.max_kl}
        config |= {"initial": self.initial.as_row(), "stopped": None}
        files.save_json(self.folder / "config.json", config)

    def evaluate(self) -> None:
        """--evaluate, on new noise."""
        with self.average.applied():
            result = compare_with_initial(
                self.evaluator, self.folder, epoch=self.epochs_done, code=self.code()
            )
        report.write(self.folder, self.epochs_done, self.code())
        sentences = report.evaluation_sentences(
            result, result["objective"], self.args.row()["watch"]
        )
        print("\n".join(sentences))

    def save(self, epoch: int) -> None:
        """lora/ for pipe.load_lora_weights, and checkpoint/ for --resume."""
        scaler = self.accelerator.scaler
        with self.average.applied():
            self.model.save_lora(self.folder / "lora")
        state = {
            "epoch": epoch,
            "lora": self.model.lora_state(),
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler and scaler.state_dict(),
        }
        files.save_tensors(self.folder / "checkpoint" / "state.pt", state)

    def draw(self) -> None:
        """Report and figures. They may fail: the checkpoint is written, and they can be redrawn."""
        try:
            figures.draw_run(self.folder)
            report.write(self.folder, self.epochs_done, self.code())
        except (UserError, OSError, ValueError) as error:
            self.bar.write(f"WARNING: the figures or the report could not be written: {error}")

    def record_stop(self, epoch: int) -> None:
        """Say, in config.json and the report too, why a run ends before this epoch is kept."""
        reason = describe_stop(self.args, epoch, self.folder)
        file = self.folder / "config.json"
        files.save_json(file, files.read_json(file) | {"stopped": reason})
        report.write(self.folder, epoch - 1, self.code())
        self.bar.write(reason)

    def code(self) -> str:
        """Python that draws an image with the LoRA."""
        model, name = self.model, self.args.row()["model"]
        flow = model.policy.prediction == "flow"
        return report.usage(
            self.folder,
            model.prompts[0],
            pipeline=type(model.pipe).__name__,
            loading={} if name.startswith("<") else loading_options(name),
            scheduler=None if flow else ddim_options(model.stock_scheduler),
        )

    def close(self, reason: str | None = None) -> None:
        """Tell people that the run has ended; reason: why it cannot go on."""
        if self.page is None:
            return
        stopped = report.settings_of(self.folder).stopped
        lines = [
            f"{reason}." if reason else "The run has finished.",
            *([stopped] if stopped else []),
        ]
        lines += report.result_sentences(self.folder)
        test = {"Blind test of whether it is better": f"python sd_demo.py --evaluate {self.folder}"}
        self.page.close("\n".join(lines), self.code(), result_paths(self.folder) | test)

    def load_checkpoint(self) -> None:
        """Go back to the last checkpoint, if there is one.

        To evaluate, what lora/ holds does too. Raises UserError where neither can be used.
        """
        state, lora = self.folder / "checkpoint" / "state.pt", self.folder / "lora"
        evaluate, file = self.args.evaluate, lora / files.LORA_FILE
        if state.exists():
            try:
                self.epochs_done = files.read_file(state, self.restore)
                return
            except UserError:
                if not evaluate or not file.exists():
                    raise
        if not evaluate:
            return
        if not file.exists():
            raise UserError(f"{self.folder} has trained nothing yet: there is no model to evaluate")
        files.read_file(file, self.model.read_lora)
        self.accelerator.print(f"There is no checkpoint that can be read: this is about {file}.")
        rows = self.metrics()
        self.epochs_done = rows[-1]["epoch"] if rows else 0

    def restore(self, file: Path) -> int:
        """Load a checkpoint; return its epoch."""
        scaler = self.accelerator.scaler
        state = torch.load(file, map_location="cpu")
        self.model.load_lora(state["lora"])
        if state["average"]:
            device = self.accelerator.device
            self.average.values = [value.to(device) for value in state["average"]]
        self.optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        return state["epoch"]


def learning_rate(args: Settings, epoch: int, last_epoch: int) -> float:
    """The step size of an epoch."""
    cosine = 1.0
    if args.lr_schedule == "cosine":
        cosine = (1 + math.cos(math.pi * (epoch - 1) / last_epoch)) / 2
    return args.lr * cosine * min(1, epoch / args.warm_up)


def is_evaluated(args: Settings, epoch: int, last_epoch: int) -> bool:
    return epoch % args.eval_every == 0 or epoch == last_epoch


def describe_stop(args: Settings, epoch: int, folder: Path) -> str:
    """Why a run ends early, and what can be done."""
    word = metrics.epoch_word(args.objective)
    kept = f"the model of {word} {epoch - 1}" if epoch > 1 else "nothing: try a smaller --lr"
    again = f"python sd_demo.py --resume {folder} --max-kl {2 * args.max_kl:g}"
    limit = f"--max-kl {args.max_kl:g}"
    return f"The KL is above {limit}: the run stops and keeps {kept}. To allow more: {again}"


def image_files(epoch: int, groups: list[int], images_per_prompt: int) -> list[str]:
    """Names of the images of an epoch's groups, given by number."""
    return [
        f"images/e{epoch:03}_p{group:02}_k{k}.png"
        for group in groups
        for k in range(images_per_prompt)
    ]


# Opening a run


@contextmanager
def open_run(setup: Setup) -> Iterator[Run]:
    """A run in its folder, which is locked, from its last checkpoint. Raises UserError.

    An error inside, or Ctrl-C, says what the folder keeps and how to go on.
    """
    args, accelerator, model = setup.args, setup.accelerator, setup.model
    is_main, folder = accelerator.is_main_process, None
    with files.Lock() as lock:
        try:
            if is_main:
                earlier = args.evaluate or args.resume
                if earlier:
                    lock.acquire(earlier)
                folder = args.evaluate or open_folder(args)
                lock.acquire(folder)
            (folder,) = broadcast_object_list([folder])
            run = make_run(setup, folder)
            with run.writer:
                run.load_checkpoint()
                if not args.evaluate:
                    start(run, setup)
                yield run
        except (UserError, KeyboardInterrupt) as error:
            if folder is None:
                raise
            new_run = isinstance(error, UserError) and error.new_run
            message = f"{reason_of(error)} {advice(folder, args, new_run=new_run)}"
            raise UserError(message) from error
        finally:
            setup.bar.close()
            model.release()


def reason_of(error: BaseException) -> str:
    return "Stopped." if isinstance(error, KeyboardInterrupt) else f"{error}. The run stops."


def advice(folder: Path, args: Settings, *, new_run: bool) -> str:
    """What a run that stops has, and how to go on; new_run: not with its own settings."""
    lora, word = folder / "lora", metrics.epoch_word(args.objective)
    trained = (lora / files.LORA_FILE).exists()
    kept = f"{folder} has no model yet"
    if trained:
        kept = f"{folder} keeps the model of the last good {word}"
    if new_run:
        return f"{kept}: --init-lora {lora} begins with it." if trained else f"{kept}."
    verb = "--evaluate" if args.evaluate and trained else "--resume"
    return f"{kept}. Go on with: python sd_demo.py {verb} {folder}"


def make_run(setup: Setup, folder: Path) -> Run:
    args, accelerator, model = setup.args, setup.accelerator, setup.model
    parts = parts_of_pass(len(setup.label_groups))
    label_epochs = parts * (options.LABEL_PASSES if args.objective else args.epochs)
    page, labeller = None, args.labeller
    if labeller is None and args.by_people:
        page = open_page(args, folder)
        labeller = PeopleLabeller(
            page,
            args.objective,
            accelerator,
            rounds=args.epochs,
            label_epochs=label_epochs,
        )
    optimizer = torch.optim.AdamW(model.lora, args.lr, weight_decay=args.weight_decay)
    return Run(
        args=args,
        accelerator=accelerator,
        model=model,
        evaluator=setup.evaluator,
        labeller=labeller or ScorerLabeller(setup.evaluator.scorers),
        page=page,
        optimizer=accelerator.prepare(optimizer),
        average=RunningAverage(model.lora, enabled=args.average_weights),
        replay=ReplayBuffer(
            folder / "latents",
            model.schedule,
            setup.prompts,
            seed=args.seed,
            batch_size=args.batch_size,
            accelerator=accelerator,
        ),
        folder=folder,
        bar=setup.bar,
        parts_of_pass=parts,
        label_epochs=label_epochs,
    )


def start(run: Run, setup: Setup) -> None:
    """Load the labelled images, drop what a kill cut short, and look at the initial model."""
    groups = setup.label_groups if run.is_main else []
    if groups and not isinstance(groups[0], LatentGroup):
        if ".parquet" in Path(run.args.labels).suffixes:  # its images go into the run's folder
            groups = read_labels(run.args, cache=run.folder / "label_images").groups
        groups = encode_groups(groups, run.model.conditioning)
    run.replay.load(run.epochs_done, groups)
    if run.is_main:
        drop_unfinished(run.folder, run.epochs_done, keep_labels=run.page is not None)
        run.evaluate_initial()


def open_folder(args: Settings) -> Path:
    """Make the folder of a new run, by default runs/OBJECTIVE-N, or open that of --resume.

    Raises UserError where it cannot be written, or goes on from nothing though it has trained.
    """
    if args.resume:
        check_not_lost(args.resume)
    try:
        out = args.resume or make_folder(args.out, args.row()["objective"] or "labels")
        for name in ("images", "latents", "lora", "checkpoint"):
            (out / name).mkdir(exist_ok=True)  # also on --resume: a kill may have come before
        for name in ("metrics.jsonl", "labels.jsonl"):
            (out / name).touch()
    except OSError as error:
        where, remedy = f"--out {args.out}", "choose another folder"
        if args.resume:
            where, remedy = args.resume, "free disk space, or change its permissions"
        raise UserError(f"{where} cannot be written ({error.strerror}): {remedy}") from error
    if not args.resume:
        files.save_json(out / "config.json", {**args.row(), "out": str(out), **provenance()})
    return out


def make_folder(out: Path | None, objective: str) -> Path:
    """Make a new folder: `out`, or the first of runs/OBJECTIVE-1, -2, ... that is not there yet."""
    if out:
        out.mkdir(parents=True)
        return out
    name = re.sub(r"\W+", "-", Path(objective).name).strip("-")
    for path in (Path(f"runs/{name}-{n}") for n in itertools.count(1)):
        with suppress(FileExistsError):  # another start may make it at the same time
            path.mkdir(parents=True)
            return path


def check_not_lost(out: Path) -> None:
    """Raise UserError for a run that has trained and lost its checkpoint.

    A kill in the first epoch may come after its row of metrics.jsonl and before its checkpoint.
    """
    epochs = [row["epoch"] for row in files.read_lines(out / "metrics.jsonl")]
    lora, folder = out / "lora" / files.LORA_FILE, out / "checkpoint"
    first = epochs == [1] and folder.is_dir() or not epochs and not lora.exists()
    if first or (folder / "state.pt").exists():
        return
    remedy = "restore a copy"
    if lora.exists():
        remedy = f"--evaluate it, begin a new run with --init-lora {lora.parent}, or {remedy}"
    raise UserError(f"{out} has lost checkpoint/state.pt, so it cannot go on: {remedy}")


def provenance() -> dict:
    """Versions of the libraries and the git revision, for config.json."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True)
        revision = done.stdout.strip()
    except OSError:  # no git
        revision = None
    versions = {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules}
    versions["python"] = platform.python_version()
    return {"versions": versions, "git_revision": revision or None}


def drop_unfinished(out: Path, epochs_done: int, *, keep_labels: bool) -> None:
    """Drop rows of an epoch that a kill cut short. What people answered is kept."""
    for name in ["metrics.jsonl"] if keep_labels else ["metrics.jsonl", "labels.jsonl"]:
        files.keep_rows(out / name, lambda row: row["epoch"] <= epochs_done)
