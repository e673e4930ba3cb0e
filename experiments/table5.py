"""Table 5 of the paper: which model should give the labels of the second stage.

python -m experiments.table5            # three seeds on the synthetic rooms
python -m experiments.table5 --seeds=1
"""

from experiments.ablation import run_table

ROWS = [
    ("geometry_guided", "Geometry guided distillation", 54.0),
    ("fixed_2d", "Fixed 2D model", 51.9),
    ("fixed_3d", "Fixed 3D model", 55.0),
    ("self_distillation", "EMA model", 56.1),
]

if __name__ == "__main__":
    run_table("table5", "Table 5: source of the labels in stage 2", ROWS)
