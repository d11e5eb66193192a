"""What the parts of a run share, and the checkpoint from which it goes on."""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from sd import UserError, files, metrics, report
from sd.feedback import ScorerFeedback
from sd.model import Model, RunningAverage
from sd.replay import LabelledBatch, ReplayBuffer


class Run(NamedTuple):
    """What the parts of a run share."""

    args: Namespace
    accelerator: Accelerator
    model: Model
    average: RunningAverage
    optimizer: torch.optim.Optimizer
    feedback: ScorerFeedback
    memory: ReplayBuffer

    @property
    def trained_steps(self) -> int:
        return self.args.num_steps - self.args.skip_last

    def log_ratios(
        self, batch: LabelledBatch, ref_log_prob: Tensor, *, sampled: bool
    ) -> metrics.LogRatios:
        """Of the policy to the initial model, before it trains on a batch.

        sampled: this policy sampled the batch, so its log-probs are there.
        """
        model, now, initial = self.model, batch.trajectory.log_prob, ref_log_prob
        if not sampled:
            now = model.log_prob(model.sampler, batch)
        if self.args.reference == "previous":
            initial = model.log_prob(model.reference, batch)
        return metrics.log_ratios(now - initial, batch.pairs, self.trained_steps)

    def save(self, epoch: int) -> None:
        """lora/ for pipe.load_lora_weights, the report, and checkpoint/ for --resume."""
        args, scaler = self.args, self.accelerator.scaler
        with self.average.applied():
            self.model.save_lora(args.out / "lora")
        self.write_report(epoch)
        state = {
            "epoch": epoch,
            "lora": self.model.lora_state(),
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler and scaler.state_dict(),
        }
        files.save_tensors(args.out / "checkpoint" / "state.pt", state)

    def rows(self) -> list[dict]:
        """Of metrics.jsonl."""
        return files.read_lines(self.args.out / "metrics.jsonl")

    def record_stop(self, epoch: int, reason: str) -> None:
        """Keep in config.json and the report why a run ends before this epoch is kept."""
        file = self.args.out / "config.json"
        files.save_json(file, files.read_json(file) | {"stopped": reason})
        self.write_report(epoch - 1)

    def write_report(self, epoch: int) -> None:
        """README.md and report.html of the run so far."""
        report.write(self.args.out, epoch, self.code())

    def code(self) -> str:
        """Python that draws an image with the LoRA."""
        model, pipeline = self.model, type(self.model.pipe).__name__
        flow = model.policy.prediction == "flow"
        return report.usage(self.args.out, model.prompts[0], pipeline=pipeline, flow=flow)

    def load_checkpoint(self) -> int:
        """Go back to the last checkpoint, if there is one; return its epoch, or 0.

        To evaluate, what lora/ holds does too. Raises UserError where neither can be used.
        """
        out, evaluate = self.args.out, self.args.evaluate
        state, lora = out / "checkpoint" / "state.pt", out / "lora" / files.LORA_FILE
        if state.exists():
            try:
                return files.read_file(state, self.restore)
            except UserError:
                if not evaluate or not lora.exists():
                    raise
        if not evaluate:
            return 0
        if not lora.exists():
            raise UserError(f"{out} has trained nothing yet: there is no model to evaluate")
        files.read_file(lora, self.model.read_lora)
        self.accelerator.print(f"There is no checkpoint that can be read: this is about {lora}.")
        rows = self.rows()
        return rows[-1]["epoch"] if rows else 0

    def restore(self, file: Path) -> int:
        """Take up a checkpoint; return its epoch."""
        scaler = self.accelerator.scaler
        state = torch.load(file, map_location=self.accelerator.device)
        self.model.load_lora(state["lora"])
        self.average.values = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        return state["epoch"]
