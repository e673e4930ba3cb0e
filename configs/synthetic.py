"""GGSD on furnished rooms that are generated on the spot: nothing is downloaded, minutes on two CPU cores.

  python -m ggsd_jax.main --config=configs/synthetic.py --workdir=out/demo

The 2D teacher is simulated (ggsd_jax/vision_language/simulated.py) and so are the class texts: this shows that the
method works and lets you study it; it says nothing about real images. Nine minutes on two cores end at about 63 mIoU.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.mode = "ggsd"  # or "supervised": the same network trained with labels, logits in place of features
    config.batch_size = 2
    config.stage1_epochs = 14  # 70 : 30, as the paper
    config.stage2_epochs = 6
    config.cpu_devices = 2  # replicas when run on a CPU: a core each
    config.stage1_from = ""  # work directory of a run with the same stage 1, to start from its end
    config.log_every = 20
    config.checkpoint_every = 500

    config.data = ml_collections.ConfigDict()
    config.data.name = "synthetic"
    config.data.root = ""
    config.data.prepared = ""  # folder of the prepared dataset; default: data/ in the work directory
    config.data.label_set = "synthetic"
    config.data.train_rooms = 120
    config.data.val_rooms = 16
    config.data.voxel_size = 0.11  # metres
    config.data.chunks = 1
    config.data.chunk_points = 60_000  # all of a room
    config.data.augment = True
    config.data.input_color = False
    config.data.loop = 1
    config.data.min_voxels = 5120  # per replica: smaller batches are padded up to this, and share one compiled step
    config.data.max_voxels = 100_000  # per replica: larger ones are cropped
    config.data.workers = 0
    config.data.prepare_workers = 0  # processes that make rooms and cut superpoints; 0: the main one does

    config.superpoints = ml_collections.ConfigDict()
    config.superpoints.voxel_resolution = 0.06  # 1.9 times the spacing of the points
    config.superpoints.seed_resolution = 0.25  # perfect votes: 94 mIoU; 0.5 joins small objects: 88
    config.superpoints.color_importance = 0.2
    config.superpoints.spatial_importance = 0.4
    config.superpoints.normal_importance = 1.0

    config.teacher = ml_collections.ConfigDict()
    config.teacher.name = "simulated"
    config.teacher.masks = ""  # folder of masks to average its features in, as SAM makes them
    # the rates of its errors, as ggsd_jax/vision_language/simulated.py explains them
    config.teacher.fragment_mistakes = 0.1
    config.teacher.view_mistakes = 0.18
    config.teacher.temperature = 0.25
    config.teacher.fragment_size = 1.0  # metres
    config.teacher.ambiguity = 0.15
    config.teacher.bleeding = 0.01
    config.teacher.lighting = 0.4
    config.teacher.pixel_noise = 1.0
    config.teacher.seed = 0

    config.text = ml_collections.ConfigDict()
    config.text.encoder = "stand-in:64"
    config.text.prompt = "a {} in a scene"

    config.model = ml_collections.ConfigDict()
    config.model.arch = "MinkUNet14A"
    config.model.width = 0.5
    config.model.dtype = "float32"  # or bfloat16, for arithmetic only; parameters, statistics and losses are float32
    config.model.remat = 0  # number of finest levels recomputed in the backward pass: saves memory

    config.loss = ml_collections.ConfigDict()
    config.loss.distill_weight = 1.0
    config.loss.superpoint_weight = 1.0  # 0: pixel-point distillation
    config.loss.self_weight = 0.02  # the teacher is no better than the student in so short a run: BUILD.md
    config.loss.temperature = 0.01
    config.loss.label_source = "ema"  # or fixed_3d (the network at the end of stage 1), fixed_2d (the 2D features)
    config.loss.voting = True
    config.loss.ema_momentum = 0.99

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 4e-3
    config.optimizer.power = 0.9
    config.optimizer.openscene_lr_quirk = False

    config.supervised = ml_collections.ConfigDict()  # SGD of OpenScene's mink.yaml
    config.supervised.learning_rate = 0.2  # OpenScene's 0.01 suits longer runs: 53.5 mIoU here, this 84.1
    config.supervised.momentum = 0.9
    config.supervised.weight_decay = 1e-4

    config.eval = ml_collections.ConfigDict()
    config.eval.repeats = 5
    config.eval.words = ""  # label set of the words points are compared with; empty: data.label_set
    config.eval.fusion_by_voxel = False  # a point has the 2D feature of its voxel's first point, as in OpenScene
    config.eval.pictures = 2  # scenes to draw
    return config
