"""GGSD on nuScenes with the hyper-parameters of the paper.

  pip install -e .[openseg]
  python -m ggsd_jax.main --config=configs/nuscenes.py --workdir=out/nuscenes --config.data.root=/data/nuscenes \\
      --config.data.lists=/data/nuscenes/lists --config.teacher.weights=/data/openseg_exported_clip \\
      --config.text.encoder=/data/clip-vit-large-patch14-336

Download from nuscenes.org the trainval metadata, all ten file blobs (samples and sweeps; with `data.sweeps=1` the
keyframe blobs suffice) and nuScenes-lidarseg, and unpack them into one folder: `v1.0-trainval/`, `samples/`,
`sweeps/`, `lidarseg/`. The tables do not say which driving scenes are for training: `data.lists` holds `train.txt`
and `val.txt`, names such as scene-0061 one per line (`nuscenes.utils.splits` of the official development kit lists
the 700 and 150). The mini release is read with `--config.data.version=v1.0-mini` and lists of its ten scenes.

A scene here is a keyframe (28,130 for training, 6,019 for validation): its sweep, whose points have labels and 2D
features, and older sweeps brought to its frame. About 20,000 of its points are in an image; with OpenSeg's 768 channels
their features take 7.5 MB a keyframe, 0.26 TB in all, its cloud half as much, and all twice while it is prepared.

OpenScene's preprocessed clouds and fused features are read instead with `--config.data.name=openscene
--config.data.root=/data/nuscenes_3d --config.data.features=/data/nuscenes_multiview_openseg`.

Points are compared with 43 detailed names, each of which means one of the 16 classes (`eval.words`). OpenScene's
supervised network, the upper row of Table 1, is `--config.mode=supervised --config.teacher.name=none
--config.batch_size=24 --config.data.loop=2`.

The 2D teacher is OpenSeg, as in the paper: `teacher.weights` is the folder of the SavedModel that its authors
exported, gs://cloud-tpu-checkpoints/detection/projects/openseg/colab/exported_model (OpenScene: openseg_exported_clip),
and the words are those of openai/clip-vit-large-patch14-336 (`hf download`). `teacher.name=maskclip` takes CLIP's
public weights alone; all teachers are listed in configs/scannet.py.

The paper trains on four A100 (80 GB) in about 24 hours with the 2D features at hand, and reports 46.1 mIoU and
59.2 mAcc on the validation keyframes. Nobody has run this project on all of nuScenes yet. As compiled for a GPU
(BUILD.md has the arithmetic, for 512 channels; OpenSeg has 768), 100,000 voxels need 4 GB in float32 and 2.4 GB in
bfloat16 (`model.dtype`); a sweep has 22,500, so 16 keyframes with `--config.data.sweeps=1` need 14 or 8 GB, on one GPU
or divided by their number.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.mode = "ggsd"  # or "supervised": the same network trained with labels, logits in place of features
    config.batch_size = 16
    config.stage1_epochs = 70
    config.stage2_epochs = 30
    config.cpu_devices = 1  # replicas when run on a CPU
    config.stage1_from = ""  # work directory of a run with the same stage 1, to start from its end
    config.log_every = 50
    config.checkpoint_every = 1000

    config.data = ml_collections.ConfigDict()
    config.data.name = "nuscenes"
    config.data.root = ""
    config.data.version = "v1.0-trainval"  # folder of the tables in data.root
    config.data.prepared = ""  # folder of the prepared dataset; default: data/ in the work directory
    config.data.lists = ""  # folder of train.txt and val.txt; default: data.root
    config.data.sweeps = 8  # at 20 a second, including the keyframe's: what OpenScene's clouds hold
    config.data.features = ""  # with data.name=openscene, the folder of its fused features
    config.data.label_set = "nuscenes16"
    config.data.voxel_size = 0.05  # metres
    config.data.chunks = 1
    config.data.chunk_points = 40_000  # all of a keyframe
    config.data.augment = False
    config.data.input_color = False
    config.data.loop = 1  # visits of a scene in one epoch
    config.data.min_voxels = 0  # per replica: smaller batches are padded up to this, and share one compiled step
    config.data.max_voxels = 1_000_000  # per replica: larger ones are cropped
    config.data.workers = 0
    config.data.prepare_workers = 4  # processes that read scenes and cut superpoints; 0: in the main one

    config.superpoints = ml_collections.ConfigDict()
    config.superpoints.voxel_resolution = 0.25  # the rings of a lidar lie this far apart
    config.superpoints.seed_resolution = 1.0
    config.superpoints.color_importance = 0.0  # a lidar sees none
    config.superpoints.spatial_importance = 0.4
    config.superpoints.normal_importance = 1.0

    config.teacher = ml_collections.ConfigDict()
    config.teacher.name = "openseg"  # or maskclip, lseg, simulated (its errors as in configs/synthetic.py)
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
    config.eval.words = "nuscenes43"  # the words points are compared with; each means one of the 16 classes
    config.eval.fusion_by_voxel = True  # a point has the 2D feature of its voxel's first point, as in OpenScene
    config.eval.pictures = 2  # scenes to draw
    return config
