"""Which layers may be passed over: exactly the known ones, with nothing on them."""

import pytest
from torch import nn

from idlevit_mm.kernels import all_plain, is_plain


class Doubled(nn.Linear):
    """A layer that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('plain', [lambda layer: is_plain(layer, nn.Linear), all_plain])
def test_only_the_class_itself_with_nothing_on_it(plain):
    layer = nn.Linear(2, 2)
    assert plain(layer)
    assert not plain(Doubled(2, 2))
    handle = layer.register_forward_hook(lambda *_: None)
    assert not plain(layer)
    handle.remove()
    assert plain(layer)
    layer.forward = Doubled(2, 2).forward
    assert not plain(layer)


def test_a_part_that_is_not_plain():
    assert all_plain(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), None)
    assert not all_plain(nn.Sequential(nn.Linear(2, 2), nn.Sequential(Doubled(2, 2))))
