"""bench_sd.py on tiny models: its counters against closed forms and torch's own, its sides against each other."""

import json
from functools import partial

import bench_sd
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import sd_demo
from toy import plots
from toy.emoji_sd import models

UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 32,
    "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 8), "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def tiny(tmp_path_factory):
    """Small models in place of both, on the CPU; the folder of one."""
    folder, words = tmp_path_factory.mktemp("tiny"), models.tokenizer()
    torch.manual_seed(0)
    parts = AutoencoderKL(**VAE), models.text_encoder(words, tiny=True), UNet2DConditionModel(sample_size=8, **UNET)
    models.pipeline(*parts).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        for module, name, value in (
            (sd_demo, "EMOJI", folder),
            (bench_sd, "SD15_UNET", UNET),
            (bench_sd, "SD15_VAE", VAE),
            (bench_sd, "LATENTS", 8),
            (bench_sd, "SMALL", 8),
        ):
            patch.setattr(module, name, value)
        yield folder


@pytest.fixture(scope="module")
def setup(tiny):
    return bench_sd.Setup("--model", str(tiny))


def gradient(bench, run):
    """Of all the updates of a pass together; nothing moves."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        step = lambda: seen.append(torch.cat([w.grad.flatten() for w in bench.setup.weights]))  # noqa: E731
        patch.setattr(bench.setup.optimizer, "step", step)
        run()
    return sum(seen)


def test_all_structures_are_the_same_mathematics(setup):
    bench = bench_sd.Bench(setup, 2, 3)
    gradients = {side.name: gradient(bench, side.run) for side in bench_sd.training(bench)}
    ours = gradients[bench_sd.HERE]
    assert ours.norm() > 0
    for name, other in gradients.items():  # a LoRA that is still zero: Eq. 5 has the gradient of Eq. 14
        other = other / 2 if name == bench_sd.RELEASED else other  # a sum over pairs, not a mean
        assert (other - ours).norm() < 1e-3 * ours.norm(), name

    seven = bench_sd.of_seven(setup, 2)
    ours, _, released, _ = (gradient(side.bench, side.run) for side in seven)
    assert len(seven[0].bench.pairs) == 12
    assert (released / 12 - ours).norm() < 1e-3 * ours.norm()


def test_rows_are_what_the_structures_need(setup):
    def rows(sides):
        return {side.name: bench_sd.count(side)["rows"] for side in sides}

    found = rows(bench_sd.training(bench_sd.Bench(setup, 2, 2)))  # two chains of two rows for each pair and step
    assert found["here, previous"] == [0, 4, 0, 4]
    assert found["here, previous, checkpointed"] == [0, 4, 4, 4]
    assert found["here, initial"] == found["whole chain in pieces"] == [3, 4, 0, 4]  # the first state is the pair's
    assert found["here, initial, checkpointed"] == [3, 4, 4, 4]
    assert found["whole chain by autograd"] == [0, 4, 0, 4]
    released = [found[f"released structure, {how}"] for how in ("pair after pair", "batches like ours")]
    assert released == [[4, 4, 0, 4]] * 2
    found = list(rows(bench_sd.of_seven(setup, 1)).values())  # 7 chains; four for each of 12 pairs; of 21
    assert found == [[0, 14 / 12, 0, 14 / 12], [0, *[14 / 12] * 3], [4, 4, 0, 4], [7, 7, 0, 7]]
    here, *stock, scored = rows(bench_sd.sampling(bench_sd.Bench(setup, 2, 2))).values()
    assert here == scored == [3, 0, 0, 0] and stock == [[4, 0, 0, 0]] * 2


def test_operations_are_those_of_torchs_counter_and_attention_counts(setup):
    bench = bench_sd.Bench(setup, 1, 2)
    attention = {op: bench_sd.FORMULAS[op].__wrapped__ for op in bench_sd.FORMULAS.keys() - flop_registry.keys()}
    with FlopCounterMode(display=False, custom_mapping=attention) as theirs:
        bench.ours("initial")
    ours = bench_sd.count(bench_sd.Side("", bench, partial(bench.ours, "initial")))["gflop"]
    assert ours == pytest.approx(theirs.get_total_flops() / 2e9)
    q = torch.randn(2, 3, 64, 8, requires_grad=True)
    with bench_sd.Meter("cpu") as meter:
        out = F.scaled_dot_product_attention(q, q, q)
        assert meter.flops == 2 * 2 * (2 * 3 * 64 * 64 * 8)  # two products
        out.sum().backward()
    assert meter.flops == 7 * 2 * (2 * 3 * 64 * 64 * 8)  # five more, one of them done again


def test_bytes_are_counted_while_they_are_alive():
    old = torch.ones(100)
    with bench_sd.Meter("cpu") as meter:
        a = old * 2
        b = a.view(10, 10)[1:] + 1  # 360 bytes; views take nothing
        del a
        assert (meter.now, meter.most) == (360, 760)
        old.add_(1)
        c = torch.ones(50)
        assert (meter.now, meter.most) == (560, 760)
        del b, c
    assert (meter.now, meter.most) == (0, 760)

    weight, x = torch.ones(10, requires_grad=True), torch.ones(10)
    held = bench_sd.Held([weight])
    with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda kept: kept.tensor):
        y = (x * weight).exp()  # keeps x and the result
        z = x * weight  # x again
        assert held.now == 80
        del y
        assert held.now == 40
        z.sum().backward()
    assert (held.now, held.most) == (0, 80)


def test_memory_is_flat_here_and_grows_in_autograd_over_the_chain(setup, monkeypatch):
    monkeypatch.setattr(bench_sd, "LENGTHS", (2, 3, 5))
    curves = bench_sd.curves(setup)["peak_gb"]
    chains = 3 * (2 * 4 * 8 * 8 * 4) / 1e9  # three more states of two chains
    for name in bench_sd.CURVES[:3]:
        assert max(curves[name]) - min(curves[name]) < 2 * chains
    low, middle, high = curves[bench_sd.AUTOGRAD]
    assert high - middle == pytest.approx(2 * (middle - low), rel=0.01) and middle - low > 10 * chains
    plain, checkpointed, *_ = map(bench_sd.count, bench_sd.training(bench_sd.Bench(setup, 1, 2))[:2])
    assert checkpointed["held_gb"] < checkpointed["grown_gb"] < plain["grown_gb"]
    assert checkpointed["held_gb"] < plain["held_gb"] / 2 and plain["held_gb"] < plain["grown_gb"]


def test_what_is_counted_without_data_is_what_a_pass_with_data_takes(setup):
    def counts(setup):
        bench = bench_sd.Bench(setup, 1, 2)
        return [bench_sd.count(side) for side in bench_sd.training(bench)[:2] + bench_sd.sampling(bench)[::3]]

    with bench_sd.random_sd15(8):
        real = counts(bench_sd.Setup(*bench_sd.ONE_PAIR, "--precision", "bf16"))
    with bench_sd.random_sd15(8, weightless=True):
        counted = counts(bench_sd.Setup(*bench_sd.ONE_PAIR))
    for one, other in zip(real, counted, strict=True):
        assert one["rows"] == other["rows"] and one["gflop"] == pytest.approx(other["gflop"])
        assert one["held_gb"] == pytest.approx(other["held_gb"], rel=0.02)
        assert one["grown_gb"] == pytest.approx(other["grown_gb"], abs=3e-5)  # latents and images always have data


def test_ratios_are_those_of_neighbours_for_each_pair_and_step(setup, monkeypatch):
    bench, clock = bench_sd.Bench(setup, 2, 3), [0.0]
    monkeypatch.setattr(bench_sd.time, "perf_counter", lambda: clock[0])
    speeds = iter([9, 9, 1, 2, 2, 8, 3, 3])  # a round to warm up, then three

    def run():
        clock[0] += 6 * next(speeds)

    first, second = bench_sd.race([bench_sd.Side("", bench, run)] * 2, 3)
    assert first == {"seconds": [2, 1, 3], "ratio": [1, 1, 1]}
    assert second == {"seconds": [3, 2, 8], "ratio": [0.5, 0.25, 1]}


def test_one_command_writes_numbers_tables_and_a_figure(tmp_path, capsys, monkeypatch):
    bench = bench_sd.Bench
    short = lambda setup, groups, T, **of: bench(setup, min(groups, 2), 1, **of)  # noqa: E731
    monkeypatch.setattr(bench_sd, "Bench", short)
    monkeypatch.setattr(bench_sd, "combinations", lambda *_: [(0, 1), (0, 2)])  # of 21
    monkeypatch.setattr(bench_sd, "LENGTHS", (1,))
    monkeypatch.setattr(bench_sd.os, "getloadavg", lambda: (0.7, 0.1, 0.1))
    out = tmp_path / "bench.json"
    gpu = {"cuda": True, "versions": "", "repeats": 1, "models": {}}
    out.write_text(json.dumps({"some GPU": gpu}))
    bench_sd.main(["--repeats", "1", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results.pop("some GPU") == gpu
    ((machine, result),) = results.items()
    emoji, sd15 = result["models"]["emoji"], result["models"]["SD 1.5"]
    assert all(row["seconds"][0] > 0 and 0 < row["share"] for row in emoji["rows"])
    assert all(row["seconds"] is None is row["share"] and row["peak_gb"] > 0 for row in sd15["rows"])
    assert {"training: channels_last", "sampling: bf16"} < {row["name"] for row in emoji["levers"]}
    assert sd15["epoch"]["labels"] == 1 and sd15["planned"][1] <= sd15["planned"][0]
    assert sd15["small"]["without"] == pytest.approx(sd15["small"]["with data"], abs=3e-5)
    text = out.with_suffix(".md").read_text()
    said = capsys.readouterr().out
    assert f"emoji, 4 pairs in a batch: {machine}" in text and text.count("| here, previous | ") == 2
    assert all(line in said for line in text.splitlines() if line.startswith("|"))
    for words in (f"{bench_sd.RELEASED} | {bench_sd.UNKNOWN} | ", "| peak, GB | 0.", " | yes |"):
        assert words in text
    assert "start 0.70, so other programs ran: TIME IT AGAIN" in text
    assert "A CUDA GPU" not in text and "A CUDA GPU" in bench_sd.report(results)
    assert out.with_suffix(".png").exists()


def test_the_figure_draws_what_grows_and_leaves_out_what_did_not_fit(tmp_path, monkeypatch):
    close, figures = plt.close, []
    monkeypatch.setattr(plt, "close", figures.append)
    peaks = {"a": [2.0, 2, 2], "b": [1.0, 1, 1], "c": [2.1, 2.1, 2.1], "d": [3.0, 5.0, None]}
    path = plots.draw_cost({"T": [2, 4, 8], "peak_gb": peaks}, "SD 1.5", tmp_path / "cost.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axis,) = figures[0].axes
    close(figures[0])
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}
    assert drawn["a: 2 GB"] == ([2, 4, 8], [2, 2, 2]) and drawn["d: 1 GB a step"] == ([2, 4], [3, 5])
    assert any(x == [2, 20] and np.allclose(y, [3, 21]) for x, y in drawn.values())
