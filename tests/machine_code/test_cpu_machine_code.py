"""The CPU loops are vectorized: read from the machine code of the library that is tested."""

import platform
import re
import shutil
import subprocess

import pytest

from quantops.backends import library_path

# What the AVX-512 and the AVX2 clone of each loop must do on whole registers.
LOOPS = {
    "quantize_loop<(Form)0, float, float, float>": ("mulps", "minps", "addps"),
    "quantize_loop<(Form)1, float, float, float>": ("mulps", "minps", "addps"),
    "quantize_loop<(Form)2, float, float, float>": ("mulps", "pminsd", "addps"),
    "quantize_loop<(Form)2, BFloat16, BFloat16, float>": ("mulps", "pminsd", "addps", "pslld", "psrld"),
    "msq_loop<(Form)0, true, float, float, float>": ("mulps", "minps", "addps", "paddd"),
    "msq_loop<(Form)0, false, float, float, float>": ("mulps", "minps", "addps", "paddd"),
    "msq_loop<(Form)1, true, float, float, float>": ("mulps", "pminsd", "addps", "paddd"),
    "msq_loop<(Form)2, true, float, float, float>": ("mulps", "pminsd", "addps", "paddd"),
    "msq_loop<(Form)2, true, BFloat16, BFloat16, float>": ("mulps", "pminsd", "addps", "paddd", "pslld", "psrld"),
    "msq_loop<(Form)1, true, float, Nothing, float>": ("mulps", "pminsd", "addps", "paddd"),
    "msq_loop<(Form)1, true, BFloat16, Nothing, float>": ("mulps", "pminsd", "addps", "paddd", "pslld"),
    "encode_loop<(Rule)0, float, float>": ("mulps", "minps", "cvttps2dq"),
    "encode_loop<(Rule)1, float, float>": ("mulps", "minps", "cvttps2dq"),
    "encode_loop<(Rule)2, float, float>": ("mulps", "(rndscale|round)ps", "cvttps2dq"),
    "lsb_loop<(Form)0, float, float>": ("mulps", "minps", "cvttps2dq"),
    "lsb_loop<(Form)1, float, float>": ("mulps", "pminsd", "(psubd|paddd)"),
    "decode_loop<int, float, float>": ("cvtdq2ps", "mulps"),
    "grad_loop<float, float, float>": ("cmp\\w*ps",),
    "grad_penalty_loop<(Form)0, float, float, float>": ("mulps", "minps", "cmp\\w*ps"),
    "grad_penalty_loop<(Form)1, float, float, float>": ("mulps", "pminsd", "cmp\\w*ps"),
    "grad_penalty_loop<(Form)1, BFloat16, BFloat16, float>": ("mulps", "pminsd", "cmp\\w*ps"),
    "add_lsb_grad_loop<(Form)0, float, float, float>": ("mulps", "minps", "cmp\\w*ps"),
    "add_lsb_grad_loop<(Form)1, float, float, float>": ("mulps", "pminsd", "cmp\\w*ps"),
    "scale_grad_loop<(Form)0, float, float, float>": ("mulps", "addps", "cmp\\w*ps"),
    "scale_grad_loop<(Form)1, float, float, float>": ("mulps", "addps", "cmp\\w*ps"),
    "scale_grad_loop<(Form)1, BFloat16, BFloat16, float>": ("mulps", "addps", "cmp\\w*ps", "pslld"),
    "absmax_loop<unsigned int>": ("pmaxud",),
    "absmax_loop<unsigned short>": ("pmaxuw",),
    "abs_sum_loop<float, float>": ("addps",),
    "abs_sum_loop<float, BFloat16>": ("addps", "pslld"),
    "code_loop<false, false, float, float>": ("mulps", "minps", "maxps", "(rndscale|round)ps"),
    "code_loop<true, true, BFloat16, float>": ("mulps", "minps", "maxps", "divps", "pslld"),
    "cut_loop<float, float, float>": ("mulps", "subps", "(rndscale|round)ps"),
    "cut_loop<BFloat16, BFloat16, float>": ("mulps", "subps", "psrld"),
    "grad_loop<(GradKind)0, float, float, float>": ("addps",),
    "grad_loop<(GradKind)1, float, float, float>": ("addps", "cmp\\w*ps"),
    "grad_loop<(GradKind)1, BFloat16, BFloat16, float>": ("addps", "cmp\\w*ps", "pslld", "psrld"),
    "grad_loop<(GradKind)2, float, float, float>": ("addps", "cmp\\w*ps", "divps"),
    "add_loop<float>": ("addps",),
    "inner_loop<false, float, float>": ("mulps", "cmp\\w*ps"),
    "inner_loop<true, float, float>": ("mulps", "cmp\\w*ps", "divps"),
    "scale_loop<float, float>": ("mulps", "addps"),
    "nearest_loop<float, float, float>": ("mulps", "minps", "maxps"),
    "nearest_loop<BFloat16, BFloat16, float>": ("mulps", "minps", "maxps", "pslld"),
    "bounded_loop<7, float>": ("mulps", "minps", "cmp\\w*ps"),
    "one_place_loop<true, float>": ("mulps", "minps", "subps"),
    "one_place_loop<false, float>": ("mulps", "minps", "subps"),
    "edge_power_loop<true, float>": ("fmadd\\w*ps", "addps", "pslld"),
    "edge_power_loop<false, float>": ("fmadd\\w*ps", "addps", "pslld"),
    "feels_end_loop<float>": ("mulps", "cmp\\w*ps"),
    "ends_loop<true, float>": ("mulps", "addps", "pslld"),
    "winner_of_one_loop<true, (From)0, false, float>": ("mulps", "addps", "divps"),
    "winner_of_one_loop<true, (From)1, false, float>": ("mulps", "addps", "divps", "cmp\\w*ps"),
    "winner_of_one_loop<true, (From)1, true, float>": ("mulps", "addps", "divps", "cmp\\w*ps"),
    "winner_of_one_loop<true, (From)2, true, float>": ("mulps", "addps", "divps"),
    "winner_of_one_loop<false, (From)2, false, float>": ("mulps", "divps"),
    "level_loop<false, true, float>": ("mulps", "divps", "pslld"),
    "winner_of_many_loop<float>": ("mulps", "divps", "pslld"),
    "winner_gate_loop<float>": ("mulps", "divps"),
    "draw_loop<false, float>": ("mulps", "divps", "psrad"),
    "draw_loop<true, float>": ("mulps", "divps", "psrad"),
    "soft_pair_loop<1, float>": ("mulps", "divps"),
    "soft_pair_loop<8, float>": ("mulps", "divps", "cmp\\w*ps"),
    "soft_slope_loop<1, float>": ("mulps", "divps"),
    "soft_tail_loop<float>": ("addps", "cmp\\w*ps"),
    "soft_gradient_loop<float>": ("mulps", "addps"),
    "spline_place_loop<true, float>": ("mulps|fn?madd\\w*ps", "minps", "maxps", "(rndscale|round)ps", "fmadd\\w*ps"),
    "spline_place_loop<false, float>": ("mulps|fn?madd\\w*ps", "minps", "maxps", "(rndscale|round)ps", "fmadd\\w*ps"),
    "spline_value_loop<float>": ("mulps", "addps"),
    "spline_gradient_loop<float>": ("mulps", "fmadd\\w*ps"),
    "philox_loop": ("psrlq",),
    "activation_loop<(Keep)1, true, float, float, float>": ("mulps", "minps", "maxps", "(rndscale|round)ps", "por"),
    "activation_loop<(Keep)1, true, BFloat16, BFloat16, float>": ("mulps", "minps", "maxps", "pslld", "psrld", "por"),
    "activation_loop<(Keep)1, false, float, float, float>": ("mulps", "minps", "maxps", "(rndscale|round)ps", "subps"),
    "activation_loop<(Keep)2, true, float, float, float>": ("mulps", "minps", "maxps", "cvttps2dq"),
    "activation_grad_loop<(Keep)1, (Learn)0, float, float>": ("(blend|and|mova|testm)\\w*",),
    "activation_grad_loop<(Keep)1, (Learn)0, BFloat16, float>": ("psrld", "pslld"),
    "activation_grad_loop<(Keep)1, (Learn)1, float, float>": ("addps", "cmp\\w*ps"),
    "activation_grad_loop<(Keep)2, (Learn)2, float, float>": ("addps", "mulps", "cvtdq2ps"),
    "activation_channels_loop<(Keep)1, float>": ("mulps", "minps", "maxps", "(rndscale|round)ps"),
    "activation_grad_channels_loop<(Keep)2, float>": ("mulps", "cvtdq2ps"),
    "front_loop<true, float>": ("mulps", "minps", "maxps", "divps", "pslld"),
    "front_loop<false, float>": ("mulps", "minps", "maxps", "divps", "pslld"),
    "front_slope_loop<true, float>": ("mulps", "minps", "maxps", "divps", "pslld"),
    "front_slope_loop<false, float>": ("mulps", "minps", "maxps", "divps", "pslld"),
    "front_loop<true, double>": ("mulpd", "minpd", "divpd", "psllq"),
    "front_product_loop<float, float>": ("mulps",),
    "front_product_loop<BFloat16, float>": ("mulps", "psrld"),
    "categorical_activation_loop<float, float, float>": ("mulps", "minps", "maxps", "(rndscale|round)ps"),
    "categorical_activation_loop<BFloat16, BFloat16, float>": ("mulps", "minps", "maxps", "pslld"),
    "quarter_loop<float>": ("mulps", "minps", "maxps", "(rndscale|round)ps"),
    "join_quarters_loop": ("psrld", "psrlw|vpor"),
    "split_quarters_loop": ("pslld",),
    "place_loop<float, float>": ("mulps", "minps", "cvttps2dq"),
    "place_loop<BFloat16, float>": ("mulps", "minps", "cvttps2dq", "pslld"),
    "soft_factor_loop<float>": ("mulps", "divps"),
    "bf16_to_float": ("pslld",),
    "float_to_bf16": ("psrld", "paddd"),
    "join_octets": ("psrlq", "psllq"),
}


@pytest.fixture(scope="module")
def functions():
    """{function: {instruction set: machine code}} of the compiled library."""
    library = library_path("cpu")
    if platform.machine() != "x86_64" or not library.exists() or not shutil.which("objdump"):
        pytest.skip("needs x86-64, the compiled library (pip install -e . with a compiler) and objdump (binutils)")
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for block in re.split(r"\n(?=[0-9a-f]+ <)", text):
        head = re.match(r"[0-9a-f]+ <(.*)\([^()]*\) \[clone \.arch_x86_64_(v\d)[^\]]*\]", block.partition("\n")[0])
        if head:
            name = head[1].replace("quantops::", "").replace("detail::", "")
            name = re.sub(r"^(void|bool|long|unsigned int|unsigned short|unsigned long|double) ", "", name)
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


# Loops of gradients and soft sums alone, QUANTOPS_FUSED_SIMD.
FUSED = re.compile("(spline(_place|_value|_gradient)?|one_place|edge_power|ends|winner_of_one)_loop<")


def test_arithmetic_is_not_contracted(functions):
    fused = {
        name for name, clones in functions.items() for code in clones.values() if re.search(r"\bvfn?m(add|sub)", code)
    }
    assert all(FUSED.match(name) for name in fused), fused
    assert len({name.partition("_loop")[0] for name in fused}) > 5


@pytest.mark.parametrize(
    "loop",
    [
        "quantize_loop<(Form)0, float, float, float>",
        "cut_loop<float, float, float>",
        "nearest_loop<BFloat16, BFloat16, float>",
        "decode_loop<int, float, float>",
    ],
)
@pytest.mark.parametrize("level", ["v4", "v3"])
def test_results_are_streamed_in_half_lines(functions, loop, level):
    """With quarters alone, 16 bytes, ops took two to three times as long wherever memory lay badly."""
    assert re.search(r"vmovntdq\s+%ymm", functions[loop][level])
