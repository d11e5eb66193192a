"""Images that are not finite stop a run in one sentence, and leave nothing of themselves."""

import json
import math

import pytest
import torch
from PIL import Image
from sd_helpers import PROMPTS, make_pipeline, read_rows, run, typed

import sd_demo
from sd import UserError, files, pipeline
from sd.model import PipelinePolicy


def broken_vae(folder, part: str):
    pipe = make_pipeline()
    getattr(pipe.vae, part).conv_out.bias.data.fill_(math.nan)
    pipe.save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def nothing_of_them_is_kept(out) -> None:
    assert read_rows(out / "labels.jsonl") == read_rows(out / "metrics.jsonl") == []
    for name in ("images", "latents", "lora", "checkpoint"):
        assert not list((out / name).iterdir()), name


def test_a_vae_that_gives_nan_stops_the_run_before_anything_is_trained(tmp_path, scorers):
    folder, out = broken_vae(tmp_path / "model", "decoder"), tmp_path / "run"
    with pytest.raises(UserError) as stop:
        run(folder, out, f"{scorers}:brightness")
    message = str(stop.value)
    assert message.startswith("2 of 2 images are not finite: number 1 (")
    assert PROMPTS[0] in message and PROMPTS[1] in message
    assert "the VAE's decoder gave in fp32" in message and f"{out} has no model yet" in message
    nothing_of_them_is_kept(out)


def test_latents_that_break_after_an_epoch_keep_the_epoch(
    tiny, scorers, tmp_path, monkeypatch, no_figures
):
    """One image of the network is enough, in an evaluation or in training."""
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", "--epochs 1")
    kept = {path: path.read_bytes() for path in out.rglob("*.*") if path.suffix != ".json"}
    kept = {path: content for path, content in kept.items() if "held_out" not in path.name}
    call = PipelinePolicy.__call__

    def broken(policy, x, *rest):
        output = call(policy, x, *rest)
        if not policy.reference and len(x) > 1:
            output[1, 0, 0, 0] = math.nan
        return output

    monkeypatch.setattr(PipelinePolicy, "__call__", broken)
    for flag, count in (("--evaluate", 2), ("--resume", 4)):
        with pytest.raises(UserError) as stop:
            sd_demo.run(**typed(f"{flag} {out} --epochs 2"))
        message = str(stop.value)
        assert f"1 of {count} images are not finite: number 2 (" in message
        assert "the network gave in fp32" in message and "lower --lr" in message
        assert f"good epoch: --init-lora {out / 'lora'} begins with it." in message
        assert {path: path.read_bytes() for path in kept} == kept
    assert not (out / "evaluation.json").exists() and not list(out.glob("*/e002*"))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_images_of_labels_that_cannot_be_encoded_are_refused(tmp_path, part):
    folder = broken_vae(tmp_path / "model", part)
    for n in range(2):
        Image.new("RGB", (64, 64), (100 * n,) * 3).save(tmp_path / f"{n}.png")
    row = {"prompt": "a cat", "chosen": "0.png", "rejected": "1.png"}
    (tmp_path / "labels.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as stop:
        run(folder, tmp_path / "run", None, prompts=None, labels=tmp_path / "labels.jsonl")
    error = str(stop.value)
    assert f"the VAE's {part} gave in fp32" in error
    assert ("0.png" if part == "encoder" else "a blank image") in error
    nothing_of_them_is_kept(tmp_path / "run")


def test_the_remedy_is_another_precision_where_there_is_one():
    broken = torch.tensor([[1.0], [math.inf], [2.0], [math.nan]])
    for dtype, remedy in (
        (torch.float16, "--precision fp32"),
        (torch.bfloat16, "--precision fp32"),
        (torch.float32, "another --model"),
    ):
        sentence = rf"2 of 4 images.*number 2 \(b\), number 4 \(d\).*{remedy}"
        with pytest.raises(UserError, match=sentence):
            pipeline.check_finite(broken.to(dtype), [*"abcd"], "the VAE", dtype)
    pipeline.check_finite(broken[:1], ["a"], "the VAE", torch.float32)


def test_numbers_that_are_not_finite_are_null_in_every_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    files.append(file, [{"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}}])
    assert read_rows(file) == [{"a": None, "b": [1.0, None], "c": {"d": None}}]
    files.save_json(tmp_path / "a.json", {"a": (math.nan, 2)})
    assert files.read_json(tmp_path / "a.json") == {"a": [None, 2]}
