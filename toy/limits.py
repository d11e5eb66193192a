"""Three limits: J_G as T grows, where very many labels lead, and what becomes of training the reference's own weights.

    python toy/limits.py            # the committed numbers: half an hour on two cores; resumes where it stopped
    python toy/limits.py --quick    # the same path with tiny budgets

--out gets limits.json and limits.md.
"""

import copy
import sys
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: this file is run as a script

import d3po
from toy import compare, optimum, runs
from toy.align import align, by_pairs
from toy.ddpm import Adapter, mean_slope
from toy.worlds import ALPHA_BARS, MIXTURES, SCORES, exact_denoiser

EPOCHS = {1.0: 350, 0.3: 250}  # of the runs with many labels, by beta: a larger beta needs more labels
BETAS, SEEDS = tuple(EPOCHS), (0, 1, 2)
MANY_LABELS = {"whole chain, stored pairs": 4e-3, "Eq. 14 (D3PO)": 1e-3}  # method of compare.py: step size


def main(argv: list[str] | None = None) -> None:
    parser = runs.Parser(prog="limits.py", description=__doc__.splitlines()[0])
    parser.set_defaults(epochs=None)
    parser.add_argument("--pairs", type=int, default=1024, help="labels an epoch of the runs with many labels")
    args = compare.parse_budget(parser, argv)
    torch.set_num_threads(1)
    result = {
        "command": "python toy/limits.py" + (" --quick" if args.quick else ""),
        "steps": steps((5, 10) if args.quick else (5, 10, 20, 50, 100)),
        "blow_up": blow_up(args),
        "many_labels": many_labels(args),
    }
    runs.save_json(args.out / "limits.json", compare.rounded(result))
    (args.out / "limits.md").write_text(tables(result))
    print(tables(result))


def steps(numbers: tuple[int, ...]) -> list[dict]:
    """J_ref, J_G and J* on the ring with the exact denoiser, for T denoising steps: J_G tends to J* as T grows."""
    reference = exact_denoiser(MIXTURES["ring"])
    rows = []
    for num_steps in tqdm(numbers, "T against J_G"):
        schedule = d3po.make_schedule(ALPHA_BARS, num_steps)
        for beta in BETAS:
            exact = optimum.solve(reference, schedule, SCORES["reach"], beta).numbers()
            rows.append({"beta": beta, "T": num_steps, **exact})
    return sorted(rows, key=lambda row: -row["beta"])


def settings(beta: float, args: Namespace) -> tuple:
    epochs = args.epochs or EPOCHS[beta]
    world = {"mixture": "ring", "preference": "reach", "beta": beta, "num_steps": 20, "epochs": epochs}
    world["average"] = False  # so many labels leave little noise in the weights
    return tuple((world | {name: getattr(args, name) for name in ("pairs", "pretrain_steps")}).items())


def many_labels(args: Namespace) -> list[dict]:
    """Where methods of compare.py end with very many labels, their beta being that of J: mean and sd over the seeds."""
    worlds = [(seed, settings(beta, args)) for beta in BETAS for seed in SEEDS]
    compare.run_all("references", compare.prepare, worlds, args)
    jobs = [
        compare.Job(name, lr, dict(world)["beta"], seed, world)
        for name, lr in MANY_LABELS.items()
        for seed, world in worlds
    ]
    compare.run_all("many labels", compare.train, jobs, args)
    results = [exact_end(job, args.work) for job in tqdm(jobs, "exact J")]
    rows = []
    for name in MANY_LABELS:
        for beta in BETAS:
            mine = [r for job, r in zip(jobs, results, strict=True) if (job.method, job.strength) == (name, beta)]
            labels = dict(settings(beta, args))["epochs"] * args.pairs
            rows.append({"method": name, "beta": beta, "labels": labels, **compare.over(mine)})
    return rows


def exact_end(job: compare.Job, work: Path) -> dict:
    """Share, score and KL of the policy that a finished job left, by quadrature."""
    reference, numbers = compare.load(job.seed, job.settings, work)
    schedule = d3po.make_schedule(ALPHA_BARS, 20)
    policy = Adapter(reference, schedule, MIXTURES["ring"])
    policy.load_state_dict(torch.load(compare.place(work, "policy", job)))
    score, kl = optimum.evaluate(policy, reference, schedule, SCORES["reach"])
    share = optimum.attained_share(score - job.strength * kl, Namespace(**numbers))
    return {"share": share, "score": score, "kl": kl}


def blow_up(args: Namespace) -> list[dict]:
    """KL of single steps, epoch by epoch, when Eq. 14 trains all weights of the reference, or an adapter on it.

    beta 0.3, lr 3e-3, 256 pairs an epoch, seed 0: a setting in which the first does not survive.
    """
    world = (0, settings(0.3, args))
    compare.prepare(world, args.work)
    reference, _ = compare.load(*world, args.work)
    schedule = d3po.make_schedule(ALPHA_BARS, 20)
    slope = (mean_slope(schedule) / schedule.sigma).abs()

    eq14 = by_pairs(d3po.d3po_losses, 0.3)
    rows = []
    for name, policy in (
        ("all weights", copy.deepcopy(reference).requires_grad_(True)),
        ("adapter", Adapter(reference, schedule, MIXTURES["ring"])),
    ):
        torch.manual_seed(0)
        training = align(policy, reference, schedule, SCORES["reach"], d3po.bradley_terry, eq14, True, 3e-3, 60, 256)
        row = {"trains": name, "slope_over_sigma": slope.tolist(), "kl_by_epoch_and_step": []}
        try:
            for _, done in zip(range(3 if args.quick else 60), training, strict=False):
                row["kl_by_epoch_and_step"].append((done.new.chains.log_prob - done.new.ref_log_prob).mean(1).tolist())
        except FloatingPointError as error:
            row["ended"] = str(error)
        rows.append(row)
    return rows


def tables(result: dict) -> str:
    """The three answers in Markdown."""
    lines = ["| beta | T | J_ref | J_G | J* | (J_G - J_ref) / (J* - J_ref) |", "| --- | --- | --- | --- | --- | --- |"]
    for row in result["steps"]:
        share = (row["j_gauss"] - row["j_ref"]) / (row["j_star"] - row["j_ref"])
        numbers = " | ".join(f"{row[key]:.3f}" for key in ("j_ref", "j_gauss", "j_star"))
        lines.append(f"| {row['beta']:g} | {row['T']} | {numbers} | {share:.3f} |")
    lines += ["", "| method | beta | labels | attained share | score | KL (nats) |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in result["many_labels"]:
        cells = " | ".join(f"{row[key]['mean']:.3f} ± {row[key]['sd']:.3f}" for key in ("share", "score", "kl"))
        lines.append(f"| {row['method']} | {row['beta']:g} | {row['labels']:,} | {cells} |")
    lines += ["", "| Eq. 14 trains | KL of step i = 18 | largest KL of another step | ended |"]
    lines += ["| --- | --- | --- | --- |"]
    for row in result["blow_up"]:
        kl = row["kl_by_epoch_and_step"]
        end = row.get("ended", f"well, after {len(kl)} epochs")
        lines.append(f"| {row['trains']} | {kl[-1][18]:.2f} | {max(kl[-1][:18] + kl[-1][19:]):.2f} | {end} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
