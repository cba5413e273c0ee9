"""The accuracy matrix as a picture: what was not measured stays visible as such, names are only text."""

from typing import Any

from matplotlib.figure import Figure

from storage.figures import heat_map, png

PNG = b"\x89PNG\r\n\x1a\n"


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_cells_that_were_never_measured_are_drawn_as_gaps() -> None:
    figure = heat_map(["base", "cycle 1"], ["billing", "trivia"], [[0.25, None], [1.0, 0.5]], "scores")
    grid: Any = figure.axes[0].images[0].get_array()
    assert grid.mask.tolist() == [[False, True], [False, False]]
    assert grid.compressed().tolist() == [0.25, 1.0, 0.5]
    assert texts(figure) == ["0.25", "–", "1.00", "0.50"]
    assert png(figure).startswith(PNG)


def test_the_colour_scale_is_the_same_for_every_matrix() -> None:
    figure = heat_map(["base"], ["billing"], [[0.4]], "scores")
    assert figure.axes[0].images[0].get_clim() == (0, 1)


def test_a_task_name_is_only_ever_text() -> None:
    names = ["$\\frac{", "a\nb\tc", "中文 🙂", "x" * 300]
    figure = heat_map(["base"], names, [[0.1, 0.2, 0.3, 0.4]], "cost in $ and {")
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown[:3] == ["$\\frac{", "a b c", "中文 🙂"]
    assert len(shown[3]) < 30
    assert png(figure).startswith(PNG)


def test_a_matrix_without_rows_or_tasks_is_still_a_picture() -> None:
    figure = heat_map([], [], [], "scores")
    assert texts(figure) == ["no scores yet"]
    assert png(figure).startswith(PNG)


def test_years_of_cycles_stay_a_picture_of_bearable_size() -> None:
    rows, columns = [f"cycle {i}" for i in range(700)], [f"task {i}" for i in range(150)]
    figure = heat_map(rows, columns, [[0.5] * 150] * 700, "scores")
    assert max(figure.get_size_inches()) <= 24
    assert len(figure.axes[0].get_yticklabels()) <= 50
    assert texts(figure) == []
