"""Whether what a plot says can be read: nothing cut off at the picture's edge, nothing written over something else."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure


def unreadable(figure: Figure) -> list[str]:
    """A line for each text that leaves the picture or meets another one."""
    drawn: list[Any] = []
    renderer = RendererAgg

    class Recording(renderer):  # type: ignore[misc, valid-type]
        def draw_text(self, *arguments: Any, mtext: Any = None, **others: Any) -> None:
            drawn.append(mtext)
            super().draw_text(*arguments, mtext=mtext, **others)

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # the layout settles
    drawn.clear()
    width, height = figure.bbox.width, figure.bbox.height
    figure.draw(Recording(width, height, figure.dpi))
    boxes = list({id(text): (text.get_text(), text.get_window_extent()) for text in drawn if text is not None}.values())
    found = [f"{what!r} is cut off" for what, box in boxes if not _inside(box, width, height)]
    found += [f"{one!r} is over {other!r}" for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    return found


def _inside(box: Any, width: float, height: float) -> bool:
    return bool(box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5)
