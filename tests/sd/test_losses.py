"""sd/losses.py: what reaches the optimiser, against diffusers' noising and plain autograd."""

import pytest
import torch
from sd_helpers import PROMPTS, Loaded

import d3po
from sd import model
from sd.labels import Label, scores_from_labels
from sd.seeds import RandomPurpose, seeded_generator

SCORES = torch.tensor([1.0, 3.0, 0.5, 0.25])
PAIRS = torch.tensor([[1, 0], [2, 3]])


def gradients_of(tiny, flags: str, order: list[int]):
    """The model, a batch, and the gradient of each update by a loss in this order of steps."""
    loaded = Loaded(tiny, f"{flags} --guidance-scale 1 --max-grad-norm 1e9")
    batch, gradients = loaded.sample(), loaded.gradients()
    loaded.update(batch, PAIRS, order, SCORES)
    return loaded, batch, gradients


def check(loaded, gradient, loss):
    expected = torch.autograd.grad(loss, loaded.model.lora)
    for own, other in zip(gradient, expected, strict=True):
        # float32, and sums in another order
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def denoising_errors(loaded, batch, i, chains, noise):
    """|eps - eps_theta|^2 of images of a batch, noised by the pipeline's own scheduler."""
    pipe, schedule = loaded.model.pipe, loaded.model.schedule
    x_0 = batch.trajectory.x[-1, chains]
    eps = torch.randn(x_0.shape, generator=noise)
    time = schedule.timesteps[i].expand(len(x_0))
    noised = pipe.scheduler.add_noise(x_0, eps, time)
    text = pipe.encode_prompt([batch.prompts[k] for k in chains], "cpu", 1, False)[0]
    output = loaded.model.network(noised, time, encoder_hidden_states=text)[0]
    return (eps - output).pow(2).sum((1, 2, 3))


@pytest.mark.parametrize("loss", ["sft", "reward-weighted"])
def test_images_are_denoised_with_their_prompts_and_weights(tiny, loss):
    order, same = [2, 0], seeded_generator(0, RandomPurpose.STEPS, 0, 0)
    flags = f"--loss {loss} --beta {0.7 * (loss != 'sft')}"
    loaded, batch, gradients = gradients_of(tiny, flags, order)
    for i, gradient in zip(order, gradients, strict=True):
        if loss == "sft":
            expected = denoising_errors(loaded, batch, i, [1, 2], same).mean()
        else:
            weight = (SCORES / 0.7).exp() / (SCORES / 0.7).exp().mean()
            expected = (weight * denoising_errors(loaded, batch, i, range(4), same)).mean()
        check(loaded, gradient, expected)


@pytest.mark.parametrize("loss", ["ddpo", "dpok"])
def test_the_policy_gradient_has_the_scores_of_its_chains(tiny, loss):
    """Before any update the ratio is one and the KL flat, and what is left is REINFORCE."""
    order = [1, 2]
    loaded, batch, gradients = gradients_of(tiny, f"--loss {loss}", order)
    advantage = SCORES - SCORES.mean()
    if loss == "ddpo":
        advantage = advantage / SCORES.std()
    schedule, x = loaded.model.schedule, batch.trajectory.x
    for i, gradient in zip(order, gradients, strict=True):
        mean = d3po.policy_mean(loaded.model.sampler, schedule, i, x[i], batch.cond)
        log_prob = torch.distributions.Normal(mean, schedule.sigma[i]).log_prob(x[i + 1])
        check(loaded, gradient, -(advantage * log_prob.sum((1, 2, 3))).mean())


def test_scores_are_those_of_the_images_of_a_batch():
    def label(chains, *scores):
        return Label(chains, "h", 1, torch.tensor(scores) if scores else None)

    cond = torch.zeros(4, dtype=torch.long)
    labels = [label([0, 1], [1.5, -2.0]), label([3, 2], [0.25, 4.0])]
    assert scores_from_labels(labels, cond).tolist() == [1.5, -2.0, 4.0, 0.25]
    assert scores_from_labels([label([0, 1])], cond) is None  # of people
    assert scores_from_labels([label([0, 1], [1.0, 2.0], [3.0, 4.0])], cond) is None  # two scorers


def test_held_out_noises_have_prompts_of_their_own(tiny, monkeypatch):
    monkeypatch.setattr(model, "STOCK_IMAGES", 1)
    apart = Loaded(tiny, "--eval-images 5", prompts=PROMPTS[:3], eval_prompts=PROMPTS[3:])
    alone = Loaded(tiny, "--eval-images 5", prompts=PROMPTS[3:])

    def held_out(loaded):
        parts = loaded.model, loaded.model.sampler, loaded.args
        images, prompts, _ = model.sample_held_out(*parts, purpose=RandomPurpose.HELD_OUT)
        stock_images, stock_prompts = model.sample_stock(*parts)
        assert prompts == [PROMPTS[3], PROMPTS[4]] * 2 + [PROMPTS[3]]
        assert stock_prompts == [PROMPTS[3]]
        return [image.tobytes() for image in [*images, *stock_images]]

    assert held_out(apart) == held_out(alone)
    assert apart.model.prompts == PROMPTS[:3]  # those that are sampled and trained on
