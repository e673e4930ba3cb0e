"""Table 4 of the paper: what each component of GGSD adds.

python -m experiments.table4            # three seeds on the synthetic rooms
python -m experiments.table4 --seeds=1
"""

from experiments.ablation import run_table

ROWS = [
    ("fusion_2d", "2D fusion", 50.0),
    ("pixel_point", "Pixel-point distillation", 52.9),
    ("geometry_guided", "Geometry guided distillation", 53.5),
    ("self_distillation", "Self-distillation", 56.1),
    ("ggsd", "Geometry guided self-distillation", 56.5),
]

if __name__ == "__main__":
    run_table("table4", "Table 4: components of GGSD", ROWS)
