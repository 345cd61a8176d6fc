"""What a person sees of a run: the live view, and one HTML page afterwards; no torch."""

from photon.dashboard.comparison import ComparisonRow, comparison_table
from photon.dashboard.live import PlainView, progress_view
from photon.dashboard.report import write_report
