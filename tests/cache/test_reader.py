"""Our caches and another program's are read through one protocol."""

import inspect

import pytest

from mpp.cache.format import Cache, Notes
from mpp.cache.reader import Reader
from mpp.core.loss import MaskedPriorLoss
from mpp.musubi.cache import MusubiCache
from tests import helpers
from tests.musubi import stored as fixtures

MEMBERS = [name for name, member in vars(Reader).items() if inspect.isfunction(member) and name[0] != "_"]


@pytest.mark.parametrize("kind", [Cache, MusubiCache])
def test_readers_have_all_members_with_their_parameters(kind):
    assert {"entries", "latents", "mask", "conditioning", "check_some"} <= set(MEMBERS)
    for name in MEMBERS:
        own, wanted = (inspect.signature(getattr(owner, name)).parameters for owner in (kind, Reader))
        described = [[(p.name, p.kind, p.default) for p in found.values()] for found in (own, wanted)]
        assert described[0] == described[1], name


def test_another_programs_cache_is_not_one_of_ours_and_has_nothing_to_write(architecture, tmp_path):
    fixtures.wan(f=1).write(tmp_path, "wan")
    cache = MusubiCache(tmp_path, architecture)
    assert isinstance(cache, Reader)
    assert not isinstance(cache, Cache)
    assert not [name for name in dir(cache) if name.startswith("write")]
    (entry,) = cache.entries()
    assert cache.notes() == Notes()
    assert cache.mask_made_from(entry) is None
    assert cache.preview(entry.key) is None
    assert cache.prompt("0" * 32, architecture) is None
    assert cache.has_text(entry.text)


def test_our_cache_says_what_is_there(prepared, pipeline):
    cache = Cache(prepared)
    assert isinstance(cache, Reader)
    masked, bare = (next(e for e in cache.entries() if (e.mask is None) is without) for without in (False, True))
    assert cache.mask_made_from(masked).kind == "folder"
    assert cache.mask_made_from(bare) is None
    assert cache.preview(masked.key).name == f"{masked.key}.jpg"
    assert cache.preview(masked.key, ".frame3") is None
    assert cache.has_text(masked.text)
    assert not cache.has_text("0" * 32)
    assert cache.prompt("0" * 32, helpers.architecture(pipeline)) is None
    assert cache.advice(MaskedPriorLoss()) == []
