"""ICC profiles for tests, written byte by byte, and what they mean by the formulas of their specification."""

import struct

import numpy as np

WHITE = np.array([0.9642, 1.0, 0.8249])  # D50
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])


def decode_srgb(values):
    """sRGB's curve: from numbers in [0, 1] to linear light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encode_srgb(values):
    """Its inverse."""
    values = np.clip(values, 0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def _xyz(values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _curve(gamma):
    """A power, or sRGB's curve as a table of 1024 numbers as most of its profiles have it."""
    if gamma != "srgb":
        return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    table = (decode_srgb(np.linspace(0, 1, 1024)) * 65535).round().astype(">u2").tobytes()
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + table


def _profile(space, tags, *, pcs=b"XYZ ", kind=b"mntr"):
    tags = {"cprt": b"text\0\0\0\0none\0\0\0\0", "wtpt": _xyz(WHITE), **tags}
    offset, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name.encode(), offset + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", offset + len(data), 0x02400000, kind, space, pcs, b"acsp")
    head = head.ljust(68, b"\0") + _xyz(WHITE)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def rgb_profile(matrix, gamma):
    """Of three colours, the columns of a matrix to XYZ, and a curve: `srgb` or a power."""
    columns = {f"{name}XYZ": _xyz(matrix[:, number]) for number, name in enumerate("rgb")}
    return _profile(b"RGB ", {**columns, **{f"{name}TRC": _curve(gamma) for name in "rgb"}})


def grey_profile(gamma):
    """Of greys."""
    return _profile(b"GRAY", {"kTRC": _curve(gamma)})


def cmyk_profile(corners):
    """Of inks: Lab in 8 bits for each of the 16 ways to print none or all of each, `(16, 3)`, cyan changing slowest."""
    same = bytes(range(256))
    head = b"mft1\0\0\0\0" + struct.pack(">BBBx9i", 4, 3, 2, *(65536 if n % 4 == 0 else 0 for n in range(9)))
    lut = head + same * 4 + np.asarray(corners, dtype=np.uint8).tobytes() + same * 3
    return _profile(b"CMYK", {"A2B0": lut}, pcs=b"Lab ", kind=b"prtr")


def lab_shown(lab):
    """What Lab in 8 bits means in sRGB, as float levels."""
    light, a, b = float(lab[0]) / 2.55, float(lab[1]) - 128, float(lab[2]) - 128
    base = (light + 16) / 116
    roots = np.array([base + a / 500, base, base - b / 200])
    xyz = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * WHITE
    return encode_srgb(np.linalg.inv(SRGB) @ xyz) * 255


def shown(pixels, gamma, matrix=SRGB):
    """What 8-bit numbers mean in sRGB: `(..., 3)` of a matrix profile, or greys `(...)`, as float levels."""
    values = np.asarray(pixels, dtype=float) / 255
    linear = decode_srgb(values) if gamma == "srgb" else values ** (round(gamma * 256) / 256)
    if pixels.ndim == 3:
        linear = linear @ (np.linalg.inv(SRGB) @ matrix).T
    return encode_srgb(linear) * 255


def drawn_matrix(draw):
    """Primaries of some monitor: none of them far from sRGB's, together white."""
    matrix = SRGB + np.array([[draw.uniform(-0.06, 0.06) for _ in "rgb"] for _ in "xyz"])
    return matrix * (WHITE / matrix.sum(1))[:, None]
