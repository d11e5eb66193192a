"""sd/losses.py: what reaches the optimiser, against diffusers' noising and plain autograd."""

import pytest
import torch
from sd_helpers import PROMPTS, Loaded

import d3po
import sd_demo
from sd.labels import Label, scores_from_labels
from sd.model import load_model, make_accelerator, sample_held_out, sample_stock
from sd.replay import LabelledBatch
from sd.seeds import RandomPurpose, seeded_generator

SCORES = torch.tensor([1.0, 3.0, 0.5, 0.25])
PAIRS = torch.tensor([[1, 0], [2, 3]])


@pytest.fixture
def gradients_of(tiny):
    """The model, a batch, and the gradient of each update by a loss with a given order of steps."""

    def run(flags: str, order: list[int]):
        loaded = Loaded(tiny, f"{flags} --guidance-scale 1 --max-grad-norm 1e9")
        batch = loaded.sample()
        labelled = LabelledBatch(batch.trajectory, batch.cond, PAIRS, SCORES)
        gradients = []
        # In place of the optimiser's step: all updates are about the same weights
        loaded.optimizer.step = lambda: gradients.append(
            [w.grad.clone() for w in loaded.model.lora]
        )
        ref = loaded.reference_log_prob(batch)
        noise = seeded_generator(3)
        sd_demo.update_batch(loaded.run, labelled, ref_log_prob=ref, steps=order, generator=noise)
        return loaded, batch, gradients

    return run


def check(loaded, gradient, loss):
    expected = torch.autograd.grad(loss, loaded.model.lora)
    for found, wanted in zip(gradient, expected, strict=True):
        # float32, and sums in another order
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def denoising_errors(loaded, batch, i, chains, noise):
    """|eps - eps_theta|^2 of images of a batch, noised by the pipeline's own scheduler."""
    pipe, model = loaded.model.pipe, loaded.model
    x_0 = batch.trajectory.x[-1, chains]
    eps = torch.randn(x_0.shape, generator=noise)
    time = model.schedule.timesteps[i].expand(len(x_0))
    noised = pipe.scheduler.add_noise(x_0, eps, time)
    text = pipe.encode_prompt([batch.prompts[k] for k in chains], "cpu", 1, False)[0]
    output = model.network(noised, time, encoder_hidden_states=text)[0]
    return (eps - output).pow(2).sum((1, 2, 3))


@pytest.mark.parametrize("loss", ["sft", "reward-weighted"])
def test_images_are_denoised_with_their_prompts_and_weights(gradients_of, loss):
    order, same = [2, 0], seeded_generator(3)
    loaded, batch, gradients = gradients_of(f"--loss {loss} --beta {0.7 * (loss != 'sft')}", order)
    for i, gradient in zip(order, gradients, strict=True):
        if loss == "sft":
            expected = denoising_errors(loaded, batch, i, [1, 2], same).mean()
        else:
            weight = (SCORES / 0.7).exp() / (SCORES / 0.7).exp().mean()
            expected = (weight * denoising_errors(loaded, batch, i, range(4), same)).mean()
        check(loaded, gradient, expected)


@pytest.mark.parametrize("loss", ["ddpo", "dpok"])
def test_the_policy_gradient_has_the_scores_of_its_chains(gradients_of, loss):
    """Before any update the ratio is one and the KL flat, and what is left is REINFORCE."""
    order = [1, 2]
    loaded, batch, gradients = gradients_of(f"--loss {loss}", order)
    advantage = SCORES - SCORES.mean()
    if loss == "ddpo":
        advantage = advantage / SCORES.std()
    schedule, x = loaded.model.schedule, batch.trajectory.x
    for i, gradient in zip(order, gradients, strict=True):
        mean = d3po.policy_mean(loaded.model.sampler, schedule, i, x[i], batch.cond)
        log_prob = torch.distributions.Normal(mean, schedule.sigma[i]).log_prob(x[i + 1])
        check(loaded, gradient, -(advantage * log_prob.sum((1, 2, 3))).mean())


def test_scores_are_those_of_the_images_of_a_batch():
    def label(chains, scores):
        return Label(chains, {"scores": scores})

    cond = torch.zeros(4, dtype=torch.long)
    labels = [label([0, 1], [1.5, -2.0]), label([3, 2], [0.25, 4.0])]
    assert scores_from_labels(labels, cond).tolist() == [1.5, -2.0, 4.0, 0.25]
    for scores in (None, [[1.0, 2.0], [3.0, 4.0]]):  # people; several scorers
        assert scores_from_labels([label([0, 1], scores)], cond) is None


def test_held_out_noises_have_prompts_of_their_own(tiny):
    args, accelerator = Loaded(tiny, "--eval-images 5").args, make_accelerator("fp32")
    names = {"numbered": PROMPTS, "eval_prompts": PROMPTS[3:]}
    apart = load_model(args, PROMPTS[:3], accelerator, **names)
    alone = load_model(args, PROMPTS[3:], accelerator)
    (images, prompts, _), (same, _, _) = (
        sample_held_out(model, model.sampler, args, purpose=RandomPurpose.HELD_OUT)
        for model in (apart, alone)
    )
    assert prompts == [PROMPTS[3], PROMPTS[4]] * 2 + [PROMPTS[3]]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in same]
    assert apart.prompts == PROMPTS[:3]  # those that are sampled and trained on
    images, stock_prompts = sample_stock(apart, apart.sampler, args)
    same, _ = sample_stock(alone, alone.sampler, args)
    assert stock_prompts == prompts
    assert [image.tobytes() for image in images] == [image.tobytes() for image in same]
