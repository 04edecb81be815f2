"""The hand-written U-Net against diffusers' `UNet2DModel`: parameters both ways, outputs, dropout, refusals."""

import inspect

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding

from cmlib.profiles import small_unet
from cmlib.unet import _FIXED, UNet, balanced, classes, given, timestep_embedding

DIGITS = small_unet((1, 8, 8), (32, 64), dropout=0.0)
CIFAR10 = {  # google/ddpm-cifar10-32
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
}
DEFAULTS = {"sample_size": 16, "block_out_channels": (32, 64, 64, 64)}  # diffusers' defaults: several heads, padding 1


def assert_same_outputs(ours, theirs, size, channels, batch=2):
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(3.7, 900.2, batch)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [DIGITS, DEFAULTS], ids=["digits", "defaults"])
def test_weights_and_outputs_both_ways(config):
    torch.manual_seed(0)
    theirs = UNet2DModel(**config).eval()
    ours = UNet.from_diffusers(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_same_outputs(ours, theirs, config["sample_size"], config.get("in_channels", 3))
    fresh = UNet(**config).eval()
    back = fresh.to_diffusers()
    assert not back.training
    assert_same_outputs(fresh, back, config["sample_size"], config.get("in_channels", 3))


def test_cifar10_teacher_configuration():
    torch.manual_seed(0)
    theirs = UNet2DModel(**CIFAR10).eval()
    ours = UNet.from_diffusers(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    assert_same_outputs(ours, theirs, 32, 3, batch=1)


def test_classes():
    """Outputs with labels both ways; a label reaches the network through whatever calls it, and its lack is told."""
    torch.manual_seed(0)
    theirs = UNet2DModel(**DIGITS, num_class_embeds=5).eval()
    ours = UNet.from_diffusers(theirs)
    assert classes(ours) == 5 and classes(UNet(**DIGITS)) == 0 and "num_class_embeds" not in UNet(**DIGITS).config
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.0, 10.0, 500.0, 999.0]), torch.tensor([4, 0, 2, 2])
    with torch.no_grad(), given(labels):
        torch.testing.assert_close(ours(x, t), theirs(x, t, class_labels=labels).sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.to_diffusers()(x, t, class_labels=labels).sample, ours(x, t), rtol=1e-5, atol=1e-5)
        with balanced(ours, torch.tensor([14, 5, 7, 2])):  # the same classes
            inner = ours(x, t)
        assert torch.equal(inner, ours(x, t))
    for missing in (None, labels[:2]):
        with pytest.raises(ValueError, match="needs a label a row"), given(missing):
            ours(x, t)


def test_training_mode_with_dropout_and_gradients(monkeypatch):
    def dropout(x, p, training, inplace):  # the mask in logical order, whatever the memory layout of x
        return x * (torch.rand(x.shape) > p) / (1 - p) if training and p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    torch.manual_seed(0)
    theirs = UNet2DModel(**{**DIGITS, "dropout": 0.3}).train()
    ours = UNet.from_diffusers(theirs)
    assert ours.training and ours.config["dropout"] == 0.3
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    outputs = []
    for call in (lambda: ours(x, t), lambda: theirs(x, t).sample, lambda: ours(x, t)):
        torch.manual_seed(7 if len(outputs) < 2 else 8)
        outputs.append(call())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3  # the masks matter
    for y in outputs[:2]:
        y.square().mean().backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, theirs_by_name[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dim", [32, 33])
def test_timestep_embedding(dim, shift, flip):
    t = torch.tensor([-1554.0, 0.0, 0.5, 999.0])
    theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    torch.testing.assert_close(timestep_embedding(t, dim, flip, shift), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"act_fn": "relu"}, "act_fn"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"block_out_channels": [32, 64, 64]}, "one a level"),
    ],
)
def test_unknown_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNet.from_config(DIGITS | change)


def test_every_setting_of_diffusers_is_implemented_or_fixed():
    theirs, ours = (set(inspect.signature(c.__init__).parameters) for c in (UNet2DModel, UNet))
    assert theirs - ours - set(_FIXED) == {"num_train_timesteps"}  # which only a class embedding reads
    defaults = {k: p.default for k, p in inspect.signature(UNet2DModel.__init__).parameters.items() if k in _FIXED}
    assert defaults == {k: v for k, v in _FIXED.items() if k in defaults}  # older diffusers have fewer settings
