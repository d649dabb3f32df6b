"""The CPU loops are vectorized: read from the machine code of the library that is tested."""

import platform
import re
import shutil
import subprocess

import pytest

from quantops.backends import library_path

# What a 16-lane (AVX-512) and an 8-lane (AVX2) clone of each float loop must do on whole registers.
LOOPS = {
    "quantize_loop<float>": ("mulps", "minps", "addps"),
    "msq_loop<true, float>": ("mulps", "minps", "addps", "paddd"),
    "msq_loop<false, float>": ("mulps", "minps", "addps", "paddd"),
    "encode_loop<float>": ("mulps", "minps", "cvttps2dq"),
    "lsb_loop<float>": ("mulps", "minps", "cvttps2dq"),
    "decode_loop<float>": ("cvtdq2ps", "mulps"),
    "grad_loop<float>": ("cmp\\w*ps",),
    "grad_penalty_loop<float>": ("mulps", "minps", "cmp\\w*ps"),
    "add_lsb_grad_loop<float>": ("mulps", "minps", "cmp\\w*ps"),
    "scale_grad_loop<float>": ("mulps", "addps", "cmp\\w*ps"),
    "absmax_loop<float, unsigned int>": ("pmaxud",),
    "abs_sum_loop<float>": ("addps",),
    "nearest_loop<float>": ("mulps", "minps", "maxps"),
    "bounded_loop<7, float>": ("mulps", "minps", "cmp\\w*ps"),
    "one_place_loop<float>": ("mulps", "minps", "subps"),
    "inner_exponential_loop<float>": ("mulps", "addps", "pslld"),
    "outer_exponential_loop<float>": ("mulps", "addps", "pslld"),
    "winner_of_one_loop<true, true, float>": ("mulps", "addps", "divps"),
    "winner_of_one_loop<false, false, float>": ("mulps", "addps", "divps"),
    "level_loop<false, true, float>": ("mulps", "divps", "pslld"),
    "winner_of_many_loop<float>": ("mulps", "divps", "pslld"),
    "winner_gate_loop<float>": ("mulps", "divps"),
    "draw_loop<float>": ("mulps", "divps", "psrad"),
    "soft_pair_loop<1, float>": ("mulps", "divps"),
    "soft_pair_loop<8, float>": ("mulps", "divps", "cmp\\w*ps"),
    "soft_slope_loop<1, float>": ("mulps", "divps"),
    "soft_tail_loop<float>": ("addps", "cmp\\w*ps"),
    "philox_loop": ("psrlq",),
    "bf16_to_float": ("pslld",),
    "float_to_bf16": ("psrld", "paddd"),
}


@pytest.fixture(scope="module")
def functions():
    """{function: {instruction set: machine code}} of the compiled library."""
    library = library_path("cpu")
    if platform.machine() != "x86_64" or not library.exists() or not shutil.which("objdump"):
        pytest.skip("needs x86-64, the compiled library (pip install -e . with a compiler) and objdump (binutils)")
    text = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", library], capture_output=True, text=True,
                          check=True).stdout
    found = {}
    for block in re.split(r"\n(?=[0-9a-f]+ <)", text):
        head = re.match(r"[0-9a-f]+ <(.*?)\((?:.*)\[clone \.arch_x86_64_(v\d)[^\]]*\]", block.partition("\n")[0])
        if head:
            name = head[1].replace("void ", "").replace("double ", "", 1) if head[1].startswith("double ") else head[1]
            name = re.sub(r"^(void|long|unsigned int|double) ", "", name).split("::")[-1]
            found.setdefault(name, {}).setdefault(head[2], "")
            found[name][head[2]] += block
    if not found:
        pytest.skip("this compiler made no clones for instruction sets (clang): nothing to read")
    return found


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("level,register", [("v4", "%zmm"), ("v3", "%ymm")])
def test_loop_is_vectorized(functions, loop, level, register):
    assert loop in functions, sorted(functions)
    code = functions[loop][level]
    for instruction in LOOPS[loop]:
        used = re.findall(rf"v?{instruction}\w*\s+.*{register}", code)
        assert used, f"{loop} [{level}] has no {instruction} on {register}"


def test_arithmetic_is_not_contracted(functions):
    assert not any(re.search(r"\bvfn?m(add|sub)", code) for clones in functions.values() for code in clones.values())
