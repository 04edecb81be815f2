"""The exported folder, loaded by diffusers itself, makes the same images."""

import pytest
import torch
from diffusers import ConsistencyModelPipeline

from cmlib.consistency import ConsistencyFunction, sample
from cmlib.export import export_diffusers, load_diffusers
from cmlib.unet import UNet
from tests.small import UNET


@pytest.fixture
def student():
    torch.manual_seed(0)
    return ConsistencyFunction(UNet(**UNET), 0.01, 80.0, 1.0, rho=20.0).eval()


@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_pipeline_samples_the_same_images(tmp_path, student, evaluations):
    export_diffusers(student, tmp_path)
    pipe = ConsistencyModelPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    theirs = pipe(batch_size=3, num_inference_steps=evaluations, generator=generator, output_type="pt").images

    generator = torch.Generator().manual_seed(5)  # one draw to start from, then one a step, the last unused
    noise = [torch.randn(3, 1, 8, 8, generator=generator) for _ in range(evaluations + (evaluations > 1))]
    if evaluations > 1:
        noise = noise[:-1]
    ours = sample(student, noise, student.levels(evaluations), student.sigma_min)
    torch.testing.assert_close(theirs, (ours + 1) / 2, atol=1e-4, rtol=0)


def test_round_trip(tmp_path, student):
    export_diffusers(student, tmp_path)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    again = load_diffusers(tmp_path)
    assert {**again.config, "unet": None} == {**student.config, "unet": None}
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 60.0])
    assert torch.equal(again(x, t), student(x, t))
