# SPDX-License-Identifier: AGPL-3.0-or-later
"""Stock YOLO networks made dynamic by `upcycle`, in processes that know nothing of `parameternet.yolo`."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch


def run(code, folder):
    """The output of Python code in a fresh process; it has `build`, `upcycle`, an image `x` and `same`."""
    start = """
        import copy, sys
        import torch
        from ultralytics import YOLO
        from parameternet.layers import DynamicConv
        from parameternet.surgery import fuse, upcycle

        def build(name):
            torch.manual_seed(0)
            model = YOLO(name).model.eval()
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 2)
                    torch.nn.init.normal_(module.weight, 1, 0.3)
                    torch.nn.init.normal_(module.bias, 0, 0.1)
            return model.double()

        x = torch.rand(2, 3, 64, 64, dtype=torch.float64)

        def same(a, b):
            with torch.no_grad():
                a, b = a(x)[0], b(x)[0]
            assert (a - b).abs().max() <= 1e-9 * b.abs().max(), (a - b).abs().max()

        def dynamic(model):
            return [name for name, module in model.named_modules() if isinstance(module, DynamicConv)]
    """
    code = textwrap.dedent(start) + textwrap.dedent(code) + "\nassert 'parameternet.yolo' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
def test_stock_fuse_of_an_upcycled_network_and_of_its_checkpoint(name, tmp_path):
    run(
        f"""
        model = build({name!r})
        table = next(name for name, _ in model.named_modules() if name.endswith("dfl.conv"))
        upcycled = upcycle(model)
        left = {{layer.name: layer.left for layer in upcycled.upcycling.layers}}
        assert left[table] == "frozen: a constant, or a stage that is not trained"
        assert len(dynamic(upcycled)) > 50 and table not in dynamic(upcycled)
        same(upcycled, model)
        torch.save(upcycled, "dynamic.pt")
        fused = copy.deepcopy(upcycled).fuse(verbose=False)
        assert not [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        same(fused, model)
        same(fused.fuse(verbose=False), model)
        same(upcycled, model)

        for parameter in model.parameters():  # as a network that was loaded for inference
            parameter.requires_grad_(False)
        assert table not in dynamic(upcycle(model))
        """,
        tmp_path,
    )
    run(
        """
        upcycled = torch.load("dynamic.pt", weights_only=False)
        before = copy.deepcopy(upcycled)
        same(upcycled.fuse(verbose=False), before)
        """,
        tmp_path,
    )


@pytest.mark.parametrize("name", ["yolov6n.yaml", "yolov9t.yaml", "yolov10n.yaml"])
def test_blocks_that_merge_their_kernels_stay_static(name, tmp_path):
    run(
        f"""
        model = build({name!r})
        upcycled = upcycle(model)
        same(upcycled, model)
        assert dynamic(upcycled)
        same(copy.deepcopy(upcycled).fuse(verbose=False), model)
        """,
        tmp_path,
    )


def test_fuse_of_a_whole_network_folds_every_batch_norm(tmp_path):
    run(
        """
        model = build("yolov8n.yaml")
        for network in (model, upcycle(model)):
            fused = fuse(network)
            assert not fused.fusing.left and len(fused.fusing.folded) == 57
            same(fused, model)
        """,
        tmp_path,
    )


def test_training_without_the_import_is_warned_of(tmp_path):
    run(
        """
        import warnings
        model = YOLO("yolov8n.yaml").model.eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            upcycle(model, probe=torch.zeros(1, 3, 64, 64))
        assert any("import parameternet.yolo before you train" in str(w.message) for w in caught), caught
        """,
        tmp_path,
    )


def test_training_with_the_import_is_not_warned_of():
    import parameternet.yolo
    from parameternet import upcycle

    model = parameternet.yolo.YOLO("yolov8n.yaml").model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upcycle(model, probe=torch.zeros(1, 3, 64, 64))
