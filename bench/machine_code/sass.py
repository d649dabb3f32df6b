"""Machine code of the CUDA and Triton kernels, compiled and read without a GPU: tests check it, static.py counts it."""

import collections
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# Those of setup.py.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def tool(name):
    """The path of a tool such as cuobjdump: the CUDA toolkit's own, or the one that comes with triton, or None."""
    beside = os.path.dirname(os.path.realpath(nvcc())) if nvcc() else None
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent.parent))
    except ImportError:
        pass
    bundled = [str(Path(f) / "triton/backends/nvidia/bin") for f in folders]
    return next(filter(None, (shutil.which(name, path=p) for p in (beside, None, *bundled))), None)


def run(*command):
    """What a command prints."""
    return subprocess.run([str(c) for c in command], text=True, capture_output=True, check=True).stdout


def _demangle(names):
    out = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True).stdout
    return [re.sub(r"quantops::cuda::|\(anonymous namespace\)::|^void |\(.*", "", n) for n in out.splitlines()]


def count(instructions, pattern):
    """How many instructions match."""
    return sum(bool(re.search(rf"(^|\s){pattern}", text)) for text in instructions)


class Kernel:
    """One kernel's resources, its PTX and its machine code."""

    def __init__(self, stack, spills, registers, shared=0):
        self.stack, self.spills, self.registers, self.shared = stack, spills, registers, shared
        self.ptx, self.code = "", []  # code: (address, instruction)

    def loosely_rounded(self):
        """Floating-point products and sums in the PTX that do not say how they round: the assembler may join them."""
        return re.findall(r"\b(?:mad|(?:mul|add|sub|fma)(?!\.rn\b))\.(?:\w+\.)*f(?:32|64)\b", self.ptx)

    def loops(self):
        """Bodies of the innermost loops: code between a backward branch and its target."""
        return [[text for at, text in self.code if low <= at <= high] for low, high in self.spans()]

    def spans(self, nested=False):
        """Addresses (first, last) of the innermost loops, or of all."""
        spans = [(to, at) for at, text in self.code if (to := target(text)) is not None and to < at]
        return (
            spans if nested else [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        )

    def opcodes(self):
        """{opcode with its modifiers: how often}."""
        return collections.Counter(full_opcode(text) for _, text in self.code)

    def shortest(self, through):
        """[(address, instruction)] on the shortest way from the start through all addresses ``through``, in their
        order, to the end of the program: slow paths, which are longer, are left aside."""
        places, path = self._places(), [0]
        for goal in [*(places[at] for at in through), None]:
            path += self._way(path[-1], goal)
        return [self.code[i] for i in path]

    def around(self, first, last, through, longest):
        """The same on the longest or shortest way once through a loop, from address ``first`` to ``last``."""
        places, better = self._places(), (lambda a, b: a > b) if longest else (lambda a, b: a < b)
        stops, path = [places[at] for at in (first, *through, last)], [places[first]]
        for start, goal in zip(stops, stops[1:]):
            best = {start: (0, None)}  # place: (instructions on the way there, the place before)
            for i in range(start, goal):
                for j in self._following(i) if i in best else ():
                    if i < j <= goal and (j not in best or better(best[i][0] + 1, best[j][0])):
                        best[j] = best[i][0] + 1, i
            if goal not in best:
                raise ValueError(f"no way from {self.code[start]} to {self.code[goal]}")
            part = [goal] if goal != start else []
            while part and best[part[-1]][1] not in (start, None):
                part.append(best[part[-1]][1])
            path += part[::-1]
        return [self.code[i] for i in path]

    def _places(self):
        return {at: i for i, (at, _) in enumerate(self.code)}

    def _following(self, i):
        """Places that may come after place ``i``; calls are taken to return."""
        text = self.code[i][1]
        name, always = opcode(text), not text.startswith("@")
        if name == "BRA":
            places = self._places()
            falls = not always or re.search(r"BRA\S* !?U?P\d", text)
            return [places[target(text)], *[i + 1] * bool(falls)]
        if always and name in ("EXIT", "RET", "BRX", "JMP"):
            return []
        return [i + 1] if i + 1 < len(self.code) else []

    def _way(self, start, goal):
        """Places after ``start`` on the shortest way to ``goal``, or to an EXIT."""
        before, queue = {start: None}, collections.deque([start])
        while queue:
            i = queue.popleft()
            if i == goal or (goal is None and opcode(self.code[i][1]) == "EXIT" and not self._following(i)):
                path = []
                while before[i] is not None:
                    path.append(i)
                    i = before[i]
                return path[::-1]
            for j in self._following(i):
                if j not in before:
                    before[j] = i
                    queue.append(j)
        raise ValueError(f"no way from place {start} to {'an end' if goal is None else goal}")


def opcode(text):
    """FADD of "@P0 FADD.FTZ R1, R2, R3"."""
    return re.match(r"(?:@!?U?P\w+\s+)?([A-Z]\w*)", text)[1]


def full_opcode(text):
    """FADD.FTZ of the same."""
    return re.match(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)[1]


def target(text):
    """Where a branch goes, or None."""
    found = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
    return int(found[1], 16) if found else None


def width(text):
    """Bytes that a lane's load or store moves."""
    bits = re.search(r"\.(8|16|32|64|128|U8|S8|U16|S16)\b", full_opcode(text))
    return int(bits[1].strip("US")) // 8 if bits else 4


def _instructions(text):
    return [(int(at, 16), line.strip()) for at, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.M)]


def cuda_kernels(archs, folder, sources=None, timeout=900):
    """{(arch, demangled name): Kernel} of .cu files, compiled with the flags of setup.py, one nvcc per arch."""
    from torch.utils.cpp_extension import include_paths

    cuobjdump, jobs, found = tool("cuobjdump"), [], {}
    for source in SOURCES if sources is None else sources:
        for arch in archs:
            made = Path(folder) / f"{source.stem}_{arch}.o"
            jobs.append(
                (
                    arch,
                    made,
                    subprocess.Popen(
                        [
                            nvcc(),
                            "-c",
                            str(source),
                            "-o",
                            str(made),
                            *FLAGS,
                            f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]",
                            "-Xptxas",
                            "-v",
                            "-Xcompiler",
                            "-fPIC",
                            *(f"-I{p}" for p in include_paths()),
                        ],
                        text=True,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                    ),
                )
            )
    for arch, made, job in jobs:
        log = job.communicate(timeout=timeout)[0]
        if job.returncode:
            raise RuntimeError(log)
        report = re.findall(
            r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
            r"loads\n.*?Used (\d+) registers(.*)",
            log,
        )
        names = dict(zip((r[0] for r in report), _demangle(r[0] for r in report)))
        for mangled, stack, stores, loads, registers, rest in report:
            shared = re.search(r"(\d+) bytes smem", rest)
            found[arch, names[mangled]] = Kernel(
                int(stack), int(stores) + int(loads), int(registers), int(shared[1]) if shared else 0
            )
        parts = re.split(r"Function : (\S+)", run(cuobjdump, "-sass", made))
        for mangled, body in zip(parts[1::2], parts[2::2]):
            found[arch, names[mangled]].code = _instructions(body)
        parts = re.split(r"\.entry (\w+)\(", run(cuobjdump, "-ptx", made))
        for mangled, body in zip(parts[1::2], parts[2::2]):
            found[arch, names[mangled]].ptx = body
    return found


# Triton.


class Launch(collections.namedtuple("Launch", "kernel args constants")):
    """A launch that was recorded instead of run."""


def triton_launches(call):
    """The launches that ``call()`` makes, recorded instead of run, so that CPU tensors will do."""
    from triton.runtime.jit import JITFunction

    launches, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **constants):
        launches.append(Launch(self, args, constants))

    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def triton_binary(launch, arch, fusion=None):
    """The compiled launch: types of the tensors, everything else constant, options as it was launched."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    options = {k: v for k, v in launch.constants.items() if k not in kernel.arg_names}
    if fusion is not None:
        options["enable_fp_fusion"] = fusion
    values = dict(zip(kernel.arg_names, launch.args)) | {
        k: v for k, v in launch.constants.items() if k in kernel.arg_names
    }

    def name(dtype):
        return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf").replace("int", "i")

    names = {torch.bool: "i1", torch.uint8: "u8"}
    types = {
        n: "*" + names.get(v.dtype, name(v.dtype)) if isinstance(v, torch.Tensor) else "constexpr"
        for n, v in values.items()
    }
    fixed = {n: v for n, v in values.items() if not isinstance(v, torch.Tensor)}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types[n] != "constexpr"}
    return triton.compile(
        ASTSource(kernel, {n: types[n] for n in kernel.arg_names}, fixed, aligned),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )


def triton_kernel(binary):
    """The Kernel of a compiled launch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        code = _instructions(run(tool("cuobjdump"), "-sass", cubin.name))
        usage = {
            k: int(v)
            for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", run(tool("cuobjdump"), "-res-usage", cubin.name))
        }
    kernel = Kernel(usage["STACK"], usage["LOCAL"], usage["REG"], max(usage["SHARED"], binary.metadata.shared))
    kernel.code, kernel.ptx = code, binary.asm["ptx"]
    return kernel
