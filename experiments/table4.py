"""Table 4 of the paper: what each component of GGSD adds.

  python -m experiments.table4                       # three seeds, on synthetic rooms
  python -m experiments.table4 --seeds=1             # a third of the time
  python -m experiments.table4 --samples=DIR         # a short run on seven ScanNet scans
  python -m experiments.table4 --config=configs/scannet.py data.root=/data/scannet text.encoder=/data/clip \\
      teacher.name=lseg teacher.weights=/data/demo_e200.ckpt

Tables 4 and 5 share the rows that they have in common. Killed, a table goes on where it was.
"""

from experiments import ablation, published

ROWS = [
    ("fusion_2d", "2D fusion", 50.0),
    ("pixel_point", "Pixel-point distillation", 52.9),
    ("geometry_guided", "Geometry guided distillation", 53.5),
    ("self_distillation", "Self-distillation", 56.1),
    ("ggsd", "Geometry guided self-distillation", 56.5),
]


def main() -> None:
    ablation.run_table(__doc__, "table4", "Table 4: components of GGSD", ROWS)


if __name__ == "__main__":
    published.call(main)
