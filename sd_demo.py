"""D3PO on Stable Diffusion: the losses of d3po.py, LoRA on the UNet, labels from a score or people.

    python sd_demo.py --objective compressibility   # SD 1.5 with CUDA, else the bundled emoji model
    python sd_demo.py --objective human             # a page asks you which of two images is better
    python sd_demo.py --labels FILE                 # pairs of images that exist already
    accelerate launch sd_demo.py --objective compressibility   # several GPUs
    torchrun --nproc_per_node 2 sd_demo.py --objective compressibility --device cpu

`train` is the paper's Alg. 1. A run folder has config.json, metrics.jsonl, labels.jsonl, images/,
latents/, figures, lora/ (for pipe.load_lora_weights) and checkpoint/ (for --resume).
"""

import itertools
import math
import sys
import time
from argparse import ArgumentParser, Namespace

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from sd import UserError, cost, figures, files, metrics, options, report, run_folder
from sd.feedback import (
    HumanFeedback,
    ScorerFeedback,
    compare_with_initial,
    evaluate_held_out,
    evaluate_initial,
)
from sd.labels import pairs_from_labels, scores_from_labels
from sd.losses import LOSSES, SCORED
from sd.model import Batch, RunningAverage, load_model, make_accelerator, sample
from sd.prompts import load_prompts
from sd.replay import Given, LabelledBatch, ReplayBuffer
from sd.run import Run
from sd.seeds import RandomPurpose, seeded_generator

MAX_SKIPPED = 10  # updates in a row whose gradient overflowed


def train(run: Run, epochs_done: int, bar: tqdm) -> None:
    """Alg. 1, from the epoch after the last one done."""
    args, accelerator, memory = run.args, run.accelerator, run.memory
    initial_eval = None
    if accelerator.is_main_process:
        initial_eval = evaluate_initial(run.feedback, run.model)
    epochs_given, last_epoch = options.epochs_given(args), options.last_epoch(args)
    last_overflows, problem = [], None

    for epoch in range(epochs_done + 1, last_epoch + 1):  # line 2
        run.optimizer.param_groups[0]["lr"] = options.learning_rate(args, epoch)
        started = time.perf_counter()

        # Sample groups of K images, each from one prompt and one x_T: lines 3-11
        batches = sample_epoch(run, epoch) if epoch > epochs_given else []
        sampled = time.perf_counter()

        # Score them, or ask people: lines 12-22
        labels = run.feedback.label(batches, epoch) if batches else []
        if batches and not labels:  # people end the run, and these they did not answer
            break
        labelled = time.perf_counter()
        new = [
            LabelledBatch(
                batch.trajectory,
                batch.cond,
                pairs_from_labels(of_batch),
                scores=scores_from_labels(of_batch, batch.cond),
            )
            for batch, of_batch in zip(batches, labels, strict=True)
        ]
        memory.add(epoch, new, args.images_per_prompt)

        # Train on the new pairs, then on earlier ones: lines 23-36
        earlier = memory.draw(epoch, args.replay) if new else memory.draw_given(epoch)
        losses, overflows, log_ratios = [], [], []
        for n, batch in enumerate(itertools.chain(new, earlier)):
            ref_log_prob = reference_log_prob(run, batch)
            if n < len(new) or not new:
                log_ratios.append(run.log_ratios(batch, ref_log_prob, sampled=bool(new)))
            random = seeded_generator(args.seed, RandomPurpose.STEPS, epoch, n)
            steps = torch.randperm(run.trained_steps, generator=random)[: cost.steps_of_batch(args)]
            done = update_batch(
                run, batch, ref_log_prob=ref_log_prob, steps=steps.tolist(), generator=random
            )
            losses += done[0]
            overflows += done[1]
        trained = time.perf_counter()
        last_overflows = (last_overflows + overflows)[-MAX_SKIPPED:]
        check_finite(run, epoch, last_overflows)
        run.average.update(epoch)

        # Evaluate, log, save
        losses, log_ratios = gather_object(losses), gather_object(log_ratios)
        rows = gather_object([label.row for of_batch in labels for label in of_batch])
        stop = False
        if accelerator.is_main_process:
            eval_result = None
            if options.is_evaluated(args, epoch):
                with run.average.applied():
                    eval_result = evaluate_held_out(
                        run.feedback, run.model, run.model.sampler, save_as=epoch
                    )
            row = {
                "epoch": epoch,
                "labels": memory.labels,
                **metrics.mean_score(rows),
                **metrics.label_counts(rows),
                **metrics.eval_row(eval_result, initial_eval),
                **metrics.preference_metrics(log_ratios if epoch > 1 else [], args.beta),
                **metrics.kl(log_ratios if new else []),
                "loss": sum(losses) / len(losses) if losses else None,
                "skipped": overflows.count(True),
                "seconds_sample": sampled - started,
                "seconds_train": trained - labelled,
                "peak_memory_mb": metrics.peak_memory_mb(accelerator.device),
            }
            row["warnings"] = metrics.warnings(row, initial_eval.as_row(), run.rows())
            bar.write(metrics.format_metrics(row, last_epoch, initial_eval.as_row()))
            stop = run.feedback.finished
            if (row["eval_kl"] or 0) > (args.max_kl or math.inf):
                run.record_stop(epoch, message := options.describe_stop(args, epoch))
                bar.write(message)
                stop = True
            else:
                files.append(args.out / "metrics.jsonl", [row])
                figures.draw_run(args.out)
                run.save(epoch)
                memory.drop_batches(epoch)
                run.feedback.status(f"Sampling, epoch {epoch + 1}")
                if not stop:
                    problem = metrics.nothing_to_learn(args.out)
        stop, problem = broadcast_object_list([stop, problem])
        if stop or problem:
            break
    if accelerator.is_main_process:
        run.feedback.close(run.code(), problem)
    if problem:
        raise UserError(problem)


def sample_epoch(run: Run, epoch: int) -> list[Batch]:
    """This process's batches of an epoch, with names to keep their images under."""
    args, accelerator, model = run.args, run.accelerator, run.model
    random = seeded_generator(args.seed, RandomPurpose.PROMPTS, epoch)
    prompts = torch.randint(len(model.prompts), (args.prompts_per_epoch,), generator=random)
    size, K, batches = args.batch_size, args.images_per_prompt, []
    own_first = accelerator.process_index * size
    for first in range(own_first, len(prompts), accelerator.num_processes * size):
        numbers = prompts[first : first + size]
        random = seeded_generator(args.seed, RandomPurpose.TRAINING, epoch, first)
        kept = run.memory.kept_batch(epoch, first)
        batch = sample(
            model, model.sampler, numbers, images_per_prompt=K, generator=random, trajectory=kept
        )
        if kept is None:
            run.memory.keep_batch(epoch, first, batch.trajectory)
        names = run_folder.image_files(epoch, range(first, first + size), K)
        batches.append(batch._replace(files=names))
    return batches


def reference_log_prob(run: Run, batch: LabelledBatch) -> Tensor:
    """Log-probs (T, B) of the reference: the initial model, or the one that sampled the batch."""
    if run.args.reference == "previous":
        return batch.trajectory.log_prob
    return run.model.log_prob(run.model.reference, batch)


def update_batch(
    run: Run,
    batch: LabelledBatch,
    *,
    ref_log_prob: Tensor,
    steps: list[int],
    generator: torch.Generator | None = None,
) -> tuple[list[float], list[bool]]:
    """Alg. 1 lines 24-35 on one batch. Returns losses, and for each update if it overflowed.

    Gradients are those of the mean over the pairs of all processes, or over the chains where a
    method sees scores; a process without pairs takes part with weight 0.
    """
    args, accelerator, model, pairs = run.args, run.accelerator, run.model, batch.pairs
    own = len(batch.cond if args.loss in SCORED else pairs)
    total = accelerator.reduce(torch.tensor(float(own), device=accelerator.device)).item()
    if total == 0:
        return [], []
    weight = own * accelerator.num_processes / total
    batch = batch if len(pairs) else batch._replace(pairs=pairs.new_zeros(1, 2))
    steps = [0] if args.loss == "eq12" else steps  # Eq. 12 is Eq. 14 on the first step
    step_losses = LOSSES[args.loss](
        model, batch, args, ref_log_prob=ref_log_prob, steps=steps, generator=generator
    )
    losses, overflows = [], []
    for k, loss in enumerate(step_losses):
        accelerator.backward(weight * loss)
        losses.append(weight * loss.item())
        if args.update_every == "timestep" or k == len(steps) - 1:
            norm = accelerator.clip_grad_norm_(model.lora, args.max_grad_norm)
            finite = accelerator.scaler is not None or norm.isfinite().item()
            if finite:  # a GradScaler looks at the gradient itself
                run.optimizer.step()
            overflows.append(not finite or run.optimizer.step_was_skipped)
            run.optimizer.zero_grad()
    if args.loss == "chain":  # its loss comes in pieces
        losses = [len(steps) * loss for loss in losses]
    return losses, overflows


def check_finite(run: Run, epoch: int, last_overflows: list[bool]) -> None:
    """Raise FloatingPointError where weights, or the gradients of the last updates, overflowed."""
    finite = all(weight.isfinite().all() for weight in run.model.lora)
    if sum(last_overflows) == MAX_SKIPPED or not finite:
        remedy = f"lower --lr (now {run.args.lr:g}) or take --precision bf16"
        problem = "gradients or weights are not finite any more"
        raise FloatingPointError(f"Epoch {epoch}: {problem}; {remedy}")


def main(argv: list[str] | None = None) -> None:
    with files.Lock() as lock, cost.memory_is_enough():
        start(*options.parse(argv), lock)


def start(parser: ArgumentParser, args: Namespace, lock: files.Lock) -> None:
    """A run, or an evaluation of one, which the lock makes ours alone."""
    try:
        accelerator = make_accelerator(args.precision, args.device)
        is_main, people = accelerator.is_main_process, args.objective in options.HUMAN_PRESETS
        quiet = args.dry_run or not is_main
        bar = tqdm(unit=" passes", mininterval=0.5, delay=0.1, disable=quiet)
        if is_main and (args.resume or args.evaluate) and not args.dry_run:
            lock.acquire(args.out)
        options.check_batches(args, accelerator.num_processes)
        given = Given(args, accelerator)
        prompts = given.prompts if args.prompts is None else load_prompts(args.prompts)
        eval_prompts = load_prompts(args.eval_prompts) if args.eval_prompts else prompts
        numbered = [*prompts, *sorted({*given.prompts, *eval_prompts} - {*prompts})]
        names = {"numbered": numbered, "eval_prompts": eval_prompts}
        model = load_model(args, prompts, accelerator, on_call=bar.update, **names)
        feedback = (HumanFeedback if people else ScorerFeedback)(args, prompts, accelerator)
        args.groups_given = given.groups
        if args.beta is None:
            args.beta = options.PAPER_BETA / math.prod(model.latent_shape)
        plan = cost.estimate(model, args, accelerator.num_processes)
        accelerator.print(cost.describe(plan, model, args))
        if args.dry_run:
            return
        groups = given.encode(model.conditioning) if is_main and not args.evaluate else []
        if is_main and not args.evaluate:
            args.out = run_folder.create_or_resume(vars(args))
            lock.acquire(args.out)
        (args.out,) = broadcast_object_list([args.out])
        optimizer = accelerator.prepare(
            torch.optim.AdamW(model.lora, args.lr, weight_decay=args.weight_decay)
        )
        run = Run(
            args=args,
            accelerator=accelerator,
            model=model,
            average=RunningAverage(model.lora, enabled=args.average_weights),
            optimizer=optimizer,
            feedback=feedback,
            memory=ReplayBuffer(args, accelerator, model.schedule, numbered),
        )
        epochs_done = run.load_checkpoint()
        if not args.evaluate:
            run.memory.load(epochs_done, given=groups)
    except (ValueError, FloatingPointError, OSError) as error:
        parser.error(" ".join(files.describe(error).split()))  # some have many lines
    bar.total = options.calls_to_go(args, plan, epochs_done)
    again = f"python sd_demo.py {'--evaluate' if args.evaluate else '--resume'} {args.out}"
    try:
        if not args.evaluate:
            if is_main:
                run_folder.drop_unfinished(args.out, epochs_done, keep_labels=people)
            train(run, epochs_done, bar)
            bar.close()
            accelerator.print(report.ending(args.out, len(run.rows()), args.objective))
        elif is_main:
            bar.total = 2 * plan.calls_eval
            with run.average.applied():
                compare_with_initial(feedback, model, epochs_done, run.code())
            run.write_report(epochs_done)
    except KeyboardInterrupt:
        sys.exit(f"Stopped. Go on with: {again}")
    except OSError as error:
        sys.exit(f"{files.describe(error)}. Then go on with: {again}")
    except (UserError, FloatingPointError) as error:
        trained = (args.out / "lora" / files.LORA_FILE).exists()
        kept = "keeps the model of the last good epoch" if trained else "has no model yet"
        sys.exit(f"{error}. The run stops; {args.out} {kept}.")
    finally:
        bar.close()


if __name__ == "__main__":
    main()
