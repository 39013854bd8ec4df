from dataclasses import replace

import pytest
import torch
from torch import nn

from ldm.config.errors import UserError
from ldm.models.discriminator import DiscriminatorConfig

SMALL = DiscriminatorConfig(channels=8, norm_groups=4)


def test_the_default_is_the_published_patch_discriminator():
    discriminator = DiscriminatorConfig().build()
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions]
    assert shapes == [(3, 64, 4, 2), (64, 128, 4, 2), (128, 256, 4, 2), (256, 512, 4, 1), (512, 1, 4, 1)]
    assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in discriminator.modules())
    assert abs(float(convolutions[3].weight.detach().std()) - 0.02) < 1e-3


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_the_told_size(layers, patch):
    torch.manual_seed(0)
    discriminator = replace(SMALL, layers=layers, norm_groups=1).build()
    for module in discriminator.modules():  # norms look at the whole picture; without them the receptive field is left
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(image)
    middle = logits.shape[2] // 2
    (slope,) = torch.autograd.grad(logits[0, 0, middle, middle], image)
    rows = slope.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == patch


def test_judging_one_picture_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    discriminator, image = SMALL.build().double().train(), torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(discriminator(image)[1].sum(), image)
    assert slope[1].abs().sum() > 0 and slope[[0, 2]].abs().sum() == 0
    torch.testing.assert_close(discriminator(image[1:2]), discriminator(image)[1:2], rtol=1e-12, atol=1e-12)


def test_a_picture_may_be_as_small_as_told_and_no_smaller():
    for layers in (1, 2, 3, 4):
        discriminator = replace(SMALL, layers=layers).build()
        assert discriminator(torch.zeros(1, 3, discriminator.smallest, discriminator.smallest)).shape == (1, 1, 1, 1)
        with pytest.raises(UserError, match=rf"discriminator\.layers is {layers}.*at least {discriminator.smallest} px"):
            discriminator(torch.zeros(1, 3, 64, discriminator.smallest - 1))


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="norm_groups 32 does not divide"):
        DiscriminatorConfig(channels=8)


def test_it_learns_to_tell_noise_from_flat_pictures():
    torch.manual_seed(0)
    discriminator = SMALL.build()
    optimiser = torch.optim.Adam(discriminator.parameters(), 2e-3)
    for _ in range(30):
        real, fake = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 1, 1).expand(-1, -1, 32, 32)
        loss = (1 - discriminator(real)).relu().mean() + (1 + discriminator(fake)).relu().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.5
