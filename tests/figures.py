"""Functions that read what is drawn in a figure, for tests."""

from typing import Any

import numpy as np


def points(artist: Any) -> np.ndarray:
  return np.asarray(artist.get_xydata())


def lines(axes):
  return {line.get_label(): points(line) for line in axes.lines}


def band(axes: Any, x):
  """The lower and upper edge of the only band at x."""
  (band,) = axes.collections
  vertices = band.get_paths()[0].vertices
  return np.unique(np.round(vertices[vertices[:, 0] == x, 1], 6))


def legend(legend: Any):
  return [text.get_text() for text in legend.get_texts()]
