"""What differs between the moments of a clip and the layers of an image."""

import pytest

from mpp.models.contract import LatentSpec
from mpp.models.frame_axis import Layers, Moments


def test_a_models_latents_say_what_their_frames_are():
    assert LatentSpec(16, 8, 4, [1, 2, 2]).frames == Moments()
    assert LatentSpec(16, 8, 1, [1, 2, 2], layered=True).frames == Layers()
    with pytest.raises(ValueError, match=r"layered=true needs model.latents.temporal_stride=1, got 4"):
        LatentSpec(16, 8, 4, [1, 2, 2], layered=True)


def test_of_a_clip_few_frames_stand_for_all_and_of_an_image_all_layers():
    assert Moments().shown(1) == [0]
    assert Moments().shown(3) == [0, 1, 2]
    assert Moments().shown(21) == [0, 3, 6, 9, 11, 14, 17, 20]
    assert Moments().shown(11, 6) == [0, 2, 4, 6, 8, 10]
    assert Layers().shown(11) == Layers().shown(11, 6) == list(range(11))


@pytest.mark.parametrize(("given", "moment", "layers"), [(0, [0], [0, 1, 2]), (1, [1], [1, 2]), (9, [0], [])])
def test_regions_are_shown_of_the_first_moment_and_of_all_layers_that_are_learned(given, moment, layers):
    assert Moments().compared(3, given) == moment
    assert Layers().compared(3, given) == layers


def test_frames_have_names_on_disk_and_in_words():
    assert [Moments().suffix(number) for number in (0, 7)] == ["", ".frame7"]
    assert [Layers().suffix(number) for number in (0, 1, 2)] == ["", ".layer0", ".layer1"]
    assert (Moments().name(0, 1), Moments().name(4, 5)) == ("", "latent frame 4")
    assert [Layers().name(number, 3) for number in (0, 1, 2)] == ["whole", "layer 0", "layer 1"]
    assert (Moments().count(5, 4), Layers().count(2, 1), Layers().count(3, 1)) == ("17 frames", "1 layer", "2 layers")


def test_only_moments_play_and_only_layers_come_with_the_whole_image():
    assert [Moments().plays(frames) for frames in (1, 2)] == [False, True]
    assert not Layers().plays(3)
    assert (Moments().length(5), Layers().length(2)) == (5, 3)
    assert (Moments().channels, Layers().channels) == (3, 4)
