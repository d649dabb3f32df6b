"""``make gpu``: what a machine with a GPU can prove, the most telling first, within MINUTES or, without them, all.

``stages`` is the list. The GPU machine only runs: build both libraries beforehand, anywhere with nvcc (``make
gpu-libraries``), and carry quantops/*.so with the sources. There it takes torch, triton and pytest in the Python that
runs this, and no network; compute-sanitizer and ncu where they are. QUANTOPS_COMMIT names the commit where there is no
.git.

Results are in bench/results/<gpu>/ or --out, each written as soon as it exists: gpu.json says what became of every
command, with the last lines of those that failed. A wrong result of a kernel ends the run; any other failure is told,
and the run goes on. The same command again takes up what has not passed. --dry goes through every stage on a CPU, in
small: the C++ kernels stand for CUDA's, Triton's are interpreted.
"""

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
from pathlib import Path

from bench import state
from bench.gpu import summary
from bench.gpu.stages import Command, Run, Stage
from bench.state import ROOT

LIBRARY = ROOT / "quantops/_cuda.abi3.so"
BUDGET = 8.0  # minutes that the stages' times are for
DTYPES = ("float32", "bfloat16", "float16", "float64")
OPS = "msq forward,msq backward,msq step,lsb_stats,absmax per row,truncate 8-4-2-1,categorical hard"
SOFT_OPS = "categorical soft, 4 bits,categorical backward"
OPS_OF_TRITON = "msq forward,msq backward,absmax per row"
OPS_OF_VARIANTS = "msq forward,msq backward,lsb_stats,absmax per row"
MORE = (
    "activation forward,activation backward,LSQ activation step,PACT activation step,activation gelu forward,"
    "activation gelu backward,LSQ activation gelu step,categorical activation step,truncate step,own_scale,"
    "own_scale backward, mean,own_scale backward, max,learned scale step,categorical step,"
    "categorical step, soft gradient, 4 bits,encode,decode,pack 4 bits,unpack 4 bits,decode packed 4 bits,absmean"
)
STEPS = "unquantized,quantops,quantops decoupled,eager chain"
COMPILED_STEPS = "unquantized,compiled chain"
OF_GPUS = "test_devices and not test_gpu_equals_cpu or test_limits"  # that one is the commands of ``equal``
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no", "--tool")


@dataclasses.dataclass(frozen=True)
class Place:
    """What the stages run on: a GPU, or for --dry the CPU. cuda, triton: variables that choose the kernels."""

    device: str = "cuda"
    cuda: tuple = (("QUANTOPS_BACKEND", "cuda"),)
    triton: tuple = (("QUANTOPS_BACKEND", "triton"),)
    families: tuple = ("msq", "uniform", "packing", "truncate", "own_scale", "activation", "categorical_activation")
    slow_families: tuple = ("categorical", "categorical_backward")  # to compile, in Triton
    dtypes: tuple = DTYPES
    workloads: str = "16M,resnet50,resnet20,transformer_1b"
    workloads_of_triton: str = "16M,resnet50"
    workloads_of_more: str = "16M"
    workloads_of_variants: str = "16M,resnet20,resnet50"
    networks: str = "resnet50,deit_small,transformer_1b"
    compiled: str = "resnet50"
    budget: float = 0.15  # seconds of timing for a row
    step_budget: float = 5.0  # and for a network
    libraries: tuple = ()  # further builds of the CUDA library, quantops/_cuda.<name>.abi3.so
    width: int = 16  # processes at a time where nothing is timed

    @property
    def dry(self):
        return self.device == "cpu"


DRY = Place(
    device="cpu",
    cuda=(),
    triton=(("QUANTOPS_BACKEND", "triton"), ("TRITON_INTERPRET", "1")),
    families=("msq",),
    slow_families=(),
    dtypes=DTYPES[:1],
    workloads="tiny",
    workloads_of_triton="tiny",
    workloads_of_more="tiny",
    networks="resnet20",
    compiled="resnet20",
    budget=0.001,
    step_budget=0.001,
    width=2,
)


def stages(at):
    """The stages, in order. Their times are those of a run of 8 minutes, on 16 cores and one GPU."""
    cuda, triton, one_thread = ("cuda", at.cuda), ("triton", at.triton), (("OMP_NUM_THREADS", "1"),)

    def equal(backend, family, *dtypes, **options):
        name, env = backend
        argv = "tests/devices.py", at.device, family, *dtypes
        return Command(f"{name} {family} {' '.join(dtypes)}", argv, env + one_thread, **options)

    def sanitized(backend, tool):
        # Without torch's caching allocator every tensor is an allocation whose ends memcheck knows.
        (name, env), caching = backend, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        argv, under = f"-m bench small --no-check --device {at.device}".split(), () if at.dry else (*SANITIZER, tool)
        return Command(f"{tool} {name}", tuple(argv), env + one_thread + caching, under)

    def tests(backend):
        name, env = backend
        only = "--collect-only" if at.dry else "-q"
        argv = f"-m pytest {only} -p no:cacheprovider tests/ops/test_devices.py tests/ops/test_limits.py".split()
        return Command(f"tests {name}", (*argv, "-k", OF_GPUS), env + one_thread)

    def timed(env, what, out, budget, *argv, folder="{out}"):
        each = f"-m bench {what} --device {at.device} --budget {budget} --keep-caches --resume --seconds {{seconds}}"
        return Command(out, (*each.split(), "--out", f"{folder}/{out}.json", *argv), env)

    def ops(env, out, cases, workloads, *argv, budget=at.budget):
        return timed(env, "run", out, budget, "--no-peers", "--cases", cases, "--workloads", workloads, *argv)

    def steps(out, networks, variants, **options):
        argv = "--networks", networks, "--variants", variants, "--compile-seconds", "60"
        return timed(at.cuda, "steps", out, at.step_budget, *argv, **options)

    def variant(path):
        env, alone = (*at.cuda, ("QUANTOPS_CUDA_LIBRARY", str(path))), ("--no-calls", "--lock", "{scratch}/lock")
        name = f"variant-{path.name.split('.')[1]}"
        return ops(env, name, OPS_OF_VARIANTS, at.workloads_of_variants, *alone, budget=at.budget / 2)

    backend_of_triton = at.cuda if at.dry else at.triton  # to time what is interpreted takes minutes
    compiled = "unquantized" if at.dry else COMPILED_STEPS
    missing = Command("other libraries", (), needs=(LIBRARY.parent / "_cuda.<name>.abi3.so",))
    return [
        Stage(
            "first",
            60,
            "info(), then msq and its backward pass against the CPU",
            (
                Command("info", ("-m", "quantops"), at.cuda, gate=True),
                equal(cuda, "msq", "float32", gate=True),
                equal(triton, "msq", "float32"),
            ),
            width=3,
        ),
        Stage(
            "correct",
            130,
            "every op and dtype against the CPU, graphs and limits, sanitizers; compile caches",
            (
                steps("warm", at.compiled, compiled, folder="{scratch}"),
                *(sanitized(cuda, tool) for tool in ("memcheck", "racecheck")),
                *(equal(triton, family, dtype) for family in at.slow_families for dtype in at.dtypes),
                *(equal(cuda, family, *at.dtypes) for family in (*at.families, *at.slow_families)),
                tests(cuda),
                *(equal(triton, family, dtype) for family in at.families for dtype in at.dtypes if not at.dry),
                *(sanitized(triton, tool) for tool in ("memcheck", "racecheck") if not at.dry),
                tests(triton),
            ),
            width=at.width,
        ),
        Stage(
            "counters",
            155,
            "bytes, issue slots and stalls of five kernels, by ncu",
            (
                Command(
                    "ncu",
                    ("-m", "bench.gpu.counters", "--device", at.device, "--out", "{out}/ncu.json"),
                    at.cuda,
                    tools=() if at.dry else ("ncu",),
                ),
            ),
        ),
        Stage("ops", 260, "shares of a copy", (ops(at.cuda, "ops-cuda", f"{OPS},{SOFT_OPS}", at.workloads),)),
        Stage(
            "triton",
            280,
            "the same of Triton",
            (ops(backend_of_triton, "ops-triton", OPS_OF_TRITON, at.workloads_of_triton),),
        ),
        Stage("more", 330, "shares of a copy of other ops", (ops(at.cuda, "ops-cuda", MORE, at.workloads_of_more),)),
        # One measures, two start meanwhile.
        Stage(
            "variants",
            375,
            "the same of bench/machine_code/variants.py's builds",
            tuple(map(variant, at.libraries)) or (missing,),
            width=3,
        ),
        Stage(
            "steps",
            446,
            "whole training steps: float, quantops, the eager chain",
            (steps("steps-cuda", at.networks, "unquantized,quantops" if at.dry else STEPS),),
        ),
        Stage(
            "compiled",
            470,
            "the eager chain compiled, in the steps of one network",
            (steps("steps-compiled", at.compiled, compiled),),
        ),
    ]


def gpu():
    """The Place of this machine, with the builds that are there."""
    return Place(
        libraries=tuple(sorted(LIBRARY.parent.glob("_cuda.*.abi3.so"))),
        width=max(2, min(16, len(os.sched_getaffinity(0)))),
    )


def device():
    """The name of the GPU, or ""."""
    names = state.output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return names[0].strip() if names else state.output(sys.executable, "-c", ask)


def prepare(scratch):
    """Makes quantops.kernels importable from the sources, and gives the variables that all commands get."""
    link = ROOT / "quantops/kernels"
    if not link.exists():
        link.unlink(missing_ok=True)  # one that leads nowhere
        link.symlink_to("../kernels")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }


def _scratch(dry):
    """A folder that can be written to, for logs and compile caches."""
    folder = ROOT / "build" / ("gpu-dry" if dry else "gpu")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "writable").touch()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="quantops-gpu-"))
    return folder


def main(argv=None):
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, help=f"a budget; the stages' times are for {BUDGET:.0f}")
    parser.add_argument("--only", help="names of stages, with commas")
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench/results/<gpu>")
    parser.add_argument("--dry", action="store_true", help="every stage on a CPU, in small; results in build/gpu-dry")
    args = parser.parse_args(argv)
    name = "cpu" if args.dry else device()
    if not name:
        raise SystemExit("make gpu: no CUDA device; DRY=1 goes through the stages without one")
    if not args.dry and not LIBRARY.exists():
        raise SystemExit(
            f"make gpu: {LIBRARY.relative_to(ROOT)} is not there: make gpu-libraries builds it, on any "
            "machine with nvcc"
        )
    wanted = stages(DRY if args.dry else gpu())
    only = args.only.split(",") if args.only else [s.name for s in wanted]
    if unknown := set(only) - {s.name for s in wanted}:
        raise SystemExit(f"make gpu: expected stages of {', '.join(s.name for s in wanted)}, got {', '.join(unknown)}")
    scratch = _scratch(args.dry)
    out = (args.out or (scratch / "results" if args.dry else state.folder(name))).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run = Run(out, scratch, args.minutes and args.minutes / BUDGET, prepare(scratch), name)
    try:
        return run.all([s for s in wanted if s.name in only])
    finally:
        print(summary.table(out), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
