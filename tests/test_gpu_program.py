"""The training step compiled for a GPU that is not there, and the count of what a program reads and writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.gpu_program import array_bytes, has_compiler, traffic

PROGRAM = """
HloModule step, is_scheduled=true

%rows (param_0.1: bf16[1000,8], param_1.2: s32[10,1]) -> bf16[10,8] {
  %param_1.2 = s32[10,1]{1,0} parameter(1)
  %param_0.1 = bf16[1000,8]{1,0} parameter(0)
  ROOT %gather.1 = bf16[10,8]{1,0} gather(%param_0.1, %param_1.2), offset_dims={1}
}

%update (param_0: f32[1000,8], param_1: s32[10,1], param_2: f32[10,8]) -> f32[1000,8] {
  %param_0 = f32[1000,8]{1,0} parameter(0)
  %param_1 = s32[10,1]{1,0} parameter(1)
  %param_2 = f32[10,8]{1,0} parameter(2)
  ROOT %scatter.1 = f32[1000,8]{1,0} scatter(%param_0, %param_1, %param_2), to_apply=%add
}

ENTRY %main (x: bf16[1000,8], i: s32[10,1], y: f32[1000,8], u: f32[10,8]) -> (bf16[10,8], f32[1000,8]) {
  %x = bf16[1000,8]{1,0} parameter(0)
  %i = s32[10,1]{1,0} parameter(1)
  %y = f32[1000,8]{1,0} parameter(2)
  %u = f32[10,8]{1,0} parameter(3)
  %conv = bf16[1000,8]{1,0} custom-call(%x, %i), metadata={op_name="jit(f)/jvp(MinkUNet)/conv/sparse_conv/pallas_call"}
  %fusion.1 = bf16[10,8]{1,0} fusion(%conv, %i), kind=kLoop, calls=%rows, metadata={op_name="jit(f)/jvp()/gather"}
  %fusion.2 = f32[1000,8]{1,0} fusion(%y, %i, %u), kind=kInput, calls=%update, metadata={op_name="jit(f)/add"}
  ROOT %tuple = (bf16[10,8]{1,0}, f32[1000,8]{1,0}) tuple(%fusion.1, %fusion.2)
}
"""


def test_arrays_are_counted_by_what_is_needed_of_them_and_in_the_part_that_asks_for_them():
    assert array_bytes("(bf16[10,8]{1,0}, s32[], pred[3])") == 160 + 4 + 3
    assert traffic(PROGRAM) == {
        "sparse convolutions": 16_000 + 40 + 16_000,
        "losses": 160 + 40 + 160,  # ten rows of a thousand
        "optimizer, EMA, other": 320 + 40 + 320 + 320,  # ten rows read, their indices, updates, ten rows written
    }


@pytest.mark.skipif(not has_compiler(), reason="the compiler for CUDA is not installed (BUILD.md, Tests)")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_step_compiles_for_a_gpu_and_multiplies_float32_in_full(dtype, tmp_path):
    command = "-m experiments.gpu_program --gpu h100 --voxels 2000 --stage 2 --dtype".split()
    environment = os.environ | {"XLA_FLAGS": f"--xla_dump_to={tmp_path}"}
    arguments = [sys.executable, *command, dtype]
    done = subprocess.run(arguments, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "NVIDIA H100 80GB HBM3" in done.stdout.splitlines()[-1]
    kernels = [file.read_text() for file in tmp_path.glob("*.ptx")]
    if not kernels:
        pytest.skip("it compiles; this XLA, of jax 0.12, does not write its PTX out")
    convolutions = [kernel for kernel in kernels if ".entry sparse_conv" in kernel and "gradient_sum" not in kernel]
    assert len(convolutions) > 20 and all(".target sm_90" in kernel for kernel in convolutions)
    assert all("cp.async" in kernel for kernel in convolutions)  # loads are pipelined
    assert not any(".tf32" in kernel for kernel in kernels)
    if dtype == "bfloat16":
        assert all("wgmma" in kernel or "mma.sync" in kernel for kernel in convolutions)
