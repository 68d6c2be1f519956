"""Which checkpoints stay."""

from trainer.checkpoint import COMPLETE, prune


def test_the_last_stay_and_the_first_to_reach_each_multiple(tmp_path):
    # Steps of 8 images, a save at each 24: positions are the first step at or past a multiple.
    for images in (24, 48, 72, 96, 120, 144, 168):
        (tmp_path / f"{images:012d}").mkdir()
        (tmp_path / f"{images:012d}" / COMPLETE).touch()
    (tmp_path / f"{200:012d}").mkdir()  # never finished: not counted, not touched
    prune(tmp_path, keep_last=2, keep_every=48, batch=8)
    assert [int(f.name) for f in sorted(tmp_path.iterdir())] == [48, 96, 144, 168, 200]
    prune(tmp_path, keep_last=1, keep_every=None, batch=8)
    assert [int(f.name) for f in sorted(tmp_path.iterdir())] == [168, 200]
