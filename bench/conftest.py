"""Options of ``pytest bench --benchmark-only``."""


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--workloads", default="1M,resnet20", help="comma-separated names of bench/ops/shapes.py")
    group.addoption("--dtypes", default="float32", help="comma-separated: float32, bfloat16")
    group.addoption("--compiled", action="store_true", help="torch.compile too, which takes seconds a case")


def pytest_generate_tests(metafunc):
    """A benchmark per case, workload, dtype, and function: quantops, the copy, each peer."""
    if "function" not in metafunc.fixturenames:
        return
    from bench.ops.registry import COPY, OURS, cases
    from bench.ops.run import DTYPES

    option, made = metafunc.config.getoption, []
    for workload in option("--workloads").split(","):
        for dtype in option("--dtypes").split(","):
            for case in cases():
                names = [name for name, peer in case.peers.items() if option("--compiled") or not peer.compiles]
                made += [(case, workload, dtype, name) for name in (OURS, COPY, *names) if DTYPES[dtype] in case.dtypes]
    metafunc.parametrize("case,workload,dtype,function", made, ids=[f"{c.name}-{w}-{d}-{f}" for c, w, d, f in made])
