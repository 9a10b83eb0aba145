"""Pathfinder-style pictures: are two dots the ends of one dashed contour?

Written anew from the parameters of Long Range Arena's Pathfinder-32, contours
of 14 dashes; its pictures differ in detail. Two contours start
`SEED_DISTANCE` apart and grow by turns, then shorter ones distract, as
far as there is room. One dot is on the start of the first contour; the other is
on its end, or on the end of the second.
"""

import numpy as np

SIZE = 32
PADDING = 1
# Pictures are drawn this much larger, then averaged.
ANTIALIAS = 2
SEED_DISTANCE = 7
MARKER_RADIUS = 1.5
CONTOUR = 14
DISTRACTOR = CONTOUR // 3
DISTRACTORS = 20 // DISTRACTOR
DASH = 2.0
THICKNESS = 0.5
MARGIN = 1.0
# Between the middles of dashes, each of which has its margin.
CLEARANCE = THICKNESS + 2 * MARGIN
CONTINUITY = 1.0
DASH_LEVEL = 0.75
# Directions that are tried for each dash.
TRIES = 12


def make_pictures(count, seed, batch=1000):
    """Draws pictures, half of them connected on average.

    Args:
        count: number of pictures.
        seed: of the draws. The first pictures do not depend on `count`.
        batch: number of pictures that are tried together.

    Returns:
        `(count, 32, 32)` uint8, and labels `(count,)` int32: 1 if connected.
    """
    rng = np.random.default_rng(seed)
    pictures, labels, made = [], [], 0
    while made < count:
        drawn, connected = _draw(rng, batch)
        pictures.append(drawn)
        labels.append(connected)
        made += len(connected)
    pictures, labels = np.concatenate(pictures), np.concatenate(labels)
    return pictures[:count], labels[:count].astype("int32")


def _draw(rng, batch):
    canvas = Canvas(batch)
    starts = _two_starts(rng, batch)
    pairs = [Contour(canvas, start, rng) for start in starts]
    for _ in range(CONTOUR - 1):
        for contour in pairs:
            contour.grow(rng)
    good = pairs[0].alive & pairs[1].alive
    for _ in range(DISTRACTORS):
        distractor = Contour(canvas, _free_starts(rng, canvas), rng)
        for _ in range(DISTRACTOR - 1):
            distractor.grow(rng)
    connected = rng.random(batch) < 0.5
    ends = np.where(
        connected[:, np.newaxis], pairs[0].position, pairs[1].position
    )
    canvas.dot(starts[0])
    canvas.dot(ends)
    return canvas.pictures()[good], connected[good]


def _two_starts(rng, batch):
    """Starts of both contours, SEED_DISTANCE apart."""
    low, high = PADDING + SEED_DISTANCE, SIZE - PADDING - SEED_DISTANCE
    first = rng.uniform(low, high, (batch, 2))
    return first, first + SEED_DISTANCE * _unit(
        rng.uniform(0, 2 * np.pi, batch)
    )


def _free_starts(rng, canvas):
    """A point of each picture that is free, if one of those tried is."""
    tried = rng.uniform(PADDING, SIZE - PADDING, (canvas.batch, TRIES, 1, 2))
    first = np.argmax(canvas.is_free(tried), axis=1)
    return tried[np.arange(canvas.batch), first, 0]


def _unit(angle):
    return np.stack([np.cos(angle), np.sin(angle)], -1)


class Contour:
    """One contour in each picture, which grows dash by dash.

    Attributes:
        position: `(batch, 2)`, the end of the last dash.
        alive: `(batch,)`, whether every dash found room.
    """

    def __init__(self, canvas, start, rng):
        self.canvas = canvas
        self.alive = np.ones(canvas.batch, bool)
        self.position = start
        # The last dash is not in the way of the next.
        self.last = None
        tries = rng.uniform(0, 2 * np.pi, (canvas.batch, TRIES))
        self._add(tries, gap=0.0)

    def grow(self, rng):
        # Turns have the density of a cosine, up to 90 degrees / CONTINUITY.
        turns = np.arcsin(rng.uniform(-1, 1, (self.canvas.batch, TRIES)))
        self._add(self.angle[:, np.newaxis] + turns / CONTINUITY, gap=MARGIN)

    def _add(self, angles, gap):
        """Adds a dash in the first direction that has room for it."""
        along = np.linspace(gap, gap + DASH, 5)[:, np.newaxis]
        points = self.position[:, np.newaxis, np.newaxis] + (
            along * _unit(angles)[:, :, np.newaxis]
        )
        free = self.canvas.is_free(points, self.last)
        self.alive &= free.any(1)
        rows = np.arange(len(angles))
        first = free.argmax(1)
        dash = points[rows, first]
        self.last = self.canvas.add(dash, self.alive)
        self.angle, self.position = angles[rows, first], dash[:, -1]


class Canvas:
    """Pictures, and which of their points are taken, both enlarged."""

    def __init__(self, batch):
        self.batch = batch
        self.side = SIZE * ANTIALIAS
        shape = (batch, self.side, self.side)
        self.levels = np.zeros(shape, "float32")
        # How many dashes a point is near to.
        self.dashes = np.zeros(shape, "int8")

    def is_free(self, points, last=None):
        """Whether all points of a try are, dash `last` left out of account.

        Args:
            points: `(batch, tries, points, 2)`.
            last: what `add` returned for that dash.

        Returns:
            `(batch, tries)`.
        """
        inside = (points >= PADDING) & (points < SIZE - PADDING)
        cells = np.clip(points * ANTIALIAS, 0, self.side - 1).astype(int)
        rows = np.arange(self.batch)[:, np.newaxis, np.newaxis]
        dashes = self.dashes
        if last is not None:
            dashes = dashes.copy()
            dashes[last] -= 1
        free = dashes[rows, cells[..., 0], cells[..., 1]] == 0
        return (inside.all(-1) & free).all(-1)

    def add(self, dash, chosen):
        """Draws a dash in chosen pictures, and keeps others clear of it.

        Args:
            dash: `(batch, points, 2)` on a straight line.
            chosen: `(batch,)`.

        Returns:
            Index of the points that are near to it.
        """
        distance, cells = self._distances(dash, CLEARANCE)
        distance[~chosen] = np.inf
        self.levels[_within(THICKNESS / 2, distance, cells)] = DASH_LEVEL
        near = _within(CLEARANCE, distance, cells)
        self.dashes[near] += 1
        return near

    def dot(self, center):
        found = self._distances(center[:, np.newaxis], MARKER_RADIUS)
        self.levels[_within(MARKER_RADIUS, *found)] = 1.0

    def _distances(self, dash, radius):
        """Distances of the cells around a dash.

        Args:
            dash: `(batch, points, 2)` on a straight line.
            radius: up to which all cells are wanted, in pixels.

        Returns:
            Distances `(batch, cells)`, infinite outside of the picture, and
            the cells' places `(batch, cells, 2)`.
        """
        reach = int(np.ceil((DASH / 2 + radius) * ANTIALIAS)) + 1
        offsets = np.arange(-reach, reach + 1)
        window = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), -1)
        middle = np.floor(dash.mean(1) * ANTIALIAS).astype(int)
        cells = middle[:, np.newaxis] + window.reshape(-1, 2)
        start, end = dash[:, np.newaxis, 0], dash[:, np.newaxis, -1]
        line, offset = end - start, (cells + 0.5) / ANTIALIAS - start
        # The nearest point of the line, as a share of it.
        share = (offset * line).sum(-1)
        share /= np.maximum((line**2).sum(-1), 1e-9)
        offset -= np.clip(share, 0, 1)[..., np.newaxis] * line
        distance = np.hypot(offset[..., 0], offset[..., 1])
        inside = ((cells >= 0) & (cells < self.side)).all(-1)
        return np.where(inside, distance, np.inf), cells

    def pictures(self):
        shape = (self.batch, SIZE, ANTIALIAS, SIZE, ANTIALIAS)
        means = self.levels.reshape(shape).mean((2, 4))
        return np.round(255 * means).astype("uint8")


def _within(radius, distance, cells):
    """Index into the pictures of the cells within a radius."""
    rows, which = np.nonzero(distance <= radius)
    return rows, cells[rows, which, 0], cells[rows, which, 1]
