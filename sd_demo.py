"""D3PO on Stable Diffusion: the losses of d3po.py, LoRA on the UNet, labels from a score or people.

    python sd_demo.py --objective compressibility   # SD 1.5 with CUDA, else the bundled emoji model
    python sd_demo.py --objective human             # a page asks you which of two images is better
    python sd_demo.py --labels FILE                 # pairs of images that exist already
    accelerate launch sd_demo.py --objective compressibility   # several GPUs
    torchrun --nproc_per_node 2 sd_demo.py --objective compressibility --device cpu

From Python, with the names of the flags (a function, a loaded pipeline, a list will do):

    folder = sd_demo.run(objective=my_scorer, model=pipe, prompts=["a cat", "a dog"], epochs=4)

`train` is the paper's Alg. 1. A run folder has config.json, metrics.jsonl, labels.jsonl, images/,
latents/, figures, lora/ (for pipe.load_lora_weights) and checkpoint/ (for --resume).
"""

import itertools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sd import UserError, options

if TYPE_CHECKING:  # these load diffusers, which takes seconds that --help does not need
    from sd.replay import LabelledBatch
    from sd.run import Epoch, Run


def train(run: "Run") -> Iterator["Epoch"]:
    """Alg. 1: sample, label and train, from the epoch after the last one done."""
    first = max(run.epochs_done, run.label_epochs) + 1
    for epoch in range(first, run.last_epoch + 1):  # line 2
        run.begin(epoch)

        # Sample groups of K images, each from one prompt and one x_T: lines 3-11
        batches = run.sample(epoch)

        # Score them, or ask people: lines 12-22
        labelled = run.label(batches, epoch)
        if labelled is None:  # people have ended the run
            return

        # Train on the new groups, then on earlier ones: lines 23-36
        for batch in labelled:
            learn(run, batch, measured=True)
        for batch in run.replay.draw(epoch, run.args.replay):
            learn(run, batch)
        yield run.finish(sampled=True)


def train_on_labels(run: "Run") -> Iterator["Epoch"]:
    """Passes over the images of --labels, on trajectories that d3po.bridge draws."""
    for epoch in range(run.epochs_done + 1, run.label_epochs + 1):
        run.begin(epoch)
        for batch in run.replay.draw_part(epoch, run.parts_of_pass):
            learn(run, batch, measured=True)
        yield run.finish(sampled=False)


def learn(run: "Run", batch: "LabelledBatch", *, measured: bool = False) -> None:
    """Alg. 1 lines 24-35 on one batch; measured: note accuracy and KL before it."""
    ref_log_prob = run.reference_log_prob(batch)
    if measured:
        run.measure(batch, ref_log_prob)
    for loss in run.step_losses(batch, ref_log_prob):
        run.accelerator.backward(loss)
        run.step_if_due()


def run(**settings) -> Path:
    """A run with these settings, under the names of the flags; returns its folder.

    objective, watch: also a function (PIL images, prompts) -> numbers. model: also a loaded
    pipeline, which comes back as it was. prompts, eval_prompts: also a list. labeller: an object
    with the method `label` of sd/labellers.py, in place of the page. Raises sd.UserError.
    """
    return start(options.make_settings(**settings))


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for prompts that a console cannot show
    try:
        start(options.parse(argv))
    except UserError as error:
        sys.exit(f"sd_demo.py: {' '.join(str(error).split())}")  # some have many lines
    except KeyboardInterrupt:
        sys.exit("Stopped before anything was written.")


def start(args: options.Settings) -> Path | None:
    """Plan a run, open it, and train or evaluate. Returns its folder; None for --dry-run."""
    from sd import report
    from sd.run import describe, load, open_run

    setup = load(args)
    setup.accelerator.print(describe(setup))
    if args.dry_run:
        setup.model.release()
        return None
    with open_run(setup) as run:
        if args.evaluate:
            run.evaluate()
            return run.folder
        for epoch in itertools.chain(train_on_labels(run), train(run)):
            if run.record(epoch):
                break
        run.close()
    setup.accelerator.print(report.ending(run.folder, run.counted_epochs, args.row()["objective"]))
    return run.folder


if __name__ == "__main__":
    main()
