"""Table 5 of the paper: which model should give the labels of the second stage.

  python -m experiments.table5                       # three seeds, on synthetic rooms
  python -m experiments.table5 --seeds=1             # a third of the time
  python -m experiments.table5 --samples=DIR         # a short run on seven ScanNet scans
  python -m experiments.table5 --config=configs/scannet.py data.root=/data/scannet text.encoder=/data/clip \\
      teacher.name=lseg teacher.weights=/data/demo_e200.ckpt

Tables 4 and 5 share the rows that they have in common. Killed, a table goes on where it was.
"""

from experiments import ablation, published

ROWS = [
    ("geometry_guided", "Geometry guided distillation", 54.0),
    ("fixed_2d", "Fixed 2D model", 51.9),
    ("fixed_3d", "Fixed 3D model", 55.0),
    ("self_distillation", "EMA model", 56.1),
]


def main() -> None:
    ablation.run_table(__doc__, "table5", "Table 5: source of the labels in stage 2", ROWS)


if __name__ == "__main__":
    published.call(main)
