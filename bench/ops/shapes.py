"""What is measured: single weights of many sizes, and the weight lists of networks that people train."""

CALL = "64"  # so small that its time is that of a call, whatever the size
SIZES = {
    CALL: (8, 8),
    "64K": (64, 1024),
    "1M": (1024, 1024),
    "16M": (4096, 4096),
    "64M": (8192, 8192),
    "256M": (16384, 16384),
}


def resnet20():
    """ResNet-20 for CIFAR-10 (He et al. 2015): 22 weights, 0.27 M elements."""
    shapes = [(16, 3, 3, 3)]
    for stage, width in enumerate((16, 32, 64)):
        for block in range(3):
            below = width // 2 if stage and not block else width
            shapes += [(width, below, 3, 3), (width, width, 3, 3)]
    return [*shapes, (32, 16, 1, 1), (64, 32, 1, 1), (10, 64)]


def resnet50():
    """ResNet-50: 54 weights, 25.5 M elements."""
    shapes, below = [(64, 3, 7, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, below, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if not block:
                shapes.append((4 * width, below, 1, 1))
            below = 4 * width
    return [*shapes, (1000, 2048)]


def mobilenet_v3_large():
    """MobileNetV3-Large: 64 weights, many depthwise ones, 5.5 M elements."""
    rows = [  # kernel, expanded, out, squeeze-excite
        (3, 16, 16, 0),
        (3, 64, 24, 0),
        (3, 72, 24, 0),
        (5, 72, 40, 24),
        (5, 120, 40, 32),
        (5, 120, 40, 32),
        (3, 240, 80, 0),
        (3, 200, 80, 0),
        (3, 184, 80, 0),
        (3, 184, 80, 0),
        (3, 480, 112, 120),
        (3, 672, 112, 168),
        (5, 672, 160, 168),
        (5, 960, 160, 240),
        (5, 960, 160, 240),
    ]
    shapes, below = [(16, 3, 3, 3)], 16
    for kernel, expanded, out, squeeze in rows:
        if expanded != below:
            shapes.append((expanded, below, 1, 1))
        shapes.append((expanded, 1, kernel, kernel))
        if squeeze:
            shapes += [(squeeze, expanded, 1, 1), (expanded, squeeze, 1, 1)]
        shapes.append((out, expanded, 1, 1))
        below = out
    return [*shapes, (960, 160, 1, 1), (1280, 960), (1000, 1280)]


def transformer(width, layers, mlp, *ends):
    """Weights of a transformer's blocks (attention in and out, MLP up and down) and what stands around them."""
    block = [(3 * width, width), (width, width), (mlp, width), (width, mlp)]
    return [*ends[:1], *block * layers, *ends[1:]]


LISTS = {
    "tiny": [(3, 40), (16, 3, 3, 3), (7, 5), (5, 1000)],  # for checks, not for timing
    "resnet20": resnet20(),
    "resnet50": resnet50(),
    "mobilenet_v3_large": mobilenet_v3_large(),
    "deit_small": transformer(384, 12, 1536, (384, 3, 16, 16), (1000, 384)),
    "transformer_1b": transformer(2048, 20, 8192),
}


def shapes_of(workload):
    """The shapes of a workload: a list's, or one square weight of a size."""
    if workload not in {*SIZES, *LISTS}:
        raise SystemExit(f"bench: expected workloads of {', '.join([*SIZES, *LISTS])}, got {workload!r}")
    return LISTS.get(workload) or [SIZES[workload]]
