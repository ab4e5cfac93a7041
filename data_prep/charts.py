"""Pictures of numbers as SVG to stand inside an HTML page: no library, no script, the colours are the page's.

In: heights or points. Out: an <svg> element, whose colours are the CSS variables --bar and --accent and the colour of
its text, so that it can be read on a light and on a dark page.
"""

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 480, 170  # of the plot, in pixels
_LEFT, _BOTTOM, _TOP = 40, 22, 8  # room for labels
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5)

Tick = tuple[float, str]  # where on the axis, from 0 to 1; what is written there


def draw_bars(bars: Sequence[tuple[float, str]], line: Sequence[float], ticks: Sequence[Tick], label: str) -> str:
    """Bars side by side, and a line of steps over them.

    Args:
        bars: Height as a share (0 to 1) and the words shown when somebody points at it, for each.
        line: A height for each bar, or nothing.
        ticks: Of the axis below the bars.
        label: What the picture shows, in words.
    """
    top = max([height for height, _ in bars] + list(line), default=0) or 1.0
    width = _WIDTH / max(len(bars), 1)
    step = next((step for step in _STEPS if top / step <= 5), 1.0)
    marks = [(n * step / top, f"{n * step:.3g}") for n in range(int(top / step) + 1)]
    shapes = [
        f'<rect x="{_LEFT + i * width + width * 0.05:.1f}" y="{_y(height / top):.1f}" width="{width * 0.9:.1f}" '
        f'height="{_HEIGHT * height / top:.1f}" fill="var(--bar)"><title>{escape(title)}</title></rect>'
        for i, (height, title) in enumerate(bars)
    ]
    if line:
        path = "".join(
            f"{'L' if i else 'M'}{_LEFT + i * width:.1f} {_y(height / top):.1f}H{_LEFT + (i + 1) * width:.1f}"
            for i, height in enumerate(line)
        )
        shapes.append(_path(path))
    marks = [(at, f"{float(text) * 100:.3g} %") for at, text in marks]
    return _frame(shapes, ticks, marks, label)


def draw_curve(points: Sequence[tuple[float, float]], ticks: Sequence[Tick], marks: Sequence[Tick], label: str) -> str:
    """A curve through points, both of whose coordinates are from 0 to 1.

    Args:
        ticks: Of the axis below.
        marks: Of the axis on the left.
        label: What the picture shows, in words.
    """
    path = "".join(f"{'L' if i else 'M'}{_LEFT + x * _WIDTH:.1f} {_y(y):.1f}" for i, (x, y) in enumerate(points))
    return _frame([_path(path)], ticks, marks, label)


def _y(share: float) -> float:
    return _TOP + _HEIGHT * (1 - share)


def _path(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="var(--accent)" stroke-width="2" stroke-linejoin="round"/>'


def _frame(shapes: Sequence[str], ticks: Sequence[Tick], marks: Sequence[Tick], label: str) -> str:
    lines = [f'<path d="M{_LEFT} {_y(at):.1f}h{_WIDTH}" stroke="var(--line)"/>' for at, _ in marks]
    lines += [f'<path d="M{_LEFT + at * _WIDTH:.1f} {_y(0)}v4" stroke="currentColor"/>' for at, _ in ticks]
    words = [
        f'<text x="{_LEFT - 5}" y="{_y(at) + 4:.1f}" text-anchor="end">{escape(text)}</text>' for at, text in marks
    ]
    words += [
        f'<text x="{_LEFT + at * _WIDTH:.1f}" y="{_y(0) + 16}" text-anchor="middle">{escape(text)}</text>'
        for at, text in ticks
    ]
    box = f"0 0 {_LEFT + _WIDTH + 16} {_TOP + _HEIGHT + _BOTTOM}"
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{"".join(lines)}{"".join(shapes)}'
        f'<g fill="currentColor" font-size="12">{"".join(words)}</g></svg>'
    )
