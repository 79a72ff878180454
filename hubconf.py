"""Entry points for torch.hub: `torch.hub.load("<this repository>", "parameternet_50m", pretrained=True)`.

Only this file is imported until a network is built, so that torch.hub can list and describe the networks and name
missing packages.
"""

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]

# timm name -> description of the network; a test compares this list with the registry.
_NETWORKS = {
    "parameternet_50m": "Ours: GhostNet's stages at width 0.5, 4 experts; 2.5 M parameters with 200 classes.",
    "parameternet_150m": "Ours: GhostNet's stages at width 1.0, 4 experts.",
    "parameternet_300m": "A reconstruction of the paper's, never released; 14.7 M parameters with 200 classes.",
    "parameternet_600m": "Official: the network of the authors' released code; 33.5 M parameters with 200 classes.",
    **{f"dynamic_{name}": f"timm's {name} upcycled, 4 experts." for name in (
        "ghostnet_050", "ghostnet_100", "ghostnet_130",
        "ghostnetv2_100", "ghostnetv2_130", "ghostnetv2_160",
        "ghostnetv3_050", "ghostnetv3_100", "ghostnetv3_130", "ghostnetv3_160",
        "efficientnetv2_b0", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2",
        "mobilenetv3_large_100",
    )},
    **{
        f"yolov8{scale}_{variant}": f"YOLOv8{scale}'s backbone, {variant}."
        for scale in "nsmlx"
        for variant in ("dynamicconv", "c2f_dynamicconv", "c2f_ghost_dynamicconv")
    },
    "dynamic_timm": "Any network of timm upcycled: source='resnet18'.",
}  # fmt: skip


def _entrypoint(name, summary):
    def create(pretrained=False, **kwargs):
        return _create(name, pretrained, kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{summary}

    Images (B, 3, H, W), normalised -> logits (B, num_classes).

    Args:
        pretrained (bool): Load weights that are verified before they reach the network; an error if there are none.
        pretrained_cfg (str): The tag of those weights, such as 'tin200'. Default: the first that there are.
        **kwargs: timm's and the network's: num_classes, in_chans, features_only, drop_path_rate, num_experts, routing,
            width, act_layer, dynamic (False: the plain static network of the same size), ...

    Source: ParameterNet, arXiv:2306.14525.
    """
    return create


def _create(name, pretrained, kwargs):
    try:
        import timm

        import parameternet  # noqa: F401  registers the networks
    except ModuleNotFoundError as error:
        package = error.name.replace("_", "-")
        raise ModuleNotFoundError(f"{name} needs {error.name}: pip install {package}", name=error.name) from error
    return timm.create_model(name, pretrained=pretrained, **kwargs)


for _name, _summary in _NETWORKS.items():
    globals()[_name] = _entrypoint(_name, _summary)
