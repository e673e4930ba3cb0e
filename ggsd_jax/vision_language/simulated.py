"""SIMULATED 2D teacher: it looks at labels. Stands in for LSeg or OpenSeg where their weights are missing.

It renders the per-pixel features a 2D vision-language network might give of a view, from the *labels* of the
point cloud and the text embeddings of the classes, and then spoils them in the ways the GGSD paper names
(Fig. 1, section 3.2). Its features go through `data.projection.fuse` as a real network's would. It measures
the method, never 2D networks; results made with it must say so.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int32
from scipy import ndimage

from data.labels import IGNORE
from data.scene import Scene, View, check_labels
from data.virtual_camera import point_spacing, splat

_NOISE_ROWS = 4096  # rows of pixel noise that pixels draw from: ten times as fast as drawing each anew


@dataclass(frozen=True, eq=False)
class SimulatedTeacher:
    """`fuse(scene.points, views, teacher(scene))` gives a labelled scene the features of a pretended network.

    All errors are random with respect to the room, but towards similar classes: not all average out. The
    defaults make the 2D fusion of the synthetic validation rooms score about 50 mIoU with the stand-in text.

    Attributes:
      class_text: unit text embedding of each class, in the order of the labels.
      fragment_mistakes: share of the scene's fragments (what one class has in a cube of `fragment_size`
        metres) that all views agree to take for the same wrong class.
      view_mistakes: share of the regions of one view (connected pieces of one class in the image) that this
        view takes for another class, in average light.
      temperature: of the softmax over cosines (of centred text) by which the wrong class is drawn; small:
        only the most similar.
      ambiguity: how far every feature leans from its own class to that softmax's mean. The same everywhere:
        this part never averages out.
      bleeding: standard deviation, in image widths, of the wobble of region boundaries.
      lighting: length of the error that a view's light adds to all its features. This, like the next, is
        measured in distances of a class text from their mean, so that text spaces as crowded as CLIP's are
        disturbed alike.
      pixel_noise: length of the error of single pixels.
      seed: another seed, other errors.
    """

    class_text: Float32[np.ndarray, "K C"]
    fragment_mistakes: float = 0.1
    view_mistakes: float = 0.18
    temperature: float = 0.25
    fragment_size: float = 1.0
    ambiguity: float = 0.15
    bleeding: float = 0.01
    lighting: float = 0.4
    pixel_noise: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for rate in ("fragment_mistakes", "view_mistakes", "ambiguity"):
            if not 0 <= getattr(self, rate) <= 1:
                raise ValueError(f"simulated teacher: {rate} is {getattr(self, rate)}, expected a share in 0..1")
        for size in ("temperature", "fragment_size"):
            if not getattr(self, size) > 0:
                raise ValueError(f"simulated teacher: {size} is {getattr(self, size)}, expected more than 0")
        if self.class_text.shape[0] < 2 or self.class_text.shape[1] <= self.class_text.shape[0]:
            raise ValueError(
                f"simulated teacher: class_text is {list(self.class_text.shape)}, expected [K, C], 2 <= K < C"
            )

    space = "simulated"  # no network's, though it is made to look like that of class_text

    @property
    def width(self) -> int:
        """C."""
        return self.class_text.shape[1]

    def __call__(self, scene: Scene) -> Callable[[View], Float32[np.ndarray, "h w C"]]:
        """The function that gives the features of any view of this scene; the same view, the same features.

        Points labelled 255, and pixels without a point, get a direction of their own that means none of the
        classes: as like each of them as they are to each other.

        Raises:
          ValueError: the scene has no labels, or one that is neither 255 nor a row of class_text.
        """
        check_labels(scene, len(self.class_text))
        name = zlib.crc32(scene.name.encode())
        apparent = self._mistake_fragments(np.random.default_rng([self.seed, name]), scene)
        spacing = 1.5 * point_spacing(scene.points)  # closes the gaps between neighbouring points

        def features_of(view: View) -> Float32[np.ndarray, "h w C"]:
            rng = np.random.default_rng([self.seed, name, zlib.crc32(view.name.encode())])
            _, index = splat(scene.points, view.pose, view.intrinsics, view.size, spacing, view.depth)
            classes = np.where(index < 0, len(self.class_text), apparent[index])
            darkness = rng.uniform(0.5, 1.5)
            classes = self._mistake_regions(rng, classes, self.view_mistakes * darkness)
            classes = _wobble(rng, classes, self.bleeding * view.size[0])
            glare = rng.normal(size=len(self.class_text)) @ self._centred
            glare *= self.lighting * darkness * self._spread / np.linalg.norm(glare)
            rows = rng.integers(_NOISE_ROWS, size=classes.shape)
            features = (self._prototypes + glare.astype(np.float32))[classes]
            features += self._noise[rows]
            return features

        return features_of

    @cached_property
    def _centred(self) -> Float32[np.ndarray, "K C"]:
        return self.class_text - self.class_text.mean(axis=0)

    @cached_property
    def _spread(self) -> np.floating:
        return np.sqrt(np.mean(np.sum(self._centred**2, axis=1)))

    @cached_property
    def _confusion(self) -> np.ndarray:
        """[K, K]: chance that a mistaken region of class i is taken for class j."""
        unit = self._centred / np.linalg.norm(self._centred, axis=1, keepdims=True)
        weights = np.exp((unit @ unit.T).astype(np.float64) / self.temperature)
        np.fill_diagonal(weights, 0)
        return weights / weights.sum(axis=1, keepdims=True)

    @cached_property
    def _prototypes(self) -> Float32[np.ndarray, "K1 C"]:
        """The feature of each class before noise; the last row is that of no class."""
        leaning = (1 - self.ambiguity) * self.class_text + self.ambiguity * (self._confusion @ self.class_text)
        leaning /= np.linalg.norm(leaning, axis=1, keepdims=True)
        basis = np.linalg.qr(self.class_text.T.astype(np.float64))[0]
        aside = np.random.default_rng(self.seed).normal(size=len(basis))
        aside -= basis @ (basis.T @ aside)
        mean = self.class_text.mean(axis=0)
        none = mean + np.sqrt(1 - mean @ mean) * aside / np.linalg.norm(aside)
        return np.vstack([leaning, none]).astype(np.float32)

    @cached_property
    def _noise(self) -> Float32[np.ndarray, "R C"]:
        width = self.class_text.shape[1]
        noise = np.random.default_rng(self.seed).standard_normal((_NOISE_ROWS, width), np.float32)
        return noise * np.float32(self.pixel_noise * self._spread / np.sqrt(width))

    def _mistake_fragments(self, rng, scene: Scene) -> Int32[np.ndarray, " N"]:
        """The class every point seems to be of in all views; K for none."""
        num_classes = len(self.class_text)
        cells = np.floor(scene.points / self.fragment_size + rng.random(3)).astype(np.int64)
        labels = np.where(scene.labels == IGNORE, num_classes, scene.labels)
        fragments, member = np.unique(np.column_stack([labels, cells]), axis=0, return_inverse=True)
        return self._mistake(rng, fragments[:, 0], self.fragment_mistakes)[member].astype(np.int32)

    def _mistake_regions(self, rng, classes, rate):
        regions = np.zeros(classes.shape, np.int32)
        owner = []
        for k in np.unique(classes):
            pieces, count = ndimage.label(classes == k)
            regions += np.where(pieces > 0, pieces + len(owner) - 1, 0).astype(np.int32)
            owner += [k] * count
        return self._mistake(rng, np.array(owner), rate)[regions]

    def _mistake(self, rng, classes, rate):
        """Each of `classes` [n], or with a chance of `rate` a similar one; none (K) stays none."""
        cumulative = np.cumsum(self._confusion, axis=1)
        cumulative[:, -1] = 1
        known = np.minimum(classes, len(self.class_text) - 1)
        other = np.argmax(rng.random(len(classes))[:, None] < cumulative[known], axis=1)
        wrong = (rng.random(len(classes)) < rate) & (classes < len(self.class_text))
        return np.where(wrong, other, classes)


def _wobble(rng, image, pixels):
    """The image [h, w] looked up at places displaced by a smooth random field of this standard deviation."""
    height, width = image.shape
    place = np.indices(image.shape)
    for axis in range(2):
        coarse = rng.normal(0, pixels, (7, 9))
        rows, cols = np.linspace(0, 6, height), np.linspace(0, 8, width)
        field = ndimage.map_coordinates(coarse, np.meshgrid(rows, cols, indexing="ij"), order=1)
        place[axis] = (place[axis] + field.round().astype(int)).clip(0, image.shape[axis] - 1)
    return image[place[0], place[1]]
