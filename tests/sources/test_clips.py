import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from mpp.media.videos import Timeline, read_frames, read_timeline
from mpp.models.contract import LatentSpec
from mpp.sources.clips import Clip, Clips, pool_in_time
from tests.media import videos

RATES = [8, 12, 15, 16, 24, 25, Fraction(24000, 1001), 29.97, 30, 50, 59.94, 60]


def steady(count, rate, unit=None):
    """A timeline of constant rate; with a unit, its times are rounded to it, as containers do."""
    exact = [Fraction(n) / Fraction(rate) for n in range(count + 1)]
    if unit is not None:
        exact = [round(time / unit) * unit for time in exact]
    *times, end = map(float, exact)
    clock = None if unit is None else (0, unit.numerator, unit.denominator)
    return Timeline((8, 8), count, tuple(times), end, clock=clock)


def uneven(count, seed=0):
    """A timeline of variable rate."""
    steps = np.random.default_rng(seed).integers(10, 200, count) / 1000
    times = np.concatenate([[0], np.cumsum(steps)])
    return Timeline((8, 8), count, tuple(times[:-1].tolist()), float(times[-1]))


def folder(count):
    return Timeline((8, 8), count, None, None, files=tuple(f"{n}.png" for n in range(count)))


def on_screen(timeline, moment):
    """The frame on screen at a moment, by looking at all of them."""
    unit = 0.001 if timeline.clock is None else timeline.clock[1] / timeline.clock[2]
    shown = [n for n, time in enumerate(timeline.times) if time <= moment + unit]
    return shown[-1]


def spec(stride):
    return LatentSpec(channels=16, spatial_stride=8, temporal_stride=stride, patch=(1, 2, 2))


# ---------------------------------------------------------------- frame rates


@pytest.mark.parametrize("source", RATES)
@pytest.mark.parametrize("target", [8, 12, 16, 24, 30])
def test_a_clip_shows_what_is_on_screen(source, target):
    timeline = steady(math.ceil(3 * source), source, Fraction(1, 90000))
    (clip,) = Clips(fps=target, frames=(5, 17, 33)).of(timeline, "v", fps=99)
    assert len(clip.frames) == (33 if 3 * target >= 33 else 17)
    assert list(clip.frames) == [on_screen(timeline, k / target) for k in range(len(clip.frames))]


@pytest.mark.parametrize("seed", range(5))
def test_clips_of_uneven_videos_show_what_is_on_screen(seed):
    timeline = uneven(60, seed)
    clips = Clips(fps=16, frames=(9, 17), extract="all").of(timeline, "v", fps=16)
    assert len(clips) > 2
    for clip in clips:
        moments = [timeline.times[clip.start] + k / 16 for k in range(len(clip.frames))]
        assert list(clip.frames) == [on_screen(timeline, moment) for moment in moments]
        assert moments[-1] < timeline.duration


@pytest.mark.parametrize("unit", [None, Fraction(1, 1000), Fraction(1, 600), Fraction(1, 90000)])
@pytest.mark.parametrize("rate", [16, 24, 25, 30, 60])
def test_at_its_own_rate_a_video_is_cut_frame_by_frame(unit, rate):
    # Matroska and others round times, mostly to milliseconds: no frame may be doubled or lost for that
    timeline = steady(200, rate, unit)
    for extract, starts in (("head", ()), ("chosen", (0, 7, 101, 119))):
        for clip in Clips(frames=(81,), extract=extract, starts=starts).of(timeline, "v", fps=rate):
            assert list(clip.frames) == list(range(clip.start, clip.start + 81))


def test_a_rate_that_does_not_divide_does_not_drift():
    source, target, count = Fraction(30000, 1001), 16, 10_001
    timeline = steady(20_000, source, Fraction(1, 30000))
    (clip,) = Clips(fps=target, frames=(count,)).of(timeline, "v", fps=99)
    for k, number in enumerate(clip.frames):
        shown, moment = Fraction(number) / source, Fraction(k, target)
        # on screen then, give or take the rounding of times
        assert shown <= moment + Fraction(2, 30000)
        assert moment < shown + 1 / source
    assert clip.frames[-1] == math.floor(Fraction(10_000, target) * source)


def test_a_container_that_counts_in_frames_shows_none_early(tmp_path):
    path = videos.write_video(tmp_path / "v.avi", videos.number_frames(60), codec="mpeg4", rate=25)
    timeline = read_timeline(path)
    assert timeline.clock[1:] == (1, 25)
    (clip,) = Clips(fps=16, frames=(33,)).of(timeline, "v", fps=99)
    assert list(clip.frames) == [25 * k // 16 for k in range(33)]


def test_slow_videos_repeat_frames_and_fast_ones_drop_them():
    (clip,) = Clips(fps=16, frames=(9,)).of(steady(40, 8), "v", fps=99)
    assert clip.frames == (0, 0, 1, 1, 2, 2, 3, 3, 4)
    (clip,) = Clips(fps=16, frames=(9,)).of(steady(40, 32), "v", fps=99)
    assert clip.frames == (0, 2, 4, 6, 8, 10, 12, 14, 16)


def test_the_models_rate_holds_where_none_is_set():
    assert Clips(frames=(3,)).of(steady(40, 32), "v", fps=8)[0].frames == (0, 4, 8)
    assert Clips(fps=16, frames=(3,)).of(steady(40, 32), "v", fps=8)[0].frames == (0, 2, 4)


def test_a_folder_of_frames_has_no_clock():
    for rate in (1, 24, 60):
        (clip,) = Clips(fps=rate, frames=(5, 9)).of(folder(10), "v", fps=16)
        assert clip.frames == tuple(range(9))


@pytest.mark.parametrize(("count", "source", "target", "want"), [(81, 16, 16, 81), (80, 16, 16, 65), (127, 25, 16, 81)])
def test_no_clip_goes_on_after_the_end(count, source, target, want):
    (clip,) = Clips(fps=target, frames=(65, 81)).of(steady(count, source), "v", fps=99)
    assert len(clip.frames) == want


def test_frames_of_a_real_video_are_those_of_the_clip(tmp_path):
    path = videos.write_video(tmp_path / "v.mp4", videos.number_frames(50), rate=25)
    timeline = read_timeline(path)
    (clip,) = Clips(fps=16, frames=(17,), extract="chosen").of(timeline, "v", fps=99, starts=[10])
    got = [videos.read_number(image) for image in read_frames(path, timeline, clip.frames)]
    assert got == [10 + 25 * k // 16 for k in range(17)]


# ---------------------------------------------------------------- which clips


def starts_and_lengths(clips):
    return [(clip.start, len(clip.frames)) for clip in clips]


@pytest.mark.parametrize(("count", "want"), [(17, 17), (32, 17), (33, 33), (80, 49), (81, 81), (500, 81)])
def test_head_takes_the_longest_length_that_fits(count, want):
    assert starts_and_lengths(Clips().of(steady(count, 16), "v", fps=16)) == [(0, want)]
    assert starts_and_lengths(Clips().of(folder(count), "v", fps=16)) == [(0, want)]


def test_lengths_may_be_named_in_any_order():
    assert starts_and_lengths(Clips(frames=[33, 17, 17]).of(folder(40), "v", fps=16)) == [(0, 33)]


def test_uniform_spreads_clips_from_the_first_to_the_last_start():
    clips = Clips(frames=(17,), extract="uniform", count=4).of(folder(77), "v", fps=16)
    assert starts_and_lengths(clips) == [(0, 17), (20, 17), (40, 17), (60, 17)]
    assert clips[-1].frames[-1] == 76
    assert starts_and_lengths(Clips(frames=(17,), extract="uniform", count=1).of(folder(77), "v", fps=16)) == [(30, 17)]


def test_uniform_gives_fewer_clips_where_starts_would_coincide():
    clips = Clips(frames=(17,), extract="uniform", count=9).of(folder(19), "v", fps=16)
    assert starts_and_lengths(clips) == [(0, 17), (1, 17), (2, 17)]
    assert len(Clips(frames=(17,), extract="uniform", count=9).of(folder(17), "v", fps=16)) == 1


@pytest.mark.parametrize("seed", range(4))
def test_uniform_reaches_the_last_start_that_fits(seed):
    timeline = uneven(80, seed)
    clips = Clips(fps=16, frames=(17,), extract="uniform", count=3).of(timeline, "v", fps=99)
    fitting = [n for n, time in enumerate(timeline.times) if time + 16 / 16 < timeline.duration - 0.001]
    assert (clips[0].start, clips[-1].start) == (0, fitting[-1])


def test_all_cuts_one_clip_after_the_other():
    clips = Clips(frames=(17, 33), extract="all").of(folder(100), "v", fps=16)
    assert starts_and_lengths(clips) == [(0, 33), (33, 33), (66, 33)]
    clips = Clips(frames=(5, 17, 33), extract="all").of(folder(99 + 23), "v", fps=16)
    assert starts_and_lengths(clips) == [(0, 33), (33, 33), (66, 33), (99, 17), (116, 5)]


@pytest.mark.parametrize("source", RATES)
def test_clips_of_all_do_not_overlap_and_leave_nothing_out(source):
    timeline = steady(math.ceil(20 * source), source)
    clips = Clips(fps=16, frames=(5, 17, 33), extract="all").of(timeline, "v", fps=99)
    for clip, later in pairwise(clips):
        assert clip.frames[-1] < later.start
        end = timeline.times[clip.start] + len(clip.frames) / 16
        assert abs(timeline.times[later.start] - end) <= float(1 / Fraction(source)) + 0.001
    covered = sum(len(clip.frames) for clip in clips) / 16
    assert covered > 20 - 5 / 16 - len(clips) / source


def test_chosen_clips_begin_where_they_are_told():
    clips = Clips(frames=(17, 33), extract="chosen", starts=(70, 10, 10, 40))
    assert starts_and_lengths(clips.of(folder(100), "v", fps=16)) == [(10, 33), (40, 33), (70, 17)]
    assert starts_and_lengths(clips.of(folder(100), "v", fps=16, starts=[5])) == [(5, 33)]


@pytest.mark.parametrize("extract", ["head", "uniform", "all", "chosen"])
@pytest.mark.parametrize("seed", range(4))
def test_clips_are_unique_and_within_the_video(extract, seed):
    timeline = uneven(90, seed)
    clips = Clips(extract=extract, frames=(5, 9, 17, 33), count=7, starts=(0, 3, 50) if extract == "chosen" else ()).of(
        timeline, "v", fps=16
    )
    names = [clip.name for clip in clips]
    assert len(set(names)) == len(names) > 0
    assert clips == sorted(clips, key=lambda clip: clip.start)
    for clip in clips:
        assert clip.frames[0] == clip.start
        assert list(clip.frames) == sorted(clip.frames)
        assert clip.frames[-1] < timeline.count


def test_a_clips_name_says_start_and_length():
    assert Clip(123, tuple(range(123, 140))).name == "00123-017"


# ---------------------------------------------------------------- errors


def test_short_videos_are_refused_with_their_length():
    with pytest.raises(ValueError, match=r"walk.mp4 has 12 frames at 16 frames per second, the shortest clip .* is 17"):
        Clips().of(steady(18, 24), "walk.mp4", fps=16)
    with pytest.raises(ValueError, match="walk has 16 frames, the shortest"):
        Clips(extract="all").of(folder(16), "walk", fps=16)


def test_a_video_of_one_frame_is_a_clip_of_one_frame():
    for duration in (0.0, 0.04):
        timeline = Timeline((8, 8), 1, (0.0,), duration)
        assert starts_and_lengths(Clips(frames=(1,)).of(timeline, "v", fps=16)) == [(0, 1)]


def test_starts_outside_the_video_are_refused():
    clips = Clips(frames=(17,), extract="chosen", starts=(100,))
    with pytest.raises(ValueError, match="walk.mp4 has frames 0 to 99; no clip can begin at 100"):
        clips.of(folder(100), "walk.mp4", fps=16)
    with pytest.raises(ValueError, match="walk.mp4 has frames 0 to 99; no clip can begin at -1"):
        clips.of(folder(100), "walk.mp4", fps=16, starts=[-1])
    with pytest.raises(ValueError, match="walk.mp4 has 10 frames from frame 90 on, the shortest clip .* is 17"):
        clips.of(folder(100), "walk.mp4", fps=16, starts=[90])
    with pytest.raises(ValueError, match="walk.mp4: data.clips.extract=chosen and no starts"):
        Clips(extract="chosen").of(folder(100), "walk.mp4", fps=16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"extract": "tail"}, "head, uniform, all, chosen, got 'tail'"),
        ({"fps": 0.0}, "fps must be above 0"),
        ({"fps": math.nan}, "fps must be above 0"),
        ({"fps": math.inf}, "fps must be above 0"),
        ({"frames": ()}, "frames must name"),
        ({"frames": (17, 0)}, "frames must name"),
        ({"count": 0}, "count must be at least 1"),
        ({"starts": (4, -1)}, "starts must be frame numbers"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Clips(**settings)


def test_lengths_off_the_models_grid_are_refused_with_those_beside():
    Clips().check(spec(4))
    Clips().check(spec(8))
    with pytest.raises(ValueError, match="instead of 80 use 77 or 81"):
        Clips(frames=(17, 80)).check(spec(4))
    with pytest.raises(ValueError, match="instead of 21 use 17 or 25"):
        Clips(frames=(21,)).check(spec(8))
    with pytest.raises(ValueError, match="learns single images"):
        Clips().check(spec(1))


# ---------------------------------------------------------------- masks pooled in time


def slowly_pooled(frames, stride):
    """The same in plain loops."""
    groups = [[0]]
    for number in range(1, len(frames)):
        if (number - 1) % stride == 0:
            groups.append([])
        groups[-1].append(number)
    found = []
    for group in groups:
        rows = []
        for y in range(len(frames[0])):
            row = []
            for x in range(len(frames[0][0])):
                total = 0.0
                for number in group:
                    total += frames[number][y][x]
                row.append(total / len(group))
            rows.append(row)
        found.append(rows)
    return found


@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("groups", [0, 1, 5])
def test_masks_are_pooled_as_a_slow_mean_of_each_group(stride, groups):
    count = 1 + groups * stride
    frames = torch.rand(count, 3, 5, generator=torch.Generator().manual_seed(count))
    want = torch.tensor(slowly_pooled(frames.double().tolist(), stride), dtype=torch.float64)
    got = pool_in_time(frames, stride)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-7)
    assert torch.equal(pool_in_time(iter(frames), stride), got)
    assert got.shape == (spec(stride).shape(count, 8, 8)[1], 3, 5)


def test_all_white_and_all_black_masks_stay_so():
    for value in (0.0, 1.0, 0.1):
        assert torch.equal(pool_in_time(torch.full((81, 2, 2), value), 4), torch.full((21, 2, 2), value))


def test_masks_are_pooled_without_being_held_together():
    alive, most = set(), 0

    class Frame(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    def frames():
        nonlocal most
        for number in range(33):
            frame = torch.full((2, 2), float(number)).as_subclass(Frame)
            alive.add(id(frame))
            most = max(most, len(alive))
            yield frame
            del frame

    assert pool_in_time(frames(), 4)[:, 0, 0].tolist() == [0.0] + [4 * k + 2.5 for k in range(8)]
    assert most < 33


@pytest.mark.parametrize("count", [0, 2, 4, 8, 82])
def test_masks_that_do_not_fill_the_last_group_are_refused(count):
    with pytest.raises(ValueError, match=f"masks of {count} frames do not fill"):
        pool_in_time(torch.ones(count, 2, 2), 4)


def test_groups_are_those_of_a_causal_vae():
    # With random weights a latent frame depends on a pixel frame unless the architecture forbids it. The first latent
    # frame that changes with a pixel frame is the one in whose group it is.
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    count = 13
    clip = torch.rand(1, 3, count, 16, 16)
    with torch.no_grad():
        before = vae.encode(clip).latent_dist.mean
        for frame in range(count):
            changed = clip.clone()
            changed[:, :, frame] = 1 - changed[:, :, frame]
            difference = (vae.encode(changed).latent_dist.mean - before).abs().amax((0, 1, 3, 4))
            marked = torch.zeros(count, 1, 1)
            marked[frame] = 1
            (group,) = pool_in_time(marked, 4).flatten().nonzero().flatten().tolist()
            assert (difference > 1e-6).nonzero().flatten()[0] == group
            assert difference[:group].max() == 0 if group else True
