"""The code that kernels/README.md shows runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "kernels" / "README.md"


def test_the_examples_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["of_points"].shape == (50_000, 16)
    assert names["loss"] > 0
    assert all(abs(kernel).max() > 0 for kernel in names["jax"].tree.leaves(names["grads"]))
