"""The data a run can learn from: the union of source configurations, each of which builds a data set."""

from __future__ import annotations

from ldm.data.dataset import DataSet, Samples, Split
from ldm.data.folder import FolderSource

Source = FolderSource

__all__ = ["DataSet", "FolderSource", "Samples", "Source", "Split"]
