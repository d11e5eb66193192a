"""sd/bench_cost.py on tiny models: its counters against closed forms and torch's own, and its sides
against each other; what is committed against its tables."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sd_helpers import make_pipeline
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import sd_demo
from sd import bench_cost, options
from sd.bench_models import ARCHITECTURES, build, small, without_data
from sd.pipeline import load_pipeline

UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD15_COUNTED = "SD 1.5, 512x512, 1 pair in a batch, T = 2: counted"


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The same UNet in a folder."""
    folder = tmp_path_factory.mktemp("emoji")
    make_pipeline(sample_size=8, **UNET).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "EMOJI", folder)
        yield folder


@pytest.fixture(scope="module")
def setup(emoji):
    return bench_cost.Setup(partial(load_pipeline, str(emoji), "fp32"))


def gradient(bench, run):
    """Of all the updates of a pass together; the weights stay."""
    gradients = []

    def step():
        gradients.append(torch.cat([weight.grad.flatten() for weight in bench.setup.lora]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.setup.optimizer, "step", step)
        run()
    return sum(gradients)


def test_all_structures_are_the_same_mathematics(setup):
    bench = bench_cost.Bench(setup, 2, 3)
    gradients = {side.name: gradient(bench, side.run) for side in bench_cost.training(bench)}
    assert len(gradients) == 9
    gradients["released structure, pair after pair"] /= 2  # a sum over pairs, not a mean
    ours = gradients[bench_cost.HERE]
    assert ours.norm() > 0
    for name, other in gradients.items():  # a LoRA that is still zero: Eq. 5's gradient is Eq. 14's
        assert (other - ours).norm() < 1e-3 * ours.norm(), name

    here, _, released, _ = bench_cost.groups_of_seven(setup)
    assert len(here.bench.pairs) == 12
    ours, other = (gradient(side.bench, side.run) for side in (here, released))
    assert (other / 12 - ours).norm() < 1e-3 * ours.norm()


def test_operations_are_those_of_torchs_counter_and_attention_counts(setup):
    bench = bench_cost.Bench(setup, 1, 2)
    lacking = bench_cost.FORMULAS.keys() - flop_registry.keys()
    attention = {op: bench_cost.FORMULAS[op].__wrapped__ for op in lacking}
    side = bench_cost.Side("", bench, partial(bench.ours, reference="initial"))
    side.prepare()
    with FlopCounterMode(display=False, custom_mapping=attention) as theirs:
        side.run()
    ours = bench_cost.count(side)["gflop"]
    assert ours == pytest.approx(theirs.get_total_flops() / 2e9)

    q = torch.randn(2, 3, 64, 8, requires_grad=True)
    with bench_cost.Meter("cpu") as meter:
        out = F.scaled_dot_product_attention(q, q, q)
        assert meter.flop == 2 * 2 * (2 * 3 * 64 * 64 * 8)  # two products
        out.sum().backward()
    assert meter.flop == 7 * 2 * (2 * 3 * 64 * 64 * 8)  # five more, one of them done again


def test_bytes_are_counted_while_they_are_alive():
    old = torch.ones(100)
    with bench_cost.Meter("cpu") as meter:
        a = old * 2
        b = a.view(10, 10)[1:] + 1  # 360 bytes; views take nothing
        del a
        assert (meter.now, meter.most) == (360, 760)
        old.add_(1)
        c = torch.ones(50)
        assert (meter.now, meter.most) == (560, 760)
        del b, c
    assert (meter.now, meter.most) == (0, 760)


def test_memory_is_flat_here_and_grows_in_autograd_over_the_chain(setup, monkeypatch):
    monkeypatch.setattr(bench_cost, "LENGTHS", (2, 3, 5))
    peaks = bench_cost.memory_by_length(setup)["peak_gb"]
    low, middle, high = peaks.pop(bench_cost.AUTOGRAD)
    states = 3 * (2 * 4 * 8 * 8 * 4) / 1e9  # of three more steps of two trajectories
    assert all(max(peak) - min(peak) < 2 * states for peak in peaks.values())
    assert high - middle == pytest.approx(2 * (middle - low), rel=0.01)
    assert middle - low > 10 * states


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_counted_without_data_is_what_a_pass_with_data_takes(name):
    def counts(load, **settings):
        bench = bench_cost.Bench(bench_cost.Setup(load, **settings), 1, 2)
        sides = [*bench_cost.training(bench)[:2], bench_cost.sampling(bench)]
        return [bench_cost.count(side) for side in sides]

    architecture = small(ARCHITECTURES[name])
    real = counts(partial(build, architecture, torch.bfloat16, "cpu"), precision="bf16")
    with without_data(architecture) as load:
        counted = counts(load)
    for one, other in zip(real, counted, strict=True):
        assert one["gflop"] == pytest.approx(other["gflop"])
        # Text and latents are real: some kB, which count beside so small a model
        assert one["grown_gb"] == pytest.approx(other["grown_gb"], rel=0.05)


@pytest.mark.slow
def test_the_operations_of_an_epoch_are_those_of_a_run(tmp_path, monkeypatch, no_figures):
    narrow = small(bench_cost.SD15)
    monkeypatch.setattr(bench_cost, "SD15", narrow)
    settings = {"prompts_per_epoch": 2, "images_per_prompt": 3, "num_steps": 4, "replay": 1}
    settings |= {"eval_images": 2, "eval_every": 1, "skip_last": 1, "guidance_scale": 5}
    flop = []
    for epochs in (1, 2):
        pipe = build(narrow, torch.float32, "cpu")
        out, new = tmp_path / str(epochs), {"objective": "compressibility", "prompts": ["a cat"]}
        with bench_cost.Meter("cpu") as meter:
            sd_demo.run(model=pipe, out=out, epochs=epochs, max_kl=1e6, **new, **settings)
        flop.append(meter.flop)
    monkeypatch.setitem(bench_cost.FIXED, "guidance_scale", settings.pop("guidance_scale"))
    counted = bench_cost.default_run(**settings)["checkpointed"]["pflop"]
    assert counted * 1e15 == pytest.approx(flop[1] - flop[0], rel=1e-3)


def test_hours_are_operations_over_a_share_of_the_cards_rate(monkeypatch):
    monkeypatch.setattr(bench_cost, "SHARE_OF_PEAK", 0.5)
    row = bench_cost.card_row("", "", {"pflop": 3, "peak_gb": 1, "epochs": 12}, (8, 50, 2))
    assert (row["minutes an epoch"], row["hours"]) == ("1.0", "0.2")  # 3e15 / (2 x 25e12) seconds


def test_ratios_are_those_of_neighbours_for_each_pair_and_step(setup, monkeypatch):
    bench, clock = bench_cost.Bench(setup, 2, 3), [0.0]
    monkeypatch.setattr(bench_cost.time, "perf_counter", lambda: clock[0])
    speeds = iter([9, 9, 1, 2, 2, 8, 3, 3])  # a round to warm up, then three

    def run():
        clock[0] += 6 * next(speeds)

    first, second = bench_cost.race([bench_cost.Side("", bench, run)] * 2, 3)
    assert first == {"seconds": [2, 1, 3], "ratio": [1, 1, 1]}
    assert second == {"seconds": [3, 2, 8], "ratio": [0.5, 0.25, 1]}


@pytest.mark.slow
@pytest.mark.usefixtures("emoji")
def test_one_command_writes_numbers_tables_and_a_figure(tmp_path, monkeypatch):
    bench = bench_cost.Bench

    def short(setup, groups, T, **group):
        return bench(setup, min(groups, 2), 1, **group)

    narrow = {name: small(architecture) for name, architecture in ARCHITECTURES.items()}
    monkeypatch.setattr(bench_cost, "ARCHITECTURES", narrow)
    monkeypatch.setattr(bench_cost, "SD15", narrow["SD 1.5"])
    monkeypatch.setattr(bench_cost, "Bench", short)
    monkeypatch.setattr(bench_cost, "combinations", lambda *_: [(0, 1), (0, 2)])  # of 21
    out, mark = tmp_path / "cost.json", bench_cost.MARK
    row = {"name": "", "gflop": 0, "grown_gb": 0, "peak_gb": 0}
    gpu = {"rows": [row], "versions": "", "rounds": 1, "load": 0}
    out.write_text(json.dumps({"some GPU": gpu}))
    out.with_suffix(".md").write_text(f"# By hand\n{mark}old\n{mark}also by hand\n")
    bench_cost.main(["--rounds", "1", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["some GPU"] == gpu
    _, emoji, *counted, default = results.values()
    assert all(row["seconds"][0] > 0 for row in emoji["rows"])
    assert len({row["name"] for row in emoji["rows"]}) == len(emoji["rows"])
    assert [len(part["rows"]) for part in counted] == [11, 3, 3]
    for part in counted:
        assert all("seconds" not in row and row["peak_gb"] > 0 for row in part["rows"])
    assert default["runs"].keys() == {"checkpointed", "kept", "authors"}
    before, tables, after = out.with_suffix(".md").read_text().split(mark)
    assert (before, after) == ("# By hand\n", "also by hand\n")
    assert tables == bench_cost.tables(results) and tables.count("| here, previous |") == 4
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_page_has_the_committed_numbers_and_they_reach_their_targets():
    results = json.loads((bench_cost.RESULTS / "cost.json").read_text())
    page = (bench_cost.RESULTS / "cost.md").read_text()
    assert page.split(bench_cost.MARK)[1] == bench_cost.tables(results)

    sd15 = results[SD15_COUNTED]
    rows = {row["name"]: row for row in sd15["rows"]}
    plain, checkpointed = rows["here, previous"], rows["here, previous, checkpointed"]
    assert plain["peak_gb"] < 6 and checkpointed["peak_gb"] < 5
    assert checkpointed["grown_gb"] < plain["grown_gb"] / 3
    peaks = sd15["memory"]["peak_gb"]
    assert max(peaks["here, previous"]) < 1.01 * min(peaks["here, previous"])
    for part in (part for title, part in results.items() if title.startswith("Emoji")):
        ratio = {row["name"]: row["ratio"][0] for row in part["rows"]}
        assert ratio["released structure, pair after pair"] < 0.6
        assert ratio["K = 7, 3 tagged: released, the 12 pairs"] < 0.12
