"""GGSD on a folder of your own: clouds, and best also posed images; no labels are needed.

  python -m ggsd_jax.main --config=configs/folder.py --workdir=out/mine --config.data.root=/data/mine \\
      --config.teacher.weights=/data/clip-vit-base-patch16 --config.text.encoder=/data/clip-vit-base-patch16

`data.root` holds

  <root>/<scene>/           a folder per scene, or just the cloud file <root>/<scene>.ply (beside which images/ and
                            so on may lie, if it is the only one)
    cloud.ply               or cloud.pcd, cloud.npz (data.scene.Scene), cloud.xyz (a line per point: x y z, or
                            x y z red green blue); metres, z up; optionally with a property `label`:
                            0 = first class of data.label_set (of NYU40 its id less 1), 255 = none
    images/K.jpg            or K.png; K is any name
    poses/K.txt             16 numbers, the camera-to-world matrix; the camera looks along +z, y down; metres
    intrinsics.txt          fx fy cx cy in pixels of the images, or the 3x3 or 4x4 matrix; or intrinsics/K.txt
    depth/K.png             optional: 16 bit, 0 = no reading, of the same shape as the image

Scenes named in `val.txt` (one per line, and labelled) are scored, all others trained on;
without it the run ends with the trained network. Clouds or poses in millimetres: `--config.data.scale=0.001`. A real
2D network looks at the images; its weights and the text go together as configs/scannet.py says. Labelled clouds without
images can be scored; with `--config.teacher.name=simulated` they are looked at by the simulated network.

The hyper-parameters are those of the paper's indoor data sets; there is no score to expect. Out of doors take
voxel_size and superpoints from configs/nuscenes.py.
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
    config.data.name = "folder"
    config.data.root = ""
    config.data.lists = ""  # folder of val.txt, if there is one; default: data.root
    config.data.scale = 0.0  # metres per unit of clouds and poses; 0: metres; implausible sizes are refused
    config.data.depth_units = 1000.0  # units of the depth images in a metre
    config.data.prepared = ""  # folder of the prepared dataset; default: data/ in the work directory
    config.data.label_set = "nyu40"  # words for the loss; ask for any others later
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
    config.teacher.name = (
        "maskclip"  # or lseg, or for labelled clouds simulated (its errors as in configs/synthetic.py)
    )
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
