import numpy as np

from cifar_lightning.metrics.calibration import softmax
from cifar_lightning.report.gallery import gallery_positions


def test_the_gallery_has_the_worst_mistakes_and_the_least_certain():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 5, 2000)
    logits = rng.normal(size=(2000, 5)).astype(np.float32)
    logits[np.arange(2000), targets] += 2
    shown = gallery_positions(logits, targets, limit=200)
    assert len(shown) <= 200
    assert np.array_equal(shown, np.unique(shown))
    probs = softmax(logits)
    wrong = np.flatnonzero(probs.argmax(1) != targets)
    assert set(wrong[np.argsort(-probs[wrong].max(1))][:50]) <= set(shown)
    two = np.sort(probs, axis=1)[:, -2:]
    assert set(np.argsort(two[:, 1] - two[:, 0])[:50]) <= set(shown)
    assert set(np.argsort(probs[np.arange(2000), targets])[:50]) <= set(shown)


def test_a_gallery_without_any_mistake_still_has_images():
    logits = 10 * np.eye(4, dtype=np.float32)
    assert gallery_positions(logits, np.arange(4)).tolist() == [0, 1, 2, 3]
