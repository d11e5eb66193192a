"""`python toy/train_toy.py` with no flag keeps the promises of the README; so does --model flow."""

import json

import numpy as np
import pytest
import torch

from toy import ddpm, flow, optimum, train_toy, worlds

pytestmark = pytest.mark.slow
RING = worlds.MIXTURES["ring"]
VARIANCE = ddpm.data_variance(RING)
UNTRAINED = {
    "ddpm": lambda: ddpm.MLP(VARIANCE),
    "flow": lambda: flow.FlowDenoiser(flow.Velocity(VARIANCE)),
}
FLOW = ["--model", "flow", "--loss", "chain"]


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_run_with_no_flag(name, tmp_path):
    """One test, so that no second worker makes the same run."""
    out = tmp_path / "run"
    train_toy.main(["--out", str(out), *([] if name == "ddpm" else FLOW)])
    check_promises(out, name)
    check_share_by_quadrature(out, name)
    check_reference_samples_the_ring(out)
    check_reference_is_close_to_the_exact_denoiser(out, name)


def check_promises(run, name):
    """Promises of the README for five seeds, counted here from the stored points of one."""
    config = json.loads((run / "config.json").read_text())
    samples = np.load(run / "samples.npz")
    before, after = (torch.tensor(samples[points]) for points in ("before", "chain"))
    assert worlds.on_data(RING, after).float().mean() >= 0.95  # 4,000 samples err by 0.006 at most
    score_before, score_after = worlds.reach(before), worlds.reach(after)
    gain = config["optimum"]["score_star"] - score_before.mean()
    assert (score_after.mean() - score_before.mean()) / gain >= 0.70
    assert (score_after > score_before).float().mean() >= 0.85
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {row["loss_name"]: row["attained_share"] for row in rows}
    assert len(rows) == len(last) * config["epochs"]
    if name == "ddpm":
        assert last["chain"] > last["eq14"] + 0.1


def check_share_by_quadrature(run, name):
    """The stored policy, by an evaluation that samples nothing, against the last of the log."""
    config = json.loads((run / "config.json").read_text())
    model, numbers = train_toy.MODELS[name], config["optimum"]
    schedule = model.make_schedule(config["num_steps"], 1.0)
    policy = ddpm.Adapter(UNTRAINED[name](), schedule, RING, alpha_bars=model.alpha_bars)
    policy.load_state_dict(torch.load(run / "policy.pt")["chain"])
    score, kl = optimum.evaluate(
        policy, policy.reference, schedule, score=worlds.reach, spacing=0.1
    )
    share = (score - 0.3 * kl - numbers["j_ref"]) / (numbers["j_gauss"] - numbers["j_ref"])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert share == pytest.approx(last["attained_share"], abs=0.1)  # 400 chains: 3 standard errors
    assert share >= 0.90


def check_reference_samples_the_ring(run):
    x = torch.tensor(np.load(run / "samples.npz")["before"])
    assert worlds.on_data(RING, x).float().mean() >= 0.95  # 0.959 here, with error 0.003
    share = torch.cdist(x, RING.means).argmin(1).bincount(minlength=8) / len(x)
    assert (share - 1 / 8).abs().max() < 0.03  # the error of a share is 0.005


def check_reference_is_close_to_the_exact_denoiser(run, name):
    """Its training loss exceeds the exact denoiser's by the mean of |eps_theta - eps|^2."""
    model, learned = train_toy.MODELS[name], UNTRAINED[name]()
    exact = worlds.exact_denoiser(RING, model.alpha_bars)
    prefix = "reference.denoiser."
    stored = torch.load(run / "policy.pt")["chain"].items()
    learned.load_state_dict({k.removeprefix(prefix): v for k, v in stored if prefix in k})
    n, generator = 20_000, torch.Generator().manual_seed(9)
    x_0 = worlds.sample_data(RING, n, generator)
    noise = torch.randn(n, 2, generator=generator)
    for time in model.make_schedule(20, 1.0).timesteps.tolist():
        ab = model.alpha_bars[time].float()
        x = ab.sqrt() * x_0 + (1 - ab).sqrt() * noise
        times = torch.full((n,), time)
        with torch.no_grad():
            excess = (learned(x, times) - exact(x, times)).square().mean()
        assert excess < 0.1**2, time  # a tenth of the noise, whose variance is 1
