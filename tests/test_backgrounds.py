"""What stands behind the sprites of composed scenes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmllm.scenes.backgrounds import photo_paths, photographs
from jaxmllm.scenes.compose import KINDS
from jaxmllm.scenes.files import FIRST_NOUNS, make_scenes, scene_at


def photo_folder(folder: Path, **colors: tuple[int, int, int]) -> Path:
    """FOLDER/SPLIT/plain.png of one colour for each split."""
    for split, color in colors.items():
        (folder / split).mkdir(parents=True)
        Image.new("RGB", (300, 200), color).save(folder / split / "plain.png")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_photographs_stand_behind_the_sprites_of_their_split(tmp_path: Path, kind: str) -> None:
    """Pieces of the training photographs in training scenes, of the held-out ones in the others."""
    colors = {"train": (200, 40, 0), "heldout": (0, 40, 200)}
    photos = photo_folder(tmp_path / "photos", **colors)
    for split, color in {**colors, "heldout_nouns": colors["heldout"]}.items():
        how = {"nouns": FIRST_NOUNS, "size": 96, "seed": 3, "kinds": (kind,)}
        scene, _ = scene_at(split, 5, **how, backgrounds=str(photos))
        behind = scene.image[scene.instances == 0].astype(int)
        assert (np.abs(behind - color).max(1) == 0).mean() > 0.7  # all but the soft edges of sprites
        assert scene.kind == kind and scene.objects


def test_pieces_of_photographs_differ(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:200, :300]
    photo = np.stack([rows, columns // 2, 0 * rows], -1).astype(np.uint8)
    (tmp_path / "train").mkdir()
    Image.fromarray(photo).save(tmp_path / "train" / "ramp.png")
    surface, rng = photographs(photo_paths(tmp_path, "train")), np.random.default_rng(0)
    pieces = [surface(rng, 60, 90, 0, 256) for _ in range(30)]
    assert all(piece.shape == (60, 90, 3) and piece.dtype == np.uint8 for piece in pieces)
    heights = [int(piece[-1, 0, 0]) - int(piece[0, 0, 0]) for piece in pieces]
    assert min(heights) > 80 and max(heights) < 200 and len(set(heights)) > 10  # half to all of the photograph
    mirrored = [int(piece[0, -1, 1]) < int(piece[0, 0, 1]) for piece in pieces]
    assert 5 < sum(mirrored) < 25


def test_a_missing_folder_of_photographs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos", train=(0, 0, 0))
    with pytest.raises(ValueError, match=r"no photographs \(.jpg, .jpeg, .png\) in .*heldout"):
        make_scenes(tmp_path / "scenes", train=5, heldout=3, backgrounds=str(photos), processes=1)
    assert not list(tmp_path.glob("scenes*"))


def test_scenes_over_photographs_are_kept_with_the_same_photographs_only(tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos", train=(0, 0, 0), heldout=(9, 9, 9))
    how = {"train": 5, "heldout": 3, "processes": 1}
    made = make_scenes(tmp_path / "scenes", **how, backgrounds=str(photos))
    assert make_scenes(made, **how, backgrounds=str(photos)) == made
    with pytest.raises(ValueError, match="was made with backgrounds=.*photos"):
        make_scenes(made, **how)
