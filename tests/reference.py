"""Slow plain-Python float64 oracles, written from the formulas alone: loops over cells, no torch arithmetic."""

import math


def blur(mask, kernel):
    """Gaussian over rows and columns of a nested list `[h][w]`, edges replicated; what is constant stays as it is."""
    if kernel == 0:
        return mask
    sigma = 0.3 * ((kernel - 1) / 2 - 1) + 0.8
    reach = kernel // 2
    height, width = len(mask), len(mask[0])
    out = [[0.0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            total = weight = 0.0
            seen = set()
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    g = math.exp(-(dy * dy + dx * dx) / (2 * sigma * sigma))
                    yy, xx = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
                    total += g * mask[yy][xx]
                    weight += g
                    seen.add(mask[yy][xx])
            out[y][x] = mask[y][x] if len(seen) == 1 else min(max(total / weight, 0.0), 1.0)
    return out


def weights(mask, *, threshold, gamma, floor, kernel, prior_applies):
    """Raw, target and prior weights of one sample `[f][h][w]`."""
    raw = [[[min(max(v, 0.0), 1.0) for v in row] for row in frame] for frame in mask]
    target, prior = [], []
    for frame in raw:
        soft = blur(frame, kernel)
        target_frame, prior_frame = [], []
        for y, row in enumerate(frame):
            target_row, prior_row = [], []
            for x, value in enumerate(row):
                processed = soft[y][x] ** gamma * (1 - floor) + floor
                keep = 0.0
                if prior_applies:
                    if threshold is None:
                        keep = 1 - processed if 1 - processed >= 1e-6 else 0.0
                    elif value < threshold:
                        keep, processed = 1.0, 0.0
                target_row.append(processed)
                prior_row.append(keep)
            target_frame.append(target_row)
            prior_frame.append(prior_row)
        target.append(target_frame)
        prior.append(prior_frame)
    return raw, target, prior


def error(a, b, kind, delta):
    """One element's error."""
    d = abs(a - b)
    if kind == "mse":
        return d * d
    if kind == "l1":
        return d
    return 0.5 * d * d if d <= delta else delta * (d - 0.5 * delta)


def _sums(pred, other, weight, kind, delta):
    num = den = 0.0
    for channel, other_channel in zip(pred, other, strict=True):
        for f, frame in enumerate(channel):
            for y, row in enumerate(frame):
                for x, value in enumerate(row):
                    num += error(value, other_channel[f][y][x], kind, delta) * weight[f][y][x]
                    den += weight[f][y][x]
    return num, den


def _ratio(num, den):
    return num / den if den > 1e-8 else 0.0


def loss(pred, target, mask, prior, s):
    """(total, target, prior) of nested lists `[b][c][f][h][w]`, masks `[b][f][h][w]`; `s` holds the settings."""
    beta = s.get("area_scale_beta", 0.0)
    kind, delta = s.get("error", "mse"), s.get("huber_delta", 1.0)
    rows = []
    for b in range(len(pred)):
        applies = prior is not None and s["prior_weight"] > 0
        raw, tw, pw = weights(
            mask[b],
            threshold=s.get("prior_threshold"),
            gamma=s.get("mask_gamma", 1.0),
            floor=s.get("mask_min_weight", 0.0),
            kernel=s.get("mask_blur", 0),
            prior_applies=applies,
        )
        cells = [v for frame in raw for row in frame for v in row]
        tn, td = _sums(pred[b], target[b], tw, kind, delta)
        pn, pd = _sums(pred[b], prior[b], pw, kind, delta) if applies else (0.0, 0.0)
        rows.append((tn, td, pn, pd, sum(cells), len(cells)))
    if s["normalization"] == "global":
        area = (sum(r[4] for r in rows) / sum(r[5] for r in rows)) ** beta if beta else 1.0
        t = _ratio(sum(r[0] for r in rows), sum(r[1] for r in rows)) * area
        p = _ratio(sum(r[2] for r in rows), sum(r[3] for r in rows))
    else:
        count = len(rows)
        t = sum(_ratio(r[0], r[1]) * ((r[4] / r[5]) ** beta if beta else 1.0) for r in rows) / count
        p = sum(_ratio(r[2], r[3]) for r in rows) / count
    return t + s["prior_weight"] * p, t, s["prior_weight"] * p


def area_average(pixels, box, cells):
    """Mean of the pixels `[y][x]` under each of `cells` (rows, columns) of a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    rows, columns = cells
    out = []
    for i in range(rows):
        y0, y1 = top + (bottom - top) * i / rows, top + (bottom - top) * (i + 1) / rows
        line = []
        for j in range(columns):
            x0, x1 = left + (right - left) * j / columns, left + (right - left) * (j + 1) / columns
            total = area = 0.0
            for y in range(int(y0), min(math.ceil(y1), len(pixels))):
                for x in range(int(x0), min(math.ceil(x1), len(pixels[0]))):
                    part = max(0.0, min(y1, y + 1) - max(y0, y)) * max(0.0, min(x1, x + 1) - max(x0, x))
                    total += part * pixels[y][x]
                    area += part
            line.append(total / area)
        out.append(line)
    return out
