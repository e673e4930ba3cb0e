"""GGSD on Matterport3D with the hyper-parameters of the paper.

  python -m ggsd_jax.main --config=configs/matterport.py --workdir=out/matterport --config.data.root=/data/v1/scans \\
      --config.data.lists=/data/matterport/lists --config.teacher.weights=/data/demo_e200.ckpt \\
      --config.text.encoder=/data/clip-vit-base-patch32

Ask the owners of Matterport3D for their download script, and get of each building the types region_segmentations,
undistorted_color_images, undistorted_depth_images and undistorted_camera_parameters; unpacked, `data.root/<building>/`
holds folders of these names. `data.lists` holds `category_mapping.tsv`, `scenes_train.txt` and `scenes_test.txt`
(metadata/ and tasks/benchmark/ of niessner/Matterport). A scene here is a region, and what is scored are the regions
of the 18 test buildings, as OpenScene does; regions of training without a camera inside are left out.

`--config.data.label_set=matterport40` (80, 160) takes the most frequent names instead of the 21 classes.

OpenScene's preprocessed clouds and fused features are read instead with `--config.data.name=openscene
--config.data.root=/data/matterport_3d --config.data.features=/data/matterport_multiview_openseg`, whose second
download, matterport_multiview_openseg_test, lies beside it.

The paper trains on one A100 (80 GB) in about 24 hours with LSeg as the teacher. Its Matterport3D numbers (40.1 mIoU,
54.4 mAcc for K = 21; 22.8/31.6, 11.9/16.2, 6.3/9.6 for K = 40, 80, 160) are those of the network trained on ScanNet;
it reports none for training here. Other teachers, their weights and text, and memory: as in configs/scannet.py.
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
    config.data.name = "matterport"
    config.data.root = ""
    config.data.prepared = ""  # folder of the prepared dataset; default: data/ in the work directory
    config.data.lists = ""  # folder of the lists and the category table; default: data.root
    config.data.features = ""  # with data.name=openscene, the folder of its fused features
    config.data.label_set = "matterport21"  # or matterport40, matterport80, matterport160
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
    config.superpoints.voxel_resolution = 0.05
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
