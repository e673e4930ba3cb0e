"""GGSD on ScanNet with the hyper-parameters of the paper.

  python -m ggsd_jax.main --config=configs/scannet.py --workdir=out/scannet --config.data.root=/data/scannet \\
      --config.teacher.weights=/data/demo_e200.ckpt --config.text.encoder=/data/clip-vit-base-patch32

`data.lists` (or `data.root`) holds `scannetv2_train.txt` and `scannetv2_val.txt`, scene names one per line (Tasks/
Benchmark/ of ScanNet/ScanNet: 1,201 and 312), and `data.root` for each scene either
`scans/<scene>/`, as ScanNet distributes it, or `<scene>.npz` (`data.scene.Scene.save_npz`; views are then simulated).
Of each scene download the types `_vh_clean_2.ply`, `_vh_clean_2.labels.ply` and `.sens` (1.2 TB for all of them; every
20th frame is used). Frames exported to color/ depth/ pose/ take the place of a stream: every 20th where the whole of it
was exported, else all. Scenes that are not there are left out and counted. `--config.data.label_set=nyu40` scores all
40 NYU classes instead of the 20, `nyu37` all but the three "other..." ones. `--config.mode=supervised
--config.teacher.name=none` trains the same network with labels alone (the paper quotes 69.0 mIoU), and reads no frames.

OpenScene's preprocessed clouds and fused features are read instead with `--config.data.name=openscene
--config.data.root=/data/scannet_3d --config.data.features=/data/scannet_multiview_lseg`.

The 2D teacher, `teacher.name` and its `teacher.weights`, and the text that goes with it, `text.encoder`:

  lseg       LSeg's checkpoint demo_e200.ckpt            openai/clip-vit-base-patch32
  openseg    OpenSeg's folder openseg_exported_clip      openai/clip-vit-large-patch14-336
  maskclip   a snapshot folder of any CLIP ViT           the same folder
  simulated  none; it LOOKS AT THE LABELS of the scenes  any; also an .npz of embeddings, or "stand-in"

A snapshot folder is what `hf download openai/clip-vit-base-patch32` makes: config.json, weights, vocabulary.

The paper trains on one A100 (80 GB) in about 24 hours and reports 56.5 mIoU, 68.6 mAcc on the 312 validation scenes
with LSeg as the teacher. Nobody has run this project on all of ScanNet yet. As compiled for a GPU (BUILD.md has the
arithmetic), a batch of 8 scenes of 100,000 voxels needs 24 GB in float32 and 14 GB in bfloat16 (`model.dtype`), on one
GPU or divided by their number.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.mode = "ggsd"  # or "supervised": the same network trained with labels, logits in place of features
    config.batch_size = 8
    config.stage1_epochs = 70
    config.stage2_epochs = 30
    config.cpu_devices = 1  # replicas when run on a CPU
    config.stage1_from = ""  # work directory of a run with the same stage 1, to start from its end
    config.log_every = 50
    config.checkpoint_every = 1000

    config.data = ml_collections.ConfigDict()
    config.data.name = "scannet"
    config.data.root = ""
    config.data.prepared = ""  # folder of the prepared dataset; default: data/ in the work directory
    config.data.lists = ""  # folder of the two lists; default: data.root
    config.data.features = ""  # with data.name=openscene, the folder of its fused features
    config.data.label_set = "scannet20"
    config.data.voxel_size = 0.02  # metres
    config.data.chunks = 5
    config.data.chunk_points = 20_000
    config.data.augment = True
    config.data.input_color = False
    config.data.loop = 5  # visits of a scene in one epoch
    config.data.min_voxels = 0  # per replica: smaller batches are padded up to this, and share one compiled step
    config.data.max_voxels = 1_500_000  # per replica: larger ones are cropped
    config.data.workers = 0
    config.data.prepare_workers = 4  # processes that read scenes and cut superpoints; 0: in the main one

    config.superpoints = ml_collections.ConfigDict()
    config.superpoints.voxel_resolution = 0.05  # ScanNet's vertices are 2.9 cm apart: 2 cm voxels would not touch
    config.superpoints.seed_resolution = 0.5
    config.superpoints.color_importance = 0.2
    config.superpoints.spatial_importance = 0.4
    config.superpoints.normal_importance = 1.0

    config.teacher = ml_collections.ConfigDict()
    config.teacher.name = "lseg"  # or openseg, maskclip, simulated (its errors as in configs/synthetic.py)
    config.teacher.weights = ""
    config.teacher.masks = ""  # folder of SAM's masks to average features in (ggsd_jax/vision_language/sam_masks.py)

    config.text = ml_collections.ConfigDict()
    config.text.encoder = ""  # the folder of a CLIP snapshot, or an .npz with its embedding of each class name
    config.text.prompt = "a {} in a scene"

    config.model = ml_collections.ConfigDict()
    config.model.arch = "MinkUNet18A"
    config.model.width = 1.0
    config.model.dtype = "float32"  # or bfloat16, for arithmetic only; parameters, statistics and losses are float32
    config.model.remat = 0  # number of finest levels recomputed in the backward pass: saves memory

    config.loss = ml_collections.ConfigDict()
    config.loss.distill_weight = 1.0
    config.loss.superpoint_weight = 1.0  # 0: pixel-point distillation
    config.loss.self_weight = 1.0
    config.loss.temperature = 0.01
    config.loss.label_source = "ema"  # or fixed_3d (the network at the end of stage 1), fixed_2d (the 2D features)
    config.loss.voting = True
    config.loss.ema_momentum = 0.999

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-4
    config.optimizer.power = 0.9
    config.optimizer.openscene_lr_quirk = False

    config.supervised = ml_collections.ConfigDict()  # SGD of OpenScene's mink.yaml
    config.supervised.learning_rate = 0.01
    config.supervised.momentum = 0.9
    config.supervised.weight_decay = 1e-4

    config.eval = ml_collections.ConfigDict()
    config.eval.repeats = 5
    config.eval.words = ""  # label set of the words points are compared with; empty: data.label_set
    config.eval.fusion_by_voxel = True  # a point has the 2D feature of its voxel's first point, as in OpenScene
    config.eval.pictures = 2  # scenes to draw
    return config
