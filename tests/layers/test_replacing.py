"""A layer that takes another one's place in a network whose library has written on its layers."""

import pytest
import torch
from timm.layers import CondConv2d
from torch import nn

from parameternet.export import forms
from parameternet.layers import DynamicConv
from parameternet.surgery import collapse, convert_condconv, fuse, upcycle


class Wired(nn.Module):
    """Rows that know where their input comes from, as Ultralytics' do."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = nn.ModuleList(rows)
        for i, row in enumerate(rows):
            row.i, row.f, row.type, row._mark = i, -1, type(row).__name__, {"kept"}
        self.eval()

    def forward(self, x):
        outputs = []
        for row in self.rows:
            x = x if row.f == -1 else outputs[row.f]
            x = row(x, torch.ones(len(x), row.num_experts)) if isinstance(row, CondConv2d) else row(x)
            outputs.append(x)
        return x


SURGERY = {
    "upcycle": (lambda: nn.Conv2d(8, 8, 3, padding=1), lambda m: upcycle(m, probe=torch.zeros(1, 3, 9, 9))),
    "collapse": (lambda: DynamicConv(8, 8), lambda m: collapse(m, [torch.randn(4, 3, 9, 9)], tolerance=9)[0]),
    "fuse": (lambda: nn.BatchNorm2d(8), fuse),
    "constant": (lambda: DynamicConv(8, 8), forms.write_constant),
    "computed": (lambda: DynamicConv(8, 8), lambda m: forms.write_computed(m, (3, 9, 9), mix_by_conv=True)),
}


@pytest.mark.parametrize(("layer", "change"), SURGERY.values(), ids=SURGERY)
def test_marks_of_other_libraries_stay(layer, change):
    model = Wired(nn.Conv2d(3, 8, 1), layer(), nn.ReLU())
    before = type(model.rows[1])
    if change is fuse:
        model = Wired(nn.Sequential(nn.Conv2d(3, 8, 1), model.rows[1]))
        model.rows[0][1].i, model.rows[0][1]._mark = 1, {"kept"}
        new = change(model).rows[0][1]
    else:
        changed = change(model)
        new = changed.rows[1]
        assert (new.f, new.type) == (-1, before.__name__)
        changed(torch.randn(1, 3, 9, 9))
    assert type(new) is not before
    assert new.i == 1 and new._mark == {"kept"}


def test_settings_of_the_old_layer_do_not_follow():
    model = Wired(nn.Conv2d(3, 8, 1), DynamicConv(8, 8, strategy="wide"))
    static = collapse(model, [torch.randn(4, 3, 9, 9)], tolerance=9)[0].rows[1]
    assert set(vars(static)) == set(vars(nn.Conv2d(1, 1, 1))) | {"i", "f", "type", "_mark"}


def test_marks_stay_on_layers_made_of_condconv():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = CondConv2d(4, 4, 3, num_experts=2)
            self.conv.i = 7

    assert convert_condconv(Block()).conv.i == 7
