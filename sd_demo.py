"""D3PO on Stable Diffusion: the losses of d3po.py, LoRA on the UNet, labels from a score or people.

    python sd_demo.py --objective compressibility   # SD 1.5 with CUDA, else the bundled emoji model
    python sd_demo.py --objective human             # a page asks you which of two images is better
    accelerate launch sd_demo.py --objective compressibility   # several GPUs

`train` is the paper's Alg. 1. A run folder has config.json, metrics.jsonl, labels.jsonl, images/,
figures, lora/ (for pipe.load_lora_weights) and checkpoint/ (for --resume).
"""

import json
import math
import sys
import time
from argparse import Namespace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

import d3po
from sd import cost, figures, metrics, options, run_folder
from sd.feedback import HumanFeedback, ScorerFeedback, blind_test
from sd.labels import LabelError, pairs_from_labels
from sd.model import Batch, Model, load_model, make_accelerator, sample, sample_held_out
from sd.prompts import load_prompts
from sd.run_folder import Stream, generator
from sd.scorers import ScorerError

LOSSES = {"eq14": d3po.d3po_losses, "eq12": d3po.d3po_losses, "chain": d3po.chain_dpo_losses}
MAX_SKIPPED = 10  # updates in a row whose gradient overflowed


class Run(NamedTuple):
    """What the parts of a run share."""

    args: Namespace
    accelerator: Accelerator
    model: Model
    optimizer: torch.optim.Optimizer
    feedback: ScorerFeedback

    @property
    def trained_steps(self) -> int:
        return self.args.num_steps - self.args.skip_last


def train(run: Run, epochs_done: int, bar: tqdm) -> None:
    """Alg. 1, from the epoch after the last one done."""
    args, accelerator, model = run.args, run.accelerator, run.model
    initial_eval = evaluate_initial(run) if accelerator.is_main_process else None
    last_overflows = []

    for epoch in range(epochs_done + 1, args.epochs + 1):  # line 2
        cosine = (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2
        run.optimizer.param_groups[0]["lr"] = args.lr * cosine
        started = time.perf_counter()

        # Sample groups of K images, each from one prompt and one x_T: lines 3-11
        batches = sample_epoch(run, epoch)
        sampled = time.perf_counter()

        # Score them, or ask people: lines 12-22
        labels = run.feedback.label(batches, epoch)
        labelled = time.perf_counter()

        # Train on the pairs: lines 23-36
        losses, overflows, ref_log_probs = [], [], []
        for n, batch in enumerate(batches):
            pairs = pairs_from_labels(labels[n])
            ref_log_prob = reference_log_prob(run, batch)
            random = generator(args.seed, Stream.STEPS, epoch, n)
            steps = torch.randperm(run.trained_steps, generator=random).tolist()
            done = update_batch(run, batch, pairs, ref_log_prob=ref_log_prob, steps=steps)
            losses += done[0]
            overflows += done[1]
            ref_log_probs.append(ref_log_prob)
        trained = time.perf_counter()
        last_overflows = (last_overflows + overflows)[-MAX_SKIPPED:]
        check_finite(run, epoch, last_overflows)

        # Evaluate, log, save
        losses = gather_object(losses)
        rows = gather_object([label.row for of_batch in labels for label in of_batch])
        if accelerator.is_main_process:
            eval_result = None
            if epoch in options.eval_epochs(args):
                eval_result = evaluate_held_out(run, model.sampler, save_as=epoch)
            row = {
                "epoch": epoch,
                "labels": epoch * len(rows),
                **metrics.mean_score(rows),
                **metrics.eval_row(eval_result, initial_eval),
                **policy_metrics(run, batches[0], labels[0], ref_log_prob=ref_log_probs[0]),
                "loss": sum(losses) / len(losses) if losses else None,
                "skipped": overflows.count(True),
                "seconds_sample": sampled - started,
                "seconds_train": trained - labelled,
                "peak_memory_mb": metrics.peak_memory_mb(),
            }
            run_folder.append(args.out / "metrics.jsonl", [row])
            bar.write(metrics.format_metrics(row, args.epochs, initial_eval.as_row()))
            figures.draw_run(args.out)
            save(run, epoch)
            run.feedback.status(f"Sampling, epoch {epoch + 1}")
        accelerator.wait_for_everyone()
    run.feedback.close()


def sample_epoch(run: Run, epoch: int) -> list[Batch]:
    """This process's batches of an epoch, with names to keep their images under."""
    args, accelerator, model = run.args, run.accelerator, run.model
    random = generator(args.seed, Stream.PROMPTS, epoch)
    prompts = torch.randint(len(model.prompts), (args.pairs_per_epoch,), generator=random)
    size, K, batches = args.batch_size, args.images_per_prompt, []
    own_first = accelerator.process_index * size
    for first in range(own_first, len(prompts), accelerator.num_processes * size):
        numbers = prompts[first : first + size]
        random = generator(args.seed, Stream.TRAINING, epoch, first)
        batch = sample(model, model.sampler, numbers, images_per_prompt=K, generator=random)
        files = run_folder.image_files(epoch, range(first, first + size), K)
        batches.append(batch._replace(files=files))
    return batches


def reference_log_prob(run: Run, batch: Batch) -> Tensor:
    """Log-probs (T, B) of the reference: the initial model, or the one that sampled the batch."""
    if run.args.reference == "previous":
        return batch.trajectory.log_prob
    return run.model.log_prob(run.model.reference, batch)


def update_batch(
    run: Run, batch: Batch, pairs: Tensor, *, ref_log_prob: Tensor, steps: list[int]
) -> tuple[list[float], list[bool]]:
    """Alg. 1 lines 24-35 on one batch. Returns losses, and for each update if it overflowed.

    Gradients are those of the mean over the pairs of all processes; one without pairs takes part
    with weight 0.
    """
    args, accelerator, model = run.args, run.accelerator, run.model
    count = torch.tensor(float(len(pairs)), device=accelerator.device)
    total = accelerator.reduce(count).item()
    if total == 0:
        return [], []
    weight = len(pairs) * accelerator.num_processes / total
    pairs = pairs if len(pairs) else pairs.new_zeros(1, 2)
    steps = [0] if args.loss == "eq12" else steps  # Eq. 12 is Eq. 14 on the first step
    chosen = {"cond": batch.cond, "steps": steps} | ({"clip": args.clip} if args.clip else {})
    step_losses = LOSSES[args.loss](
        model.policy, model.schedule, batch.trajectory, pairs, args.beta, ref_log_prob, **chosen
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


def policy_metrics(run: Run, batch: Batch, labels: list, *, ref_log_prob: Tensor) -> dict:
    """Accuracy, margin and KL after training on one batch, which stands for the epoch."""
    model, initial = run.model, ref_log_prob
    if run.args.reference == "previous":
        initial = model.log_prob(model.reference, batch)
    log_ratio = model.log_prob(model.sampler, batch) - ref_log_prob
    log_ratio = log_ratio[: run.trained_steps].sum(0)
    return {
        **metrics.preference_metrics(log_ratio, pairs_from_labels(labels), run.args.beta),
        **metrics.kl(batch.trajectory.log_prob - initial, run.trained_steps),
    }


def evaluate_held_out(
    run: Run, denoiser: d3po.Denoiser, *, stream=Stream.HELD_OUT, save_as: int | None = None
) -> metrics.EvalResult:
    """What the scorers think of images of fixed prompts and noises, whatever was trained.

    save_as: the epoch under which some of the images are kept.
    """
    args = run.args
    images, prompts = sample_held_out(run.model, denoiser, args, stream=stream)
    if save_as is not None:
        for n, image in enumerate(images[: figures.NUM_FIGURE_IMAGES]):
            image.save(figures.held_out_file(args.out, save_as, n))
    return run.feedback.evaluate(images, prompts)


def evaluate_initial(run: Run) -> metrics.EvalResult:
    """The model before training on the held-out noises; config.json keeps what it scores."""
    result = evaluate_held_out(run, run.model.reference, save_as=0)
    config = run_folder.read_json(run.args.out / "config.json")
    config |= {"epochs": run.args.epochs, "initial": result.as_row()}
    run_folder.save_json(run.args.out / "config.json", config)
    return result


def evaluate(run: Run, epochs_done: int) -> None:
    """Tuned against initial model on noises that no training saw, by the scorers or blind."""
    args, model = run.args, run.model
    initial, tuned = (
        evaluate_held_out(run, denoiser, stream=Stream.EVALUATION)
        for denoiser in (model.reference, model.sampler)
    )
    if isinstance(run.feedback, HumanFeedback):
        result = blind_test(run.feedback, tuned, initial, epoch=epochs_done)
    else:
        result = metrics.win_rate_vs_reference(tuned, initial)
    result = {"objective": args.objective, **result}
    run_folder.save_json(args.out / "evaluation.json", result)
    print(json.dumps(result, indent=2))
    print(figures.draw_pairs(initial.images, tuned.images, args.out / "evaluation.png"))


def save(run: Run, epoch: int) -> None:
    """lora/ for pipe.load_lora_weights, a model card, and checkpoint/ for --resume."""
    args, scaler = run.args, run.accelerator.scaler
    lora = run.model.save_lora(args.out / "lora")
    figures.write_card(args.out, args, epoch)
    state = {"epoch": epoch, "lora": lora, "optimizer": run.optimizer.state_dict()}
    state["scaler"] = scaler and scaler.state_dict()
    run_folder.save_tensors(args.out / "checkpoint" / "state.pt", state)


def load_checkpoint(run: Run) -> int:
    """Go back to the last checkpoint of the run folder, if there is one; return its epoch, or 0."""
    file, scaler = run.args.out / "checkpoint" / "state.pt", run.accelerator.scaler
    if not file.exists():
        return 0
    state = torch.load(file, map_location=run.accelerator.device)
    run.model.load_lora(state["lora"])
    run.optimizer.load_state_dict(state["optimizer"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
    return state["epoch"]


def main(argv: list[str] | None = None) -> None:
    parser, args = options.parse(argv)
    accelerator = make_accelerator(args.precision)
    is_main, people = accelerator.is_main_process, args.objective in options.HUMAN_PRESETS
    quiet = args.dry_run or not is_main
    bar = tqdm(unit=" passes", mininterval=0.5, delay=0.1, disable=quiet)
    try:
        options.check_batches(args, accelerator.num_processes)
        prompts = load_prompts(args.prompts)
        model = load_model(args, prompts, accelerator, on_call=bar.update)
        feedback = (HumanFeedback if people else ScorerFeedback)(args, prompts, accelerator)
        args.beta = args.beta or options.PAPER_BETA / math.prod(model.latent_shape)
        plan = cost.estimate(model, args, accelerator.num_processes)
        accelerator.print(cost.describe(plan, model, args))
        if args.dry_run:
            return
        if is_main and not args.evaluate:
            args.out = run_folder.create_or_resume(vars(args))
    except ValueError as error:
        parser.error(" ".join(str(error).split()))  # some libraries' errors have many lines
    (args.out,) = broadcast_object_list([args.out])
    optimizer = torch.optim.AdamW(model.lora, args.lr, weight_decay=args.weight_decay)
    run = Run(args, accelerator, model, accelerator.prepare(optimizer), feedback)
    epochs_done = load_checkpoint(run)
    to_evaluate = options.eval_epochs(args) - set(range(1, epochs_done + 1))
    bar.total = plan.calls * (args.epochs - epochs_done) + plan.calls_eval * len(to_evaluate)
    try:
        if not args.evaluate:
            if is_main:
                run_folder.drop_unfinished(args.out, epochs_done, keep_labels=people)
            train(run, epochs_done, bar)
        elif is_main:
            bar.total = 2 * plan.calls_eval
            evaluate(run, epochs_done)
    except KeyboardInterrupt:
        sys.exit(f"Stopped. Go on with: python sd_demo.py --resume {args.out}")
    except (ScorerError, LabelError, FloatingPointError) as error:
        reason = f"The run stops; {args.out} keeps the model of the last good epoch."
        sys.exit(f"{error}. {reason}")


if __name__ == "__main__":
    main()
