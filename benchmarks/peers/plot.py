"""Bars side by side, as an SVG that needs nothing to be drawn.

Knows figures and names. Knows nothing of peers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.peers.figures import Figure

NAME_WIDTH, BAR_WIDTH, NUMBER_WIDTH, GAP = 260, 200, 60, 24
LINE, HEAD, MARGIN = 18, 34, 14
PANEL_WIDTH = NAME_WIDTH + BAR_WIDTH + NUMBER_WIDTH
OURS, OTHERS, INK, FAINT = "#c2410c", "#94a3b8", "#1e293b", "#64748b"


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    # None where there is only something to say.
    figure: Figure | None
    note: str = ""
    is_ours: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars on a scale of their own, which begins at nothing."""

    title: str
    bars: Sequence[Bar]

    @property
    def height(self) -> int:
        return HEAD + LINE * len(self.bars) + GAP


def draw(panels: Sequence[Panel], *, columns: int, unit: str) -> str:
    """Row by row."""
    height = max(panel.height for panel in panels)
    num_rows = -(-len(panels) // columns)
    width = 2 * MARGIN + columns * (PANEL_WIDTH + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}"'
        f' height="{num_rows * height + 2 * MARGIN}"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        x, y = MARGIN + column * (PANEL_WIDTH + GAP), MARGIN + row * height
        parts.append(f'<g transform="translate({x} {y})">{_panel(panel, unit)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, unit: str) -> str:
    most = max((bar.figure.high for bar in panel.bars if bar.figure is not None), default=1.0)
    title = f"{panel.title} ({unit})"
    lines = [_text(0, 14, title, fill=INK, weight="bold")]
    for place, bar in enumerate(panel.bars):
        lines.append(_bar(bar, HEAD + place * LINE, BAR_WIDTH / most))
    return "\n".join(lines)


def _bar(bar: Bar, y: int, scale: float) -> str:
    middle = y + LINE / 2
    name = _text(NAME_WIDTH - 8, y + 13, bar.name, fill=INK, anchor="end")
    if bar.figure is None:
        return name + _text(NAME_WIDTH, y + 13, bar.note, fill=FAINT)
    length, low, high = (
        value * scale for value in (bar.figure.median, bar.figure.low, bar.figure.high)
    )
    colour = OURS if bar.is_ours else OTHERS
    return (
        f'{name}<rect x="{NAME_WIDTH}" y="{y + 3}" width="{length:.1f}" height="{LINE - 6}"'
        f' fill="{colour}"/><path d="M{NAME_WIDTH + low:.1f} {middle}H{NAME_WIDTH + high:.1f}"'
        f' stroke="{INK}"/>'
        + _text(NAME_WIDTH + max(length, high) + 6, y + 13, f"{bar.figure.median:.0f}", fill=INK)
    )


def _text(
    x: float, y: float, content: str, *, fill: str, anchor: str = "start", weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" fill="{fill}" text-anchor="{anchor}"'
        f' font-weight="{weight}">{escape(content)}</text>'
    )
