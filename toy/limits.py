"""Three limits: J_G as T grows, very many labels, and training the reference's own weights.

    python -m toy.limits            # the committed numbers: half an hour on two cores; resumes
    python -m toy.limits --quick    # the same path with tiny budgets

--out gets limits.json, and the tables of the page limits.md between its marks.
"""

import argparse
import copy
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import d3po
from toy import compare, optimum
from toy.align import align, pair_loss
from toy.ddpm import Adapter, mean_slope
from toy.worlds import ALPHA_BARS, MIXTURES, SCORES, exact_denoiser

MARK = "<!-- python -m toy.limits writes what is between these two lines -->\n"
EPOCHS = {1.0: 350, 0.3: 250}  # of runs with many labels, by beta: a larger one needs more labels
STEPS, BETAS, SEEDS = (5, 10, 20, 50, 100), tuple(EPOCHS), (0, 1, 2)
QUICK_STEPS, QUICK_BETAS, QUICK_SEEDS = (5,), (0.3,), (0,)
MANY_LABELS = {"whole chain, stored pairs": 4e-3, "Eq. 14 (D3PO)": 1e-3}  # method: step size


def main(argv: list[str] | None = None) -> None:
    parser = compare.new_parser("python -m toy.limits", __doc__.splitlines()[0])
    parser.set_defaults(epochs=None)
    parser.add_argument("--pairs", type=int, default=1024, help="labels an epoch, where many")
    args = compare.parse_budget(parser, argv)
    torch.set_num_threads(1)
    result = {
        "command": "python -m toy.limits" + (" --quick" if args.quick else ""),
        "steps": steps(args),
        "blow_up": blow_up(args),
        "many_labels": many_labels(args),
    }
    text = json.dumps(compare.rounded(result), indent=2) + "\n"
    (args.out / "limits.json").write_text(text)
    compare.write_tables(args.out / "limits.md", MARK, tables(result))
    print(*tables(result), sep="\n")


def steps(args: argparse.Namespace) -> list[dict]:
    """J_ref, J_G and J* on the ring with the exact denoiser: J_G tends to J* as T grows."""
    reference, score = exact_denoiser(MIXTURES["ring"]), SCORES["reach"]
    betas = QUICK_BETAS if args.quick else BETAS
    numbers = QUICK_STEPS if args.quick else STEPS
    rows = []
    for beta, num_steps in tqdm(list(itertools.product(betas, numbers)), "T against J_G"):
        schedule = d3po.make_schedule(ALPHA_BARS, num_steps)
        exact = optimum.solve(reference, schedule, score, beta=beta)
        rows.append({"beta": beta, "T": num_steps, **exact.numbers()})
    return rows


def settings(beta: float, args: argparse.Namespace) -> dict:
    return {
        "mixture": "ring",
        "preference": "reach",
        "beta": beta,
        "num_steps": 20,
        "epochs": args.epochs or EPOCHS[beta],
        "average": False,  # so many labels leave little noise in the weights
        "pairs": args.pairs,
        "pretrain_steps": args.pretrain_steps,
    }


def many_labels(args: argparse.Namespace) -> list[dict]:
    """Where methods of compare.py end with very many labels, their beta being that of J."""
    betas = QUICK_BETAS if args.quick else BETAS
    seeds = QUICK_SEEDS if args.quick else SEEDS
    worlds = [(seed, settings(beta, args)) for beta in betas for seed in seeds]
    compare.run_all(compare.prepare, worlds, args, title="references")
    jobs = [
        compare.Job(name, lr, hyperparameter=world["beta"], seed=seed, settings=world)
        for name, lr in MANY_LABELS.items()
        for seed, world in worlds
    ]
    compare.run_all(compare.train, jobs, args, title="many labels")
    ends = [(job, exact_end(job, args.work)) for job in tqdm(jobs, "exact J")]
    rows = []
    for name, beta in itertools.product(MANY_LABELS, betas):
        chosen = [end for job, end in ends if (job.method, job.hyperparameter) == (name, beta)]
        labels = settings(beta, args)["epochs"] * args.pairs
        row = {"method": name, "beta": beta, "labels": labels}
        rows.append(row | compare.mean_and_std(chosen))
    return rows


def exact_end(job: compare.Job, work: Path) -> dict:
    """Share, score and KL of the policy that a finished job left, by quadrature."""
    reference, numbers = compare.load(job.seed, job.settings, work)
    schedule = d3po.make_schedule(ALPHA_BARS, 20)
    policy = Adapter(reference, schedule, MIXTURES["ring"])
    policy.load_state_dict(torch.load(compare.cache_path(work, "policy", job)))
    score, kl = optimum.evaluate(policy, reference, schedule, score=SCORES["reach"])
    j = score - job.hyperparameter * kl
    share = optimum.attained_share(j, SimpleNamespace(**numbers))
    return {"share": share, "score": score, "kl": kl}


def blow_up(args: argparse.Namespace) -> list[dict]:
    """KL of single steps, epoch by epoch, where Eq. 14 trains all weights, or an adapter.

    beta 0.3, lr 3e-3, 256 pairs an epoch, seed 0: a setting in which the first does not survive.
    """
    world = (0, settings(0.3, args))
    compare.prepare(world, args.work)
    reference, _ = compare.load(*world, args.work)
    schedule = d3po.make_schedule(ALPHA_BARS, 20)
    slope = (mean_slope(schedule) / schedule.sigma).abs().tolist()
    policies = {
        "all weights": copy.deepcopy(reference).requires_grad_(True),
        "adapter": Adapter(reference, schedule, MIXTURES["ring"]),
    }
    rows = []
    for name, policy in policies.items():
        torch.manual_seed(0)
        training = align(
            policy,
            schedule,
            pair_loss(d3po.d3po_losses, beta=0.3),
            reference=reference,
            score=SCORES["reach"],
            label=d3po.bradley_terry,
            update_every="timestep",
            lr=3e-3,
            epochs=60,
            pairs=256,
        )
        row = {"trains": name, "slope_over_sigma": slope, "kl_by_epoch_and_step": []}
        try:
            for epoch in itertools.islice(training, 3 if args.quick else 60):
                log_ratio = epoch.new.trajectory.log_prob - epoch.new.ref_log_prob
                row["kl_by_epoch_and_step"].append(log_ratio.mean(1).tolist())
        except FloatingPointError as error:
            row["ended"] = str(error)
        rows.append(row)
    return rows


def tables(result: dict) -> list[str]:
    """The three answers in Markdown."""
    by_T = [
        "| beta | T | J_ref | J_G | J* | (J_G - J_ref) / (J* - J_ref) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["steps"]:
        share = (row["j_gauss"] - row["j_ref"]) / (row["j_star"] - row["j_ref"])
        numbers = " | ".join(f"{row[key]:.3f}" for key in ("j_ref", "j_gauss", "j_star"))
        by_T.append(f"| {row['beta']:g} | {row['T']} | {numbers} | {share:.3f} |")
    by_labels = [
        "| method | beta | labels | attained share | score | KL (nats) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["many_labels"]:
        numbers = [row[key] for key in ("share", "score", "kl")]
        cells = " | ".join(f"{number['mean']:.3f} ± {number['sd']:.3f}" for number in numbers)
        by_labels.append(f"| {row['method']} | {row['beta']:g} | {row['labels']:,} | {cells} |")
    by_weights = [
        "| Eq. 14 trains | KL of step i = 18 | largest KL of another step | ended |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["blow_up"]:
        *_, last = epochs = row["kl_by_epoch_and_step"]
        largest_other = max(last[:18] + last[19:])
        end = row.get("ended", f"well, after {len(epochs)} epochs")
        by_weights.append(f"| {row['trains']} | {last[18]:.2f} | {largest_other:.2f} | {end} |")
    return ["\n".join(lines) + "\n" for lines in (by_T, by_labels, by_weights)]


if __name__ == "__main__":
    main()
