"""sd/bench_models.py against the numbers of weights that the real models are known to have."""

import pytest

from sd.bench_models import ARCHITECTURES, build
from sd.pipeline import DTYPES, NETWORKS

# Of network and VAE: the models' own pages and diffusers' documentation
WEIGHTS = {
    "SD 1.5": (859_520_964, 83_653_863),
    "SDXL": (2_567_463_684, 83_653_863),
    "SD 3 medium": (2_028_328_000, 83_819_683),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_weights_of_the_real_models(name):
    pipe = build(ARCHITECTURES[name], DTYPES["fp16"], "meta")
    parts = getattr(pipe, NETWORKS[type(pipe)]), pipe.vae
    assert tuple(part.num_parameters() for part in parts) == WEIGHTS[name]
